"""The import contracts hold, and each of them fails when it is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint_imports(folder):
    """Run import-linter in a folder with a package: (exit code, output)."""
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package and its contracts, to break."""
    folder = tmp_path_factory.mktemp("layers")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "pear_ray", folder / "pear_ray", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_package_keeps_the_contracts():
    code, output = lint_imports(ROOT)
    assert code == 0 and "0 broken" in output, output


LAYERS = "Layers"
PURE = "Losses, tasks, records, config and statistics know no cluster and no engine"
ENGINES = "Only train and engines import deepspeed, transformers or vllm"

BREACHES = {
    "a stage imports its neighbor": ("sft/heldout.py", "import pear_ray.rl.scheduler", LAYERS),
    "rl imports cooperate": ("rl/scheduler.py", "import pear_ray.cooperate.schedulers", LAYERS),
    "weights import rl": ("weights/publish.py", "import pear_ray.rl.scheduler", LAYERS),
    "data imports weights": ("data/scored_dataset.py", "import pear_ray.weights.publish", LAYERS),
    "losses import weights": ("losses/packing.py", "import pear_ray.weights", LAYERS),
    "metrics import tasks": ("metrics.py", "import pear_ray.tasks", LAYERS),
    "records import losses": ("records.py", "import pear_ray.losses.packing", LAYERS),
    "a module without a layer": ("utils.py", "", LAYERS),
    "errors import config": ("errors.py", "import pear_ray.config", LAYERS),
    "losses import ray": ("losses/pear.py", "import ray", PURE),
    "rl imports transformers": ("rl/scheduler.py", "import transformers", ENGINES),
    "a stage imports vllm": ("score/shards.py", "import vllm", ENGINES),
}


@pytest.mark.parametrize(("module", "line", "rule"), BREACHES.values(), ids=BREACHES)
def test_a_breach_is_reported(copy, module, line, rule):
    path = copy / "pear_ray" / module
    before = path.read_text() if path.exists() else None
    try:
        path.write_text(f"{before or ''}\n{line}\n")
        code, output = lint_imports(copy)
    finally:
        path.write_text(before) if before is not None else path.unlink()
    assert code == 1
    broken = [text for text in output.splitlines() if " BROKEN" in text]
    assert len(broken) == 1 and broken[0].startswith(rule), output
