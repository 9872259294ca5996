"""The engines of a pool: how their actors start, and the record the pool keeps of each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from pear_ray.config import Generator as Settings
from pear_ray.engines.engine_actor import EngineActor
from pear_ray.engines.generator import Generator, Request, SampleRequest
from pear_ray.weights.adapters import AdapterCache
from pear_ray.weights.fetch import WeightCache

MakeCache = Callable[[], WeightCache | AdapterCache]


@dataclass
class InFlight:
    """A request that is not finished; `num_attempts` counts the engines it was sent to."""

    key: Hashable
    request: Request
    num_attempts: int = 0

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences the engine generates or scores for it."""
        return self.request.num_samples if isinstance(self.request, SampleRequest) else 1


@dataclass(eq=False)
class EngineHandle:
    """The pool's record of one engine actor."""

    number: int
    actor: Any
    is_ready: bool = False
    node_id: str = ""
    has_finished_any: bool = False
    num_failed_updates: int = 0
    """Failed weight updates in a row."""
    polled_at: float = 0.0
    """Start of the open poll, in `time.monotonic()` seconds."""
    is_updating: bool = False
    requested_version: int = -1
    """Newest weight version the engine was asked to load."""
    in_flight: dict[str, InFlight] = field(default_factory=dict)
    num_sequences: int = 0
    """Unfinished sequences of all requests in flight."""
    idle_seconds: float = 0.0


@dataclass
class VllmEngineFactory:
    """Starts vLLM engines, each in an actor of its own on a node with `labels`.

    `make_cache()` builds the cache through which an engine fetches weight versions; None: the engines follow no
    learner.
    """

    dtype: str
    settings: Settings
    seed: int
    make_cache: MakeCache | None = WeightCache
    labels: Mapping[str, str] = field(default_factory=dict)

    def start(self, path: str) -> Any:
        """Return an actor whose engine serves the model in `path`."""
        settings = self.settings
        if settings.num_gpus == 0:
            # No chunked prefill: see `Generator`.
            batch_tokens = max(settings.max_num_batched_tokens, settings.max_model_len + 1)
            settings = settings.model_copy(update={"max_num_batched_tokens": batch_tokens})
        follows_learner = self.make_cache is not None
        make_engine = partial(Generator, path, self.dtype, settings, self.seed, follows_learner=follows_learner)
        actor_class = EngineActor.options(  # type: ignore[attr-defined]
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_actor_gpus,
            label_selector=dict(self.labels),
            max_concurrency=1000,
        )
        make_cache = self.make_cache or WeightCache
        return actor_class.remote(make_engine, make_cache, settings.timeout_seconds)

    def stop(self, actor: Any) -> None:
        """Kill an engine actor."""
        ray.kill(actor)
