"""From D_n to batches: which corrections share an optimiser step, and the tensors of a micro-batch."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stasc.errors import UserError
from stasc.prefix_tree import Ints, common_prefix, prefix_tree
from stasc.trajectory import Trajectory

Example = tuple[list[int], list[int]]
"""A prompt's token ids, which carry no loss, and the target's, which do."""


@dataclass
class Batch:
    """A micro-batch of one process: what the model reads, and which tokens it learns.

    Either ``ends`` is None and every row is an example of its own, padded on the right; or there is one row,
    laid out as a prefix tree, and ``ends`` says where the subtree of each token ends.

    Attributes:
        input_ids: int64 of shape [rows, width].
        position_ids: int64 of shape [rows, width].
        ends: int64 of shape [width], or None.
        predictors: Places in the flattened ``input_ids`` whose logits predict a target, of shape [targets].
        targets: The tokens they predict, of shape [targets].
        counts: How many examples learn each of them just there, of shape [targets].
        step_tokens: Correction tokens of the whole optimiser step: of all its micro-batches on all processes.
        ends_step: Whether this is the last micro-batch of its step.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor | None
    predictors: Tensor
    targets: Tensor
    counts: Tensor
    step_tokens: int
    ends_step: bool


class CorrectionBatches(Dataset):
    """The micro-batches of one epoch over D_n, for one process.

    D_n is shuffled and cut into optimiser steps of ``batch_size`` corrections. A step is dealt out evenly, by
    tokens, to the processes and their micro-batches: as few as ``accumulate`` and ``token_budget`` allow, and
    as many on every process. Where there are fewer corrections than micro-batches, one stays without targets
    and weighs nothing. So the sum of all gradients of a step is the same however it is dealt out.

    Examples are rendered when their step comes.

    Args:
        dataset: D_n.
        example: Renders a trajectory.
        batch_size: Corrections per optimiser step, over all processes.
        seed: Of the shuffle.
        token_budget: Tokens that a micro-batch may hold, padding included.
        prefix_sharing: Lay a micro-batch out as a prefix tree; otherwise as padded rows.
        group_corrections: Keep the corrections of an initial answer side by side, which makes most of them
            share a step and their prompt.
        longest: Tokens that no example exceeds, if that is known: where even such examples fit into
            ``accumulate`` micro-batches, D_n need not be rendered beforehand to know the number of batches.
        rank: This process.
        ranks: Processes.
        accumulate: Least number of micro-batches per optimiser step and process.

    Raises:
        UserError: An example alone exceeds the budget.
    """

    def __init__(
        self,
        dataset: Sequence[Trajectory],
        example: Callable[[Trajectory], Example],
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
        self.example = example
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.prefix_sharing = prefix_sharing
        self.rank = rank
        self.ranks = ranks
        self.order = _shuffled(dataset, seed, group_corrections)
        self.steps = math.ceil(len(dataset) / batch_size)
        """Optimiser steps of the epoch."""
        self._rendered: tuple[int, _Step] | None = None
        most = math.ceil(batch_size / (ranks * accumulate))
        if longest is not None and most * longest <= token_budget:
            turns = np.full(self.steps, accumulate)
        else:
            turns = np.array(
                [max(accumulate, self._step(step).turns(token_budget, ranks)) for step in range(self.steps)],
                dtype=np.int64,
            )
        self.begins = np.concatenate([[0], turns.cumsum()])
        """The number of each step's first micro-batch, and in the end that of all."""

    def __len__(self) -> int:
        return int(self.begins[-1])

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.begins, index, side="right")) - 1
        turn, turns = index - self.begins[number], self.begins[number + 1] - self.begins[number]
        step = self._step(number)
        shares = step.shares(self.token_budget, int(turns) * self.ranks)
        mine = shares[int(turn) * self.ranks + self.rank]
        lay_out = pack if self.prefix_sharing else pad
        return lay_out(mine, step.tokens, ends_step=bool(turn == turns - 1))

    def examples(self, step: int) -> list[Example]:
        """The examples of an optimiser step."""
        return self._step(step).examples

    def _step(self, number: int) -> _Step:
        """A step's examples, rendered once for all micro-batches of the step."""
        if self._rendered is None or self._rendered[0] != number:
            members = self.order[number * self.batch_size : (number + 1) * self.batch_size]
            examples = [self._example(self.dataset[int(i)]) for i in members]
            self._rendered = number, _Step(examples, sharing=self.prefix_sharing)
        return self._rendered[1]

    def _example(self, trajectory: Trajectory) -> Example:
        prompt, target = self.example(trajectory)
        if (tokens := len(prompt) + len(target)) > self.token_budget:
            raise UserError(
                f"data.token_budget is {self.token_budget}, and the training example of question "
                f"'{trajectory.question.id}' has {tokens} tokens: raise it."
            )
        return prompt, target


