"""Weights from learners to vLLM engines, whole and as changes, beside bare memory copies.

    python tests/benchmarks/weights.py [--millions 110] [--rounds 5] [--dtypes bfloat16 float32]

Two publishers (Ray actors) each hold half of every parameter of a Qwen3; two engines serve it. Between versions
`--changed` of the elements change, at random. A round is what the loop does between an optimizer step and the first
token under the new weights: publish, announce, poll, fetch, load. Prints medians over rounds,
of the slower process where two work at the same time:

    total       from the optimizer step to both engines serving the new version
    publish     partitions into the store: checksum, put; of changes also the comparison
    fetch       the store into whole parameters, and the checksum; engines go on answering
    load        vLLM's own load; on CPUs into a spare model, engines go on answering
    copies      the total, in units of three numpy copies of all bytes by two processes at the same
                time: partitions to shared memory, that to private memory, that to other such
    own load    the same with the engine's own load in the place of the third copy
    pause       the share of the total in which an engine could not answer
    store       most that the object store held, in units of one whole version
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file

from pear_ray.config import Job, Pretrain
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.train.new_model import write_new_model
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.publish import Publisher
from pear_ray.weights.registry import PolicyVersions

NUM_RANKS = NUM_ENGINES = 2
BUCKET_MIB = 512
DEADLINE_SECONDS = 300.0
# Ray gives memory back within a second of the last reference; a learner's step is longer than that.
SECONDS_BETWEEN_ROUNDS = 1.5
# What is measured, and whether changes may follow a whole version.
KINDS = {"whole, no changes": 1, "whole, changes follow": 10**9, "changes": 10**9}
COLUMNS = ("mib", "total", "publish", "fetch", "load", "copies", "own load", "pause", "store")


def write_model(folder: Path, num_parameters: int, vocabulary: int) -> None:
    """A tied Qwen3 of width 1024 with at least so many parameters."""
    width, intermediate, heads = 1024, 3072, 16
    of_layer = 4 * width * heads * 64 + 3 * width * intermediate
    shape = Pretrain(
        styles={},
        hidden_size=width,
        intermediate_size=intermediate,
        num_layers=-(-(num_parameters - vocabulary * width) // of_layer),
        num_heads=heads,
        tie_word_embeddings=True,
    )
    write_new_model(folder, shape, [f"w{number}" for number in range(vocabulary - 3)])


@ray.remote(num_cpus=0)
class Rank:
    """A publisher and its partitions."""

    def __init__(self, rank: int, model: str, dtype: str, registry: Any) -> None:
        torch.set_num_threads(1)
        self._rank, self._registry = rank, registry
        self._rng = np.random.default_rng(rank)
        self._partitions = []
        for name, tensor in load_file(Path(model) / "model.safetensors").items():
            flat = tensor.to(getattr(torch, dtype)).flatten()
            size = -(-len(flat) // NUM_RANKS)
            part = torch.zeros(size, dtype=flat.dtype)
            mine = flat[rank * size :][:size]
            part[: len(mine)] = mine
            self._partitions.append((name, tuple(tensor.shape), part))

    def start(self, full_every: int) -> None:
        """A new publisher."""
        self._publisher = Publisher(self._rank, BUCKET_MIB, full_every)

    def change(self, share: float) -> None:
        """Flip the lowest bit of about this share of the elements."""
        for _, _, flat in self._partitions:
            bits = flat.view(torch.uint8).numpy().view(f"u{flat.element_size()}")
            bits[self._rng.integers(0, len(bits), round(share * len(bits)))] ^= 1

    def publish(self, version: int, full: bool) -> tuple[int, float]:
        """Publish and announce; the bytes and the seconds of the first."""
        started = time.perf_counter()
        share = self._publisher.publish(self._partitions, version, full)
        seconds = time.perf_counter() - started
        if full != (share.base_version is None):
            raise RuntimeError(f"version {version}: read {share}, expected whole: {full}")
        ray.get(self._registry.announce.remote(share, NUM_RANKS, 0, "only"))
        return share.num_bytes, seconds


@ray.remote(num_cpus=0)
class Copier:
    """Bare copies of as many bytes as a whole version has."""

    def __init__(self, name: str) -> None:
        self._memory = SharedMemory(name)
        # Whoever made it also removes it.
        resource_tracker.unregister(self._memory._name, "shared_memory")  # type: ignore[attr-defined]
        self._shared = np.ndarray(self._memory.size, np.uint8, self._memory.buf)
        self._private, self._other = (np.ones(self._memory.size, np.uint8) for _ in range(2))

    def copy(self, which: str) -> float:
        """Seconds of one of the three copies."""
        part = len(self._shared) // NUM_RANKS
        target, source = {
            "in": (self._shared[:part], self._private[:part]),
            "out": (self._private, self._shared),
            "load": (self._other, self._private),
        }[which]
        started = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - started


@contextmanager
def copiers(num_bytes: int) -> Iterator[list[Any]]:
    """Two of them, each with its own memory."""
    memories = [SharedMemory(create=True, size=num_bytes) for _ in range(NUM_ENGINES)]
    try:
        started = [Copier.remote(memory.name) for memory in memories]  # type: ignore[attr-defined]
        yield started
        for copier in started:
            ray.kill(copier)
    finally:
        for memory in memories:
            memory.close()
            memory.unlink()


class StorePeak:
    """Most bytes in the object store while the block runs."""

    def __enter__(self) -> StorePeak:
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self.num_bytes, self._ended = 0, threading.Event()

        def look() -> None:
            while not self._ended.wait(0.01):
                held = get_memory_info_reply(state).store_stats.object_store_bytes_used
                self.num_bytes = max(self.num_bytes, held)

        self._thread = threading.Thread(target=look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def one_round(ranks: list[Any], registry: Any, pool: EnginePool, version: int, full: bool) -> dict[str, float]:
    """A version from the optimizer step to both engines."""
    announcement = registry.newest.remote(mark_of(registry), DEADLINE_SECONDS)
    started = time.perf_counter()
    publishing = [rank.publish.remote(version, full) for rank in ranks]
    pool.update_weights(ray.get(announcement).versions, (), DEADLINE_SECONDS)
    while len(pool.weight_updates) < NUM_ENGINES:
        ray.wait(pool.pending_calls, timeout=DEADLINE_SECONDS, fetch_local=False)
        pool.pop_finished()
        if pool.failed_updates:
            raise pool.failed_updates[0][1]
    total = time.perf_counter() - started
    published = ray.get(publishing, timeout=DEADLINE_SECONDS)
    loads, pool.weight_updates = [load for _, load in pool.weight_updates], []
    return {
        "mib": sum(num_bytes for num_bytes, _ in published) / 2**20,
        "total": total,
        "publish": max(seconds for _, seconds in published),
        "fetch": max(load.fetch_seconds for load in loads),
        "load": max(load.prepare_seconds + load.pause_seconds for load in loads),
        "pause_seconds": max(load.pause_seconds for load in loads),
    }


def beside_copies(found: dict[str, float], copies: list[Any]) -> dict[str, float]:
    """The round's ratios to bare copies, made right behind it."""
    bare = {which: max(ray.get([copier.copy.remote(which) for copier in copies])) for which in ("in", "out", "load")}
    return found | {
        "copies": found["total"] / sum(bare.values()),
        "own load": found["total"] / (bare["in"] + bare["out"] + found["load"]),
        "pause": found["pause_seconds"] / found["total"],
    }


