"""The held-out loss on the way, and what it says of over-training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pear_ray.config import Job
from pear_ray.data.scored_dataset import RowGroup, first_rows, row_filter, sequences_of
from pear_ray.losses.sft import Supervised
from pear_ray.records import TrainingBatch
from pear_ray.statistics import overtraining

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner


@dataclass(frozen=True)
class HeldOut:
    """This rank's share of the held-out rows, the newest loss on all of them (nats per token, NaN
    before there is one) and the lowest so far."""

    batches: tuple[TrainingBatch, ...]
    loss: float = math.nan
    lowest: float = math.inf

    @classmethod
    def of(cls, job: Job, groups: Sequence[RowGroup], learner: Learner) -> HeldOut:
        """The first held-out rows, as many as the job measures."""
        table = first_rows(groups, row_filter(job), "heldout", job.sft.heldout_rows)
        return cls(() if table is None else tuple(learner.share(sequences_of(table, 1.0))))

    def measured(self, learner: Learner) -> HeldOut:
        """With the loss of the learner as it is now; nothing changes where no row is held out."""
        if not self.batches:
            return self
        facts = learner.measure(self.batches, Supervised())
        loss = float(facts["nll"]) / float(facts["tokens_to_learn"])
        return replace(self, loss=loss, lowest=min(loss, self.lowest))

    def after(self, notes: Mapping[str, Any]) -> HeldOut:
        """As it was when a checkpoint was written."""
        lowest = notes.get("lowest_heldout_loss", math.inf)
        return replace(self, loss=notes.get("heldout_loss", math.nan), lowest=lowest)

    @property
    def regime(self) -> str:
        """How far over-training has gone."""
        return overtraining(self.loss, self.lowest)

    @property
    def numbers(self) -> dict[str, float]:
        """For metrics and checkpoints; none before the first measurement."""
        if math.isnan(self.loss):
            return {}
        return {"heldout_loss": self.loss, "lowest_heldout_loss": self.lowest}
