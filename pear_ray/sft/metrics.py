"""What a step of `sft` says: numbers, a line, and advice."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pear_ray.config import Job
from pear_ray.sft.heldout import HeldOut
from pear_ray.statistics import weight_summary

if TYPE_CHECKING:
    from pear_ray.train.learner import StepResult

log = logging.getLogger(__name__)

STEPS_PER_LINE = 10
# Below the first, few tokens carry the step; above the second, one bound decides most weights.
LEAST_EFFECTIVE_SHARE = 0.2
MOST_AT_A_CLIP = 0.5


def numbers_of(job: Job, result: StepResult) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    numbers = {
        "loss": result.loss,
        "nll": float(result.facts["nll"]) / max(1.0, float(result.facts["tokens_to_learn"])),
        "entropy": float(result.facts["entropy"]) / result.num_tokens,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": result.num_tokens,
    }
    if job.sft.level == "none":
        return numbers
    return numbers | weight_summary(result.facts, result.num_tokens, job.sft.clip_log_weight)


def speak(step: int, num_steps: int, numbers: dict[str, Any], heldout: HeldOut) -> None:
    """A line in the log now and then, and a warning when weights or held-out loss ask for one."""
    if step % STEPS_PER_LINE and step + 1 < num_steps:
        return
    line = f"sft: step {step + 1} of {num_steps}: loss {numbers['loss']:.4f}"
    if heldout.numbers:
        line += f", held-out loss {heldout.loss:.4f} ({heldout.regime})"
    log.info(line, extra={"step": step})
    if advice := advice_on(numbers):
        log.warning("sft: step %d: %s", step + 1, advice, extra={"step": step})


def advice_on(numbers: dict[str, Any]) -> str | None:
    """What to do about weights that have collapsed; None where they have not, or there are none."""
    if "effective_sample_size" not in numbers:
        return None
    share, floor = numbers["effective_sample_size"], numbers["weight_frac_at_floor"]
    lower = numbers["clip_frac_low"]
    if floor > MOST_AT_A_CLIP:
        return (
            f"{floor:.0%} of the tokens have the smallest weight there is: only the ends of traces"
            ' are learned. The corpus is far from this model; try sft.level = "block", a narrower'
            " sft.clip_log_ratio, or a behavior policy nearer to the model"
        )
    if share < LEAST_EFFECTIVE_SHARE:
        return (
            f"the effective sample size is {share:.0%} of the tokens: a few of them carry the step."
            " Try a narrower sft.clip_log_weight or sft.clip_log_ratio, or more examples_per_step"
        )
    if lower > MOST_AT_A_CLIP:
        return (
            f"{lower:.0%} of the log-ratios are at the lower clip: weights count tokens rather than"
            " weigh them. Try a wider sft.clip_log_ratio, or check behavior_logprobs in the report"
        )
    return None
