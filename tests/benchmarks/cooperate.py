"""What BRIDGE costs beside plain RL: one command, ratios from one run.

    python tests/benchmarks/cooperate.py [--pairs 3] [--steps 12] [--methods bridge sum]
                                         [--width 256] [--layers 4] [--answer-tokens 32]

Stage `rl` and stage `cooperate` take turns on the same game with the same model: two ranks with ZeRO-3 and one engine
of one thread, 32 problems and 8 answers a step, and a quarter as many traces as answers. Seconds of a step are medians
over steps after a warm-up; memory is the most that the ranks have held at once that nobody shares (USS), looked at once
a second. What a step takes is rollouts and learning: BRIDGE learns from traces too, and from the rollouts with signal
twice, so the longer the sampling, the nearer its ratio is to 1. The learning rate is next to nothing, so that answers
stay as long as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
PROBLEMS, GROUP, TRACES = 32, 8, 64
WARM_UP = 3
SECONDS = 1800


def write_model(folder: Path, width: int, num_layers: int) -> None:
    """An untied Qwen3 of a hundred words."""
    from pear_ray.config import Pretrain
    from pear_ray.train.new_model import write_new_model

    shape = Pretrain(
        styles={}, hidden_size=width, intermediate_size=11 * width // 4, num_layers=num_layers, num_heads=width // 64
    )
    write_new_model(folder, shape, [f"w{number}" for number in range(97)])


def job_of(folder: Path, home: Path, name: str, words: argparse.Namespace) -> Path:
    """A job for a stage, or for a method of `cooperate`."""
    path = folder / f"{name}.toml"
    path.write_text(
        f"""
        [run]
        dir = "{folder}/{name}"
        [model]
        path = "{home}/model"
        dtype = "float32"
        [corpus]
        scored_path = "{home}/scored"
        [sft]
        examples_per_step = {TRACES}
        [rl]
        steps = {words.steps}
        prompts_per_step = {PROBLEMS}
        group_size = {GROUP}
        # What is learned would change how long answers are, and with that what is measured.
        learning_rate = 1e-12
        [cooperate]
        method = "{name if name != "rl" else "sum"}"
        [generator]
        num_cpus = 0
        threads = 1
        max_new_tokens = {words.answer_tokens}
        max_model_len = {words.answer_tokens + 32}
        max_num_seqs = {PROBLEMS * GROUP}
        [learner]
        num_workers = 2
        cpus_per_worker = 1
        tokens_per_micro_batch = 8192
        save_every = 1000
        [rewards]
        processes = 1
        [[tasks]]
        name = "tests.rl.parity_task:Parity"
        """
    )
    return path


def measured(job: Path, name: str) -> dict[str, float]:
    """Medians of a run's steps, and the most memory of its ranks, MiB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pear_ray", "rl" if name == "rl" else "cooperate", str(job)],
        env=os.environ | {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=(job.parent / f"{name}.log").open("w"),
    )
    end, most = time.monotonic() + SECONDS, 0.0
    while process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError(f"{name}: not done in {SECONDS} s")
        most = max(most, memory_of_ranks(process.pid))
        time.sleep(1.0)
    if process.returncode:
        raise RuntimeError((job.parent / f"{name}.log").read_text()[-3000:])
    lines = (job.parent / name / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines][WARM_UP:]
    keys = ("step_seconds", "wait_seconds", "train_seconds")
    return {key: statistics.median(row[key] for row in rows) for key in keys} | {"mib": most}


def memory_of_ranks(driver: int) -> float:
    """Memory that only they hold, MiB, of all learner processes below a driver."""
    total = 0
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::RayTrainWorker"):
                total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / 2**20


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="rounds in which all take turns")
    parser.add_argument("--steps", type=int, default=12, help="steps of each")
    parser.add_argument("--methods", nargs="+", default=["bridge"], help="beside rl")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--answer-tokens", type=int, default=32)
    words = parser.parse_args()
    names = ["rl", *words.methods]
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        write_model(home / "model", words.width, words.layers)
        # In a process of its own: what it imports would be this one's.
        program = (
            "from pathlib import Path; from tests.rl.parity_corpus import write_corpus;"
            f" write_corpus(Path({str(home / 'scored')!r}), Path({str(home / 'model')!r}))"
        )
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=SECONDS)
        for number in range(words.pairs):
            folder = home / str(number)
            folder.mkdir()
            rounds.append({n: measured(job_of(folder, home, n, words), n) for n in names})
            said = "  ".join(f"{n} {rounds[-1][n]['step_seconds']:.2f} s" for n in names)
            print(f"  round {number + 1}: {said}", flush=True)
    for name in names:
        own = {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        ratios = {
            key: statistics.median(one[name][key] / one["rl"][key] for one in rounds) for key in ("step_seconds", "mib")
        }
        print(
            f"  {name:<10}{own['step_seconds']:6.2f} s a step: {own['wait_seconds']:.2f} waiting,"
            f" {own['train_seconds']:.2f} learning; {own['mib']:6.0f} MiB;"
            f" of rl: time {ratios['step_seconds']:.2f}, memory {ratios['mib']:.2f}"
        )


if __name__ == "__main__":
    main()
