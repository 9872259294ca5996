"""Families of problems, by the name a job gives them."""

from pear_ray.tasks.mixture import endless_problems, heldout_problems, mixed_problems
from pear_ray.tasks.registry import make_graders, make_tasks

__all__ = ["endless_problems", "heldout_problems", "make_graders", "make_tasks", "mixed_problems"]
