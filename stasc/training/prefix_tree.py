"""Prefix trees: several token sequences laid out in one row, every shared prefix once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PrefixTree:
    """The tree of some token sequences, laid out depth first in T tokens.

    Token i follows token j in some sequence, or is the same token, exactly if ``j <= i < subtree_ends[j]``.
    So attention needs no more of the tree than ``subtree_ends`` (and ``depths`` for a sliding window).

    Attributes:
        tokens: The tokens in layout order, of shape [T].
        depths: How many tokens precede each one in its sequences, of shape [T].
        subtree_ends: For each token the layout index behind its subtree, of shape [T].
        paths: For each sequence the layout indices of its tokens.
    """

    tokens: Ints
    depths: Ints
    subtree_ends: Ints
    paths: list[Ints]


def prefix_tree(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """The tree of one or more sequences, of one or more tokens each."""
    # In sorted order no earlier sequence shares a longer prefix with one than the sequence just before it.
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    tokens, depths = [], []
    subtree_ends = np.zeros(sum(map(len, sequences)), dtype=np.int64)
    paths = [np.zeros(0, dtype=np.int64)] * len(sequences)
    previous, path, size = np.zeros(0, dtype=np.int64), paths[0], 0
    for i in order:
        sequence = np.asarray(sequences[i], dtype=np.int64)
        shared = common_prefix(previous, sequence)
        subtree_ends[path[shared:]] = size
        tokens.append(sequence[shared:])
        depths.append(np.arange(shared, len(sequence)))
        path = np.concatenate([path[:shared], np.arange(size, size + len(sequence) - shared)])
        paths[i] = path
        previous, size = sequence, size + len(sequence) - shared
    subtree_ends[path] = size
    return PrefixTree(np.concatenate(tokens), np.concatenate(depths), subtree_ends[:size], paths)


def common_prefix(a: Ints, b: Ints) -> int:
    """How many tokens two sequences share from the start."""
    shorter = min(len(a), len(b))
    differ = a[:shorter] != b[:shorter]
    return int(differ.argmax()) if differ.any() else shorter
