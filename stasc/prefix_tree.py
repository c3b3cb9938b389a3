"""Token sequences that begin alike, laid out as one sequence in which every shared beginning stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PrefixTree:
    """The tree of some token sequences, laid out depth first.

    The token at place i comes after the one at place j in some sequence, or is it, exactly if
    ``j <= i < ends[j]``; so ``ends`` is all that attention has to know of the tree.

    Attributes:
        tokens: The tokens in their layout, of shape [T].
        depths: How many tokens come before each in its sequences, of shape [T].
        ends: Where the layout leaves the tokens that come after each, of shape [T].
        paths: For every sequence the places of its tokens.
    """

    tokens: Ints
    depths: Ints
    ends: Ints
    paths: list[Ints]


def prefix_tree(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """The tree of one or more sequences, of one or more tokens each."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    tokens, depths = [], []
    ends = np.zeros(sum(map(len, sequences)), dtype=np.int64)
    paths = [np.zeros(0, dtype=np.int64)] * len(sequences)
    previous, path, size = np.zeros(0, dtype=np.int64), paths[0], 0
    for i in order:
        sequence = np.asarray(sequences[i], dtype=np.int64)
        shared = common_prefix(previous, sequence)
        ends[path[shared:]] = size
        tokens.append(sequence[shared:])
        depths.append(np.arange(shared, len(sequence)))
        path = np.concatenate([path[:shared], np.arange(size, size + len(sequence) - shared)])
        paths[i] = path
        previous, size = sequence, size + len(sequence) - shared
    ends[path] = size
    return PrefixTree(np.concatenate(tokens), np.concatenate(depths), ends[:size], paths)


def common_prefix(a: Ints, b: Ints) -> int:
    """How many tokens two sequences share from their beginning on."""
    shorter = min(len(a), len(b))
    differ = a[:shorter] != b[:shorter]
    return int(differ.argmax()) if differ.any() else shorter
