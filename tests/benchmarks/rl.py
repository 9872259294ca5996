"""The RL loop beside TRL's GRPOTrainer: one command, ratios from one run.

    pip install -e '.[benchmarks]'        # TRL and datasets
    python tests/benchmarks/rl.py [--pairs 3] [--steps 14] [--only trl bare one]

Every contender learns the same game with the same tiny model (3.2 M parameters), as many problems and answers in each
step, answers of at most 32 tokens, AdamW, float32, on the same two cores; they take turns, as often as `--pairs` says:

    trl         TRL's GRPOTrainer, which samples with transformers
    bare        vLLM and a plain PyTorch step in turns, in one process: no weights travel, nothing
                is judged, each has both cores. No bound: learning could be faster than here
    one         stage `rl`, one rank without ZeRO, one vLLM engine
    zero        the same, two ranks with ZeRO-3
    ahead       the same as `one`, rollouts one step ahead (rl.max_staleness = 1)

The engine has one thread: two of them wait for each other whenever another process works.

A step's rate is its sampled-and-trained tokens over the time since the step before; the medians over steps after a
warm-up are compared. For stage `rl` a second table says what learners and engines did in that time.
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
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PROBLEMS, GROUP, MAX_NEW_TOKENS = 32, 8, 32
TASK = "tests.rl.parity_task:Parity"
WARM_UP = 4
THREADS = 2


class Setup(NamedTuple):
    """What jobs of stage `rl` differ in."""

    num_ranks: int
    zero_stage: int
    cpus_per_rank: int
    max_staleness: int


# Learners that take turns with their engine have both cores, those that work beside it have one.
SHAPES = {"one": Setup(1, 0, 2, 0), "zero": Setup(2, 3, 1, 0), "ahead": Setup(1, 0, 1, 1)}
ALONE = ("trl", "bare")
CONTENDERS = (*ALONE, *SHAPES)


def write_model(folder: Path) -> None:
    """A Qwen3, 4 layers of width 256, untied."""
    from pear_ray.config import Pretrain
    from pear_ray.train.new_model import write_new_model

    shape = Pretrain(styles={}, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4)
    write_new_model(folder, shape, [f"w{number}" for number in range(97)])


def trl(model: str, num_steps: int) -> None:
    """TRL, sampling with transformers: prints [tokens, seconds] of each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tests.rl.parity_task import Parity

    torch.set_num_threads(THREADS)
    task = Parity()
    problems = list(islice(task.problems("train", 0), PROBLEMS * num_steps))
    rows = {"prompt": [problem.messages[0]["content"] for problem in problems]}
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    steps: list[tuple[int, float]] = []
    num_tokens = 0

    def reward(completions: list[str], completion_ids: Any, **_: Any) -> list[float]:
        nonlocal num_tokens
        num_tokens += sum(len(ids) for ids in completion_ids)
        return [task.grade(problems[0], text).reward for text in completions]

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append((num_tokens, time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=PROBLEMS * GROUP,
            num_generations=GROUP,
            max_completion_length=MAX_NEW_TOKENS,
            steps_per_generation=1,
            beta=0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            learning_rate=1e-4,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            model_init_kwargs={"dtype": "float32"},
        )
        GRPOTrainer(
            model,
            reward,
            args=settings,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()
    print(json.dumps([(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(steps)]))


def bare(model: str, num_steps: int) -> None:
    """vLLM and PyTorch alone: prints the same."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    from pear_ray.process import keep_freed_memory
    from tests.rl.parity_task import Parity

    keep_freed_memory()
    engine = LLM(
        model,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=PROBLEMS * GROUP,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    torch.set_num_threads(THREADS)
    wanted = SamplingParams(n=GROUP, max_tokens=MAX_NEW_TOKENS, logprobs=0, flat_logprobs=True, detokenize=False)
    tokenizer = engine.get_tokenizer()
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    adam = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    problems = Parity().problems("train", 0)
    steps: list[tuple[int, float]] = []
    for _ in range(num_steps):
        began = time.perf_counter()
        texts = [problem.messages[0]["content"] for problem in islice(problems, PROBLEMS)]
        prompts: Any = [{"prompt_token_ids": ids} for ids in tokenizer(texts)["input_ids"]]
        found = engine.generate(prompts, wanted, use_tqdm=False)
        rows = [
            (torch.tensor(output.prompt_token_ids), torch.tensor(list(answer.token_ids)))
            for output in found
            for answer in output.outputs
        ]
        learn(policy, adam, rows)
        num_tokens = sum(len(answer) for _, answer in rows)
        steps.append((num_tokens, time.perf_counter() - began))
    print(json.dumps(steps[1:]))


def learn(policy: Any, adam: Any, rows: list[tuple[Any, Any]]) -> None:
    """A step of policy gradient on (prompt, answer), padded to one length."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    whole = [torch.cat(row) for row in rows]
    ids = pad_sequence(whole, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in whole], batch_first=True)
    is_answer = mask.bool()
    for row, (prompt, _) in zip(is_answer, rows, strict=True):
        row[: len(prompt)] = False
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][is_answer[:, 1:]]
    (-logprobs.mean()).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    adam.step()
    adam.zero_grad()


def job_of(folder: Path, model: Path, name: str, num_steps: int) -> Path:
    """The same as a job."""
    shape = SHAPES[name]
    path = folder / f"{name}.toml"
    path.write_text(
        f"""
        [run]
        dir = "{folder}/{name}"
        [model]
        path = "{model}"
        dtype = "float32"
        [rl]
        steps = {num_steps}
        prompts_per_step = {PROBLEMS}
        group_size = {GROUP}
        learning_rate = 1e-4
        max_staleness = {shape.max_staleness}
        [generator]
        num_cpus = 0
        threads = 1
        max_new_tokens = {MAX_NEW_TOKENS}
        max_model_len = 64
        max_num_seqs = {PROBLEMS * GROUP}
        [learner]
        num_workers = {shape.num_ranks}
        zero_stage = {shape.zero_stage}
        cpus_per_worker = {shape.cpus_per_rank}
        tokens_per_micro_batch = 8192
        save_every = 1000
        [rewards]
        processes = 1
        [[tasks]]
        name = "{TASK}"
        """
    )
    return path


def stage(folder: Path, model: Path, name: str, num_steps: int) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of stage `rl`."""
    job = job_of(folder, model, name, num_steps)
    environment = {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-m", "pear_ray", "rl", str(job)],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def measured(folder: Path, model: Path, name: str, num_steps: int) -> dict[str, Any]:
    """Tokens per second of each step, and the rows, if there are any."""
    if name in ALONE:
        program = f"from tests.benchmarks.rl import {name}; {name}({str(model)!r}, {num_steps})"
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
        steps, rows = json.loads(done.stdout.splitlines()[-1]), []
    else:
        rows = stage(folder, model, name, num_steps)
        steps = [(row["num_tokens"], row["time"] - before["time"]) for before, row in pairwise(rows)]
    rates = [tokens / seconds for tokens, seconds in steps[WARM_UP:]]
    return {"rate": statistics.median(rates), "rows": rows[WARM_UP + 1 :]}


def print_times(name: str, rows: list[dict[str, Any]]) -> None:
    """What learners and engines did, as shares of a step."""

    def share(key: str) -> float:
        return statistics.median(row[key] / row["step_seconds"] for row in rows)

    parts = {
        "learn": share("train_seconds"),
        "publish": share("publish_seconds"),
        "learners wait": share("wait_seconds"),
        "engines idle": share("engine_idle_seconds"),
        "engines load weights": share("pause_seconds"),
    }
    seconds = statistics.median(row["step_seconds"] for row in rows)
    said = "  ".join(f"{part} {value:.2f}" for part, value in parts.items())
    print(f"  {name:<8}{seconds:6.2f} s a step: {said}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="rounds in which all take turns")
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of each")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="leave others out")
    words = parser.parse_args()
    names = words.only or list(CONTENDERS)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        model = Path(home) / "model"
        write_model(model)
        for number in range(words.pairs):
            folder = Path(home) / str(number)
            folder.mkdir()
            rounds.append({})
            for name in names:
                rounds[-1][name] = measured(folder, model, name, words.steps)
                print(f"  round {number + 1}: {name} {rounds[-1][name]['rate']:.0f}", flush=True)
    print(f"{words.pairs} rounds of {words.steps} steps of {PROBLEMS} x {GROUP} answers")
    for name in names:
        rate = statistics.median(one[name]["rate"] for one in rounds)
        line = f"  {name:<8}{rate:>8.0f} tokens/s"
        for base in ("trl", "one"):
            if base in names:
                ratio = statistics.median(one[name]["rate"] / one[base]["rate"] for one in rounds)
                line += f"   {ratio:6.3f} of {base}"
        print(line)
    print("Where the time goes, medians over steps, as shares of a step:")
    for name in names:
        if rows := [row for one in rounds for row in one[name]["rows"]]:
            print_times(name, rows)


if __name__ == "__main__":
    main()
