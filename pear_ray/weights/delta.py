"""What changed between two flat arrays of the same length, bit by bit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# The places in a block are as many as 16 bits can tell apart.
BLOCK_ELEMENTS = 65_536


class Delta(NamedTuple):
    """The changed elements of a flat array of unsigned integers, in order. One of 16 bits takes
    four bytes, besides four for each block."""

    counts: np.ndarray
    """Changed elements of each block of 65,536, uint32 [blocks]."""
    places: np.ndarray
    """Where in its block each of them is, uint16 [changed]."""
    values: np.ndarray
    """What it is after the change, of the array's dtype [changed]."""

    @property
    def nbytes(self) -> int:
        """Size of the three arrays, under the name that it has for one."""
        return self.counts.nbytes + self.places.nbytes + self.values.nbytes


def difference(old: np.ndarray, new: np.ndarray, max_bytes: int) -> Delta | None:
    """What makes `new` of `old`, or None where that takes more than `max_bytes`.

    Both are flat, equally long, of one unsigned dtype: bits are compared, not numbers, so that
    -0.0 is not 0.0 and a NaN is itself.
    """
    counts = np.zeros(-(-len(new) // BLOCK_ELEMENTS), np.uint32)
    places, values = [np.empty(0, np.uint16)], [np.empty(0, new.dtype)]
    left = max_bytes - counts.nbytes
    # A block of both arrays fits a processor's cache; all at once is slower and takes more memory.
    for number, start in enumerate(range(0, len(new), BLOCK_ELEMENTS)):
        block = new[start : start + BLOCK_ELEMENTS]
        changed = np.flatnonzero(old[start : start + BLOCK_ELEMENTS] != block)
        counts[number] = len(changed)
        places.append(changed.astype(np.uint16))
        values.append(block[changed])
        left -= places[-1].nbytes + values[-1].nbytes
        if left < 0:
            return None
    return Delta(counts, np.concatenate(places), np.concatenate(values)) if left >= 0 else None


def apply(delta: Delta, flat: np.ndarray) -> None:
    """Make `flat`, in place, what it was the difference to.

    Raises:
        ValueError: the delta contradicts itself, or is one of a longer array.
    """
    num_changed = int(delta.counts.sum(dtype=np.int64))
    if num_changed != len(delta.places):
        raise ValueError(f"{num_changed} elements changed, at {len(delta.places)} places")
    blocks = np.arange(len(delta.counts)) * BLOCK_ELEMENTS
    indices = np.repeat(blocks, delta.counts) + delta.places
    if indices.max(initial=-1) >= len(flat):
        raise ValueError(f"element {indices.max()} changed, of {len(flat)}")
    flat[indices] = delta.values
