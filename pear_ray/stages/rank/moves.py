"""How far SFT and RL moved the parameters of each arm. Files are read tensor by tensor: no model is
ever in memory as a whole."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pear_ray.algorithms import drift
from pear_ray.config import Job
from pear_ray.weights.adapters import local_folder

log = logging.getLogger(__name__)


def moves(job: Job) -> dict[str, Any]:
    """For every arm that was trained: the relative move of SFT and of RL, the cosine between the
    two, and the same and stable ranks for each matrix."""
    found = {}
    for name, home in job.homes(job.folder).items():
        exports = [home / stage / "export" for stage in ("sft", "rl")]
        if not exports[0].is_dir():
            continue
        try:
            base = local_folder(job.model_path())
        except OSError as error:
            log.warning("rank: cannot tell how far SFT moved from %s: %s", job.model_path(), error)
            return {}
        folders = [base, *(export for export in exports if export.is_dir())]
        found[name or job.folder.name] = of_arm([Tensors(folder) for folder in folders])
    return found


class Tensors:
    """The tensors of a Hugging Face folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            handle = safe_open(str(path), framework="pt")
            self._files |= dict.fromkeys(handle.keys(), handle)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Any:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def of_arm(models: list[Tensors]) -> dict[str, Any]:
    """Base, after SFT and, where there is one, after RL. Tensors that one of them lacks, or has in
    another shape, are not compared (a tied head is stored by some and left out by others)."""
    start, middle, *after = models
    end = after[0] if after else middle
    turns: dict[str, drift.Turn] = {}
    ranks: dict[str, tuple[float | None, float | None]] = {}
    for name in start:
        if name not in middle or name not in end:
            continue
        three = start[name], middle[name], end[name]
        if len({values.shape for values in three}) > 1:
            continue
        turns[name] = drift.turn(*three)
        if three[0].dim() == 2:
            one, other = three[1].float() - three[0].float(), three[2].float() - three[1].float()
            ranks[name] = drift.stable_rank(one), drift.stable_rank(other)
    whole = in_numbers(drift.total(turns.values()), bool(after))
    for stage, place in (("sft", 0), ("rl", 1)):
        known = [rank for pair in ranks.values() if (rank := pair[place]) is not None]
        whole[f"{stage}_stable_rank_median"] = statistics.median(known) if known else None
    matrices = {
        name: in_numbers(turns[name], bool(after))
        | {"sft_stable_rank": of_sft, "rl_stable_rank": of_rl}
        for name, (of_sft, of_rl) in ranks.items()
    }
    return {**whole, "matrices": matrices}


def in_numbers(turn: drift.Turn, has_rl: bool) -> dict[str, float | None]:
    """The two moves and the angle between them."""
    return {
        "sft_move": turn.first.relative,
        "rl_move": turn.second.relative if has_rl else None,
        "cosine": turn.cosine if has_rl else None,
    }
