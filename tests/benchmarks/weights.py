"""Weights from learners to generators, full and as deltas, beside bare memory copies.

    python tests/benchmarks/weights.py [--millions 110] [--rounds 5] [--dtypes bfloat16 float32]

Two publishers (Ray actors) each hold half of every parameter of a dense model (width 1024, an
embedding of `--vocabulary` rows, as many layers as `--millions` asks for); two consumers fetch
every version. Between versions `--changed` of the elements change, at random.

    publish     partitions into the store: checksum, put; of deltas also the comparison
    fetch       the consumers' wait for the objects, which are in their node's store
    assemble    the rest of `Replica.fetch`: into whole parameters, and the checksum

Seconds are medians over rounds of the slower process, as both work at the same time. `of bare` is
their ratio to a bare numpy copy of the bytes that travelled, by the same processes at the same
time: partitions to shared memory for publish, shared memory to private memory for assemble.
"""

from __future__ import annotations

import argparse
import statistics
import time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import ray
import torch

from pear_ray.engines import keep_freed_memory
from pear_ray.weights.assemble import Replica, pull
from pear_ray.weights.manifest import WeightVersion
from pear_ray.weights.publish import Publisher

NUM_RANKS = NUM_CONSUMERS = 2
WIDTH, INTERMEDIATE, KEYS = 1024, 3072, 512
DEADLINE_SECONDS = 300.0
# What is measured, and whether deltas may follow a full version.
KINDS = {"full, no deltas": 1, "full, deltas follow": 10**9, "delta": 10**9}


