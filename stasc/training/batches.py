"""From D_n to batches: which examples share an optimiser step, and the tensors of a micro-batch."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stasc.errors import UserError
from stasc.training.prefix_tree import Ints, common_prefix, prefix_tree
from stasc.trajectory import Example


class TokenizedExample(NamedTuple):
    """An example as token ids: the prompt carries no loss, its target ``weight`` and ``kl``."""

    prompt: list[int]
    target: list[int]
    weight: float = 1.0
    kl: float = 0.0

    @property
    def tokens(self) -> list[int]:
        """Prompt and target."""
        return [*self.prompt, *self.target]


@dataclass
class Batch:
    """A micro-batch of one process: what the model reads, and which tokens it learns.

    There are two layouts. Padded rows: each row holds one example, padded on the right, and ``subtree_ends``
    is None. Prefix tree: a single row holds every shared prefix once, and ``subtree_ends`` describes it.

    A target that several examples learn at the same index is listed once, with the sums of their factors.

    Attributes:
        input_ids: int64 of shape [rows, width].
        position_ids: int64 of shape [rows, width].
        subtree_ends: For each token the index behind its subtree, int64 of shape [width]; or None.
        predictors: Indices into the flattened ``input_ids`` whose logits predict a target, int64 of shape
            [targets].
        targets: The tokens they predict, int64 of shape [targets].
        weights: Factor of the loss of each target, float32 of shape [targets].
        kls: Factor of the divergence from M_0 where each target is predicted, float32 of shape [targets];
            None if no example of the optimiser step has one.
        tokens: Target tokens of all examples of the micro-batch, shared ones counted as often as learnt.
        step_tokens: The same for the whole optimiser step: all its micro-batches on all processes.
        ends_step: Whether this is the last micro-batch of its step.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_ends: Tensor | None
    predictors: Tensor
    targets: Tensor
    weights: Tensor
    kls: Tensor | None
    tokens: int
    step_tokens: int
    ends_step: bool