class _Step:
    """The examples of an optimiser step, in an order in which neighbours fit together.

    Args:
        examples: In any order.
        sharing: Whether a micro-batch is laid out as a prefix tree; otherwise as padded rows.
    """

    def __init__(self, examples: Sequence[Example], *, sharing: bool) -> None:
        self.sharing = sharing
        self.examples = sorted(examples, key=_whole if sharing else lambda example: len(_whole(example)))
        self.tokens = sum(len(target) for _, target in self.examples)
        sequences = [np.asarray(_whole(example), dtype=np.int64) for example in self.examples]
        self._lengths = [len(sequence) for sequence in sequences]
        self._shared = [0, *(common_prefix(a, b) for a, b in itertools.pairwise(sequences))]

    def turns(self, budget: int, ranks: int) -> int:
        """Micro-batches of at most ``budget`` tokens that every process needs."""
        return math.ceil(len(self._cuts(budget)) / ranks)

    def shares(self, budget: int, places: int) -> list[list[Example]]:
        """The examples dealt out to ``places`` micro-batches, the largest of which is as small as can be."""
        sizes = range(max(self._lengths), budget + 1)
        smallest = bisect_left(sizes, True, key=lambda size: len(self._cuts(size)) <= places)
        if smallest == len(sizes):
            raise RuntimeError("an example is longer than CorrectionBatches was told that any is")
        cuts = [*self._cuts(sizes[smallest]), len(self.examples)]
        shares = [self.examples[begin:end] for begin, end in itertools.pairwise(cuts)]
        first_token: Example = self.examples[0][0][:1], []
        return shares + [[first_token]] * (places - len(shares))

    def _cuts(self, size: int) -> list[int]:
        """Where micro-batches begin if each takes as many examples as fit into ``size`` tokens."""
        begins, held = [0], 0
        for i, (length, shared) in enumerate(zip(self._lengths, self._shared, strict=True)):
            grown = held + length - shared if self.sharing else (i - begins[-1] + 1) * length
            if grown > size:
                begins.append(i)
                grown = length
            held = grown
        return begins


def pack(examples: Sequence[Example], step_tokens: int, *, ends_step: bool) -> Batch:
    """One row that holds every shared beginning once; no prompt may be empty."""
    tree = prefix_tree([_whole(example) for example in examples])
    return _batch(
        tree.tokens[None], tree.depths[None], tree.ends, examples, tree.paths, step_tokens, ends_step
    )


def pad(examples: Sequence[Example], step_tokens: int, *, ends_step: bool) -> Batch:
    """One row per example, padded on the right, where causal attention sees no padding."""
    sequences = [_whole(example) for example in examples]
    width = max(map(len, sequences))
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
    positions = np.broadcast_to(np.arange(width), input_ids.shape)
    paths = [row * width + np.arange(len(sequence)) for row, sequence in enumerate(sequences)]
    return _batch(input_ids, positions, None, examples, paths, step_tokens, ends_step)


def _batch(
    input_ids: Ints,
    position_ids: Ints,
    ends: Ints | None,
    examples: Sequence[Example],
    paths: Sequence[Ints],
    step_tokens: int,
    ends_step: bool,
) -> Batch:
    """A batch in which the tokens of each example lie at the places of its path."""
    predictors = np.concatenate(
        [
            path[len(prompt) - 1 : len(prompt) + len(target) - 1]
            for path, (prompt, target) in zip(paths, examples, strict=True)
        ]
    )
    targets = np.array([token for _, target in examples for token in target], dtype=np.int64)
    learnt, counts = np.unique(predictors << 32 | targets, return_counts=True)
    return Batch(
        torch.from_numpy(input_ids),
        torch.tensor(position_ids),
        None if ends is None else torch.from_numpy(ends),
        torch.from_numpy(learnt >> 32),
        torch.from_numpy(learnt & 0xFFFFFFFF),
        torch.from_numpy(counts),
        step_tokens,
        ends_step,
    )


def _whole(example: Example) -> list[int]:
    prompt, target = example
    return [*prompt, *target]


def _shuffled(dataset: Sequence[Trajectory], seed: int, grouped: bool) -> Ints:
    """Numbers of all trajectories in the order of the epoch, those of an initial answer together if asked."""
    generator = torch.Generator().manual_seed(seed)
    if not grouped:
        return torch.randperm(len(dataset), generator=generator).numpy()
    answers = (dataset[i] for i in range(len(dataset)))
    sizes = [len(list(of)) for _, of in itertools.groupby(answers, key=lambda t: (t.question.id, t.j))]
    groups = np.split(np.arange(len(dataset)), np.cumsum(sizes)[:-1])
    return np.concatenate([groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()])
