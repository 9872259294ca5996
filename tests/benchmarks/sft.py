"""PEAR-SFT beside plain SFT, a bare PyTorch loop and TRL: one command, ratios from one run.

    pip install -e '.[benchmarks]'        # TRL and datasets
    python tests/benchmarks/sft.py [--pairs 5] [--steps 20] [--zero]

Every contender trains the same model on the same sequences, as many in each step, with as many
threads and AdamW, in a process of its own; they take turns, as often as `--pairs` says:

    bare        transformers' model, cross-entropy of all logits, torch.optim.AdamW: no trainer
    trl         TRL's SFTTrainer with packing
    trl-even    the same without: these sequences are of even length and need no padding
    sft         the learner on one rank without ZeRO, plain SFT
    token, block, sequence      the same with PEAR's weights
    zero        (--zero) the learner on two ranks with ZeRO-3, a thread each

Models: `small` (3.2 M parameters, 128 tokens of vocabulary) and `wide` (the same with 150,016).
Tokens per second are medians over steps, after a warm-up; memory is each process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCES, TOKENS = 4, 512
VOCABULARY = {"small": 125, "wide": 150_000}
LEVELS = ("token", "block", "sequence")
WARM_UP = 4
THREADS = 2


def write_model(folder: Path, num_words: int) -> None:
    """A Qwen3, 4 layers of width 256, untied."""
    from pear_ray.config import Pretrain
    from pear_ray.engines.model import write_new_model

    shape = Pretrain(styles={}, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4)
    write_new_model(folder, shape, [f"w{number}" for number in range(num_words)])


def ids_of(step: int) -> np.ndarray:
    """Token ids of one step, [sequences, tokens]."""
    return np.random.default_rng(step).integers(3, 125, (SEQUENCES, TOKENS))


def report(seconds: list[float]) -> None:
    """Print what the parent reads: tokens per second, and the peak of memory in MiB."""
    rate = SEQUENCES * TOKENS / statistics.median(seconds[WARM_UP:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rate": rate, "peak": peak, "seconds": seconds}))


def bare(model: str, num_steps: int) -> None:
    """A plain loop, as one would write it first."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimiser = torch.optim.AdamW(policy.parameters(), 1e-4, weight_decay=0.0)
    seconds = []
    for step in range(num_steps):
        started = time.perf_counter()
        ids = torch.from_numpy(ids_of(step))
        logits = policy(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - started)
    report(seconds)


def trl(model: str, num_steps: int, packing: bool) -> None:
    """TRL on rows that fill a pack exactly."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(THREADS)
    rows = np.concatenate([ids_of(step) for step in range(num_steps)])
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=SEQUENCES,
            max_length=TOKENS,
            packing=packing,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            learning_rate=1e-4,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            # Packing is part of the preparation.
            dataset_kwargs={"skip_prepare_dataset": not packing},
            model_init_kwargs={"dtype": "float32"},
        )
        dataset = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
        SFTTrainer(model, settings, train_dataset=dataset, callbacks=[Clock()]).train()
    report(seconds)


def learner(model: str, num_steps: int, level: str, zero_stage: int) -> None:
    """This project's learner, in a process group of its own."""
    import torch
    import torch.distributed as dist

    from pear_ray.algorithms.objectives import Supervised, Weighted
    from pear_ray.algorithms.weighting import Pear
    from pear_ray.config import Learner as Settings
    from pear_ray.config import Sft
    from pear_ray.engines.learner import Learner
    from pear_ray.records import TrainingSequence

    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(THREADS // num_ranks)
    dist.init_process_group("gloo")
    per_micro_batch = SEQUENCES * TOKENS // num_ranks
    settings = Settings(
        num_workers=num_ranks, zero_stage=zero_stage, tokens_per_micro_batch=per_micro_batch
    )
    optimiser = Sft(learning_rate=1e-4, schedule="constant", warmup_fraction=0.0)
    ours = Learner(model, "float32", settings, optimiser, num_steps, seed=0)
    objective = Supervised() if level == "none" else Weighted(weigh=Pear(level), sources=("a",))
    seconds = []
    for step in range(num_steps):
        draw = np.random.default_rng(step)
        sequences = [
            TrainingSequence.of(row[:1], row[1:], draw.normal(-5, 1, TOKENS - 1), 1.0, "a")
            for row in ids_of(step)
        ]
        started = time.perf_counter()
        ours.step(ours.share(sequences), objective)
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        report(seconds)


CONTENDERS = {
    "bare": "bare({model!r}, {steps})",
    "trl": "trl({model!r}, {steps}, True)",
    "trl-even": "trl({model!r}, {steps}, False)",
    "sft": "learner({model!r}, {steps}, 'none', 0)",
    **{level: f"learner({{model!r}}, {{steps}}, {level!r}, 0)" for level in LEVELS},
    "zero": "learner({model!r}, {steps}, 'token', 3)",
}


def meeting_of(rank: int, num_ranks: int) -> dict[str, str]:
    """What torch.distributed and DeepSpeed want to know. TRL would take it for a request to train
    in parallel, which costs it time and memory."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29471",
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
    }


def measured(name: str, model: Path, num_steps: int) -> dict[str, Any]:
    """What a contender printed; on several ranks, its first rank."""
    call = CONTENDERS[name].format(model=str(model), steps=num_steps)
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import sft; sft."
    num_ranks = 2 if name == "zero" else 1
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program + call],
            env=os.environ | (meeting_of(rank, num_ranks) if "learner" in call else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    said = [rank.communicate(timeout=1800) for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{name}: " + "\n".join(error[-3000:] for _, error in said))
    return json.loads(said[0][0].splitlines()[-1])


def compare(size: str, names: list[str], num_pairs: int, num_steps: int) -> None:
    """Print a table: rates and peaks, and their ratios to the bare loop, TRL and plain SFT."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / size
        write_model(model, VOCABULARY[size])
        rounds = [
            {name: measured(name, model, num_steps) for name in names} for _ in range(num_pairs)
        ]
    print(f"{size}: {num_pairs} rounds of {num_steps} steps of {SEQUENCES} x {TOKENS} tokens")
    for name in names:
        rate = statistics.median(one[name]["rate"] for one in rounds)
        peak = statistics.median(one[name]["peak"] for one in rounds)
        line = f"  {name:<10}{rate:>9.0f} tokens/s"
        for base in ("bare", "trl", "sft"):
            if base in names:
                ratio = statistics.median(one[name]["rate"] / one[base]["rate"] for one in rounds)
                line += f"   {ratio:6.3f} of {base}"
        line += f"   peak {peak:6.0f} MiB"
        if "trl" in names:
            ratio = statistics.median(one[name]["peak"] / one["trl"]["peak"] for one in rounds)
            line += f" ({ratio:.2f} of trl)"
        print(line, flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which all take turns")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each")
    parser.add_argument("--sizes", nargs="+", default=list(VOCABULARY), choices=list(VOCABULARY))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="leave others out")
    parser.add_argument("--zero", action="store_true", help="also two ranks with ZeRO-3")
    words = parser.parse_args()
    names = words.only or [name for name in CONTENDERS if name != "zero" or words.zero]
    for size in words.sizes:
        compare(size, names, words.pairs, words.steps)


if __name__ == "__main__":
    main()