def shapes_of(num_parameters: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """A tied model's parameters by name: embedding, and layers until there are enough."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, WIDTH)}
    layer = 0
    while sum(int(np.prod(shape)) for shape in shapes.values()) < num_parameters:
        start = f"model.layers.{layer}"
        shapes |= {
            f"{start}.self_attn.q_proj.weight": (WIDTH, WIDTH),
            f"{start}.self_attn.k_proj.weight": (KEYS, WIDTH),
            f"{start}.self_attn.v_proj.weight": (KEYS, WIDTH),
            f"{start}.self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"{start}.mlp.gate_proj.weight": (INTERMEDIATE, WIDTH),
            f"{start}.mlp.up_proj.weight": (INTERMEDIATE, WIDTH),
            f"{start}.mlp.down_proj.weight": (WIDTH, INTERMEDIATE),
            f"{start}.input_layernorm.weight": (WIDTH,),
            f"{start}.post_attention_layernorm.weight": (WIDTH,),
        }
        layer += 1
    return shapes


class Shared:
    """Shared memory that another process made, and private memory as long."""

    def __init__(self, name: str) -> None:
        self._memory = SharedMemory(name)
        # Whoever made it also removes it.
        resource_tracker.unregister(self._memory._name, "shared_memory")  # type: ignore[attr-defined]
        self.shared = np.ndarray(self._memory.size, np.uint8, self._memory.buf)
        self.private = np.ones(len(self.shared), np.uint8)


@ray.remote(num_cpus=0)
class Rank:
    """A publisher, its partitions, and the bare copy of them."""

    def __init__(self, rank: int, shapes: dict[str, tuple[int, ...]], dtype: str, name: str):
        torch.set_num_threads(1)
        self._rank, self._shapes = rank, shapes
        draw = torch.Generator().manual_seed(rank)
        self._flats = {
            key: torch.randn(-(-int(np.prod(shape)) // NUM_RANKS), generator=draw).to(
                getattr(torch, dtype)
            )
            for key, shape in shapes.items()
        }
        self._rng = np.random.default_rng(rank)
        self._copy = Shared(name)

    def start(self, bucket_mib: int, full_every: int) -> None:
        """A new publisher."""
        self._publisher = Publisher(self._rank, bucket_mib, full_every)

    def change(self, share: float) -> None:
        """Flip the lowest bit of about this share of the elements."""
        for flat in self._flats.values():
            bits = flat.view(torch.uint8).numpy().view(f"u{flat.element_size()}")
            bits[self._rng.integers(0, len(bits), round(share * len(bits)))] ^= 1

    def publish(self, version: int, full: bool) -> tuple[Any, float]:
        """The rank's share and the seconds it took."""
        partitions = [(name, self._shapes[name], flat) for name, flat in self._flats.items()]
        started = time.perf_counter()
        share = self._publisher.publish(partitions, version, full)
        return share, time.perf_counter() - started

    def bare(self, num_bytes: int) -> float:
        """Seconds to copy so many bytes into shared memory."""
        started = time.perf_counter()
        np.copyto(self._copy.shared[:num_bytes], self._copy.private[:num_bytes])
        return time.perf_counter() - started


@ray.remote(num_cpus=0)
class Consumer:
    """A replica, and the bare copy of what it gets."""

    def __init__(self, names: list[str]) -> None:
        torch.set_num_threads(1)
        # As engines on CPUs do.
        keep_freed_memory()
        self._copies = [Shared(name) for name in names]

    def start(self) -> None:
        """A new replica."""
        self._replica = Replica()

    def take(self, version: WeightVersion) -> tuple[float, float]:
        """Seconds to fetch and to assemble."""
        started = time.perf_counter()
        objects = pull(version, DEADLINE_SECONDS)
        pulled = time.perf_counter()
        # They stay in the store until this has fetched them again.
        self._replica.fetch(version, DEADLINE_SECONDS)
        del objects
        return pulled - started, time.perf_counter() - pulled

    def bare(self, num_bytes: list[int]) -> float:
        """Seconds to copy so many bytes of each rank out of shared memory."""
        started = time.perf_counter()
        for copy, length in zip(self._copies, num_bytes, strict=True):
            np.copyto(copy.private[:length], copy.shared[:length])
        return time.perf_counter() - started


def one_round(ranks: list[Any], consumers: list[Any], number: int, full: bool) -> dict[str, float]:
    """Publish a version, fetch it, and copy as many bytes."""
    wait = DEADLINE_SECONDS
    published = ray.get([rank.publish.remote(number, full) for rank in ranks], timeout=wait)
    shares = [share for share, _ in published]
    if any((share.base_version is None) != full for share in shares):
        raise RuntimeError(f"version {number}: read {shares}, expected full: {full}")
    version = WeightVersion.of(shares)
    taken = ray.get([consumer.take.remote(version) for consumer in consumers], timeout=wait)
    sizes = [share.num_bytes for share in shares]
    into = [rank.bare.remote(size) for rank, size in zip(ranks, sizes, strict=True)]
    bare_in = max(ray.get(into, timeout=wait))
    bare_out = max(ray.get([c.bare.remote(sizes) for c in consumers], timeout=wait))
    seconds = {
        "publish": max(seconds for _, seconds in published),
        "fetch": max(fetched for fetched, _ in taken),
        "assemble": max(assembled for _, assembled in taken),
    }
    return seconds | {
        "mib": sum(sizes) / 2**20,
        "publish of bare": seconds["publish"] / bare_in,
        "assemble of bare": seconds["assemble"] / bare_out,
    }


def measured(
    kind: str, ranks: list[Any], consumers: list[Any], words: argparse.Namespace
) -> list[dict[str, float]]:
    """Rounds of one kind, after one that warms up."""
    starts = [rank.start.remote(words.bucket_mib, KINDS[kind]) for rank in ranks]
    ray.get(starts + [consumer.start.remote() for consumer in consumers], timeout=DEADLINE_SECONDS)
    found = []
    for number in range(words.rounds + 1):
        full = number == 0 or kind != "delta"
        found.append(one_round(ranks, consumers, number, full))
        changes = [rank.change.remote(words.changed) for rank in ranks]
        ray.get(changes, timeout=DEADLINE_SECONDS)
    return found[1:]


def compare(dtype: str, words: argparse.Namespace) -> None:
    """Print the table of one dtype."""
    shapes = shapes_of(round(words.millions * 1e6), words.vocabulary)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    size = sum(-(-int(np.prod(shape)) // NUM_RANKS) for shape in shapes.values())
    num_bytes = size * getattr(torch, dtype).itemsize
    memories = [SharedMemory(create=True, size=num_bytes) for _ in range(NUM_RANKS)]
    try:
        names = [memory.name for memory in memories]
        ranks = [Rank.remote(n, shapes, dtype, name) for n, name in enumerate(names)]  # type: ignore[attr-defined]
        consumers = [Consumer.remote(names) for _ in range(NUM_CONSUMERS)]  # type: ignore[attr-defined]
        print(f"{dtype}: {count / 1e6:.1f} million parameters, {words.changed:.1%} changed a round")
        print(f"  {'':<20}{'MiB':>9}{'publish s':>11}{'of bare':>9}", end="")
        print(f"{'fetch s':>10}{'assemble s':>12}{'of bare':>9}")
        for kind in KINDS:
            rounds = measured(kind, ranks, consumers, words)
            of = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            print(f"  {kind:<20}{of['mib']:>9.2f}{of['publish']:>11.4f}", end="")
            print(f"{of['publish of bare']:>9.2f}{of['fetch']:>10.4f}", end="")
            print(f"{of['assemble']:>12.4f}{of['assemble of bare']:>9.2f}", flush=True)
        for actor in ranks + consumers:
            ray.kill(actor)
    finally:
        for memory in memories:
            memory.close()
            memory.unlink()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=110, help="parameters, at least")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="rows of the embedding")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each kind")
    parser.add_argument("--changed", type=float, default=0.02, help="share of changed elements")
    parser.add_argument("--bucket-mib", type=int, default=512, help="weights.bucket_mib")
    parser.add_argument("--store-mib", type=int, default=3072, help="size of Ray's object store")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], help="dtypes of the parameters"
    )
    words = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=words.store_mib * 2**20,
    )
    for dtype in words.dtypes:
        compare(dtype, words)
    ray.shutdown()


if __name__ == "__main__":
    main()
