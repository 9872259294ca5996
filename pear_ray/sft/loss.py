"""The loss of stage `sft`, built from the job; the held-out loss; a step's metrics, log lines and warnings."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pear_ray.config import IwObjective, Job, KlObjective, SedObjective, TrSftObjective
from pear_ray.data.scored_dataset import RowFilter, RowGroup, first_rows, training_sequences
from pear_ray.data.tokenizer import num_embeddings
from pear_ray.losses.pear import Centered, MeanWeightOnly, NoNormalization, Pear, PerBatch, PerSequence, Shuffled
from pear_ray.losses.sft import Dft, IwSft, Kl, Nll, SedSft, Supervised, TokenLoss, TopMasses, TrSft, Weighted
from pear_ray.records import TrainingBatch
from pear_ray.statistics import overtraining, weight_summary

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner, StepResult

log = logging.getLogger(__name__)

# SED-SFT (arXiv 2602.07464) chooses its bound on 100 sequences.
SED_NUM_ROWS = 100
STEPS_PER_LOG_LINE = 10
# Below the first, few tokens carry the step; above the second, one clip sets most weights.
MIN_EFFECTIVE_SAMPLE_SIZE, MAX_CLIPPED = 0.2, 0.5
NORMALIZATIONS = {"none": NoNormalization, "per_sequence": PerSequence, "per_batch": PerBatch}


def build_sft_loss(job: Job, groups: Sequence[RowGroup], learner: Learner) -> Supervised:
    """Return the base objective, PEAR-weighted unless sft.level is "none". Collective: SED-SFT measures the model."""
    settings = job.sft
    loss = token_loss(job, groups, learner)
    if settings.level == "none":
        return Supervised(loss)
    pear = (settings.level, settings.discount, settings.block_size, settings.ratio_bounds, settings.clip_log_weight)
    controls: dict[str, Callable[..., Pear]] = {"shuffled": partial(Shuffled, seed=job.run.seed), "centered": Centered}
    only_mean = settings.control == "mean_weight"
    return Weighted(
        loss,
        weigh=controls.get(settings.control, Pear)(*pear),
        normalization=MeanWeightOnly() if only_mean else NORMALIZATIONS[settings.normalize](),
        sources=settings.sources or tuple(sorted({name for group in groups for name in group.sources})),
    )


def token_loss(job: Job, groups: Sequence[RowGroup], learner: Learner) -> TokenLoss:
    """Return the base objective."""
    match job.sft.objective:
        case KlObjective():
            return Kl(num_embeddings(job.model_path()))
        case TrSftObjective(alpha=alpha):
            return TrSft(alpha)
        case IwObjective(temperature=temperature, bounds=bounds):
            return IwSft(temperature, bounds)
        case SedObjective() as sed:
            return SedSft(sed.strength, sed.top_k, decided_mass(job, sed, groups, learner))
    return Dft() if job.sft.objective.type == "dft" else Nll()


def decided_mass(job: Job, objective: SedObjective, groups: Sequence[RowGroup], learner: Learner) -> float:
    """Return SED-SFT's bound: the top-k probability that the untrained model exceeds at `decided_frac` of positions."""
    table = first_rows(groups, RowFilter.from_job(job), "train", SED_NUM_ROWS)
    assert table is not None
    batches = learner.micro_batches(training_sequences(table, 1.0))
    counts = learner.evaluate(batches, TopMasses(objective.top_k))["histogram"]
    cumulative = np.cumsum(counts) / counts.sum()
    return float((np.searchsorted(cumulative, 1 - objective.decided_frac) + 1) / len(counts))


