"""Scorecards: metrics of each checkpoint, and paired differences between checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.config import Job, is_after_rl, start_of
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import ScoreRequest
from pear_ray.statistics import mean_with_interval, pass_at_k_by_problem


def heldout_rows(folder: Path) -> list[dict[str, Any]]:
    """Return prompt ids, response ids and trainable mask of the corpus's held-out rows, if any."""
    rows = []
    for file in sorted(folder.glob("*.parquet")):
        columns = {"prompt_ids", "response_ids", "trainable"} & set(pq.read_schema(file).names)
        rows += pq.read_table(file, columns=sorted(columns), filters=[("split", "==", "heldout")]).to_pylist()
    return rows


def heldout_nll(pool: EnginePool, rows: list[dict[str, Any]]) -> float | None:
    """Return the mean negative log-likelihood of the rows' trainable tokens, in nats."""
    if not rows:
        return None
    logprobs = pool.generate([ScoreRequest(tuple(row["prompt_ids"]), tuple(row["response_ids"])) for row in rows])
    chosen = [values[row.get("trainable") or ...] for values, row in zip(logprobs, rows, strict=True)]
    return float(-np.concatenate(chosen).mean())


def kl_from_start(
    pool: EnginePool, prompts: Sequence[tuple[int, ...]], attempts: pa.Table, seed: int
) -> dict[str, float]:
    """Return KL(start || end) over whole answers in nats, with its 95 % interval over problems: the mean of log p_start
    - log p_end over the first answers is unbiased. `attempts` are those of the checkpoint from which training started,
    sampled at temperature 1, `prompts` their token ids, one per problem; the pool serves the checkpoint it ended with.
    """
    first = attempts.filter(pc.equal(attempts.column("sample"), 0)).to_pylist()
    requests = [ScoreRequest(prompt, tuple(row["response_ids"])) for prompt, row in zip(prompts, first, strict=True)]
    ends = pool.generate(requests)
    gaps = [np.sum(row["logprobs"]) - end.sum() for row, end in zip(first, ends, strict=True)]
    return mean_with_interval(np.array(gaps), seed)


def checkpoint_card(job: Job, path: str, attempts: pa.Table) -> dict[str, Any]:
    """Return the metrics of one checkpoint that its attempts give."""
    num_samples, seed = job.evaluation.samples_per_problem, job.run.seed
    counts = num_correct(job, attempts)
    curve = [mean_with_interval(pass_at_k_by_problem(num_samples, counts, k), seed) for k in range(1, num_samples + 1)]
    num_tokens = attempts.column("num_tokens").to_numpy()
    logprob = float((attempts.column("mean_logprob").to_numpy() * num_tokens).sum() / num_tokens.sum())
    parts = [dict(row) for row in attempts.column("parts").to_pylist()]
    names = sorted({name for row in parts for name in row})
    return {
        "path": path,
        "pass_at_k": {str(k): curve[k - 1] for k in job.evaluation.ks},
        "pass_at_k_curve": curve,
        "completions_mean_length": float(num_tokens.mean()),
        "completions_clipped_ratio": float(np.mean(attempts.column("finish_reason").to_numpy() == "length")),
        "mean_logprob": logprob,
        # At temperature 1, -log-prob of a sampled token is an unbiased estimate of the entropy at its position.
        "entropy": -logprob if job.evaluation.temperature == 1.0 else None,
        "parts": {name: float(np.mean([row.get(name, 0.0) for row in parts])) for name in names},
    }


def scorecard(job: Job, num_problems: int, cards: dict[str, Any], attempts: dict[str, pa.Table]) -> dict[str, Any]:
    """Return scorecard.json: settings, the card of each checkpoint, and paired differences."""
    num_samples = job.evaluation.samples_per_problem
    counts = {label: num_correct(job, table) for label, table in attempts.items()}
    differences = []
    for b, a in comparable_pairs(list(cards)):
        for k in job.evaluation.ks:
            lead = pass_at_k_by_problem(num_samples, counts[a], k) - pass_at_k_by_problem(num_samples, counts[b], k)
            differences.append({"a": a, "b": b, "k": k, **mean_with_interval(lead, job.run.seed)})
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
    """Return the number of correct attempts at each problem, int64 [problems]."""
    correct = attempts.column("correct").to_numpy().astype(np.int64)
    return correct.reshape(-1, job.evaluation.samples_per_problem).sum(axis=1)


def comparable_pairs(labels: list[str]) -> list[tuple[str, str]]:
    """Return pairs (b, a) to compare as "a minus b": an arm after RL and before it; and two arms with the same seed,
    both after SFT or both after RL."""
    pairs = []
    for b, a in combinations(labels, 2):
        (arm_b, stage_b), (arm_a, stage_a) = (label.rpartition("/")[::2] for label in (b, a))
        is_change = is_after_rl(a) and b == start_of(a, labels)
        is_same_seed = arm_b.partition("@")[2] == arm_a.partition("@")[2]
        is_same_point = stage_a == stage_b == "sft" or (is_after_rl(a) and is_after_rl(b))
        if is_change or (is_same_point and is_same_seed):
            pairs.append((b, a))
    return pairs
