"""Loss over the tokens of answers without holding all logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from stasc.errors import UserError
from stasc.training.batches import Batch, TokenizedExample, pack, pad
from stasc.training.masks import prefix_tree_masks

if TYPE_CHECKING:
    from stasc.training.lora import LoRA

MAX_LOGITS = 2**25
"""Logits that are held at once: 128 MiB in float32."""


class NegativeLogLikelihood:
    """Weighted sum of the negative log-likelihoods of a batch's targets, and of divergences from M_0.

    Logits are computed once and only where a target is predicted, at most ``MAX_LOGITS`` of them at a time.
    That needs a plain head: logits that are the product of the hidden states and the output embedding alone.
    A model that adds a cap, a scale, a bias or an adapter computes the logits itself, all at once.

    Args:
        model: A causal language model, with or without adapters, before a strategy shards it.
        attention: ``auto`` is what transformers chooses for the model: sdpa, where the model has it. ``flex``
            is FlexAttention, which skips blocks that no token attends to: for CUDA and long batches.
        temperature: What logits are divided by: the distribution that is learnt is the one at this
            temperature. On-policy it is that of sampling.

    Raises:
        UserError: The model does not have FlexAttention.
    """

    penalty: Tensor | float = 0.0
    """The divergences in the last sum, with their factors."""

    def __init__(
        self,
        model: PreTrainedModel,
        attention: Literal["auto", "flex"] = "auto",
        temperature: float = 1.0,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.flex = False
        training = model.training
        model.eval()
        self.has_plain_head, self.supports_prefix_sharing = self._probe_model()
        model.train(training)
        if attention == "flex":
            self.flex = True
            try:
                model.set_attn_implementation("flex_attention")
            except (ValueError, ImportError) as error:
                raise UserError(
                    f"model.attention is flex, which {model.config.model_type} does not have: set it to auto."
                ) from error

    def __call__(self, batch: Batch, reference: Reference | None = None) -> Tensor:
        """The sum over all targets of what they are learnt for, a float32 scalar.

        That is weight times negative log-likelihood and, where the batch has ``kls``, these times the
        divergence KL(model || reference) of the distributions over the whole vocabulary from which the target
        was drawn. Summed over the tokens of an answer that the model has drawn, the divergences have the
        divergence of the distributions over answers as their expectation.

        It depends on all parameters even if the batch has no targets, as DDP requires.

        Args:
            batch: The micro-batch.
            reference: M_0; needed where the batch has ``kls``.

        Raises:
            UserError: The batch shares prefixes, and the model does not support that.
        """
        self.check(prefix_sharing=batch.subtree_ends is not None)
        held = () if batch.kls is None else (batch.kls, *reference(batch))
        if self.chunks:
            head, hidden = self.model.get_output_embeddings().weight, self._hidden_states(batch)
            loss, self.penalty = _ChunkedNLL.apply(hidden, head, batch.targets, batch.weights, *held)
            return loss
        found = self._logits(batch).float().log_softmax(-1)
        loss = -(found.gather(1, batch.targets[:, None])[:, 0] * batch.weights).sum()
        if held:
            kls, logits, _ = held
            divergences = (found.exp() * (found - logits.float().log_softmax(-1))).sum(-1)
            penalty = (kls * divergences).sum()
            loss, self.penalty = loss + penalty, penalty.detach()
        return loss

    @property
    def chunks(self) -> bool:
        """Whether the logits come from the hidden states, chunk by chunk; FSDP may have wrapped the head."""
        return self.has_plain_head and type(self.model.get_output_embeddings()) is torch.nn.Linear

    def check(self, *, prefix_sharing: bool) -> None:
        """Raise UserError if batches share prefixes and the model does not support that."""
        if prefix_sharing and not self.supports_prefix_sharing:
            raise UserError(
                f"{self.model.config.model_type} does not attend as prefix-sharing batches need it: "
                "set data.batches.prefix_sharing to false."
            )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        masks = None
        if batch.subtree_ends is not None:
            config = self.model.config.get_text_config()
            masks = prefix_tree_masks(config, batch.position_ids[0], batch.subtree_ends, flex=self.flex)
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_mask": masks,
            "use_cache": False,
        }

    def _hidden_states(self, batch: Batch) -> Tensor:
        """The input of the output embedding where a target is predicted, of shape [targets, hidden size].

        It is divided by the temperature, as the logits are then too.
        """
        output = self.model.get_decoder()(**self._inputs(batch))
        return output.last_hidden_state.flatten(0, 1)[batch.predictors] / self.temperature

    def _logits(self, batch: Batch) -> Tensor:
        """The model's own logits where a target is predicted, of shape [targets, vocabulary]."""
        width = batch.input_ids.shape[1]
        columns, column = (batch.predictors % width).unique(return_inverse=True)
        logits = self.model(**self._inputs(batch), logits_to_keep=columns).logits
        return logits[batch.predictors // width, column] / self.temperature

    @torch.no_grad()
    def _probe_model(self) -> tuple[bool, bool]:
        """Whether the model has a plain head, and whether it gives the same logits for a prefix tree.

        Found out with two short sequences, as no config says either.
        """
        examples = [TokenizedExample([0, 1, 2], [0]), TokenizedExample([0, 1, 3], [0])]
        rows, tree = (
            move_data_to_device(lay_out(examples, step_tokens=2, ends_step=True), self.model.device)
            for lay_out in (pad, pack)
        )
        logits = self._logits(rows)
        head = self.model.get_output_embeddings()
        has_plain_head = (
            type(head) is torch.nn.Linear
            and head.bias is None
            and self.model.get_decoder() is not self.model
            and torch.equal(head(self._hidden_states(rows)), logits)
        )
        try:
            difference = (self._logits(tree) - logits).abs().max()
            supports_prefix_sharing = bool(difference < 1e-3 * logits.std())
        except Exception:  # models that do not know such masks fail in many ways
            supports_prefix_sharing = False
        return has_plain_head, supports_prefix_sharing


class Reference:
    """M_0, from which the model that trains shall not go far: a frozen copy, or that model less its adapters.

    Args:
        loss: Of M_0, or of the model that trains and has adapters.
        lora: Turns the adapters off; None for a copy.
    """

    def __init__(self, loss: NegativeLogLikelihood, lora: LoRA | None = None) -> None:
        self.loss = loss
        self.lora = lora

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What M_0's logits where a batch's targets are predicted are made of.

        Returns:
            Hidden states of shape [targets, hidden size] and the output embedding, of which they are the
            product; or the logits themselves, and None, if the model does not have a plain head.
        """
        with self.lora.off(self.loss.model) if self.lora else nullcontext():
            if self.loss.chunks:
                return self.loss._hidden_states(batch), self.loss.model.get_output_embeddings().weight
            return self.loss._logits(batch), None


class _ChunkedNLL(torch.autograd.Function):
    """Weighted negative log-likelihood of the targets, from hidden states and the output embedding.

    The forward pass computes the gradients too, chunk by chunk while the chunk's logits exist. So no logits
    are kept for the backward pass, and none are computed a second time.

    PyTorch's ``linear_cross_entropy`` does the same, but computes in float32 under autocast (2.13), and
    rounds the loss to bfloat16 when its inputs are bfloat16.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        kls: Tensor | None = None,
        reference_hidden: Tensor | None = None,
        reference_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum, and the part of the divergences in it; in float32, or float64 for such inputs.

        Args:
            ctx: Keeps the gradients for ``backward``.
            hidden: Hidden states, of shape [targets, hidden size].
            weight: The output embedding, of shape [vocabulary, hidden size].
            targets: Token ids, int64 of shape [targets].
            weights: Factor of each target's loss, float32 of shape [targets].
            kls: Factor of each divergence from the reference, float32 of shape [targets].
            reference_hidden: The reference's hidden states.
            reference_weight: The reference's output embedding.
        """
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            if kls is not None:
                reference_hidden, reference_weight = reference_hidden.to(dtype), reference_weight.to(dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss, penalty = (hidden.new_zeros((), dtype=exact) for _ in range(2))
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        rows = max(1, MAX_LOGITS // len(weight))
        columns = [hidden, hidden_grad, targets[:, None], weights[:, None].to(exact)]
        columns += [] if kls is None else [kls[:, None].to(exact), reference_hidden]
        for states, states_grad, target, factor, *held in zip(*(c.split(rows) for c in columns), strict=True):
            log_probabilities = (states @ weight.T).log_softmax(-1, dtype=exact)
            loss -= (log_probabilities.gather(1, target) * factor).sum()
            if held:
                held_factor, reference_states = held
                reference = (reference_states @ reference_weight.T).log_softmax(-1, dtype=exact)
                held_sum, held_grad = _divergences(log_probabilities, reference, held_factor)
                penalty += held_sum
            # d loss / d logits = factor * (probabilities - one_hot(target))
            logits_grad = log_probabilities.exp_().mul_(factor).scatter_add_(1, target, -factor)
            if held:
                logits_grad += held_grad
            logits_grad = logits_grad.to(states.dtype)
            torch.mm(logits_grad, weight, out=states_grad)
            if weight_grad is None:
                continue
            if states.dtype == exact:
                weight_grad.addmm_(logits_grad.T, states)  # refuses operands of different dtypes
            else:
                weight_grad += logits_grad.T @ states
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(penalty)
        return loss + penalty, penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``hidden`` and ``weight``; autograd casts them to the dtypes of the inputs."""
        hidden_grad, weight_grad = ctx.saved_tensors
        of_weight = None if weight_grad is None else weight_grad.mul_(gradient)
        return hidden_grad * gradient, of_weight, *[None] * 5


def _divergences(log_probabilities: Tensor, reference: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of KL(model || reference) over positions, and its gradient for the model's logits.

    Args:
        log_probabilities: The model's, of shape [positions, vocabulary].
        reference: The reference's, of the same shape.
        factors: Of each position, of shape [positions, 1].
    """
    probabilities, ratios = log_probabilities.exp(), log_probabilities - reference
    divergences = (probabilities * ratios).sum(-1, keepdim=True)
    return (divergences * factors).sum(), (ratios - divergences) * probabilities * factors
