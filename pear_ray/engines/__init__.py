"""vLLM engines: sampling, scoring, and weight updates while requests run."""

from pear_ray.process import prepare_libraries

prepare_libraries()
