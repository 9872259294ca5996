"""The vLLM engines that a job asks for, as a fleet of actors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray

from pear_ray.config import Generator as Settings
from pear_ray.config import Job
from pear_ray.engines.engine_actor import EngineActor
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import Generator
from pear_ray.weights.adapters import AdapterCache
from pear_ray.weights.fetch import WeightCache


class VllmEngineFactory:
    """vLLM engines, each in a process of its own that `make_replica()` fetches weights for; without
    it they follow no learner. On CPUs an engine that samples reads every prompt in one piece (see
    `Generator`). `labels` are those of the nodes they may run on."""

    def __init__(
        self,
        dtype: str,
        settings: Settings,
        seed: int,
        make_replica: Callable[[], WeightCache | AdapterCache] | None = WeightCache,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        if settings.num_gpus == 0:
            whole = max(settings.batch_tokens, settings.max_model_len + 1)
            settings = settings.model_copy(update={"max_num_batched_tokens": whole})
        self._settings, self._make_replica = settings, make_replica or WeightCache
        self._labels = dict(labels or {})
        follows = make_replica is not None
        self._make = partial(Generator, dtype=dtype, settings=settings, seed=seed, follows=follows)

    def start(self, path: str) -> Any:
        settings = self._settings
        server = EngineActor.options(  # type: ignore[attr-defined]
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_actor_gpus,
            label_selector=self._labels,
            max_concurrency=1000,
        )
        make = partial(self._make, path)
        return server.remote(make, self._make_replica, settings.timeout_seconds)

    def end(self, actor: Any) -> None:
        ray.kill(actor)


def engine_pool(
    job: Job,
    path: str,
    tell: Callable[[str, str], None],
    make_replica: Callable[[], WeightCache | AdapterCache] | None = None,
) -> EnginePool:
    """The engines that a job asks for, serving the model in `path`; `make_replica` as above."""
    settings = job.generator
    labels = job.placement.generators
    servers = VllmEngineFactory(job.model.dtype, settings, job.run.seed, make_replica, labels)
    return EnginePool(servers, path, settings, tell)