class CorrectionBatches(Dataset):
    """The micro-batches of one epoch over D_n, for one process.

    D_n is shuffled and cut into optimiser steps of ``batch_size`` examples. A step is divided evenly, by
    tokens, into micro-batches: the same number on every process, and as few as ``accumulate`` and
    ``token_budget`` allow. Where there are fewer examples than micro-batches, the remaining ones have no
    targets and add nothing to the loss. So the summed gradient of a step does not depend on the division.

    Examples are rendered when their step is read.

    Args:
        dataset: D_n.
        render: Gives the token ids of an example's prompt and of its target.
        batch_size: Examples per optimiser step, over all processes.
        seed: Of the shuffle.
        token_budget: Tokens that a micro-batch may hold, padding included.
        prefix_sharing: Lay micro-batches out as prefix trees instead of padded rows.
        group_corrections: Shuffle initial answers instead of examples and keep the corrections of each
            together, so that most of them are in the same step and share their prompt. They must be adjacent
            in ``dataset``.
        longest: Upper bound of the tokens of an example, if known: where even examples of this length fit
            into ``accumulate`` micro-batches, the number of batches is known without rendering D_n.
        rank: This process.
        ranks: Number of processes.
        accumulate: Least number of micro-batches per optimiser step and process.

    Raises:
        UserError: A single example exceeds the budget, or its factors are not finite.
    """

    def __init__(
        self,
        dataset: Sequence[Example],
        render: Callable[[Example], tuple[list[int], list[int]]],
        batch_size: int,
        *,
        seed: int,
        token_budget: int = 16384,
        prefix_sharing: bool = True,
        group_corrections: bool = False,
        longest: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.dataset = dataset
        self.render = render
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.prefix_sharing = prefix_sharing
        self.rank = rank
        self.ranks = ranks
        self.order = _shuffled(dataset, seed, grouped=group_corrections)
        """Indices into ``dataset``, in the order in which the epoch learns them."""
        self.steps = math.ceil(len(dataset) / batch_size)
        """Optimiser steps of the epoch."""
        self._last_step: tuple[int, _Step] | None = None
        most_examples = math.ceil(batch_size / (ranks * accumulate))
        if longest is not None and most_examples * longest <= token_budget:
            sizes = np.full(self.steps, accumulate)
        else:
            needed = [self._step(step).needed(token_budget, ranks) for step in range(self.steps)]
            sizes = np.array([max(accumulate, size) for size in needed], dtype=np.int64)
        self.step_starts = np.concatenate([[0], sizes.cumsum()])
        """Index of the first micro-batch of each step, followed by the number of all micro-batches."""

    def __len__(self) -> int:
        return int(self.step_starts[-1])

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.step_starts, index, side="right")) - 1
        start, end = (int(bound) for bound in self.step_starts[number : number + 2])
        step = self._step(number)
        parts = step.divide(self.token_budget, (end - start) * self.ranks)
        part = parts[(index - start) * self.ranks + self.rank]
        lay_out = pack if self.prefix_sharing else pad
        batch = lay_out(part, step.tokens, ends_step=index == end - 1)
        if not step.has_kl:  # which all processes must agree on
            batch.kls = None
        return batch

    def examples(self, step: int) -> list[TokenizedExample]:
        """The examples of an optimiser step, of all processes."""
        return self._step(step).examples

    def _step(self, number: int) -> _Step:
        """The examples of a step; the last one asked for is kept, as its micro-batches are read in a row."""
        if self._last_step is None or self._last_step[0] != number:
            members = self.order[number * self.batch_size : (number + 1) * self.batch_size]
            examples = [self._tokenize(self.dataset[int(i)]) for i in members]
            self._last_step = number, _Step(examples, prefix_sharing=self.prefix_sharing)
        return self._last_step[1]

    def _tokenize(self, example: Example) -> TokenizedExample:
        tokenized = TokenizedExample(*self.render(example), example.weight, example.kl)
        question = example.trajectory.question.id
        if (size := len(tokenized.tokens)) > self.token_budget:
            raise UserError(
                f"data.batches.token_budget is {self.token_budget}, and the training example of question "
                f"'{question}' has {size} tokens: raise it."
            )
        if not math.isfinite(example.weight) or not 0 <= example.kl < math.inf:
            raise UserError(
                f"the training example of question '{question}' has weight {example.weight} and kl "
                f"{example.kl}: the algorithm must give finite weights, and no kl below 0."
            )
        return tokenized


class _Step:
    """The examples of an optimiser step, sorted so that neighbours cost little in one micro-batch.

    Neighbours share long prefixes for prefix trees, and have similar lengths for padded rows.

    Args:
        examples: In any order.
        prefix_sharing: Whether micro-batches are prefix trees.
    """

    def __init__(self, examples: Sequence[TokenizedExample], *, prefix_sharing: bool) -> None:
        self.prefix_sharing = prefix_sharing
        self.examples = sorted(examples, key=lambda e: e.tokens if prefix_sharing else len(e.tokens))
        self.tokens = sum(len(example.target) for example in self.examples)
        """Target tokens of the step."""
        self.has_kl = any(example.kl for example in self.examples)
        sequences = [np.asarray(example.tokens, dtype=np.int64) for example in self.examples]
        self._lengths = [len(sequence) for sequence in sequences]
        self._shared = [0, *(common_prefix(a, b) for a, b in itertools.pairwise(sequences))]

    def needed(self, budget: int, ranks: int) -> int:
        """How many micro-batches of at most ``budget`` tokens every process needs."""
        return math.ceil(len(self._starts(budget)) / ranks)

    def divide(self, budget: int, count: int) -> list[list[TokenizedExample]]:
        """The examples in ``count`` micro-batches, the largest of which has as few tokens as possible.

        Raises:
            RuntimeError: They do not fit, as an example is longer than the known bound.
        """
        sizes = range(max(self._lengths), budget + 1)
        smallest = bisect_left(sizes, True, key=lambda size: len(self._starts(size)) <= count)
        if smallest == len(sizes):
            raise RuntimeError("an example is longer than `longest`, the limit that was given")
        bounds = [*self._starts(sizes[smallest]), len(self.examples)]
        parts = [self.examples[start:end] for start, end in itertools.pairwise(bounds)]
        no_targets = TokenizedExample(self.examples[0].prompt[:1], [])
        return parts + [[no_targets]] * (count - len(parts))

    def _starts(self, size: int) -> list[int]:
        """First example of each micro-batch if each takes as many examples as fit into ``size`` tokens."""
        starts, held = [0], 0
        for i, (length, shared) in enumerate(zip(self._lengths, self._shared, strict=True)):
            grown = held + length - shared if self.prefix_sharing else (i - starts[-1] + 1) * length
            if grown > size:
                starts.append(i)
                grown = length
            held = grown
        return starts


