"""PEAR-SFT beside plain SFT, a bare PyTorch loop and TRL: one command, ratios from one run.

    pip install -e '.[benchmarks]'        # TRL and datasets
    python tests/benchmarks/sft.py [--steps 25] [--zero]

Every contender trains the same model on the same sequences, as many in each step, with as many threads and AdamW, in a
process of its own. All stand side by side and make one step after the other in turn, so that what slows the machine for
a while slows all of them:

    bare        transformers' model, cross-entropy of all logits, torch.optim.AdamW: no trainer
    trl         TRL's SFTTrainer with packing
    trl-even    the same without: these sequences are of even length and need no padding
    sft         the learner on one rank without ZeRO, plain SFT
    token, block, sequence      the same with PEAR's weights
    zero        (--zero) the learner on two ranks with ZeRO-3, a thread each

Models: `small` (3.2 M parameters, 128 tokens of vocabulary) and `wide` (the same with 150,016; without block, sequence
and zero, which would not fit beside the others). Ratios are medians over steps of two steps after each other, after a
warm-up; memory is each process's peak.
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
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCES, TOKENS = 4, 512
VOCABULARY = {"small": 125, "wide": 150_000}
LEVELS = ("token", "block", "sequence")
NOT_BESIDE_WIDE = ("block", "sequence", "zero")
WARM_UP = 4
THREADS = 2


def write_model(folder: Path, num_words: int) -> None:
    """A Qwen3, 4 layers of width 256, untied."""
    from pear_ray.config import Pretrain
    from pear_ray.train.new_model import write_new_model

    shape = Pretrain(styles={}, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4)
    write_new_model(folder, shape, [f"w{number}" for number in range(num_words)])


def ids_of(step: int) -> np.ndarray:
    """Token ids of one step, [sequences, tokens]."""
    return np.random.default_rng(step).integers(3, 125, (SEQUENCES, TOKENS))


def serve(step: Callable[[int], None]) -> None:
    """One step for each line that the parent writes; `say` how long it took."""
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        step(number)
        say(time.perf_counter() - started)


def say(seconds: float) -> None:
    """Print what the parent reads: the step's seconds, and the peak of memory so far in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


def bare(model: str) -> None:
    """A plain loop, as one would write it first."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-4, weight_decay=0.0)

    def step(number: int) -> None:
        ids = torch.from_numpy(ids_of(number))
        logits = policy(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    serve(step)


def trl(model: str, num_steps: int, packing: bool) -> None:
    """TRL on rows that fill a pack exactly."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(THREADS)
    rows = np.concatenate([ids_of(step) for step in range(num_steps)])

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sys.stdin.readline()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            say(time.perf_counter() - self.started)

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


