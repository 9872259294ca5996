"""Corpus rows, as they are found, to token ids: once, with the student's tokenizer and template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pear_ray.config import Columns
from pear_ray.data.tokenizer import Conversation, encode_conversation, load_tokenizer
from pear_ray.records import TOKENIZED_SCHEMA, Message
from pear_ray.seeds import seed_of

ROLES = ("system", "developer", "user", "assistant", "tool")
SPLITS = ("train", "heldout")
LONGEST_REASON = 1000
# What float32 can hold.
LOWEST = -3.4028234e38


@dataclass(frozen=True)
class TokenizeConfig:
    """What a row must be: names of its columns, [behavior]'s sources, stand-ins for a source that
    is not named or has no model, and the longest row in tokens."""

    columns: Columns
    sources: frozenset[str]
    source: str | None
    fallback_scorer: str | None
    heldout_fraction: float
    max_model_len: int
    truncates: bool
    keeps_recorded: bool
    num_embeddings: int


class Tokenize:
    """Maps tables of corpus rows to tables of `TokenizedExample`."""

    def __init__(self, path: str, rules: TokenizeConfig) -> None:
        self._tokenizer = load_tokenizer(path)
        self._rules = rules

    def table(self, table: pa.Table) -> pa.Table:
        """Rows with columns of their own."""
        return self._rows((read_row(table, number), "") for number in range(table.num_rows))

    def lines(self, table: pa.Table) -> pa.Table:
        """JSON in `text`, from `place`."""
        texts, places = table.column("text").to_pylist(), table.column("place").to_pylist()
        return self._rows(
            (read_line(text, place), place) for text, place in zip(texts, places, strict=True)
        )

    def _rows(self, rows: Iterable[tuple[Any, str]]) -> pa.Table:
        return pa.Table.from_pylist([self._row(*row) for row in rows], TOKENIZED_SCHEMA)

    def _row(self, row: Any, place: str) -> dict[str, Any]:
        kept: dict[str, Any] = {"digest": digest(row), "reason": "", "truncated": False}
        kept["example_id"] = place or kept["digest"]
        try:
            if isinstance(row, ValueError):
                raise row
            named = RowReader(row, self._rules.columns)
            kept["example_id"] = named.example_id() or kept["example_id"]
            messages = named.messages()
            kept |= self._facts(named, messages)
            kept |= self._tokens(named, messages)
            kept["example_id"] = named.example_id() or digest([kept["source"], messages])
            if kept["scorer"] != kept["source"]:
                # Only its author's model could confirm what a row brings along.
                kept["recorded_logprobs"] = None
        except ValueError as error:
            kept |= {"prompt_ids": [], "response_ids": [], "reason": str(error)[:LONGEST_REASON]}
        return kept

    def _facts(self, named: RowReader, messages: list[Message]) -> dict[str, Any]:
        """Author, scorer, split and rightness of a row."""
        rules = self._rules
        source = named.text("source") or rules.source
        scorer = source if source in rules.sources else rules.fallback_scorer
        if source is None or scorer is None:
            raise ValueError(
                f"{rules.columns.source}: read {source!r}; expected one of [behavior]:"
                f" {sorted(rules.sources)} (or set corpus.source for rows that name none,"
                " corpus.fallback_scorer for sources without a model)"
            )
        first_answer = [message["role"] for message in messages].index("assistant")
        content = int(digest(messages[:first_answer]), 16)
        given = named.text("split")
        if given not in (*SPLITS, None):
            raise ValueError(
                f"{rules.columns.split}: read {given!r}; expected 'train', 'heldout' or nothing"
            )
        is_drawn = seed_of(content) < rules.heldout_fraction * 2**31
        return {
            "source": source,
            "scorer": scorer,
            "split": given or SPLITS[is_drawn],
            "split_is_given": given is not None,
            "correct": named.truth("correct"),
            # Arrow's integers are signed.
            "content": content - 2**63,
        }

    def _tokens(self, named: RowReader, messages: list[Message]) -> dict[str, Any]:
        """Ids of a row, checked against what its author recorded."""
        rules = self._rules
        found = encode_conversation(self._tokenizer, messages)
        if not found.prompt_ids:
            raise ValueError("messages: nothing stands before the first answer; expected a prompt")
        highest = max(*found.prompt_ids, *found.response_ids)
        if highest >= rules.num_embeddings:
            raise ValueError(
                f"messages: token id {highest} is outside the vocabulary; expected ids below"
                f" {rules.num_embeddings}, the embeddings of every model of the job"
            )
        sampled = named.numbers("response_ids", int)
        if sampled is not None and sampled != found.response_ids:
            raise ValueError(
                f"{rules.columns.response_ids}: differ from the ids of the text; expected the same"
            )
        recorded = self._recorded(named, found.trainable)
        num_kept = self._num_kept(found)
        all_trainable = all(found.trainable[:num_kept])
        return {
            "prompt_ids": found.prompt_ids,
            "response_ids": found.response_ids[:num_kept],
            "trainable": None if all_trainable else found.trainable[:num_kept],
            "recorded_logprobs": None if recorded is None else recorded[:num_kept],
            "truncated": num_kept < len(found.response_ids),
        }

    def _num_kept(self, found: Conversation) -> int:
        """How many response tokens fit."""
        num_prompt, limit = len(found.prompt_ids), self._rules.max_model_len
        num_all = num_prompt + len(found.response_ids)
        if num_all <= limit:
            return len(found.response_ids)
        if not self._rules.truncates:
            raise ValueError(
                f"messages: {num_all} tokens; expected at most generator.max_model_len {limit}"
                ' (or corpus.on_overlength = "truncate")'
            )
        if num_prompt >= limit:
            raise ValueError(
                f"messages: {num_prompt} tokens before the first answer; expected fewer than"
                f" generator.max_model_len {limit}"
            )
        return limit - num_prompt

    def _recorded(self, named: RowReader, trainable: list[bool]) -> list[float] | None:
        """The author's log-probs, 0 for tokens that are not the author's, if there and wanted."""
        name = self._rules.columns.behavior_logprobs
        recorded = named.numbers("behavior_logprobs", float)
        if recorded is None or not self._rules.keeps_recorded:
            return None
        if len(recorded) != len(trainable):
            raise ValueError(
                f"{name}: read {len(recorded)}; expected one for each of the {len(trainable)}"
                " response tokens"
            )
        recorded = [value if own else 0.0 for value, own in zip(recorded, trainable, strict=True)]
        for number, value in enumerate(recorded):
            # Rounding may lift the log-prob of a sure token a little above 0.
            if not LOWEST <= value <= 1e-3:
                raise ValueError(f"{name}.{number}: read {value}; expected a finite log-prob")
        return [float(value) for value in recorded]


class RowReader:
    """One row of a corpus, by the names which [corpus.columns] gives its columns.

    Raises:
        ValueError: the row, or a value that is asked for, is of another type than expected.
    """

    def __init__(self, row: Any, columns: Columns) -> None:
        if not isinstance(row, Mapping):
            raise ValueError(f"the row is {kind(row)}; expected an object with named values")
        self._row, self._columns = row, columns

    def _value(self, field: str) -> tuple[str, Any]:
        name = getattr(self._columns, field)
        return name, self._row.get(name)

    def text(self, field: str) -> str | None:
        """A text that may be missing; an empty one counts as missing."""
        name, value = self._value(field)
        return None if value is None else text_of(name, value) or None

    def truth(self, field: str) -> bool | None:
        name, value = self._value(field)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name}: read {value!r}; expected true, false or nothing")
        return value

    def example_id(self) -> str | None:
        """The row's own name, if it has one."""
        name, value = self._value("example_id")
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise ValueError(f"{name}: read {kind(value)}; expected text or a whole number")
        return None if value is None else text_of(name, str(value)) or None

    def numbers(self, field: str, number: type) -> list[Any] | None:
        name, value = self._value(field)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(n) in (int, number) for n in value):
            raise ValueError(f"{name}: read {kind(value)}; expected a list of {number.__name__}s")
        return value

    def messages(self) -> list[Message]:
        """The conversation, its last message the assistant's."""
        if self._columns.prompt is not None:
            halves = {half: self.text(half) for half in ("prompt", "response")}
            for half, value in halves.items():
                if value is None:
                    raise ValueError(f"{getattr(self._columns, half)}: is empty; expected text")
            return [
                {"role": "user", "content": str(halves["prompt"])},
                {"role": "assistant", "content": str(halves["response"])},
            ]
        name, value = self._value("messages")
        if not isinstance(value, list):
            raise ValueError(f"{name}: read {kind(value)}; expected a list of messages")
        messages = [message_of(f"{name}.{n}", message) for n, message in enumerate(value)]
        roles = [message["role"] for message in messages]
        if not roles or roles[-1] != "assistant":
            raise ValueError(f"{name}: read roles {roles}; expected the last to be 'assistant'")
        if roles[0] == "assistant":
            raise ValueError(f"{name}.0: read role 'assistant'; expected a prompt before an answer")
        return messages


def message_of(name: str, message: Any) -> Message:
    """One message of a conversation, checked."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{name}: read {kind(message)}; expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{name}.role: read {role!r}; expected one of {', '.join(ROLES)}")
    return {"role": role, "content": text_of(f"{name}.content", content)}


def text_of(name: str, value: Any) -> str:
    """A text, checked: JSON can spell half a character, which nothing can store."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: read {kind(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: is not Unicode: {error}") from error
    return value


def read_row(table: pa.Table, number: int) -> Any:
    """One row of a table, or the ValueError that says why there is none: nobody checked its
    texts before."""
    try:
        return table.slice(number, 1).to_pylist()[0]
    except ValueError as error:
        return ValueError(f"the row cannot be read: {error}")


def read_line(text: bytes, place: str) -> Any:
    """The JSON of one line, or the ValueError that says why there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"{place}: is not JSON: {error}")


def digest(value: Any) -> str:
    """A fingerprint of anything JSON-like, 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
