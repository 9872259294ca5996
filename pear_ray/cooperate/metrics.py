"""What a step of both signals says of itself: rollouts as `rl` does, traces under names of their
own. SFT's loss and reward stand side by side, for each rises at the other's cost
(arXiv 2601.07389)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pear_ray.losses.mixed import OF_TRACES
from pear_ray.records import TrainingBatch
from pear_ray.rl.learners import numbers_of

if TYPE_CHECKING:
    from pear_ray.train.learner import StepResult


def both_signals_metrics(result: StepResult, batch: TrainingBatch) -> dict[str, float]:
    """Numbers of a step whose objective was one of `algorithms.cooperation`; `batch` is any
    micro-batch of it."""
    num_ours = batch.num_trainable_tokens_global - batch.num_trace_tokens_global
    numbers = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
    }
    if num_ours:
        numbers = numbers_of(replace(result, num_tokens=num_ours)) | numbers
        numbers["rl_loss"] = float(result.facts["rl_loss"]) / num_ours
    return numbers | of_traces(result.facts, batch)


def numbers_of_rollouts(result: StepResult) -> dict[str, float]:
    """Numbers of a step on rollouts alone."""
    return numbers_of(result) | {"rl_loss": result.loss}


def of_traces(facts: Mapping[str, np.ndarray], batch: TrainingBatch) -> dict[str, float]:
    """Numbers of a step's traces, per token; none where it had none."""
    num_tokens = batch.num_trace_tokens_global
    if not num_tokens:
        return {}
    own = {
        name.removeprefix(OF_TRACES): float(fact)
        for name, fact in facts.items()
        if name.startswith(OF_TRACES) and np.ndim(fact) == 0
    }
    numbers = {
        "loss": own["loss"] / num_tokens,
        "nll": own["nll"] / max(1.0, own["tokens_to_learn"]),
        "tokens": num_tokens,
    }
    if "weight" in own:
        numbers["weight_mean"] = own["weight"] / num_tokens
        numbers["effective_sample_size"] = own["weight"] ** 2 / own["weight_squared"] / num_tokens
    return {OF_TRACES + name: number for name, number in numbers.items()}
