"""vLLM engines: sampling, scoring, and new weights while they serve."""

import pear_ray.environment  # noqa: F401  (before the libraries that read it)
