"""Publishing ranks without learners."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from pear_ray.weights.publish import Publisher
from pear_ray.weights.registry import WeightVersion


class Ranks:
    """One publisher for each rank, and the shards of the last version."""

    def __init__(self, num_ranks, bucket_mib=1, full_every=1):
        self.publishers = [Publisher(rank, bucket_mib, full_every) for rank in range(num_ranks)]
        self.shards = []

    def publish(self, whole, version, full=False):
        self.shards = [
            publisher.publish(partitions(whole, rank, len(self.publishers)), version, full)
            for rank, publisher in enumerate(self.publishers)
        ]
        return WeightVersion.of(self.shards)


def partitions(whole, rank, num_ranks):
    """Yield a rank's partitions as ZeRO-3 cuts them: equal, padded parts of each flat tensor."""
    for name, tensor in whole.items():
        length = -(-tensor.numel() // num_ranks)
        flat = torch.full((length * num_ranks,), 99, dtype=tensor.dtype)
        flat[: tensor.numel()] = tensor.reshape(-1)
        yield name, tuple(tensor.shape), flat[rank * length :][:length]


def bits(tensor):
    """Return the elements as unsigned integers, so that NaN equals itself."""
    return tensor.reshape(-1).view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


def random_bits(rng, shape, dtype):
    """Return a tensor of random bits, NaN and infinities included."""
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(rng.integers(0, 256, size, np.uint8)).view(dtype).view(shape)


def with_changes(rng, tensor, share):
    """Return a copy with about this share of the elements changed."""
    copy = tensor.clone()
    bits(copy)[rng.random(copy.numel()) < share] ^= 1
    return copy


def assert_equal_bits(found, whole):
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert np.array_equal(bits(found[name].contiguous()), bits(tensor)), name


def with_bucket(version, number, **changes):
    buckets = list(version.buckets)
    buckets[number] = dataclasses.replace(buckets[number], **changes)
    return dataclasses.replace(version, buckets=tuple(buckets))
