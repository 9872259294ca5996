"""A job holds no secret: it is kept in the run folder, printed and shown in the report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pear_ray.errors import ConfigError

# The last word of a key that names a secret. A checkpoint may be called "token", as an arm is.
NAMES = re.compile(
    r"(^|[._-])(secret|password|passwd|credentials?|(api|access|secret|private)[_-]?key)$"
    r"|[_-]token$|\boptions\.token$",
    re.I,
)
# Addresses with a password or a signature in them, and what Hugging Face, AWS, GitHub and others
# begin their secrets with.
SHAPES = re.compile(
    r"://[^/\s]*:[^/\s]*@"
    r"|[?&](x-(amz|goog)-(signature|credential|security-token)|sig|signature|(access_)?token"
    r"|api_?key)="
    r"|\b(hf_|sk-|gh[pousr]_)\w{20,}|\bAKIA[0-9A-Z]{16}\b",
    re.I,
)


def refuse_secrets(where: str, document: Any) -> None:
    """Stop where a job says what looks like a secret, without saying it again.

    Raises:
        ConfigError: it does; names the field.
    """
    for field, value in leaves(document):
        if value and (NAMES.search(field) or SHAPES.search(value)):
            raise ConfigError(
                f"{where}: {field}: read what looks like a secret (not shown); expected none in a"
                " job, which is kept and shown: put it into the environment of the nodes"
            )


def leaves(document: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a document, with the dotted name of its field."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield from leaves(value, f"{field}.{key}" if field else str(key))
    elif isinstance(document, list | tuple):
        for number, value in enumerate(document):
            yield from leaves(value, f"{field}.{number}")
    elif isinstance(document, str):
        yield field, document
