"""Parameter drift: how far, and in which direction, SFT and the last training stage (called RL here) moved the
parameters of each arm. Reads one tensor at a time, never a whole model."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pear_ray.config import Job
from pear_ray.train.hf_folder import open_tensors
from pear_ray.weights.adapters import local_folder

log = logging.getLogger(__name__)

# Directions and passes of the randomized search for the largest singular value.
DIRECTIONS, PASSES = 8, 8


class Drift(NamedTuple):
    """Two successive steps of a tensor: squared Frobenius norms of the tensor before each step and of the steps, and
    the inner product of the steps. Additive over tensors."""

    start: float
    sft: float
    middle: float
    rl: float
    product: float

    @classmethod
    def of(cls, start: Tensor, sft: Tensor, rl: Tensor) -> Drift:
        """Measure the steps `sft` and then `rl` from `start`, all float32."""
        product = float((sft * rl).sum(dtype=torch.float64))
        return cls(squared(start), squared(sft), squared(start + sft), squared(rl), product)

    @classmethod
    def total(cls, drifts: Iterable[Drift]) -> Drift:
        """Return the drift of all tensors as one vector."""
        drifts = list(drifts)
        return cls(*(sum(drift[part] for drift in drifts) for part in range(len(cls._fields))))

    def row(self, has_rl: bool) -> dict[str, float | None]:
        """Return ||step|| / ||before|| of both steps (None if before is 0), and the cosine of the
        steps: 1 if RL continues SFT, -1 if it undoes it, None if one is 0."""
        norms = math.sqrt(self.sft * self.rl)
        return {
            "sft_move": math.sqrt(self.sft / self.start) if self.start else None,
            "rl_move": math.sqrt(self.rl / self.middle) if has_rl and self.middle else None,
            "cosine": self.product / norms if has_rl and norms else None,
        }


def squared(values: Tensor) -> float:
    """Return the sum of squares, accumulated in float64."""
    return float(values.square().sum(dtype=torch.float64))


def stable_rank(step: Tensor) -> float | None:
    """Return ||D||_F^2 / ||D||_2^2 of a matrix, the number of directions it moves in (at least 1);
    None if it is 0. The largest singular value comes from randomized subspace iteration (Halko,
    Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4) with a fixed seed."""
    if not step.any():
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        num_directions = min(DIRECTIONS, *step.shape)
        largest = torch.svd_lowrank(step, q=num_directions, niter=PASSES)[1][0]
    return squared(step) / float(largest) ** 2


def parameter_drift(job: Job) -> dict[str, Any]:
    """Return the drift of every trained arm: relative steps of SFT and RL, their cosine, and the same with stable ranks
    for each matrix. Empty if the base model cannot be found."""
    rows: dict[str, Any] = {}
    for name, home in job.homes(job.folder).items():
        sft, rl = (home / stage / "export" for stage in ("sft", job.last_stage_of(name)))
        if not (sft.is_dir() or rl.is_dir()):
            continue
        try:
            base = local_folder(job.model_path())
        except OSError as error:
            log.warning("rank: no parameter drift: %s not found: %s", job.model_path(), error)
            return {}
        after_sft = sft if sft.is_dir() else base
        rows[name or job.folder.name] = arm_drift(base, after_sft, rl if rl.is_dir() else None)
    return rows


def arm_drift(base: Path, after_sft: Path, after_rl: Path | None) -> dict[str, Any]:
    """Return the drift between the models of three Hugging Face folders. Skips tensors that a model lacks or has in
    another shape: some models store a tied head, others leave it out."""
    models = [open_tensors(folder) for folder in (base, after_sft, after_rl or after_sft)]
    has_rl = after_rl is not None
    drifts: dict[str, Drift] = {}
    ranks: dict[str, tuple[float | None, float | None]] = {}
    for name in models[0]:
        if not all(name in files for files in models):
            continue
        start, middle, end = (files[name].get_tensor(name).float() for files in models)
        if not start.shape == middle.shape == end.shape:
            continue
        sft, rl = middle - start, end - middle
        drifts[name] = Drift.of(start, sft, rl)
        if start.dim() == 2:
            ranks[name] = stable_rank(sft), stable_rank(rl)
    row: dict[str, Any] = Drift.total(drifts.values()).row(has_rl)
    for index, stage in enumerate(("sft", "rl")):
        column = [pair[index] for pair in ranks.values()]
        known = [value for value in column if value is not None]
        row[f"{stage}_stable_rank_median"] = statistics.median(known) if known else None
    row["matrices"] = {
        name: drifts[name].row(has_rl) | {"sft_stable_rank": sft_rank, "rl_stable_rank": rl_rank}
        for name, (sft_rank, rl_rank) in ranks.items()
    }
    return row
