"""Attempts on a real engine, judged by real verifiers, broken off and taken up again; scorecards of
attempts whose numbers are known."""

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
from pear_ray.evaluate import checkpoints_of
from pear_ray.evaluate.attempts import Store, attempt, requests
from pear_ray.evaluate.likelihood import kl_from
from pear_ray.evaluate.scorecard import card, pairs_of, scorecard
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
            "tasks": [{"name": "tests.rl.parity:Parity"}],
            "generator": {"max_new_tokens": 24, "max_model_len": 48, **generator},
            "evaluation": {
                "num_problems": PROBLEMS, "samples_per_problem": SAMPLES, "ks": [1, 4],
            },
        }
    )  # fmt: skip


class Bench:
    """An engine, verifiers and problems, as stage `evaluate` brings them together."""

    def __init__(self, job: Job, pool: EnginePool, reward_pool: RewardPool) -> None:
        self.job, self.pool, self.reward_pool = job, pool, reward_pool
        self.problems = heldout_problems(job.tasks, PROBLEMS, 3)
        self.prompts = encode_problems(job.model_path(), self.problems, 48)

    def work(self, store: Store) -> list[Any]:
        return list(requests(self.job, self.prompts, self.problems, store.done()))

    def sample(self, store: Store) -> None:
        attempt("base", self.work(store), self.problems, self.pool, self.reward_pool, store)

    def drain(self) -> None:
        """What a dead process leaves under way dies with its engines; this one is used again."""
        while self.pool.num_sequences or self.reward_pool.num_waiting:
            self.pool.pop_finished()
            self.reward_pool.pop_finished(0.1)


@pytest.fixture(scope="module")
def bench(engine_of: Callable[[bool], EnginePool], tiny_model: Any) -> Iterator[Bench]:
    job = job_of(str(tiny_model(True)))
    pool = engine_of(True)
    pool.load_folder(job.model_path())
    with RewardPool(job.tasks, job.rewards) as reward_pool:
        yield Bench(job, pool, reward_pool)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    bench.sample(store)
    return store.table(bench.problems)


def test_every_problem_has_all_its_attempts_in_order(bench: Bench, undisturbed: pa.Table) -> None:
    rows = undisturbed.to_pylist()
    expected = [(p.problem_id, n) for p in bench.problems for n in range(SAMPLES)]
    assert [(row["problem_id"], row["sample"]) for row in rows] == expected
    assert undisturbed.schema == ATTEMPT_SCHEMA
    # Parity judges half of what such a model writes right.
    assert 0 < np.mean([row["correct"] for row in rows]) < 1
    assert len({row["text"] for row in rows}) > len(rows) / 2


class BrokenOff(Exception):
    pass


class Breaking(Store):
    """Writes what it is given at once, and breaks off after the fifth."""

    num_added = 0

    def add(self, attempts: Any) -> None:
        super().add(attempts)
        self.write()
        self.num_added += 1
        if self.num_added == 5:
            raise BrokenOff


def test_what_is_stored_is_not_asked_again_and_changes_nothing(
    bench: Bench, undisturbed: pa.Table, tmp_path: Path
) -> None:
    """Broken off three times, each after some attempts were written."""
    numbers_asked = []
    for _ in range(3):
        store = Breaking(tmp_path)
        numbers_asked.append(len(bench.work(store)))
        with pytest.raises(BrokenOff):
            bench.sample(store)
        bench.drain()
    (tmp_path / "torn.partial").write_bytes(b"PAR1")
    assert numbers_asked == [36, 31, 26]
    store = Store(tmp_path)
    bench.sample(store)
    assert not bench.work(store)
    assert store.table(bench.problems).equals(undisturbed)


def test_a_prompt_without_room_is_told(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"its prompt has \d+ tokens; expected fewer than"):
        encode_problems(bench.job.model_path(), bench.problems, max_model_len=2)


