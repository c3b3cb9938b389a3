"""What a model says of the correction tokens of a batch, and nothing more than that."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stasc.attention import tree_masks
from stasc.errors import UserError
from stasc.packing import Batch, pack, pad

LOGITS = 2**25
"""Logits that are held at once: 128 MiB in float32."""


class NegativeLogLikelihood:
    """Summed negative log-likelihood of a batch's targets.

    Logits are computed at the places alone that predict a target, and never more than ``LOGITS`` of them at
    once: a chunk of them is computed again in the backward pass. A model that does something to its logits
    behind the output embedding (a cap, a scale) computes them itself, all at once.

    Args:
        model: A causal language model, with adapters or without; before any strategy shards it.
        attention: ``auto`` is what transformers takes for the model: sdpa, where the model has it. ``flex``
            is FlexAttention, which skips what no token attends to: for CUDA and long batches.

    Raises:
        UserError: The model does not have FlexAttention.
    """

    def __init__(self, model: PreTrainedModel, attention: Literal["auto", "flex"] = "auto") -> None:
        self.model = model
        self.blocks = False
        training = model.training
        model.eval()
        self.plain_head, self.reads_trees = self._try_out()
        model.train(training)
        if attention == "flex":
            self.blocks = True
            try:
                model.set_attn_implementation("flex_attention")
            except (ValueError, ImportError) as error:
                raise UserError(
                    f"model.attention is flex, which {model.config.model_type} does not have: set it to auto."
                ) from error

    def __call__(self, batch: Batch) -> Tensor:
        """The sum, in float32; part of the graph of all parameters even where a batch has no targets.

        Raises:
            UserError: The batch shares prefixes, which the model does not understand.
        """
        if batch.ends is not None and not self.reads_trees:
            raise UserError(
                f"{self.model.config.model_type} does not attend as prefix-sharing batches need it: "
                "set data.prefix_sharing to false."
            )
        if not self.plain_head:
            return _summed(self._logits(batch), batch.targets, batch.counts)
        hidden = self._hidden(batch)
        head = self.model.get_output_embeddings()

        def summed(hidden: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
            return _summed(head(hidden), targets, counts)

        rows = max(1, LOGITS // self.model.config.get_text_config().vocab_size)
        if len(hidden) <= rows:
            return summed(hidden, batch.targets, batch.counts)
        chunks = zip(hidden.split(rows), batch.targets.split(rows), batch.counts.split(rows), strict=True)
        return torch.stack([checkpoint(summed, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        masks = None
        if batch.ends is not None:
            config = self.model.config.get_text_config()
            masks = tree_masks(config, batch.position_ids[0], batch.ends, blocks=self.blocks)
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_mask": masks,
            "use_cache": False,
        }

    def _hidden(self, batch: Batch) -> Tensor:
        """What the output embedding gets at the predicting places, of shape [targets, hidden size]."""
        output = self.model.get_decoder()(**self._inputs(batch))
        return output.last_hidden_state.flatten(0, 1)[batch.predictors]

    def _logits(self, batch: Batch) -> Tensor:
        """The model's own logits at the predicting places, of shape [targets, vocabulary]."""
        width = batch.input_ids.shape[1]
        columns, column = (batch.predictors % width).unique(return_inverse=True)
        logits = self.model(**self._inputs(batch), logits_to_keep=columns).logits
        return logits[batch.predictors // width, column]

    @torch.no_grad()
    def _try_out(self) -> tuple[bool, bool]:
        """Whether the output embedding alone makes the logits, and whether a tree gives the same ones."""
        examples = [([0, 1, 2], [0]), ([0, 1, 3], [0])]
        plain, tree = (
            move_data_to_device(make(examples, step_tokens=2, ends_step=True), self.model.device)
            for make in (pad, pack)
        )
        logits = self._logits(plain)
        plain_head = self.model.get_decoder() is not self.model and torch.equal(
            self.model.get_output_embeddings()(self._hidden(plain)), logits
        )
        try:
            away = (self._logits(tree) - logits).abs().max()
            reads_trees = bool(away < 1e-3 * logits.std())
        except Exception:  # whatever a model says that does not know such masks
            reads_trees = False
        return plain_head, reads_trees


def _summed(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * counts).sum()
