"""Read a job: a TOML file that people write, or the JSON of a run directory, with overrides from the command line; no
secrets in either."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from pear_ray.config.base import describe, keys_at
from pear_ray.config.job import Job
from pear_ray.errors import ConfigError, require

COMMAND_LINE = "command line"

# The last word of a key that names a secret. A checkpoint or an arm may be called "token".
SECRET_KEYS = re.compile(
    r"(^|[._-])(secret|password|passwd|credentials?|(api|access|secret|private)[_-]?key)$|[_-]token$|\boptions\.token$",
    re.I,
)
# URLs with a password or a signature, and the prefixes of secrets of Hugging Face, AWS, GitHub and others.
SECRET_VALUES = re.compile(
    r"://[^/\s]*:[^/\s]*@"
    r"|[?&](x-(amz|goog)-(signature|credential|security-token)|sig|signature|(access_)?token|api_?key)="
    r"|\b(hf_|sk-|gh[pousr]_)\w{20,}|\bAKIA[0-9A-Z]{16}\b",
    re.I,
)


def read_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Return the job of a TOML or JSON file, changed by the words of a command line.

    Raises:
        ConfigError: the file cannot be read, a key or value is invalid, or one looks like a secret.
    """
    form = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text()
        document = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: expected {form}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a job file: {error}") from error
    refuse_secrets(str(path), document)
    changed = []
    for key, words in parse_overrides(overrides):
        names, value = parse_override(key, words)
        changed.append(".".join(names))
        refuse_secrets(COMMAND_LINE, {changed[-1]: value})
        for name in reversed(names):
            value = {name: value}
        document = merge(document, value)
    try:
        return Job.model_validate(document)
    except ValidationError as error:
        lines = []
        for line in describe(error, Job):
            field = line.partition(":")[0] + "."
            is_override = any(f"{key}.".startswith(field) or field.startswith(f"{key}.") for key in changed)
            lines.append(f"{COMMAND_LINE if is_override else path}: {line}")
        raise ConfigError("\n".join(lines)) from error


def parse_overrides(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return dotted key and values of each `--key value ...` or `--key=value`; raise ConfigError if a word belongs to
    no key, or a value looks like a secret."""
    items: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            key, is_equation, value = word[2:].partition("=")
            items.append((key, [value] if is_equation else []))
        else:
            require(items, COMMAND_LINE, "--section.key value", repr(word))
            items[-1][1].append(word)
    refuse_secrets(COMMAND_LINE, {key: " ".join(values) for key, values in items})
    return items


def parse_override(key: str, words: Sequence[str]) -> tuple[list[str], Any]:
    """Return the parts of a dotted key as a job spells them, and its value; raise ConfigError if it needs one.

    Hyphens in names of keys count as underscores. Without words a boolean is set, or cleared by `--section.no-key` or
    `--no-section.key`. Several words are a list.
    """
    *parents, last = key.removeprefix("no-").split(".")
    names: list[str] = []
    for part in (*parents, last.removeprefix("no-")):
        _, known = keys_at(names, Job)
        names.append(part.replace("-", "_") if part.replace("-", "_") in known else part)
    field = known.get(names[-1])
    annotation = field.annotation if field else None
    if not words and annotation is bool:
        return names, not (key.startswith("no-") or last.startswith("no-"))
    require(words, f"{COMMAND_LINE}: {'.'.join(names)}", "a value", "none")
    is_text = annotation is str or annotation == (str | None)
    values = [word if is_text else parse_toml(word) for word in words]
    is_list = len(values) > 1 or (get_origin(annotation) is tuple and type(values[0]) is not list)
    return names, values if is_list else values[0]


def parse_toml(word: str) -> Any:
    """Return the value that the word is in TOML, or the word itself."""
    try:
        document = tomllib.loads(f"value = {word}")
    except tomllib.TOMLDecodeError:
        return word
    return document["value"] if len(document) == 1 else word


def merge(old: Any, new: Any) -> Any:
    """Return `old` with the tables of `new` merged into its own, and all else replaced; items of a list are changed by
    number, as in {"0": ...}."""
    if not isinstance(new, dict):
        return new
    if isinstance(old, list):
        items = {str(number): item for number, item in enumerate(old)}
        for number in sorted(new):
            require(number in items, COMMAND_LINE, f"the index of one of {len(old)} items", repr(number))
        return list(merge(items, new).values())
    old = {"type": old} if isinstance(old, str) else old or {}
    return old | {key: merge(old.get(key), value) for key, value in new.items()}


def refuse_secrets(source: str, document: Any) -> None:
    """Raise ConfigError, without the value, if a key or value of a document looks like a secret: a job is stored in the
    run directory, printed and shown in the report."""
    for field, value in strings_in(document):
        if value and (SECRET_KEYS.search(field) or SECRET_VALUES.search(value)):
            raise ConfigError(
                f"{source}: {field}: expected no secret in a job, which is stored and shown, got a value that looks"
                " like one: set it in the environment of the nodes"
            )


def strings_in(document: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted key and value of every string of a document."""
    if isinstance(document, str):
        yield field, document
    elif isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from strings_in(value, f"{field}.{key}" if field else str(key))
