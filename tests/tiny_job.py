"""Job files of a tiny model, for tests that run stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PARITY = "tests.rl.parity_task:Parity"
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {},
    "model": {"dtype": "float32"},
    "generator": {
        "num_cpus": 0.5,
        "max_new_tokens": 8,
        "max_model_len": 24,
        "max_num_seqs": 32,
        "timeout_seconds": 300,
    },
    "learner": {"tokens_per_micro_batch": 256, "timeout_seconds": 300},
    "weights": {"max_logprob_gap": 1e-4},
    "rewards": {"processes": 1},
}


def tiny_job(folder: Path, model: Path, task: str = PARITY, **sections: dict[str, Any]) -> Path:
    """Write `folder`/job.json, a job with its run at `folder`/run: keys of `sections` replace or join those of
    SECTIONS."""
    job = {name: SECTIONS.get(name, {}) | sections.get(name, {}) for name in {**SECTIONS, **sections}}
    job["run"] = {"dir": f"{folder}/run"} | job["run"]
    job["model"] = {"path": str(model)} | job["model"]
    path = folder / "job.json"
    path.write_text(json.dumps(job | {"tasks": [{"name": task}]}, indent=1))
    return path