def mark_of(registry: Any) -> str:
    """What the next announcement is waited behind. No version is held on to."""
    announced = ray.get(registry.newest.remote(None, 0.1))
    return "" if announced is None else str(announced.cursor)


def measured(
    kind: str, ranks: list[Any], registry: Any, pool: EnginePool, copies: list[Any], words: Any
) -> list[dict[str, float]]:
    """Rounds of one kind, after two that warm up."""
    first = 1 + 1000 * list(KINDS).index(kind)
    ray.get([rank.start.remote(KINDS[kind]) for rank in ranks], timeout=DEADLINE_SECONDS)
    found = []
    for number in range(words.rounds + 2):
        full = number == 0 or kind != "changes"
        with StorePeak() as store:
            times = one_round(ranks, registry, pool, first + number, full)
        found.append(beside_copies(times, copies) | {"store_bytes": store.num_bytes})
        changes = [rank.change.remote(words.changed) for rank in ranks]
        ray.get(changes, timeout=DEADLINE_SECONDS)
        time.sleep(SECONDS_BETWEEN_ROUNDS)
    return found[2:]


def compare(model: str, dtype: str, words: argparse.Namespace) -> None:
    """Print the table of one dtype."""
    count = sum(t.numel() for t in load_file(Path(model) / "model.safetensors").values())
    num_bytes = count * getattr(torch, dtype).itemsize
    settings = {"num_engines": NUM_ENGINES, "num_cpus": 0.5, "threads": 1, "max_new_tokens": 8, "max_model_len": 32}
    document = {"run": {"dir": "unused", "seed": 0}, "model": {"path": model, "dtype": dtype}, "generator": settings}
    job = Job(**document, tasks=[{"name": "countdown"}])  # type: ignore[arg-type]
    registry = PolicyVersions.remote()  # type: ignore[attr-defined]
    ranks = [Rank.remote(rank, model, dtype, registry) for rank in range(NUM_RANKS)]  # type: ignore[attr-defined]
    with copiers(num_bytes) as copies, EnginePool(job, model, print, WeightCache) as pool:
        pool.wait_ready()
        print(f"{dtype}: {count / 1e6:.1f} million parameters, {words.changed:.1%} changed a round")
        print(f"  {'':<23}" + "".join(f"{name:>10}" for name in COLUMNS))
        for kind in KINDS:
            rounds = measured(kind, ranks, registry, pool, copies, words)
            of = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            of["store"] = of["store_bytes"] / num_bytes
            print(f"  {kind:<23}" + "".join(f"{of[name]:>10.3f}" for name in COLUMNS), flush=True)
    for actor in (*ranks, registry):
        ray.kill(actor)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=110, help="parameters, at least")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="rows of the embedding")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each kind")
    parser.add_argument("--changed", type=float, default=0.02, help="share of changed elements")
    parser.add_argument("--store-mib", type=int, default=3072, help="size of Ray's object store")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="dtypes of the parameters")
    words = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), round(words.millions * 1e6), words.vocabulary)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=words.store_mib * 2**20,
        )
        for dtype in words.dtypes:
            compare(folder, dtype, words)
        ray.shutdown()


if __name__ == "__main__":
    main()
