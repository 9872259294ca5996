"""Corpus files, tokenization, the scored dataset and the batch loader."""

from pear_ray.process import quiet_libraries

quiet_libraries()
