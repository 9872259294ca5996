"""Stage `score` beside what it is made of: one command, one table, ratios from one run.

    python tests/benchmarks/score.py [--rounds 3] [--rows 1024] [--sizes small large]

For each model size, in turn and as often as `--rounds` says, on the same token ids and threads:

    bare vLLM       one process, one engine, all rows in one call: no Ray, nothing stored
    pear-ray score  the stage as users run it, without start-up: from the first stored part on
    trainer         the learner's packed forward pass, on a quarter of the rows
    matmul          what the machine's matrix products would allow for 2 FLOP per weight and token

Then the stage on 1, 4 and 16 times the corpus: time per token, and the peak memory (without what processes share) of
the driver, of the scoring actor and of the largest of Ray's other workers.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from pear_ray.config import Generator, Pretrain
from pear_ray.train.model import load_policy
from pear_ray.train.new_model import write_new_model

WORDS = [f"w{number}" for number in range(97)]
SIZES = {
    "small": Pretrain(styles={}, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4),
    "large": Pretrain(styles={}, hidden_size=640, intermediate_size=1760, num_layers=7, num_heads=10),
}
THREADS = 2
RATE = "tokens per second:"
SETTLE_SECONDS = 30.0
MEMORY = ("driver", "scorer", "worker")
ENGINE = Generator(num_cpus=THREADS, threads=THREADS, max_new_tokens=8, max_model_len=512, max_num_seqs=256)
CORE = """
import sys; sys.path.insert(0, {here!r}); import score; score.{call}
"""


def write_corpus(path: Path, num_rows: int) -> None:
    """Conversations of 20 to 260 tokens, most of them the answer's."""
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(num_rows):
            texts = [" ".join(draw.choice(WORDS, n)) for n in (draw.integers(8, 33), draw.integers(12, 228))]
            messages = [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            row = {"example_id": f"row-{number:06d}", "source": "author", "messages": messages}
            file.write(json.dumps(row) + "\n")


def rows_of(corpus: Path, model: Path) -> list[tuple[list[int], list[int]]]:
    """The corpus as token ids."""
    from pear_ray.data.tokenizer import encode_conversation, load_tokenizer

    tokenizer = load_tokenizer(str(model))
    texts = [json.loads(line)["messages"] for line in corpus.open()]
    found = [encode_conversation(tokenizer, messages) for messages in texts]
    return [(conversation.prompt_ids, conversation.response_ids) for conversation in found]


def bare(corpus: str, model: str) -> None:
    """One call of vLLM over all rows whenever it is asked, after a warm-up."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    torch.set_num_threads(THREADS)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=ENGINE.max_model_len,
        max_num_seqs=ENGINE.max_num_seqs,
        max_num_batched_tokens=ENGINE.max_num_batched_tokens,
        distributed_executor_backend="uni",
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": p + r} for p, r in rows_of(Path(corpus), Path(model))]
    llm.generate(prompts[:256], asked, use_tqdm=False)
    num_tokens = sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
    serve(num_tokens, lambda: llm.generate(prompts, asked, use_tqdm=False))


def trainer(corpus: str, model: str) -> None:
    """The learner's forward pass over a quarter of the rows whenever it is asked."""
    from pear_ray.train.model import policy_logprobs

    torch.set_num_threads(THREADS)
    rows = rows_of(Path(corpus), Path(model))[::4]
    policy = load_policy(model, "float32").eval()
    policy_logprobs(policy, rows[:64], 8192, torch.device("cpu"))
    num_tokens = sum(len(p) + len(r) for p, r in rows)
    serve(num_tokens, lambda: policy_logprobs(policy, rows, 8192, torch.device("cpu")))


def serve(num_tokens: int, work: Callable[[], Any]) -> None:
    """Do the work once for each line that the parent writes, and print its tokens per second."""
    for _ in sys.stdin:
        started = time.perf_counter()
        work()
        print(RATE, num_tokens / (time.perf_counter() - started), flush=True)


@contextmanager
def contender(call: str, log: Path) -> Iterator[Callable[[], float]]:
    """A function of this file in a process of its own, ready to be asked for its rate."""
    program = CORE.format(here=str(Path(__file__).parent), call=call)
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        asked, answers = process.stdin, process.stdout
        assert asked is not None and answers is not None

        def rate() -> float:
            asked.write("\n")
            asked.flush()
            for line in answers:
                if line.startswith(RATE):
                    return float(line.split()[-1])
            raise RuntimeError(log.read_text()[-3000:])

        yield rate


def matmul_tokens_per_second(model: Path) -> float:
    """Tokens per second if nothing but matrix products took time, 2 FLOP per weight."""
    torch.set_num_threads(THREADS)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    flops = 2 * 2048**3 / statistics.median(times)
    weights = sum(p.numel() for n, p in load_policy(str(model), "float32").named_parameters() if "embed" not in n)
    return flops / (2 * weights)


def stage(folder: Path, corpus: Path, model: Path, watch: bool = False) -> dict[str, float]:
    """Tokens per second of the stage between its first and its last part; with `watch`, which costs a core some
    percent, also the peak memory in MiB of driver, scoring actor and Ray's other workers."""
    job = folder / "job.toml"
    run = folder / "run"
    job.write_text(
        f"""
        [run]
        dir = "{run}"
        [model]
        path = "{model}"
        dtype = "float32"
        [behavior.author]
        path = "{model}"
        [corpus]
        path = "{corpus}"
        [generator]
        num_cpus = {ENGINE.num_cpus}
        threads = {THREADS}
        max_new_tokens = {ENGINE.max_new_tokens}
        max_model_len = {ENGINE.max_model_len}
        max_num_seqs = {ENGINE.max_num_seqs}
        [[tasks]]
        name = "countdown"
        """
    )
    driver = subprocess.Popen(
        [sys.executable, "-m", "pear_ray", "score", str(job)],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
    )
    peaks = dict.fromkeys(MEMORY, 0.0)
    while driver.poll() is None:
        for name, process in watched(driver.pid) if watch else ():
            try:
                peaks[name] = max(peaks[name], process.memory_full_info().uss / 2**20)
            except psutil.Error:
                continue
        time.sleep(2.0)
    if driver.returncode:
        raise RuntimeError((folder / "log").read_text()[-3000:])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {"tokens_per_second": last["tokens_per_second"], **peaks}


def watched(driver: int) -> list[tuple[str, psutil.Process]]:
    """The processes whose memory is watched."""
    found = [("driver", psutil.Process(driver))]
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::"):
            found.append(("scorer" if "Map(Scorer)" in title else "worker", process))
    return found


def compare(folder: Path, size: str, num_rounds: int, num_rows: int) -> None:
    """Print one line per contender, with its ratio to bare vLLM: to the mean of bare vLLM's rates before and after it,
    for the machine's own speed changes by the minute."""
    model = folder / size
    write_new_model(model, SIZES[size], WORDS)
    corpus = folder / f"{size}.jsonl"
    write_corpus(corpus, num_rows if size == "small" else max(num_rows // 4, 1024))
    words = f"({str(corpus)!r}, {str(model)!r})"
    rates: dict[str, list[float]] = {"pear-ray score": [], "trainer": []}
    with (
        contender("bare" + words, folder / "bare.log") as ask_bare,
        contender("trainer" + words, folder / "trainer.log") as ask_trainer,
    ):
        ask_trainer()
        bare_rates = [ask_bare()]
        for number in range(num_rounds):
            where = folder / f"{size}-{number}"
            where.mkdir()
            rates["pear-ray score"].append(stage(where, corpus, model)["tokens_per_second"])
            bare_rates.append(ask_bare())
            rates["trainer"].append(ask_trainer())
    base = [(before + after) / 2 for before, after in pairwise(bare_rates)]
    rates["matmul"] = [matmul_tokens_per_second(model)] * num_rounds
    for name, found in {"bare vLLM": base, **rates}.items():
        ratios = [rate / of for rate, of in zip(found, base, strict=True)]
        print(
            f"{size:<7}{name:<16}{statistics.median(found):>10.0f} tokens/s"
            f"{statistics.median(ratios):>8.3f} of bare vLLM   {[round(r, 3) for r in ratios]}",
            flush=True,
        )


def grow(folder: Path, num_rows: int) -> None:
    """Print time per token and memory of 1, 4 and 16 times the corpus."""
    model = folder / "small"
    base: dict[str, float] = {}
    for times in (1, 4, 16):
        where = folder / f"times-{times}"
        where.mkdir()
        write_corpus(where / "corpus.jsonl", times * num_rows)
        found = stage(where, where / "corpus.jsonl", model, watch=True)
        base = base or found
        print(
            f"{times:>3}x rows  {1e6 / found['tokens_per_second']:7.1f} us/token"
            f" ({base['tokens_per_second'] / found['tokens_per_second']:.3f} of 1x)"
            + "".join(f"   {name} {found[name]:.0f} MiB ({found[name] / base[name]:.3f} of 1x)" for name in MEMORY),
            flush=True,
        )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="repeats of every comparison")
    parser.add_argument("--rows", type=int, default=1024, help="rows of the corpus, at 1x")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--no-growth", action="store_true", help="leave 1x, 4x and 16x out")
    words = parser.parse_args()
    # A cluster that stands already, as users have it: its own start would slow the first parts.
    ray.init("local", num_cpus=THREADS, log_to_driver=False)
    time.sleep(SETTLE_SECONDS)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for size in words.sizes:
            compare(Path(folder), size, words.rounds, 4 * words.rows)
        if not words.no_growth:
            grow(Path(folder), words.rows)


if __name__ == "__main__":
    main()
