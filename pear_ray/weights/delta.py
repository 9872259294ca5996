"""Lossless deltas between two flat arrays of the same length, compared bit by bit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Offsets in a block fit into 16 bits.
BLOCK_ELEMENTS = 65_536


class Delta(NamedTuple):
    """The changed elements of a flat array, in order. Each takes two bytes and its own size."""

    counts: np.ndarray
    """Changed elements of each block of 65,536, uint32 [blocks]."""
    offsets: np.ndarray
    """Their positions in the block, uint16 [changed]."""
    values: np.ndarray
    """Their new values, of the array's dtype [changed]."""

    @property
    def nbytes(self) -> int:
        """Return the size of the three arrays, like `ndarray.nbytes`."""
        return self.counts.nbytes + self.offsets.nbytes + self.values.nbytes


def compute_delta(old: np.ndarray, new: np.ndarray, max_bytes: int) -> Delta | None:
    """Return the delta from `old` to `new`; None if it is larger than `max_bytes`.

    Both are flat and of the same length and unsigned dtype, so that -0.0 differs from 0.0 and a NaN equals itself.
    """
    counts = np.zeros(-(-len(new) // BLOCK_ELEMENTS), np.uint32)
    offsets, values = [np.empty(0, np.uint16)], [np.empty(0, new.dtype)]
    bytes_left = max_bytes - counts.nbytes
    # Blocks of both arrays fit into the CPU cache; one pass over all is slower and takes memory.
    for number, start in enumerate(range(0, len(new), BLOCK_ELEMENTS)):
        block = new[start : start + BLOCK_ELEMENTS]
        changed = np.flatnonzero(old[start : start + BLOCK_ELEMENTS] != block)
        counts[number] = len(changed)
        offsets.append(changed.astype(np.uint16))
        values.append(block[changed])
        bytes_left -= offsets[-1].nbytes + values[-1].nbytes
        if bytes_left < 0:
            return None
    if bytes_left < 0:
        return None
    return Delta(counts, np.concatenate(offsets), np.concatenate(values))


def apply_delta(delta: Delta, flat: np.ndarray) -> None:
    """Update `flat` in place; raise ValueError if the delta is inconsistent or does not fit."""
    num_changed = int(delta.counts.sum(dtype=np.int64))
    if num_changed != len(delta.offsets):
        raise ValueError(f"delta: expected {num_changed} offsets, got {len(delta.offsets)}")
    blocks = np.arange(len(delta.counts)) * BLOCK_ELEMENTS
    indices = np.repeat(blocks, delta.counts) + delta.offsets
    if indices.max(initial=-1) >= len(flat):
        raise ValueError(f"delta: expected indices below {len(flat)}, got {indices.max()}")
    flat[indices] = delta.values
