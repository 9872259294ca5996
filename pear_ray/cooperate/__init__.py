"""Stage `cooperate`: train on rollouts and offline demonstrations at once, in place of `rl`.

The loop is `rl`'s. Demonstrations are rows of the scored corpus, weighted as in `sft`. A method is a train step:

| cooperate.method | train step         |                                                          |
|------------------|--------------------|----------------------------------------------------------|
| sum              | SumStep            | one loss: lambda RL + (1 - lambda) SFT                   |
| alternate        | AlternateStep      | an optimizer step on rollouts, then one on               |
|                  |                    | demonstrations (with freezing: MIFO, arXiv 2510.04454)   |
| bridge           | BridgeStep         | weights and LoRA, which learns how SFT helps RL (BRIDGE, |
|                  |                    | arXiv 2509.06948)                                        |
|                  | WeightsAndLoraStep | the same without `meta_objective`                        |
| trapo            | TrapoStep          | RL on completions that continue prefixes of              |
|                  |                    | demonstrations, SFT on these (TRAPO, arXiv 2512.17636)   |

and a scheduler, which chooses the demonstrations of a step:

| cooperate.traces | scheduler             |                                                       |
|------------------|-----------------------|-------------------------------------------------------|
| all              | MixedDataScheduler    | the rows that `sft` would train on in the same step   |
| failed           | FailedPromptScheduler | those of prompts that the policy fails (MIFO)         |
| all, trapo       | PrefixScheduler       | those of the prompts, as prefixes of completions      |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from pear_ray.config import AlternateMethod, BridgeMethod, Job, SumMethod, TrapoMethod
from pear_ray.cooperate.bridge import BridgeStep, WeightsAndLoraStep
from pear_ray.cooperate.demonstrations import DemonstrationIndex
from pear_ray.cooperate.methods import CooperateStep, MixedDataScheduler, SumStep, cooperate_settings, demonstration_job
from pear_ray.cooperate.mifo import AlternateStep, FailedPromptScheduler
from pear_ray.cooperate.prefix import PrefixScheduler, TrapoStep
from pear_ray.data.scored_dataset import RowFilter, RowGroup, check_enough_rows, scan_dataset
from pear_ray.rl import run_rl
from pear_ray.rl.rollouts import RolloutStage
from pear_ray.rl.scheduler import RolloutScheduler
from pear_ray.run import RunDir
from pear_ray.weights.adapters import MergedCache

TRAIN_STEPS: dict[str, type[CooperateStep]] = {
    "sum": SumStep,
    "alternate": AlternateStep,
    "bridge": BridgeStep,
    "trapo": TrapoStep,
}


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Run the stage; return the facts for the manifest.

    Raises:
        ConfigError: the corpus cannot be used, or has fewer rows than a step needs.
    """
    sft_job, method = demonstration_job(job), cooperate_settings(job).method
    groups = scan_dataset(sft_job.scored_folder, RowFilter.from_job(sft_job))
    check_enough_rows(sft_job, groups)
    stage = RolloutStage.of(job, run, "cooperate", scheduler_factory(job, groups))
    if isinstance(method, BridgeMethod):
        stage = replace(stage, make_weight_cache=MergedCache)
    return run_rl(stage, partial(train_step_class(method), groups))


def train_step_class(method: SumMethod | AlternateMethod | BridgeMethod | TrapoMethod) -> type[CooperateStep]:
    """Return the train step of a method."""
    if isinstance(method, BridgeMethod) and not method.meta_objective:
        return WeightsAndLoraStep
    return TRAIN_STEPS[method.type]


def scheduler_factory(job: Job, groups: list[RowGroup]) -> Callable[[Job, str, int, int], RolloutScheduler]:
    """Return the stage's `make_scheduler`."""
    settings, sft_job = cooperate_settings(job), demonstration_job(job)
    if settings.method.type != "trapo" and settings.traces == "all":
        return partial(MixedDataScheduler, sft_job, groups)
    index = DemonstrationIndex(groups, RowFilter.from_job(sft_job))
    scheduler = PrefixScheduler if settings.method.type == "trapo" else FailedPromptScheduler
    return partial(scheduler, index)
