"""Who belongs to a fleet of engines, and what it is at work on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pear_ray.engines.generator import SampleRequest, ScoreRequest


@dataclass
class InFlight:
    """Work on its way: the caller's key, and how many engines have taken it up."""

    key: Hashable
    work: SampleRequest | ScoreRequest
    num_attempts: int = 0

    @property
    def num_sequences(self) -> int:
        """Sequences that it keeps an engine busy with."""
        return self.work.num_samples if isinstance(self.work, SampleRequest) else 1


@dataclass(eq=False)
class EngineHandle:
    """One engine, as its owner sees it."""

    name: str
    actor: Any
    stands: bool = False
    node: str = ""
    """Id of the node that it stands on."""
    has_finished: bool = False
    """Whether it has done anything yet."""
    num_failed_loads: int = 0
    """Loads of weights that failed since the last that did not."""
    polled: float = 0.0
    """When it was last asked what it has finished."""
    loading: bool = False
    """Whether it is loading weights."""
    asked: int = -1
    """Newest version that it was asked to serve."""
    open: dict[str, InFlight] = field(default_factory=dict)
    num_sequences: int = 0
    """Sequences that it has not finished."""
    idle_seconds: float = 0.0
    """Time in which it has had nothing to do."""


class EngineFactory(Protocol):
    """Where engines come from: actors with the methods of `Server`."""

    def start(self, path: str) -> Any:
        """An actor whose engine serves the model in `path`."""

    def end(self, actor: Any) -> None:
        """End one."""
