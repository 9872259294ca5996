"""How a mistake in a job is told: file, field, what was expected, what was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError


def format_validation_error(path: Path | str, error: ValidationError, root: type[BaseModel]) -> str:
    """One line per mistake: file, field, what was expected, what was read."""
    lines, mistakes = [], error.errors()
    for mistake in mistakes:
        here = mistake["loc"]
        others = [other["loc"] for other in mistakes if other is not mistake]
        if mistake["type"] == "too_short" and any(o[: len(here)] == here for o in others):
            # Only because pydantic has left out the items that are mistakes themselves.
            continue
        field = ".".join(str(part) for part in mistake["loc"]) or "(whole job)"
        if mistake["type"] == "extra_forbidden":
            known = known_keys(mistake["loc"][:-1], root)
            message = f"unknown key; expected one of: {', '.join(known)}"
        else:
            message = mistake["msg"]
        read = mistake["input"]
        shown = "" if isinstance(read, dict | BaseModel) else f"; read {read!r}"
        lines.append(f"{path}: {field}: {message}{shown}")
    return "\n".join(lines)


def known_keys(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """Keys which `root` may have at `location`, a path of keys and list positions."""
    here: Any = root
    for part in location:
        fields = getattr(here, "model_fields", {})
        if isinstance(part, int) or part not in fields:
            continue
        annotation = fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        here = next((c for c in candidates if hasattr(c, "model_fields")), here)
    return sorted(here.model_fields)
