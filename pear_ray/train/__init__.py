"""One rank of a DeepSpeed learner, and the Ray Train run that starts the ranks."""

from pear_ray.process import prepare_libraries

prepare_libraries()
