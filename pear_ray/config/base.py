"""The base class of every section of a job, and the wording of mistakes in one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A table of a job: frozen, with a docstring for every key."""

    # JSON has no infinity, and config.json must read back as the same job.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _run_check(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        """Raise ConfigError if keys do not fit together; for sections to override."""


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError(f"expected the lower bound first, got {list(bounds)}")
    return bounds


Fraction = Annotated[float, Field(ge=0, le=1)]
Bounds = Annotated[tuple[float, float], AfterValidator(_ordered)]


def by_type(default: str) -> BeforeValidator:
    """Return the validator of a union of sections with different `type`s: "gspo" is short for {type = "gspo"}, and a
    table without a type has the default one."""

    def complete(value: Any) -> Any:
        if isinstance(value, str):
            return {"type": value}
        return {"type": default} | value if isinstance(value, dict) else value

    return BeforeValidator(complete)


def overridden(section: Section, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's values with some changed. A member of a union keeps its type, and the keys set in it, unless
    the change names another type: {"loss": {"clip_ratio": ...}} on a job with GSPO stays GSPO."""
    values = section.model_dump()
    for key, change in changes.items():
        old = getattr(section, key, None)
        if isinstance(old, Section) and (own_type := tag(type(old))):
            change = {"type": change} if isinstance(change, str) else change
            if isinstance(change, dict) and change.get("type", own_type) == own_type:
                # Only keys that were set: others may be derived from those that change.
                change = old.model_dump(exclude_unset=True) | {"type": own_type} | change
        values[key] = change
    return values


def describe(error: ValidationError, root: type[Section], prefix: str = "") -> list[str]:
    """Return one line "field: expected Y, got X" for each mistake in a value of class `root`."""
    lines = []
    details = error.errors(include_url=False)
    for detail in details:
        location = detail["loc"]
        inner = (other["loc"] for other in details if other is not detail)
        if detail["type"] == "default_factory_not_called" or (
            # pydantic leaves out invalid items, and then finds too few.
            detail["type"] == "too_short" and any(o[: len(location)] == location for o in inner)
        ):
            continue
        names, _ = keys_at(location, root)
        _, known = keys_at(location[:-1], root)
        field = ".".join([prefix, *names] if prefix else names)
        # A validator's message may begin with a key below the section that it checks.
        for message in _message(detail, known).split("\n"):
            joint = "." if re.match(r"[\w.]+: ", message) else ": "
            lines.append(f"{field}{joint}{message}" if field else message)
    return lines


def _message(detail: Mapping[str, Any], known: Mapping[str, FieldInfo]) -> str:
    value = detail["input"]
    got = "" if isinstance(value, dict | BaseModel) else f", got {value!r}"
    match detail["type"]:
        case "value_error":
            return str(detail["ctx"]["error"])
        case "missing":
            return "missing; expected a value"
        case "extra_forbidden":
            return f"unknown key{got}; expected one of: {', '.join(sorted(known))}"
        case "union_tag_invalid":
            return f"expected one of {detail['ctx']['expected_tags']}, got {detail['ctx']['tag']!r}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"expected a table{got}"
    expected = re.sub(r"^\w+ should (be|have|match) ", "", detail["msg"])
    return f"expected {re.split(', (?:unable|got) | after validation', expected)[0]}{got}"


def keys_at(location: Sequence[int | str], root: type[Section]) -> tuple[list[str], dict[str, FieldInfo]]:
    """Return a location's parts without pydantic's union tags, and the keys that a table there may have: keys_at(("rl",
    "loss", "nft"), Job) is (["rl", "loss"], {"type": ...})."""
    names = []
    sections: list[type[Section]] = [root]
    is_dict = False
    for part in location:
        tagged = [section for section in sections if tag(section) == part]
        if tagged or "[" in str(part):
            sections = tagged or sections
            continue
        names.append(str(part))
        found = [section.model_fields[part] for section in sections if part in section.model_fields]
        if found and not is_dict:
            sections = [inner for field in found for inner in sections_in(field.annotation)]
            is_dict = get_origin(found[0].annotation) is dict
        else:
            is_dict = False
    return names, {name: f for section in sections for name, f in section.model_fields.items()}


def tag(section: type[Section]) -> str | None:
    """Return the value of `type` that selects the section in a union, if it is a member of one."""
    field = section.model_fields.get("type")
    return None if field is None else str(field.default)


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections in an annotation: in unions, Annotated, tuples and values of dicts."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)
