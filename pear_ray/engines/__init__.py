"""vLLM engines: sampling, scoring, and weight updates while requests run."""

import pear_ray.environment  # noqa: F401  (sets variables that vLLM reads on import)