@dataclass(frozen=True)
class HeldOut:
    """This rank's micro-batches of the held-out rows; the latest loss over all ranks, in nats per token (NaN before the
    first), and the lowest so far."""

    batches: tuple[TrainingBatch, ...]
    loss: float = math.nan
    lowest: float = math.inf

    @classmethod
    def create(cls, job: Job, groups: Sequence[RowGroup], learner: Learner) -> HeldOut:
        """Read the first `sft.heldout_rows` held-out rows."""
        table = first_rows(groups, RowFilter.from_job(job), "heldout", job.sft.heldout_rows)
        return cls(() if table is None else tuple(learner.micro_batches(training_sequences(table, 1.0))))

    def measure(self, learner: Learner) -> HeldOut:
        """Return a copy with the learner's current loss; unchanged if no row is held out."""
        if not self.batches:
            return self
        sums = learner.evaluate(self.batches, Supervised())
        loss = float(sums["nll"]) / float(sums["tokens_to_learn"])
        return replace(self, loss=loss, lowest=min(loss, self.lowest))

    def resume(self, metadata: Mapping[str, Any]) -> HeldOut:
        """Return a copy with the losses of a checkpoint."""
        lowest = metadata.get("lowest_heldout_loss", math.inf)
        return replace(self, loss=metadata.get("heldout_loss", math.nan), lowest=lowest)

    @property
    def metrics(self) -> dict[str, float]:
        """The losses for metrics.jsonl and checkpoints; empty before the first measurement."""
        return {} if math.isnan(self.loss) else {"heldout_loss": self.loss, "lowest_heldout_loss": self.lowest}


def step_metrics(job: Job, result: StepResult) -> dict[str, Any]:
    """Return one step's row of metrics.jsonl."""
    sums = result.metric_sums
    metrics = {
        "loss": result.loss,
        "nll": float(sums["nll"]) / max(1.0, float(sums["tokens_to_learn"])),
        "entropy": float(sums["entropy"]) / result.num_tokens,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": result.num_tokens,
    }
    if job.sft.level == "none":
        return metrics
    return metrics | weight_summary(sums, result.num_tokens, job.sft.clip_log_weight)


def log_step(step: int, num_steps: int, metrics: Mapping[str, Any], heldout: HeldOut) -> None:
    """Log every tenth step and the last one, with a warning if weights have collapsed."""
    if step % STEPS_PER_LOG_LINE and step + 1 < num_steps:
        return
    line = f"sft: step {step + 1} of {num_steps}: loss {metrics['loss']:.4f}"
    if heldout.metrics:
        line += f", held-out loss {heldout.loss:.4f} ({overtraining(heldout.loss, heldout.lowest)})"
    log.info(line, extra={"step": step})
    if warning := weight_warning(metrics):
        log.warning("sft: step %d: %s", step + 1, warning, extra={"step": step})


def weight_warning(metrics: Mapping[str, Any]) -> str | None:
    """Return the most severe sign of collapsed weights and its remedy; None if there is none."""
    if "effective_sample_size" not in metrics:
        return None
    if metrics["weight_frac_at_floor"] > MAX_CLIPPED:
        return (
            f"{metrics['weight_frac_at_floor']:.0%} of the tokens have the smallest possible weight: only the ends of"
            ' traces are learned. Try sft.level = "block", a narrower sft.clip_log_ratio, or a behavior policy closer'
            " to the model"
        )
    if metrics["effective_sample_size"] < MIN_EFFECTIVE_SAMPLE_SIZE:
        return (
            f"the effective sample size is {metrics['effective_sample_size']:.0%} of the tokens: few carry the step."
            " Try a narrower sft.clip_log_weight or sft.clip_log_ratio, or more sft.examples_per_step"
        )
    # One implausible source is what PEAR is for: its rows get small weights, the others' do not.
    clipped = min(metrics["clip_frac_low_by_source"].values(), default=0.0)
    if clipped > MAX_CLIPPED:
        return (
            f"of each source at least {clipped:.0%} of the log-ratios are at the lower clip: weights depend on position"
            " alone. Try a wider sft.clip_log_ratio, or check behavior_logprobs in the report"
        )
    return None
