"""What Ray Data maps over a corpus: conversations to token ids, token ids to log-probs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pear_ray.algorithms.seeds import seed_of
from pear_ray.config import Generator as Settings
from pear_ray.engines.generator import Generator
from pear_ray.engines.model import conversation_ids, digests, load_tokenizer


class Tokenise:
    """Adds `prompt_ids`, `response_ids`, `split` and `reason` (why a row is unusable, or "")."""

    def __init__(
        self, path: str, sources: frozenset[str], max_model_len: int, heldout_fraction: float
    ) -> None:
        self._tokenizer = load_tokenizer(path)
        self._digests = digests(self._tokenizer)
        self._sources = sources
        self._max_model_len = max_model_len
        self._heldout_fraction = heldout_fraction

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._row(row) for row in table.to_pylist()], TOKENISED_SCHEMA)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        example_id = str(row.get("example_id") or "")
        recorded = row.get("behaviour_logprobs")
        kept: dict[str, Any] = {
            "example_id": example_id,
            "source": row.get("source") or "",
            "split": row.get("split") or self._split(example_id),
            "correct": row.get("correct"),
            "tokenizer_digest": self._digests[0],
            "template_digest": self._digests[1],
            "prompt_ids": [],
            "response_ids": [],
            "recorded_logprobs": recorded,
            "reason": "",
        }
        try:
            kept["prompt_ids"], kept["response_ids"] = self._ids(row)
        except ValueError as error:
            return kept | {"reason": str(error)}
        return kept

    def _ids(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        messages = row.get("messages")
        if not row.get("example_id"):
            raise ValueError("example_id: read none; expected a name of its own for each row")
        if row.get("source") not in self._sources:
            raise ValueError(
                f"source: read {row.get('source')!r}; expected one of [behaviour]:"
                f" {sorted(self._sources)}"
            )
        if not messages or messages[-1].get("role") != "assistant":
            roles = [message.get("role") for message in messages or []]
            raise ValueError(f"messages: read roles {roles}; expected the last to be 'assistant'")
        if any(not isinstance(message.get("content"), str) for message in messages):
            raise ValueError("messages: read a message without text; expected `content` in each")
        prompt, response = conversation_ids(self._tokenizer, messages)
        length = len(prompt) + len(response)
        # One place is kept for the token which the engine must generate.
        if length >= self._max_model_len:
            raise ValueError(
                f"messages: {length} tokens; expected fewer than generator.max_model_len"
                f" {self._max_model_len}"
            )
        recorded = row.get("response_ids")
        if recorded is not None and list(recorded) != response:
            raise ValueError("response_ids: differ from the ids of the text; expected the same")
        return prompt, response

    def _split(self, example_id: str) -> str:
        return "heldout" if seed_of(example_id) < self._heldout_fraction * 2**31 else "train"


TOKENISED_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("correct", pa.bool_()),
        ("tokenizer_digest", pa.string()),
        ("template_digest", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("recorded_logprobs", pa.list_(pa.float32())),
        ("reason", pa.string()),
    ]
)


class Scorer:
    """Adds `behaviour_logprobs` under one model, and `recorded_gap`: the largest difference to
    log-probs that the row brought along, in nats (null where it brought none)."""

    def __init__(self, path: str, dtype: str, settings: Settings, seed: int) -> None:
        self._path = path
        self._generator = Generator(path, dtype, settings, seed)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        # Rows near in length travel together.
        order = sorted(
            range(len(rows)), key=lambda i: len(rows[i]["prompt_ids"] + rows[i]["response_ids"])
        )
        scores = self._generator.score(
            [(rows[i]["prompt_ids"], rows[i]["response_ids"]) for i in order]
        )
        found: list[np.ndarray] = [scores[0]] * len(rows)
        for place, score in zip(order, scores, strict=True):
            found[place] = score
        recorded = table.column("recorded_logprobs").to_pylist()
        gaps = [
            None if seen is None else float(np.abs(np.asarray(seen, np.float32) - score).max())
            for seen, score in zip(recorded, found, strict=True)
        ]
        columns = table.drop_columns(["recorded_logprobs", "reason"])
        columns = columns.append_column(
            "behaviour_logprobs", pa.array([s.tolist() for s in found], pa.list_(pa.float32()))
        )
        counts = pa.array([len(s) for s in found], pa.int64())
        columns = columns.append_column("num_response_tokens", counts)
        columns = columns.append_column("behaviour_model", pa.array([self._path] * len(rows)))
        return columns.append_column("recorded_gap", pa.array(gaps, pa.float32()))
