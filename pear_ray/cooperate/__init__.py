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

from dataclasses import replace
from functools import partial
from typing import Any

from pear_ray.config import AlternateMethod, BridgeMethod, Job, SumMethod, TrapoMethod
from pear_ray.cooperate import steps
from pear_ray.cooperate.schedulers import DemonstrationIndex, FailedPromptScheduler, MixedDataScheduler, PrefixScheduler
from pear_ray.data.scored_dataset import RowFilter, check_enough_rows, scan_dataset
from pear_ray.rl import run_rl
from pear_ray.rl.rollouts import RolloutStage
from pear_ray.run import RunDir
from pear_ray.weights.adapters import MergedCache


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Run the stage; return the facts for the manifest. Raise ConfigError if the corpus cannot be used, or has fewer
    rows than a step needs."""
    settings, sft_job = steps.cooperate_settings(job), steps.demonstration_job(job)
    row_filter = RowFilter.from_job(sft_job)
    groups = scan_dataset(sft_job.scored_folder, row_filter)
    check_enough_rows(sft_job, groups)
    stage = RolloutStage.of(job, run, "cooperate")
    if settings.method.type == "trapo":
        stage = replace(stage, make_scheduler=partial(PrefixScheduler, DemonstrationIndex(groups, row_filter)))
    elif settings.traces == "failed":
        stage = replace(stage, make_scheduler=partial(FailedPromptScheduler, DemonstrationIndex(groups, row_filter)))
    else:
        stage = replace(stage, make_scheduler=partial(MixedDataScheduler, sft_job, groups))
    if settings.method.type == "bridge":
        stage = replace(stage, make_weight_cache=MergedCache)
    return run_rl(stage, partial(train_step_class(settings.method), groups))


def train_step_class(method: SumMethod | AlternateMethod | BridgeMethod | TrapoMethod) -> type[steps.CooperateStep]:
    """Return the train step of a method."""
    if isinstance(method, BridgeMethod) and not method.meta_objective:
        return steps.WeightsAndLoraStep
    train_steps: dict[str, type[steps.CooperateStep]] = {
        "sum": steps.SumStep,
        "alternate": steps.AlternateStep,
        "bridge": steps.BridgeStep,
        "trapo": steps.TrapoStep,
    }
    return train_steps[method.type]
