"""What attempts say of checkpoints, and of one checkpoint against another."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from pear_ray.config import Job, is_after_rl, start_of
from pear_ray.statistics import mean_pass_at_k, mean_with_interval


def card(job: Job, path: str, attempts: pa.Table) -> dict[str, Any]:
    """What the scorecard says of one checkpoint."""
    num_samples, seed = job.evaluation.samples_per_problem, job.run.seed
    counts = num_correct(job, attempts)
    curve = [
        mean_with_interval(mean_pass_at_k(num_samples, counts, k), seed)
        for k in range(1, num_samples + 1)
    ]
    num_tokens = attempts.column("num_tokens").to_numpy()
    mean_logprobs = attempts.column("mean_logprob").to_numpy()
    logprob = float((mean_logprobs * num_tokens).sum() / num_tokens.sum())
    parts = [dict(row) for row in attempts.column("parts").to_pylist()]
    names = sorted({name for row in parts for name in row})
    return {
        "path": path,
        "pass_at_k": {str(k): curve[k - 1] for k in job.evaluation.ks},
        "pass_at_k_curve": curve,
        "completions_mean_length": float(num_tokens.mean()),
        "completions_clipped_ratio": float(
            np.mean(attempts.column("finish_reason").to_numpy() == "length")
        ),
        "mean_logprob": logprob,
        # A sampled token's own log-prob is an unbiased reading of the entropy of its place, where
        # nothing bends the distribution that it is drawn from.
        "entropy": -logprob if job.evaluation.temperature == 1.0 else None,
        "parts": {name: float(np.mean([row.get(name, 0.0) for row in parts])) for name in names},
    }


def scorecard(
    job: Job, num_problems: int, cards: dict[str, Any], attempts: dict[str, pa.Table]
) -> dict[str, Any]:
    """The whole document, with paired differences between checkpoints of one kind."""
    num_samples = job.evaluation.samples_per_problem
    counts = {label: num_correct(job, table) for label, table in attempts.items()}
    differences = []
    for before, after in pairs_of(list(cards)):
        for k in job.evaluation.ks:
            first, second = (mean_pass_at_k(num_samples, counts[c], k) for c in (before, after))
            paired = mean_with_interval(second - first, job.run.seed)
            differences.append({"a": after, "b": before, "k": k, **paired})
    return {
        "num_problems": num_problems,
        "samples_per_problem": num_samples,
        "temperature": job.evaluation.temperature,
        "max_new_tokens": job.generator.max_new_tokens,
        "seed": job.run.seed,
        "checkpoints": cards,
        "differences": differences,
    }


def num_correct(job: Job, attempts: pa.Table) -> np.ndarray:
    """Right answers to each problem, int64 [problems], of attempts in the order of problems."""
    correct = attempts.column("correct").to_numpy().astype(np.int64)
    return correct.reshape(-1, job.evaluation.samples_per_problem).sum(axis=1)


def pairs_of(labels: list[str]) -> list[tuple[str, str]]:
    """Checkpoints worth comparing, (b, a) for "a minus b": one arm before and after RL, and two
    arms both after SFT or both after RL; in a study, with the same seed."""
    pairs = []
    for b, a in combinations(labels, 2):
        (arm_b, stage_b), (arm_a, stage_a) = (label.rpartition("/")[::2] for label in (b, a))
        is_change = is_after_rl(a) and b == start_of(a, labels)
        is_one_seed = arm_b.partition("@")[2] == arm_a.partition("@")[2]
        is_one_point = stage_a == stage_b == "sft" or (is_after_rl(a) and is_after_rl(b))
        is_rivalry = is_one_point and is_one_seed
        if is_change or is_rivalry:
            pairs.append((b, a))
    return pairs
