"""How far SFT and the stage after it, called RL here, moved the parameters of each arm. Files are
read tensor by tensor: no model is ever in memory as a whole."""

from __future__ import annotations

import logging
import statistics
from typing import Any

from pear_ray.config import Job
from pear_ray.rank import drift
from pear_ray.train.safetensors_io import open_tensors
from pear_ray.weights.adapters import local_folder

log = logging.getLogger(__name__)


def moves(job: Job) -> dict[str, Any]:
    """For every arm that was trained: the relative move of SFT and of RL, the cosine between the
    two, and the same and stable ranks for each matrix."""
    found = {}
    for name, home in job.homes(job.folder).items():
        exports = [home / stage / "export" for stage in ("sft", job.last_stage_of(name))]
        if not any(export.is_dir() for export in exports):
            continue
        try:
            base = local_folder(job.model_path())
        except OSError as error:
            log.warning("rank: cannot tell how far SFT moved from %s: %s", job.model_path(), error)
            return {}
        after_sft = exports[0] if exports[0].is_dir() else base
        folders = [base, after_sft, *(export for export in exports[1:] if export.is_dir())]
        found[name or job.folder.name] = of_arm([open_tensors(folder) for folder in folders])
    return found


def of_arm(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Base, after SFT and, where there is one, after RL: files by tensor. Tensors that one of them
    lacks, or has in another shape, are not compared (a tied head is stored by some and left out by
    others)."""
    names = [name for name in models[0] if all(name in files for files in models)]
    turns: dict[str, drift.StepPair] = {}
    ranks: dict[str, tuple[float | None, float | None]] = {}
    for name in names:
        start, middle, *after = (files[name].get_tensor(name).float() for files in models)
        end = after[0] if after else middle
        if not start.shape == middle.shape == end.shape:
            continue
        one, other = middle - start, end - middle
        turns[name] = drift.turn(start, one, other)
        if start.dim() == 2:
            ranks[name] = drift.stable_rank(one), drift.stable_rank(other)
    has_rl = len(models) > 2
    whole = in_numbers(drift.total(turns.values()), has_rl)
    for stage, place in (("sft", 0), ("rl", 1)):
        known = [rank for pair in ranks.values() if (rank := pair[place]) is not None]
        whole[f"{stage}_stable_rank_median"] = statistics.median(known) if known else None
    matrices = {
        name: in_numbers(turns[name], has_rl) | {"sft_stable_rank": of_sft, "rl_stable_rank": of_rl}
        for name, (of_sft, of_rl) in ranks.items()
    }
    return {**whole, "matrices": matrices}


def in_numbers(turn: drift.StepPair, has_rl: bool) -> dict[str, float | None]:
    """The two moves and the angle between them."""
    return {
        "sft_move": turn.first.relative,
        "rl_move": turn.second.relative if has_rl else None,
        "cosine": turn.cosine if has_rl else None,
    }
