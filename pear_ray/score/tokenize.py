"""Corpus rows to token ids, once, with the student's tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pear_ray.config import Columns, Job
from pear_ray.data.tokenizer import (
    EncodedConversation,
    encode_conversation,
    fingerprint,
    load_tokenizer,
    num_embeddings,
)
from pear_ray.records import TOKENIZED_SCHEMA, Message
from pear_ray.seeds import seed_of

ROLES = ("system", "developer", "user", "assistant", "tool")
SPLITS = ("train", "heldout")
MAX_REASON_CHARS = 1000
FLOAT32_MIN = -3.4028234e38


@dataclass(frozen=True)
class TokenizeConfig:
    """Requirements on corpus rows.

    `sources` are the entries of [behavior]; `default_source` is that of rows without one, and `fallback_scorer` scores
    rows of sources without a model. `max_model_len` and `num_embeddings` bound the length and the ids of a row.
    """

    columns: Columns
    sources: frozenset[str]
    default_source: str | None
    fallback_scorer: str | None
    heldout_fraction: float
    max_model_len: int
    truncates: bool
    keeps_recorded: bool
    num_embeddings: int

    @classmethod
    def from_job(cls, job: Job) -> TokenizeConfig:
        """Return what [corpus] and the job's models require."""
        paths = [job.model_path(), *(job.model_path(source) for source in job.behavior)]
        corpus = job.corpus
        return cls(
            columns=corpus.columns,
            sources=frozenset(job.behavior),
            default_source=corpus.source,
            fallback_scorer=corpus.fallback_scorer,
            heldout_fraction=corpus.heldout_fraction,
            max_model_len=job.generator.max_model_len,
            truncates=corpus.on_overlength == "truncate",
            keeps_recorded=corpus.recorded_logprobs == "probe",
            num_embeddings=min(num_embeddings(path) for path in paths),
        )


class TokenizeRows:
    """Maps tables of corpus rows to tables of `TokenizedExample`; bad rows get a `reason`."""

    def __init__(self, path: str, config: TokenizeConfig) -> None:
        self._tokenizer = load_tokenizer(path)
        self._config = config

    def from_parquet(self, table: pa.Table) -> pa.Table:
        """Tokenize rows with columns of their own."""
        return self._table((parquet_row(table, number), "") for number in range(table.num_rows))

    def from_json_lines(self, table: pa.Table) -> pa.Table:
        """Tokenize JSON in column `text`, read at `place`."""
        columns = (table.column(name).to_pylist() for name in ("text", "place"))
        return self._table((json_row(text, place), place) for text, place in zip(*columns, strict=True))

    def _table(self, rows: Iterable[tuple[Any, str]]) -> pa.Table:
        return pa.Table.from_pylist([self._tokenize(*row) for row in rows], TOKENIZED_SCHEMA)

    def _tokenize(self, row: Any, place: str) -> dict[str, Any]:
        """Return one row of TOKENIZED_SCHEMA; the keys of a rejected row may be incomplete."""
        result: dict[str, Any] = {"digest": digest(row), "reason": "", "truncated": False}
        result["example_id"] = place or result["digest"]
        try:
            if isinstance(row, ValueError):
                raise row
            reader = RowReader(row, self._config.columns)
            result["example_id"] = reader.example_id() or result["example_id"]
            messages = reader.messages()
            result |= self._attribute(reader, messages)
            result |= self._encode(reader, messages)
            result["example_id"] = reader.example_id() or digest([result["source"], messages])
            if result["scorer"] != result["source"]:
                # Only its author's model could verify recorded log-probs.
                result["recorded_logprobs"] = None
        except ValueError as error:
            reason = str(error)[:MAX_REASON_CHARS]
            result |= {"prompt_ids": [], "response_ids": [], "reason": reason}
        return result

    def _attribute(self, reader: RowReader, messages: list[Message]) -> dict[str, Any]:
        """Return source, scorer, split and correctness of a row."""
        config = self._config
        source = reader.text("source") or config.default_source
        scorer = source if source in config.sources else config.fallback_scorer
        if source is None or scorer is None:
            raise ValueError(
                f"{config.columns.source}: expected an entry of [behavior], {sorted(config.sources)}, got {source!r}"
                " (corpus.source is the default, corpus.fallback_scorer scores sources without a model)"
            )
        first_answer = [message["role"] for message in messages].index("assistant")
        content = int(digest(messages[:first_answer]), 16)
        split = reader.text("split")
        if split not in (*SPLITS, None):
            raise ValueError(f"{config.columns.split}: expected 'train', 'heldout' or nothing, got {split!r}")
        is_heldout = seed_of(content) < config.heldout_fraction * 2**31
        return {
            "source": source,
            "scorer": scorer,
            "split": split or SPLITS[is_heldout],
            "split_is_given": split is not None,
            "correct": reader.boolean("correct"),
            # Arrow's int64 is signed.
            "content": content - 2**63,
        }

    def _encode(self, reader: RowReader, messages: list[Message]) -> dict[str, Any]:
        """Return the token ids of a row, checked against the recorded ones."""
        config = self._config
        encoded = encode_conversation(self._tokenizer, messages)
        if not encoded.prompt_ids:
            raise ValueError("messages: expected a prompt before the first answer, got none")
        max_id = max(*encoded.prompt_ids, *encoded.response_ids)
        if max_id >= config.num_embeddings:
            raise ValueError(
                f"messages: expected token ids below {config.num_embeddings}, the embeddings of"
                f" the job's models, got {max_id}"
            )
        sampled = reader.numbers("response_ids", int)
        if sampled is not None and sampled != encoded.response_ids:
            raise ValueError(f"{config.columns.response_ids}: expected the ids of the text, got others")
        recorded = self._recorded_logprobs(reader, encoded.trainable)
        num_kept = self._num_kept(encoded)
        trainable = encoded.trainable[:num_kept]
        return {
            "prompt_ids": encoded.prompt_ids,
            "response_ids": encoded.response_ids[:num_kept],
            "trainable": None if all(trainable) else trainable,
            "recorded_logprobs": None if recorded is None else recorded[:num_kept],
            "truncated": num_kept < len(encoded.response_ids),
        }

    def _num_kept(self, encoded: EncodedConversation) -> int:
        """Return the number of response tokens that fit the context."""
        num_prompt, limit = len(encoded.prompt_ids), self._config.max_model_len
        num_tokens = num_prompt + len(encoded.response_ids)
        if num_tokens <= limit:
            return len(encoded.response_ids)
        if not self._config.truncates:
            raise ValueError(
                f"messages: expected at most generator.max_model_len = {limit} tokens, got"
                f' {num_tokens} (corpus.on_overlength = "truncate" cuts them)'
            )
        if num_prompt >= limit:
            raise ValueError(
                f"messages: expected fewer than generator.max_model_len = {limit} tokens before the"
                f" first answer, got {num_prompt}"
            )
        return limit - num_prompt

    def _recorded_logprobs(self, reader: RowReader, trainable: list[bool]) -> list[float] | None:
        """Return the recorded log-probs, 0 for tokens that are not trainable, if used at all."""
        name = self._config.columns.behavior_logprobs
        recorded = reader.numbers("behavior_logprobs", float)
        if recorded is None or not self._config.keeps_recorded:
            return None
        if len(recorded) != len(trainable):
            raise ValueError(f"{name}: expected one value per response token, {len(trainable)}, got {len(recorded)}")
        recorded = [value if own else 0.0 for value, own in zip(recorded, trainable, strict=True)]
        for number, value in enumerate(recorded):
            # Rounding may lift the log-prob of a certain token slightly above 0.
            if not FLOAT32_MIN <= value <= 1e-3:
                raise ValueError(f"{name}.{number}: expected a finite log-prob, got {value}")
        return [float(value) for value in recorded]