def test_the_divergence_is_what_two_models_say_of_the_same_answers(
    bench: Bench, undisturbed: pa.Table, tiny_model: Any, engine_of: Callable[[bool], EnginePool]
) -> None:
    """Against the sums of log-probs that transformers finds, of both models, for whole answers."""
    prompts = bench.prompts
    start, end = (
        AutoModelForCausalLM.from_pretrained(str(tiny_model(tied))) for tied in (True, False)
    )
    gaps = []
    firsts = [row for row in undisturbed.to_pylist() if row["sample"] == 0]
    for prompt, row in zip(prompts, firsts, strict=True):
        ids = torch.tensor([[*prompt, *row["response_ids"]]])
        with torch.no_grad():
            both = [model(ids).logits[0, len(prompt) - 1 : -1] for model in (start, end)]
        chosen = torch.tensor(row["response_ids"])[:, None]
        ours, theirs = (x.log_softmax(-1).gather(1, chosen).sum().item() for x in both)
        gaps.append(ours - theirs)
    pool = engine_of(False)
    pool.load_folder(str(tiny_model(False)))
    found = kl_from(pool, prompts, undisturbed, seed=0)
    assert found["value"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert found["low"] < found["value"] < found["high"]
    assert found["value"] > 1
    itself = kl_from(bench.pool, prompts, undisturbed, seed=0)
    assert itself["value"] == pytest.approx(0, abs=1e-4)


def test_checkpoints_are_compared_with_what_their_training_began_with() -> None:
    labels = ["base", "a@0/sft", "a@0/rl", "a@1/sft", "a@1/rl", "none@0/rl", "none@1/rl", "mine"]
    starts = {label: start_of(label, labels) for label in labels}
    assert starts == {
        "base": None, "mine": None, "a@0/sft": "base", "a@0/rl": "a@0/sft", "a@1/sft": "base",
        "a@1/rl": "a@1/sft", "none@0/rl": "base", "none@1/rl": "base",
    }  # fmt: skip
    assert set(pairs_of(labels)) == {
        ("a@0/sft", "a@0/rl"), ("a@1/sft", "a@1/rl"), ("base", "none@0/rl"), ("base", "none@1/rl"),
        ("a@0/rl", "none@0/rl"), ("a@1/rl", "none@1/rl"),
    }  # fmt: skip


def test_arms_that_end_in_other_stages_are_compared_after_them() -> None:
    labels = ["base", "a@0/sft", "a@0/rl", "b@0/sft", "b@0/cooperate", "c@1/cooperate"]
    assert set(pairs_of(labels)) == {
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
    found = checkpoints_of(Job(**document), tmp_path)
    assert list(found) == ["base", "cooperate", "a/sft", "a/rl", "b/sft", "b/cooperate"]
    assert found["b/cooperate"] == str(tmp_path / "arms/b/cooperate/export")


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


def test_a_card_says_what_the_attempts_say() -> None:
    counts = [0, 3, 20, 7]
    found = card(job_of(), "a/path", table_of(counts))
    assert len(found["pass_at_k_curve"]) == SAMPLES
    for k in range(1, SAMPLES + 1):
        expected = np.mean([pass_at_k(SAMPLES, count, k) for count in counts])
        point = found["pass_at_k_curve"][k - 1]
        assert point["value"] == pytest.approx(expected)
        assert point["low"] <= point["value"] <= point["high"]
    assert found["pass_at_k"] == {str(k): found["pass_at_k_curve"][k - 1] for k in (1, 4)}
    right, wrong = sum(counts), 4 * SAMPLES - sum(counts)
    assert found["completions_clipped_ratio"] == pytest.approx(wrong / 80)
    assert found["parts"] == {"answered": pytest.approx(right / 80)}
    # By token: a long answer counts more than a short one.
    tokens, entropy = 5 * right + 15 * wrong, 0.5 * 5 * right + 1.0 * 15 * wrong
    assert found["completions_mean_length"] == pytest.approx(tokens / 80)
    assert found["entropy"] == pytest.approx(entropy / tokens)


@pytest.mark.parametrize("count", [0, SAMPLES])
def test_all_alike_is_no_error(count: int) -> None:
    found = card(job_of(), "a/path", table_of([count] * 3))
    value = count / SAMPLES
    assert found["pass_at_k"]["1"] == {"value": value, "low": value, "high": value}


def test_differences_are_paired_over_problems() -> None:
    """b is better by the same on every problem: their difference is certain, though each is not."""
    tables = {"a/sft": table_of([1, 5, 9, 13]), "b/sft": table_of([3, 7, 11, 15])}
    cards = {label: card(job_of(), "", table) for label, table in tables.items()}
    document = scorecard(job_of(), 4, cards, tables)
    (at_1,) = [row for row in document["differences"] if row["k"] == 1]
    assert (at_1["a"], at_1["b"]) == ("b/sft", "a/sft")
    assert [at_1[key] for key in ("value", "low", "high")] == pytest.approx([0.1] * 3)
    assert cards["a/sft"]["pass_at_k"]["1"]["high"] > cards["a/sft"]["pass_at_k"]["1"]["value"]
