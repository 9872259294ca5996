"""One rank of a DeepSpeed learner, and the Ray Train run that starts the ranks."""

import pear_ray.environment  # noqa: F401  (before the libraries that read it)
