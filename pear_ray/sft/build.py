"""Build the SFT loss from the job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pear_ray.config import IwObjective, Job, KlObjective, SedObjective, TrSftObjective
from pear_ray.data.scored_dataset import RowFilter, RowGroup, first_rows, training_sequences
from pear_ray.data.tokenizer import num_embeddings
from pear_ray.losses.pear import Centered, MeanWeightOnly, NoNormalization, Pear, PerBatch, PerSequence, Shuffled
from pear_ray.losses.sft import Dft, IwSft, Kl, Nll, SedSft, Supervised, TokenLoss, TopMasses, TrSft, Weighted

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

# SED-SFT chooses its bound on 100 sequences (arXiv 2602.07464).
SED_NUM_ROWS = 100

NORMALIZATIONS = {"none": NoNormalization, "per_sequence": PerSequence, "per_batch": PerBatch}


def build_sft_loss(job: Job, groups: Sequence[RowGroup], learner: Learner) -> Supervised:
    """Return the base objective, PEAR-weighted unless sft.level is "none". Collective: SED-SFT measures the untrained
    model."""
    settings = job.sft
    loss = token_loss(job, groups, learner)
    if settings.level == "none":
        return Supervised(loss)
    pear = (settings.level, settings.discount, settings.block_size, settings.ratio_bounds, settings.clip_log_weight)
    weighings: dict[str, Callable[..., Pear]] = {
        "none": Pear,
        "mean_weight": Pear,
        "shuffled": partial(Shuffled, seed=job.run.seed),
        "centered": Centered,
    }
    only_mean = settings.control == "mean_weight"
    return Weighted(
        loss,
        weigh=weighings[settings.control](*pear),
        normalization=MeanWeightOnly() if only_mean else NORMALIZATIONS[settings.normalize](),
        sources=settings.sources or tuple(sorted({name for group in groups for name in group.sources})),
    )


def token_loss(job: Job, groups: Sequence[RowGroup], learner: Learner) -> TokenLoss:
    """Return the base objective."""
    objective = job.sft.objective
    match objective:
        case KlObjective():
            return Kl(num_embeddings(job.model_path()))
        case TrSftObjective():
            return TrSft(objective.alpha)
        case IwObjective():
            return IwSft(objective.temperature, objective.bounds)
        case SedObjective():
            bound = decided_mass(job, objective, groups, learner)
            return SedSft(objective.strength, objective.top_k, bound)
    return Dft() if objective.type == "dft" else Nll()


def decided_mass(job: Job, objective: SedObjective, groups: Sequence[RowGroup], learner: Learner) -> float:
    """Return SED-SFT's bound: the top-k probability exceeded at `decided_frac` of the positions, under the model before
    training (arXiv 2602.07464)."""
    table = first_rows(groups, RowFilter.from_job(job), "train", SED_NUM_ROWS)
    assert table is not None
    batches = learner.micro_batches(training_sequences(table, 1.0))
    counts = learner.evaluate(batches, TopMasses(objective.top_k))["histogram"]
    cumulative = np.cumsum(counts) / counts.sum()
    return float((np.searchsorted(cumulative, 1 - objective.decided_frac) + 1) / len(counts))