class RowReader:
    """One corpus row, read by the column names of [corpus.columns].

    Methods raise ValueError if the row or a value has an unexpected type.
    """

    def __init__(self, row: Any, columns: Columns) -> None:
        if not isinstance(row, Mapping):
            raise ValueError(f"expected an object with named values, got {json_type(row)}")
        self._row = row
        self._columns = columns

    def _value(self, field: str) -> tuple[str, Any]:
        name = getattr(self._columns, field)
        return name, self._row.get(name)

    def text(self, field: str) -> str | None:
        """Return a text, None if it is missing or empty."""
        name, value = self._value(field)
        return None if value is None else check_text(name, value) or None

    def boolean(self, field: str) -> bool | None:
        """Return a boolean, None if it is missing."""
        name, value = self._value(field)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name}: expected true, false or nothing, got {value!r}")
        return value

    def example_id(self) -> str | None:
        """Return the row's id, None if it has none."""
        name, value = self._value("example_id")
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise ValueError(f"{name}: expected text or an integer, got {json_type(value)}")
        return None if value is None else check_text(name, str(value)) or None

    def numbers(self, field: str, number: type) -> list[Any] | None:
        """Return a list of numbers (integers are valid floats), None if it is missing."""
        name, value = self._value(field)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(n) in (int, number) for n in value):
            raise ValueError(f"{name}: expected a list of {number.__name__}s, got {json_type(value)}")
        return value

    def messages(self) -> list[Message]:
        """Return the conversation, which ends with the assistant's message."""
        if self._columns.prompt is not None:
            halves = {half: self.text(half) for half in ("prompt", "response")}
            for half, value in halves.items():
                if value is None:
                    raise ValueError(f"{getattr(self._columns, half)}: expected text, got none")
            return [
                {"role": "user", "content": str(halves["prompt"])},
                {"role": "assistant", "content": str(halves["response"])},
            ]
        name, value = self._value("messages")
        if not isinstance(value, list):
            raise ValueError(f"{name}: expected a list of messages, got {json_type(value)}")
        messages = [check_message(f"{name}.{n}", message) for n, message in enumerate(value)]
        roles = [message["role"] for message in messages]
        if not roles or roles[-1] != "assistant":
            raise ValueError(f"{name}: expected 'assistant' as the last role, got {roles}")
        if roles[0] == "assistant":
            raise ValueError(f"{name}.0: expected a prompt before an answer, got role 'assistant'")
        return messages


def check_message(name: str, message: Any) -> Message:
    """Return one message with known role and content as text, or raise ValueError."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{name}: expected an object, got {json_type(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{name}.role: expected one of {', '.join(ROLES)}, got {role!r}")
    return {"role": role, "content": check_text(f"{name}.content", content)}


def check_text(name: str, value: Any) -> str:
    """Return a text, or raise ValueError; JSON allows lone surrogates, which nothing can store."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {json_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected Unicode text: {error}") from error
    return value


def parquet_row(table: pa.Table, number: int) -> Any:
    """Return one row of a table, or the ValueError of a text that is not UTF-8."""
    try:
        return table.slice(number, 1).to_pylist()[0]
    except ValueError as error:
        # The digest of this text is the row's example_id.
        return ValueError(f"the row cannot be read: {error}")


def json_row(text: bytes, place: str) -> Any:
    """Return the JSON of one line, or the ValueError of a line that is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"{place}: expected JSON: {error}")


def digest(value: Any) -> str:
    """Return a fingerprint of a JSON-like value, independent of the order of keys."""
    return fingerprint(json.dumps(value, sort_keys=True, default=str))


def json_type(value: Any) -> str:
    """Return the type of a value in JSON's terms."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
