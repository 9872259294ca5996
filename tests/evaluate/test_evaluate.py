"""Attempts on a real engine with real reward workers, interrupted and resumed; scorecards of known attempts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from pear_ray.config import Job, start_of
from pear_ray.data.tokenizer import encode_problems
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.errors import ConfigError
from pear_ray.evaluate import AttemptStore, attempt_requests, find_checkpoints, sample_attempts
from pear_ray.evaluate.scorecard import checkpoint_card, comparable_pairs, kl_from_start, scorecard
from pear_ray.records import ATTEMPT_SCHEMA
from pear_ray.rewards.pool import RewardPool
from pear_ray.statistics import pass_at_k
from pear_ray.tasks import heldout_problems

PROBLEMS, SAMPLES = 12, 20


def job_of(model: str = "some/model", **generator: Any) -> Job:
    return Job.model_validate(
        {
            "run": {"dir": "unused", "seed": 3},
            "model": {"path": model},
            "tasks": [{"name": "tests.rl.parity_task:Parity"}],
            "generator": {"max_new_tokens": 24, "max_model_len": 48, **generator},
            "evaluation": {
                "num_problems": PROBLEMS, "samples_per_problem": SAMPLES, "ks": [1, 4],
            },
        }
    )  # fmt: skip


class Evaluator:
    """An engine, a reward pool and problems, as stage `evaluate` combines them."""

    def __init__(self, job: Job, pool: EnginePool, reward_pool: RewardPool) -> None:
        self.job, self.pool, self.reward_pool = job, pool, reward_pool
        self.problems = heldout_problems(job.tasks, PROBLEMS, 3)
        self.prompts = encode_problems(job.model_path(), self.problems, 48)

    def work(self, store: AttemptStore) -> list[Any]:
        return list(attempt_requests(self.job, self.prompts, self.problems, store.stored()))

    def sample(self, store: AttemptStore) -> None:
        sample_attempts("base", self.work(store), self.pool, self.reward_pool, store)

    def drain(self) -> None:
        """Discard requests in flight: a killed process takes them along, this engine is reused."""
        while self.pool.num_sequences or self.reward_pool.num_waiting:
            self.pool.pop_finished()
            self.reward_pool.pop_finished(0.1)


@pytest.fixture(scope="module")
def evaluator(engine_of: Callable[[bool], EnginePool], tiny_model: Any) -> Iterator[Evaluator]:
    job = job_of(str(tiny_model(True)))
    pool = engine_of(True)
    pool.load_folder(job.model_path())
    with RewardPool(job.tasks, job.rewards) as reward_pool:
        yield Evaluator(job, pool, reward_pool)


@pytest.fixture(scope="module")
def uninterrupted(evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    store = AttemptStore(tmp_path_factory.mktemp("uninterrupted"))
    evaluator.sample(store)
    return store.table(evaluator.problems)


def test_attempts_are_complete_and_in_order(evaluator: Evaluator, uninterrupted: pa.Table) -> None:
    rows = uninterrupted.to_pylist()
    expected = [(p.problem_id, n) for p in evaluator.problems for n in range(SAMPLES)]
    assert [(row["problem_id"], row["sample"]) for row in rows] == expected
    assert uninterrupted.schema == ATTEMPT_SCHEMA
    # Task Parity accepts half of the answers of such a model.
    assert 0 < np.mean([row["correct"] for row in rows]) < 1
    assert len({row["text"] for row in rows}) > len(rows) / 2


class Interrupted(Exception):
    pass


class InterruptedStore(AttemptStore):
    """Writes attempts at once and fails after the fifth request."""

    num_added = 0

    def add(self, *attempts: Any) -> None:
        super().add(*attempts)
        self.write()
        self.num_added += 1
        if self.num_added == 5:
            raise Interrupted


def test_resumed_attempts_equal_uninterrupted_ones(
    evaluator: Evaluator, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    """Interrupted three times, each after some attempts were written."""
    num_requests = []
    for _ in range(3):
        store = InterruptedStore(tmp_path)
        num_requests.append(len(evaluator.work(store)))
        with pytest.raises(Interrupted):
            evaluator.sample(store)
        evaluator.drain()
    (tmp_path / "torn.partial").write_bytes(b"PAR1")
    assert num_requests == [36, 31, 26]
    store = AttemptStore(tmp_path)
    evaluator.sample(store)
    assert not evaluator.work(store)
    assert store.table(evaluator.problems).equals(uninterrupted)


def test_a_prompt_that_is_too_long_is_refused(evaluator: Evaluator) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len: expected more than \d+, .* got 2"):
        encode_problems(evaluator.job.model_path(), evaluator.problems, max_model_len=2)


def test_kl_from_start_matches_transformers(
    evaluator: Evaluator, uninterrupted: pa.Table, tiny_model: Any, engine_of: Callable[[bool], EnginePool]
) -> None:
    """Reference: log-probs of whole answers under both models by transformers."""
    prompts = evaluator.prompts
    start, end = (AutoModelForCausalLM.from_pretrained(str(tiny_model(tied))) for tied in (True, False))
    gaps = []
    firsts = [row for row in uninterrupted.to_pylist() if row["sample"] == 0]
    for prompt, row in zip(prompts, firsts, strict=True):
        ids = torch.tensor([[*prompt, *row["response_ids"]]])
        with torch.no_grad():
            both = [model(ids).logits[0, len(prompt) - 1 : -1] for model in (start, end)]
        chosen = torch.tensor(row["response_ids"])[:, None]
        start_sum, end_sum = (x.log_softmax(-1).gather(1, chosen).sum().item() for x in both)
        gaps.append(start_sum - end_sum)
    pool = engine_of(False)
    pool.load_folder(str(tiny_model(False)))
    result = kl_from_start(pool, prompts, uninterrupted, seed=0)
    assert result["value"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert result["low"] < result["value"] < result["high"]
    assert result["value"] > 1
    same = kl_from_start(evaluator.pool, prompts, uninterrupted, seed=0)
    assert same["value"] == pytest.approx(0, abs=1e-4)


def test_checkpoints_are_compared_with_their_start() -> None:
    labels = ["base", "a@0/sft", "a@0/rl", "a@1/sft", "a@1/rl", "none@0/rl", "none@1/rl", "mine"]
    starts = {label: start_of(label, labels) for label in labels}
    assert starts == {
        "base": None, "mine": None, "a@0/sft": "base", "a@0/rl": "a@0/sft", "a@1/sft": "base",
        "a@1/rl": "a@1/sft", "none@0/rl": "base", "none@1/rl": "base",
    }  # fmt: skip
    assert set(comparable_pairs(labels)) == {
        ("a@0/sft", "a@0/rl"), ("a@1/sft", "a@1/rl"), ("base", "none@0/rl"), ("base", "none@1/rl"),
        ("a@0/rl", "none@0/rl"), ("a@1/rl", "none@1/rl"),
    }  # fmt: skip


def test_arms_with_different_last_stages_are_compared() -> None:
    labels = ["base", "a@0/sft", "a@0/rl", "b@0/sft", "b@0/cooperate", "c@1/cooperate"]
    assert set(comparable_pairs(labels)) == {
        ("a@0/sft", "a@0/rl"), ("b@0/sft", "b@0/cooperate"), ("base", "c@1/cooperate"),
        ("a@0/sft", "b@0/sft"), ("a@0/rl", "b@0/cooperate"),
    }  # fmt: skip


def test_every_export_of_the_run_and_its_arms_is_evaluated(tmp_path: Path) -> None:
    document = job_of().model_dump() | {
        "run": {"dir": str(tmp_path)},
        "arms": [{"name": "a"}, {"name": "b", "cooperate": {}}],
    }
    exports = ["arms/a/sft", "arms/a/rl", "arms/b/sft", "arms/b/cooperate", "cooperate"]
    for name in exports:
        (tmp_path / name / "export").mkdir(parents=True)
    result = find_checkpoints(Job(**document), tmp_path)
    assert list(result) == ["base", "cooperate", "a/sft", "a/rl", "b/sft", "b/cooperate"]
    assert result["b/cooperate"] == str(tmp_path / "arms/b/cooperate/export")


def table_of(counts: list[int], num_tokens: int = 5, logprob: float = -0.5) -> pa.Table:
    rows = [
        {
            "checkpoint": "base", "problem_id": f"p-{problem}", "task": "parity", "sample": sample,
            "text": "", "correct": sample < count, "reward": float(sample < count),
            # The wrong ones are longer, less likely, and cut.
            "num_tokens": num_tokens if sample < count else 3 * num_tokens,
            "finish_reason": "stop" if sample < count else "length",
            "mean_logprob": logprob if sample < count else 2 * logprob,
            "note": "", "parts": {"answered": float(sample < count)},
        }
        for problem, count in enumerate(counts)
        for sample in range(SAMPLES)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, ATTEMPT_SCHEMA)


def test_card_of_known_attempts() -> None:
    counts = [0, 3, 20, 7]
    result = checkpoint_card(job_of(), "a/path", table_of(counts))
    assert len(result["pass_at_k_curve"]) == SAMPLES
    for k in range(1, SAMPLES + 1):
        expected = np.mean([pass_at_k(SAMPLES, count, k) for count in counts])
        point = result["pass_at_k_curve"][k - 1]
        assert point["value"] == pytest.approx(expected)
        assert point["low"] <= point["value"] <= point["high"]
    assert result["pass_at_k"] == {str(k): result["pass_at_k_curve"][k - 1] for k in (1, 4)}
    right, wrong = sum(counts), 4 * SAMPLES - sum(counts)
    assert result["completions_clipped_ratio"] == pytest.approx(wrong / 80)
    assert result["parts"] == {"answered": pytest.approx(right / 80)}
    # By token: a long answer counts more than a short one.
    tokens, entropy = 5 * right + 15 * wrong, 0.5 * 5 * right + 1.0 * 15 * wrong
    assert result["completions_mean_length"] == pytest.approx(tokens / 80)
    assert result["entropy"] == pytest.approx(entropy / tokens)


@pytest.mark.parametrize("count", [0, SAMPLES])
def test_card_of_identical_grades(count: int) -> None:
    result = checkpoint_card(job_of(), "a/path", table_of([count] * 3))
    value = count / SAMPLES
    assert result["pass_at_k"]["1"] == {"value": value, "low": value, "high": value}


def test_differences_are_paired_over_problems() -> None:
    """b leads by the same margin on every problem: the interval of the difference is a point."""
    tables = {"a/sft": table_of([1, 5, 9, 13]), "b/sft": table_of([3, 7, 11, 15])}
    cards = {label: checkpoint_card(job_of(), "", table) for label, table in tables.items()}
    document = scorecard(job_of(), 4, cards, tables)
    (at_1,) = [row for row in document["differences"] if row["k"] == 1]
    assert (at_1["a"], at_1["b"]) == ("b/sft", "a/sft")
    assert [at_1[key] for key in ("value", "low", "high")] == pytest.approx([0.1] * 3)
    assert cards["a/sft"]["pass_at_k"]["1"]["high"] > cards["a/sft"]["pass_at_k"]["1"]["value"]