def pack(examples: Sequence[TokenizedExample], step_tokens: int, *, ends_step: bool) -> Batch:
    """A batch in one row that holds every shared prefix once; no prompt may be empty."""
    tree = prefix_tree([example.tokens for example in examples])
    return _batch(
        tree.tokens[None], tree.depths[None], tree.subtree_ends, examples, tree.paths, step_tokens, ends_step
    )


def pad(examples: Sequence[TokenizedExample], step_tokens: int, *, ends_step: bool) -> Batch:
    """A batch with one row per example; causal attention never looks at padding on the right."""
    sequences = [example.tokens for example in examples]
    width = max(map(len, sequences))
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
    position_ids = np.broadcast_to(np.arange(width), input_ids.shape)
    paths = [row * width + np.arange(len(sequence)) for row, sequence in enumerate(sequences)]
    return _batch(input_ids, position_ids, None, examples, paths, step_tokens, ends_step)


def _batch(
    input_ids: Ints,
    position_ids: Ints,
    subtree_ends: Ints | None,
    examples: Sequence[TokenizedExample],
    paths: Sequence[Ints],
    step_tokens: int,
    ends_step: bool,
) -> Batch:
    """A batch in which ``paths`` gives the indices of each example's tokens."""
    predictors = np.concatenate(
        [path[len(e.prompt) - 1 :][: len(e.target)] for path, e in zip(paths, examples, strict=True)]
    )
    targets = np.array([token for e in examples for token in e.target], dtype=np.int64)
    # One number for each pair of index and token, as both fit into 32 bits.
    pairs, pair = np.unique(predictors << 32 | targets, return_inverse=True)
    lengths = [len(e.target) for e in examples]
    weights, kls = (
        torch.from_numpy(np.bincount(pair, np.repeat(of_each, lengths), len(pairs)).astype(np.float32))
        for of_each in ([e.weight for e in examples], [e.kl for e in examples])
    )
    return Batch(
        torch.from_numpy(input_ids),
        torch.tensor(position_ids),
        None if subtree_ends is None else torch.from_numpy(subtree_ends),
        torch.from_numpy(pairs >> 32),
        torch.from_numpy(pairs & 0xFFFFFFFF),
        weights,
        kls,
        len(targets),
        step_tokens,
        ends_step,
    )


def _shuffled(dataset: Sequence[Example], seed: int, *, grouped: bool) -> Ints:
    """Indices of all examples in the order of the epoch, those of an initial answer together if asked."""
    generator = torch.Generator().manual_seed(seed)
    if not grouped:
        return torch.randperm(len(dataset), generator=generator).numpy()
    trajectories = (dataset[i].trajectory for i in range(len(dataset)))
    sizes = [len(list(of)) for _, of in itertools.groupby(trajectories, lambda t: (t.question.id, t.path[0]))]
    groups = np.split(np.arange(len(dataset)), np.cumsum(sizes)[:-1])
    return np.concatenate([groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()])
