"""Corpus files, tokenization, the scored dataset and the batch loader."""

from pear_ray.process import prepare_libraries

prepare_libraries()
