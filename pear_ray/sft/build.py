"""From the job's words to the objective that is minimized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pear_ray.config import Job
from pear_ray.data.scored_dataset import RowGroup, first_rows, row_filter, sequences_of
from pear_ray.data.tokenizer import num_embeddings
from pear_ray.losses.sft import Supervised, TopMasses, Weighted
from pear_ray.losses.token_losses import Dft, IwSft, Kl, Nll, SedSft, TokenLoss, TrSft
from pear_ray.losses.weighting import (
    Centered,
    MeanWeightOnly,
    NoNormalization,
    Pear,
    PerBatch,
    PerSequence,
    Shuffled,
)

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

# As many sequences as SED-SFT's authors take to choose their bound.
ROWS_FOR_SED = 100

NORMALIZATIONS = {"none": NoNormalization, "per_sequence": PerSequence, "per_batch": PerBatch}


def objective_of(job: Job, groups: Sequence[RowGroup], learner: Learner) -> Supervised:
    """Any base objective, weighted or not. Every rank calls this, before anything is learned."""
    settings = job.sft

    def sed() -> TokenLoss:
        bound = decided_mass(job, groups, learner)
        return SedSft(settings.sed_strength, settings.sed_top_k, bound)

    losses: dict[str, Callable[[], TokenLoss]] = {
        "nll": Nll,
        "dft": Dft,
        "kl": lambda: Kl(num_embeddings(job.model_path())),
        "trsft": lambda: TrSft(settings.trsft_alpha),
        "iw": lambda: IwSft(settings.iw_temperature, settings.iw_bounds),
        "sed": sed,
    }
    loss = losses[settings.objective]()
    if settings.level == "none":
        return Supervised(loss)
    pear = (
        settings.level,
        settings.discount,
        settings.block_size,
        settings.ratio_bounds,
        settings.clip_log_weight,
    )
    weighers: dict[str, Callable[[], Pear]] = {
        "none": lambda: Pear(*pear),
        "mean_weight": lambda: Pear(*pear),
        "shuffled": lambda: Shuffled(*pear, seed=job.run.seed),
        "centered": lambda: Centered(*pear),
    }
    only_mean = settings.control == "mean_weight"
    return Weighted(
        loss,
        weigh=weighers[settings.control](),
        normalization=MeanWeightOnly() if only_mean else NORMALIZATIONS[settings.normalize](),
        sources=settings.sources
        or tuple(sorted({name for group in groups for name in group.sources})),
    )


def decided_mass(job: Job, groups: Sequence[RowGroup], learner: Learner) -> float:
    """SED-SFT's bound: the mass of the likeliest tokens above which the wanted share of places
    lies, under the model before training (arXiv 2602.07464, from 100 sequences of the corpus)."""
    table = first_rows(groups, row_filter(job), "train", ROWS_FOR_SED)
    assert table is not None
    facts = learner.measure(learner.share(sequences_of(table, 1.0)), TopMasses(job.sft.sed_top_k))
    counts = facts["histogram"]
    cumulative = np.cumsum(counts) / counts.sum()
    return float((np.searchsorted(cumulative, 1 - job.sft.sed_decided_frac) + 1) / len(counts))
