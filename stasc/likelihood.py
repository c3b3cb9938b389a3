"""What a model says of the correction tokens of a batch, and nothing more than that."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from stasc.attention import tree_masks
from stasc.errors import UserError
from stasc.packing import Batch, pack, pad

LOGITS = 2**25
"""Logits that are held at once: 128 MiB in float32."""


class NegativeLogLikelihood:
    """Summed negative log-likelihood of a batch's targets.

    Logits are computed once, at the places alone that predict a target, and never more than ``LOGITS`` of
    them are held. A model whose logits are more than a product with the output embedding (a cap, a scale, a
    bias, an adapter) computes them itself, all at once.

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
        self.check(prefix_sharing=batch.ends is not None)
        head = self.model.get_output_embeddings()
        if self.plain_head and type(head) is torch.nn.Linear:  # FSDP may have wrapped it since
            return _BehindHead.apply(self._hidden(batch), head.weight, batch.targets, batch.counts)
        losses = torch.nn.functional.cross_entropy(
            self._logits(batch).float(), batch.targets, reduction="none"
        )
        return (losses * batch.counts).sum()

    def check(self, *, prefix_sharing: bool) -> None:
        """Raise UserError if batches share prefixes and the model does not understand that."""
        if prefix_sharing and not self.reads_trees:
            raise UserError(
                f"{self.model.config.model_type} does not attend as prefix-sharing batches need it: "
                "set data.prefix_sharing to false."
            )

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
        head = self.model.get_output_embeddings()
        plain_head = (
            type(head) is torch.nn.Linear
            and head.bias is None
            and self.model.get_decoder() is not self.model
            and torch.equal(head(self._hidden(plain)), logits)
        )
        try:
            away = (self._logits(tree) - logits).abs().max()
            reads_trees = bool(away < 1e-3 * logits.std())
        except Exception:  # whatever a model says that does not know such masks
            reads_trees = False
        return plain_head, reads_trees


class _BehindHead(torch.autograd.Function):
    """Summed negative log-likelihood of the targets, from what the output embedding is given.

    The gradients are computed together with the loss, while the logits of a chunk are there: none are kept
    for the backward pass or computed again in it.

    PyTorch's ``linear_cross_entropy`` does so too, but computes in float32 under autocast (2.13), and from
    bfloat16 inputs it gives a loss that is rounded to bfloat16.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        """Shapes [targets, hidden size], [vocabulary, hidden size], [targets] and [targets]."""
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        summed = hidden.new_zeros((), dtype=exact)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        rows = max(1, LOGITS // len(weight))
        chunks = (of.split(rows) for of in (hidden, hidden_grad, targets[:, None], counts[:, None]))
        for states, states_grad, target, count in zip(*chunks, strict=True):
            likelihoods = (states @ weight.T).log_softmax(-1, dtype=exact)
            summed -= (likelihoods.gather(1, target) * count).sum()
            logits_grad = likelihoods.exp_().mul_(count).scatter_add_(1, target, -count.to(exact))
            logits_grad = logits_grad.to(states.dtype)
            torch.mm(logits_grad, weight, out=states_grad)
            if weight_grad is None:
                continue
            if states.dtype == exact:
                weight_grad.addmm_(logits_grad.T, states)  # which mixed dtypes do not have
            else:
                weight_grad += logits_grad.T @ states
        ctx.save_for_backward(hidden_grad, weight_grad)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Autograd casts them to the dtypes of the inputs."""
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * gradient, None if weight_grad is None else weight_grad.mul_(gradient), None, None
