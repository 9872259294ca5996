"""A corpus with every kind of row, and the log-probs of its rows by transformers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pear_ray.data.tokenizer import encode_conversation, load_tokenizer

NUM_ROWS = 600
MAX_MODEL_LEN = 64
TOP = 3
WORDS = [f"w{number}" for number in range(97)]

Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Corpus:
    """A job on a corpus: rows by example_id, rejected ones, and models by source."""

    max_model_len = MAX_MODEL_LEN
    num_top = TOP
    job: Path
    rows: dict[str, dict[str, Any]]
    bad: dict[str, str]
    models: dict[str, str]


@pytest.fixture(scope="session")
def by_transformers() -> Callable[[str, list[Row]], list[torch.Tensor]]:
    """Log-softmax [response tokens, vocabulary] at the positions of each response, by row."""

    @torch.no_grad()
    def score(model: str, rows: list[Row]) -> list[torch.Tensor]:
        network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
        found = []
        for prompt, response in rows:
            logits = network(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
            found.append(logits.log_softmax(-1)[len(prompt) - 1 : -1])
        return found

    return score


def conversation(draw: np.random.Generator, number: int) -> list[dict[str, str]]:
    """One turn or two; every fortieth is too long."""
    lengths = [draw.integers(1, 14), draw.integers(1, 18)]
    if number % 5 == 0:
        lengths += [draw.integers(1, 6), draw.integers(1, 14)]
    if number % 40 == 1:
        lengths[-1] = MAX_MODEL_LEN
    roles = ("user", "assistant") * 2
    return [
        {"role": role, "content": " ".join(draw.choice(WORDS, length))}
        for role, length in zip(roles, lengths, strict=False)
    ]


@pytest.fixture(scope="session")
def corpus(
    tiny_model: Callable[..., Path],
    by_transformers: Callable[[str, list[Row]], list[torch.Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Corpus:
    """Four sources: two with a model, one that also records log-probs, and an unknown one with a fallback scorer; some
    bad rows; two gzipped files. Rows exceed an engine's batch."""
    folder = tmp_path_factory.mktemp("corpus")
    models = {"a": tiny_model(True, 0), "b": tiny_model(True, 1), "c": tiny_model(True, 2)}
    tokenizer = load_tokenizer(str(models["a"]))
    draw = np.random.default_rng(0)
    rows: dict[str, dict[str, Any]] = {}
    for number in range(NUM_ROWS):
        name = f"row-{draw.integers(10**9):09d}"
        source = "abc?"[number % 4]
        rows[name] = {"example_id": name, "source": source, "messages": conversation(draw, number)}
    own = [row for row in rows.values() if row["source"] == "c"]
    found = [encode_conversation(tokenizer, row["messages"]) for row in own]
    ids = [(one.prompt_ids, one.response_ids) for one in found]
    for row, (_, response), table in zip(own, ids, by_transformers(str(models["c"]), ids), strict=True):
        row["response_ids"] = response
        row["behavior_logprobs"] = table[range(len(response)), response].tolist()
    bad = {"bad-1": "messages", "bad-2": "behavior_logprobs", "bad-3": "split"}
    worse = [
        {"example_id": "bad-1", "source": "a", "messages": []},
        {**own[0], "example_id": "bad-2", "behavior_logprobs": [float("nan")]},
        {**own[1], "example_id": "bad-3", "split": "test"},
        next(iter(rows.values())),
    ]
    lines = [json.dumps(row) for row in [*rows.values(), *worse]]
    for part in range(2):
        with gzip.open(folder / f"{part}.jsonl.gz", "wt") as file:
            file.write("\n".join(lines[part::2]))
    behavior = "".join(f'[behavior.{s}]\npath = "{path}"\n' for s, path in models.items())
    job = folder / "job.toml"
    job.write_text(
        f"""
        [run]
        dir = "{folder}/run"
        [model]
        path = "{models["a"]}"
        dtype = "float32"
        {behavior}
        [corpus]
        path = "{folder}/*.jsonl.gz"
        fallback_scorer = "b"
        on_overlength = "truncate"
        heldout_fraction = 0.2
        max_rejected_fraction = 0.01
        max_logprob_gap = 1e-4
        probe_rows = 60
        rows_per_part = 64
        top_logprobs = {TOP}
        [generator]
        num_cpus = 2
        threads = 1
        max_new_tokens = 8
        max_model_len = {MAX_MODEL_LEN}
        max_num_seqs = 32
        max_num_batched_tokens = 48
        timeout_seconds = 200
        [[tasks]]
        name = "countdown"
        """
    )
    return Corpus(job, rows, bad, {s: str(path) for s, path in models.items()})


@pytest.fixture(scope="session")
def scored_run(corpus: Corpus, ray_session: None) -> Path:
    """The run directory of an uninterrupted stage `score` on that corpus."""
    from pear_ray.__main__ import run_command

    assert run_command(["score", str(corpus.job)]) == 0
    return corpus.job.parent / "run"
