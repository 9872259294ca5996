"""Corpus files, tokenization, the scored dataset and the batch loader."""

import pear_ray.environment  # noqa: F401  (before the libraries that read it)
