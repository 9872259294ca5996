"""What Ray Data maps over a corpus: conversations to token ids, token ids to log-probs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pear_ray.algorithms.seeds import seed_of
from pear_ray.config import Generator as Settings
from pear_ray.engines.generator import Generator
from pear_ray.engines.tokenizer import conversation_ids, digests, load_tokenizer
from pear_ray.records import SCORED_SCHEMA


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
        logprobs = row.get("behaviour_logprobs")
        if logprobs is not None and len(logprobs) != len(response):
            raise ValueError(
                f"behaviour_logprobs: read {len(logprobs)}; expected one for each of the"
                f" {len(response)} response tokens"
            )
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
    """Turns tokenised rows into ScoredExample rows.

    One engine serves the model of each source in turn: rows of one source should come together.
    """

    def __init__(self, models: dict[str, str], dtype: str, settings: Settings, seed: int) -> None:
        self._models = models
        self._served = next(iter(models.values()))
        self._num_served = 0
        self._generator = Generator(self._served, dtype, settings, seed)

    def __call__(self, table: pa.Table) -> pa.Table:
        sources = table.column("source")
        return pa.concat_tables(
            self._scored(table.filter(pc.equal(sources, source)), self._models[source])
            for source in sources.unique().to_pylist()
        )

    def _scored(self, table: pa.Table, model: str) -> pa.Table:
        """Rows of one source."""
        if model != self._served:
            self._num_served += 1
            self._generator.load_folder(model, self._num_served)
            self._served = model
        rows = table.to_pylist()
        lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows]
        # Rows near in length travel together.
        order = np.argsort(lengths, kind="stable")
        asked = [(rows[i]["prompt_ids"], rows[i]["response_ids"]) for i in order]
        scores = dict(zip(order, self._generator.score(asked), strict=True))
        for i, row in enumerate(rows):
            row["behaviour_logprobs"] = scores[i]
            row["behaviour_model"] = model
            row["recorded_gap"] = gap(row["recorded_logprobs"], scores[i])
        return pa.Table.from_pylist(rows, SCORED_SCHEMA)


def gap(recorded: list[float] | None, score: np.ndarray) -> float | None:
    """Largest difference between the log-probs that a row brought along and its score."""
    if recorded is None:
        return None
    return float(np.abs(np.asarray(recorded, np.float32) - score).max())
