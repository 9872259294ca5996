"""PEAR-SFT and RL on Ray: from an offline corpus of reasoning traces to a better policy.

The functions below need torch and numpy alone: `pear_weights(target_logprobs, behavior_logprobs, ids, level="token")`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pear_ray.errors import ConfigError

if TYPE_CHECKING:
    from pear_ray.losses.pear import pear_weights
    from pear_ray.losses.policy import group_advantages
    from pear_ray.statistics import pass_at_k

__version__ = "0.1.0"
__all__ = ["ConfigError", "__version__", "group_advantages", "pass_at_k", "pear_weights"]

MODULES = {
    "group_advantages": "pear_ray.losses.policy",
    "pass_at_k": "pear_ray.statistics",
    "pear_weights": "pear_ray.losses.pear",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'pear_ray' has no attribute {name!r}")
    # On first use: pear_ray.process.prepare_libraries must set variables before torch is imported.
    return getattr(import_module(MODULES[name]), name)
