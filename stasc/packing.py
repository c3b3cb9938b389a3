"""From D_n to batches: which corrections share an optimiser step, and the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stasc.prompting import Dialogue
from stasc.trajectory import Trajectory

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass
class Batch:
    """A micro-batch of one process.

    ``input_ids``, ``attention_mask`` and ``labels`` are int64 of shape [examples, tokens], padded on the
    right; ``labels`` is ``IGNORED`` wherever no correction token stands. ``step_tokens`` counts the
    correction tokens of the whole optimiser step: over all its micro-batches on all processes.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    step_tokens: int


class CorrectionBatches(Dataset):
    """The micro-batches of one epoch over D_n, for one process.

    D_n is shuffled and cut into optimiser steps of ``batch_size`` corrections. A step is dealt out to the
    processes and their ``accumulate`` micro-batches; where it has fewer corrections than places, a place
    holds a correction without labels, which weighs nothing. So the sum of all gradients of a step is the
    same for any number of processes and any accumulation.

    Args:
        dataset: D_n.
        dialogue: Renders prompts.
        batch_size: Corrections per optimiser step, over all processes.
        seed: Of the shuffle.
        rank: This process.
        ranks: Processes.
        accumulate: Micro-batches per optimiser step and process.
    """

    def __init__(
        self,
        dataset: Sequence[Trajectory],
        dialogue: Dialogue,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.dataset = dataset
        self.dialogue = dialogue
        self.rank = rank
        self.accumulate = accumulate
        self.places = ranks * accumulate
        self.ranks = ranks
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        step, turn = divmod(index, self.accumulate)
        members = [self.dataset[i] for i in self.steps[step]]
        mine = members[self.rank + turn * self.ranks :: self.places]
        step_tokens = sum(len(t.correction.token_ids) + t.correction.finished for t in members)
        if mine:
            return pad([self.dialogue.training_example(t) for t in mine], step_tokens)
        prompt, target = self.dialogue.training_example(members[0])
        return pad([(prompt + target, [])], step_tokens)


def pad(examples: Sequence[tuple[Sequence[int], Sequence[int]]], step_tokens: int) -> Batch:
    """One row per (prompt, target), padded on the right; only the target's tokens are labels."""
    length = max(len(prompt) + len(target) for prompt, target in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (prompt, target) in enumerate(examples):
        end = len(prompt) + len(target)
        input_ids[row, :end] = torch.tensor([*prompt, *target])
        attention_mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(target, dtype=torch.int64)
    return Batch(input_ids, attention_mask, labels, step_tokens)
