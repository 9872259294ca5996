"""Corpus rows to token ids, once, with the student's tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pear_ray.config import Columns, Job
from pear_ray.data.tokenizer import encode_conversation, fingerprint, load_tokenizer, num_embeddings, tokenizer_digests
from pear_ray.errors import require
from pear_ray.records import TOKENIZED_SCHEMA, Message
from pear_ray.statistics import seed_of

ROLES = ("system", "developer", "user", "assistant", "tool")
SPLITS = ("train", "heldout")
MAX_REASON_CHARS = 1000
FLOAT32_MIN = -3.4028234e38


def check_same_tokenizer(job: Job) -> tuple[str, str]:
    """Return the digests of tokenizer and chat template. Raise ConfigError if a behavior policy has others: a PEAR
    ratio compares two probabilities of the SAME token."""
    ours = tokenizer_digests(load_tokenizer(job.model_path()))
    for source in job.behavior:
        field, path = f"behavior.{source}.path", job.model_path(source)
        theirs = tokenizer_digests(load_tokenizer(path, field))
        part = "vocabulary" if theirs[0] != ours[0] else "chat template"
        expected = f"the {part} of {job.model_path()}, since PEAR divides two probabilities of the same token"
        require(theirs == ours, field, expected, f"another one in {path}")
    return ours


class TokenizeRows:
    """Maps tables of corpus rows to tables of `TokenizedExample`; bad rows get a `reason`."""

    def __init__(self, job: Job) -> None:
        self._tokenizer = load_tokenizer(job.model_path())
        self._corpus = job.corpus
        self._sources = sorted(job.behavior)
        self._max_model_len = job.generator.max_model_len
        self._num_embeddings = min(num_embeddings(job.model_path(source)) for source in (None, *job.behavior))

    def from_parquet(self, table: pa.Table) -> pa.Table:
        """Tokenize rows with columns of their own."""
        return self._table((_parquet_row(table, number), "") for number in range(table.num_rows))

    def from_json_lines(self, table: pa.Table) -> pa.Table:
        """Tokenize JSON in column `text`, read at `place`."""
        columns = (table.column(name).to_pylist() for name in ("text", "place"))
        return self._table((_json_row(text, place), place) for text, place in zip(*columns, strict=True))

    def _table(self, rows: Iterable[tuple[Any, str]]) -> pa.Table:
        return pa.Table.from_pylist([self._tokenize(*row) for row in rows], TOKENIZED_SCHEMA)

    def _tokenize(self, row: Any, place: str) -> dict[str, Any]:
        """Return one row of TOKENIZED_SCHEMA; the keys of a rejected row may be incomplete."""
        result: dict[str, Any] = {"digest": _digest(row), "reason": "", "truncated": False}
        result["example_id"] = place or result["digest"]
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, Mapping):
                raise ValueError(f"expected an object with named values, got {_json_type(row)}")
            reader = RowReader(row, self._corpus.columns)
            result["example_id"] = reader.example_id() or result["example_id"]
            messages = reader.messages()
            result |= self._attribute(reader, messages)
            result |= self._encode(reader, messages)
            result["example_id"] = reader.example_id() or _digest([result["source"], messages])
            if result["scorer"] != result["source"]:
                # Only its author's model could verify recorded log-probs.
                result["recorded_logprobs"] = None
        except ValueError as error:
            result |= {"prompt_ids": [], "response_ids": [], "reason": str(error)[:MAX_REASON_CHARS]}
        return result

    def _attribute(self, reader: RowReader, messages: list[Message]) -> dict[str, Any]:
        corpus = self._corpus
        source = reader.text("source") or corpus.source
        scorer = source if source in self._sources else corpus.fallback_scorer
        is_known = source is not None and scorer is not None
        got = f"{source!r} (corpus.source is the default, corpus.fallback_scorer scores sources without a model)"
        require(is_known, corpus.columns.source, f"an entry of [behavior], {self._sources}", got)
        first_answer = [message["role"] for message in messages].index("assistant")
        content = int(_digest(messages[:first_answer]), 16)
        split = reader.text("split")
        require(split in (*SPLITS, None), corpus.columns.split, "'train', 'heldout' or nothing", repr(split))
        is_heldout = seed_of(content) < corpus.heldout_fraction * 2**31
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
        encoded = encode_conversation(self._tokenizer, messages)
        require(encoded.prompt_ids, "messages", "a prompt before the first answer", "none")
        max_id, limit = max(*encoded.prompt_ids, *encoded.response_ids), self._num_embeddings
        require(max_id < limit, "messages", f"token ids below {limit}, the embeddings of the job's models", max_id)
        sampled = reader.numbers("response_ids", int)
        agrees = sampled is None or sampled == encoded.response_ids
        require(agrees, self._corpus.columns.response_ids, "the ids of the text", "others")
        recorded = self._recorded_logprobs(reader, encoded.trainable)
        num_kept = self._num_kept(len(encoded.prompt_ids), len(encoded.response_ids))
        trainable = encoded.trainable[:num_kept]
        return {
            "prompt_ids": encoded.prompt_ids,
            "response_ids": encoded.response_ids[:num_kept],
            "trainable": None if all(trainable) else trainable,
            "recorded_logprobs": None if recorded is None else recorded[:num_kept],
            "truncated": num_kept < len(encoded.response_ids),
        }

    def _num_kept(self, num_prompt: int, num_response: int) -> int:
        num_tokens, limit = num_prompt + num_response, self._max_model_len
        fits = num_tokens <= limit or self._corpus.on_overlength == "truncate"
        got = f'{num_tokens} (corpus.on_overlength = "truncate" cuts them)'
        require(fits, "messages", f"at most generator.max_model_len = {limit} tokens", got)
        expected = f"fewer than generator.max_model_len = {limit} tokens before the first answer"
        require(num_prompt < limit, "messages", expected, num_prompt)
        return min(num_response, limit - num_prompt)

    def _recorded_logprobs(self, reader: RowReader, trainable: list[bool]) -> list[float] | None:
        """Return the recorded log-probs, 0 for tokens that are not trainable, if used at all."""
        name = self._corpus.columns.behavior_logprobs
        recorded = reader.numbers("behavior_logprobs", float)
        if recorded is None or self._corpus.recorded_logprobs == "ignore":
            return None
        num_tokens = len(trainable)
        require(len(recorded) == num_tokens, name, f"one value per response token, {num_tokens}", len(recorded))
        recorded = [value if own else 0.0 for value, own in zip(recorded, trainable, strict=True)]
        for number, value in enumerate(recorded):
            # Rounding may lift the log-prob of a certain token slightly above 0.
            if not FLOAT32_MIN <= value <= 1e-3:
                raise ValueError(f"{name}.{number}: expected a finite log-prob, got {value}")
        return [float(value) for value in recorded]


@dataclass(frozen=True)
class RowReader:
    """One corpus row, read by the column names of [corpus.columns]; a value of an unexpected type is a ConfigError."""

    row: Mapping[str, Any]
    columns: Columns

    def _value(self, field: str) -> tuple[str, Any]:
        name = getattr(self.columns, field)
        return name, self.row.get(name)

    def text(self, field: str) -> str | None:
        """Return a text, None if it is missing or empty."""
        name, value = self._value(field)
        return None if value is None else _check_text(name, value) or None

    def boolean(self, field: str) -> bool | None:
        """Return a boolean, None if it is missing."""
        name, value = self._value(field)
        require(isinstance(value, bool | None), name, "true, false or nothing", repr(value))
        return value

    def example_id(self) -> str | None:
        """Return the row's id, None if it has none."""
        name, value = self._value("example_id")
        is_valid = isinstance(value, str | int | None) and not isinstance(value, bool)
        require(is_valid, name, "text or an integer", _json_type(value))
        return None if value is None else _check_text(name, str(value)) or None

    def numbers(self, field: str, number: type) -> list[Any] | None:
        """Return a list of numbers (integers are valid floats), None if it is missing."""
        name, value = self._value(field)
        if value is None:
            return None
        is_valid = isinstance(value, list) and all(type(n) in (int, number) for n in value)
        require(is_valid, name, f"a list of {number.__name__}s", _json_type(value))
        return value

    def messages(self) -> list[Message]:
        """Return the conversation, which ends with the assistant's message."""
        if self.columns.prompt is not None:
            halves = {half: self.text(half) for half in ("prompt", "response")}
            for half, text in halves.items():
                require(text is not None, getattr(self.columns, half), "text", "none")
            turns = zip(("user", "assistant"), halves.values(), strict=True)
            return [{"role": role, "content": str(text)} for role, text in turns]
        name, value = self._value("messages")
        require(isinstance(value, list), name, "a list of messages", _json_type(value))
        messages = [_check_message(f"{name}.{n}", message) for n, message in enumerate(value)]
        roles = [message["role"] for message in messages]
        require(roles[-1:] == ["assistant"], name, "'assistant' as the last role", roles)
        require(roles[0] != "assistant", f"{name}.0", "a prompt before an answer", "role 'assistant'")
        return messages


def _check_message(name: str, message: Any) -> Message:
    require(isinstance(message, Mapping), name, "an object", _json_type(message))
    role, content = message.get("role"), message.get("content")
    require(role in ROLES, f"{name}.role", f"one of {', '.join(ROLES)}", repr(role))
    return {"role": role, "content": _check_text(f"{name}.content", content)}


def _check_text(name: str, value: Any) -> str:
    require(isinstance(value, str), name, "text", _json_type(value))
    try:
        # JSON allows lone surrogates, which nothing can store.
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected Unicode text: {error}") from error
    return value


def _parquet_row(table: pa.Table, number: int) -> Any:
    try:
        return table.slice(number, 1).to_pylist()[0]
    except ValueError as error:
        # A text that is not UTF-8. The digest of this message is the row's example_id.
        return ValueError(f"the row cannot be read: {error}")


def _json_row(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"{place}: expected JSON: {error}")


def _digest(value: Any) -> str:
    return fingerprint(json.dumps(value, sort_keys=True, default=str))


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")