def learner(model: str, num_steps: int, level: str, zero_stage: int) -> None:
    """This project's learner, in a process group of its own."""
    import torch
    import torch.distributed as dist

    from pear_ray.config import Learner as Settings
    from pear_ray.config import Sft
    from pear_ray.losses.pear import Pear
    from pear_ray.losses.sft import Supervised, Weighted
    from pear_ray.records import TrainingSequence
    from pear_ray.train.learner import Learner

    num_ranks = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(THREADS // num_ranks)
    dist.init_process_group("gloo")
    per_micro_batch = SEQUENCES * TOKENS // num_ranks
    settings = Settings(num_workers=num_ranks, zero_stage=zero_stage, tokens_per_micro_batch=per_micro_batch)
    optimizer = Sft(learning_rate=1e-4, schedule="constant", warmup_fraction=0.0)
    ours = Learner(model, "float32", settings, optimizer, num_steps, seed=0)
    objective = Supervised() if level == "none" else Weighted(weigh=Pear(level), sources=("a",))

    def step(number: int) -> None:
        logprobs = np.random.default_rng(number).normal(-5, 1, (SEQUENCES, TOKENS - 1))
        sequences = [
            TrainingSequence.of(row[:1], row[1:], of_row, 1.0, "a")
            for row, of_row in zip(ids_of(number), logprobs, strict=True)
        ]
        ours.step(ours.micro_batches(sequences), objective)

    serve(step)


CONTENDERS = {
    "bare": "bare({model!r})",
    "trl": "trl({model!r}, {steps}, True)",
    "trl-even": "trl({model!r}, {steps}, False)",
    "sft": "learner({model!r}, {steps}, 'none', 0)",
    **{level: f"learner({{model!r}}, {{steps}}, {level!r}, 0)" for level in LEVELS},
    "zero": "learner({model!r}, {steps}, 'token', 3)",
}


def meeting_of(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torch.distributed and DeepSpeed want to know. TRL would take it for a request to train in parallel, which
    costs it time and memory."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
    }


class Contender:
    """The processes of one: several where it has several ranks, of which the first speaks."""

    def __init__(self, name: str, model: Path, num_steps: int) -> None:
        self.name, self.peak = name, 0.0
        self.seconds: list[float] = []
        call = CONTENDERS[name].format(model=str(model), steps=num_steps)
        here = str(Path(__file__).parent)
        program = f"import sys; sys.path.insert(0, {here!r}); import sft; sft.{call}"
        num_ranks = 2 if name == "zero" else 1
        port = 29471 + list(CONTENDERS).index(name)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=os.environ | (meeting_of(rank, num_ranks, port) if "learner" in call else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
            )
            for rank in range(num_ranks)
        ]

    def step(self) -> None:
        """Have it make one step, and note how long it took."""
        for rank in self.ranks:
            print(file=rank.stdin, flush=True)
        for line in self.ranks[0].stdout or ():
            if line.startswith('{"seconds"'):
                said = json.loads(line)
                self.seconds.append(said["seconds"])
                self.peak = said["peak"]
                return
        self.log.seek(0)
        raise RuntimeError(f"{self.name}: {self.log.read()[-3000:]}")

    def end(self) -> None:
        """No step more."""
        for rank in self.ranks:
            rank.kill()
            rank.communicate()

    def over(self, other: Contender) -> float:
        """How many times as fast it was, median over pairs of steps."""
        pairs = zip(other.seconds[WARM_UP:], self.seconds[WARM_UP:], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)


def compare(size: str, names: list[str], num_steps: int) -> None:
    """Print a table: rates and peaks, and their ratios to the bare loop, TRL and plain SFT."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
        model = Path(folder) / size
        write_model(model, VOCABULARY[size])
        contenders = {name: Contender(name, model, num_steps) for name in names}
        for contender in contenders.values():
            started.callback(contender.end)
        for _ in range(num_steps):
            for contender in contenders.values():
                contender.step()
    print(f"{size}: {num_steps} steps of {SEQUENCES} x {TOKENS} tokens")
    for name, contender in contenders.items():
        rate = SEQUENCES * TOKENS / statistics.median(contender.seconds[WARM_UP:])
        line = f"  {name:<10}{rate:>9.0f} tokens/s"
        for base in ("bare", "trl", "sft"):
            if base in names:
                line += f"   {contender.over(contenders[base]):6.3f} of {base}"
        line += f"   peak {contender.peak:6.0f} MiB"
        if "trl" in names:
            line += f" ({contender.peak / contenders['trl'].peak:.2f} of trl)"
        print(line, flush=True)


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of each")
    parser.add_argument("--sizes", nargs="+", default=list(VOCABULARY), choices=list(VOCABULARY))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="leave others out")
    parser.add_argument("--zero", action="store_true", help="also two ranks with ZeRO-3")
    words = parser.parse_args()
    for size in words.sizes:
        left_out = {*(() if words.zero else ("zero",)), *(NOT_BESIDE_WIDE if size == "wide" else ())}
        compare(size, words.only or [n for n in CONTENDERS if n not in left_out], words.steps)


if __name__ == "__main__":
    main()
