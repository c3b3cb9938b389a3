"""LoRA (Hu et al., 2022): low-rank adapters train beside M_0's frozen weights; M_n is both merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stasc.errors import UserError

if TYPE_CHECKING:
    from peft import LoraModel


@dataclass(frozen=True)
class LoRA:
    """A linear layer with weights W computes ``W x + alpha / r * B A x``; A and B train, W does not.

    A starts random and B at zero, so new adapters do not change a model's outputs.

    Args:
        r: Rank of B A.
        alpha: Scales B A.
        dropout: Of the input of A in training, in [0, 1).
        target_modules: Linear layers by their names in the model, as ``[q_proj, v_proj]``; or ``all-linear``,
            which is all but the output embedding.

    Raises:
        UserError: A value is out of its range.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Sequence[str] | Literal["all-linear"] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.lora.r is {self.r}: it must be 1 or more.")
        if self.alpha < 1:
            raise UserError(f"model.lora.alpha is {self.alpha}: it must be 1 or more.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout is {self.dropout}: it must lie in [0, 1).")
        if not self.target_modules:
            raise UserError("model.lora.target_modules is empty: name some layers, or set all-linear.")

    def add_to(self, model: PreTrainedModel) -> None:
        """Freeze a model and add new adapters, drawn from the seed that torch was last given.

        Raises:
            UserError: ``target_modules`` has a name that no linear layer of the model has.
        """
        self._wrap(model)

    @contextmanager
    def off(self, model: PreTrainedModel) -> Iterator[None]:
        """Let a model with adapters compute as M_0 does: without them, and without dropout."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers, training = [m for m in model.modules() if isinstance(m, BaseTunerLayer)], model.training
        model.eval()
        for layer in layers:
            # Its enable_adapters would switch requires_grad too, which FSDP takes as it was when it wrapped.
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False
            model.train(training)

    def merge(self, weights: dict[str, Tensor], empty: PreTrainedModel) -> dict[str, Tensor]:
        """The weights of a plain model with the same outputs as the model with adapters.

        Args:
            weights: State dict of a model with adapters; it is not changed.
            empty: A model of that architecture without weights; it is changed, so use it for nothing else.

        Raises:
            UserError: The sum is not finite, as training diverged.
        """
        adapted = self._wrap(empty)
        empty.load_state_dict(weights, assign=True)
        empty.tie_weights()
        try:
            with torch.no_grad():
                return adapted.merge_and_unload(safe_merge=True).state_dict()
        except ValueError as error:
            raise UserError(
                "training diverged: the adapters are not finite. Lower model.learning_rate or set "
                "trainer.gradient_clip_val, in a new run_dir."
            ) from error

    def _wrap(self, model: PreTrainedModel) -> LoraModel:
        from peft import LoraConfig, LoraModel  # takes a second, which full fine-tuning need not wait

        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        if targets != "all-linear":
            _check_layers(targets, model)
        config = LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets
        )
        # On the CPU and from the seed itself, so that all ranks draw the same, whatever they drew before.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(torch.initial_seed())
            return LoraModel(model, config, "default")


def _check_layers(targets: list[str], model: PreTrainedModel) -> None:
    output = model.get_output_embeddings()
    layers = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not output]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(
                f"model.lora.target_modules names '{target}', and the model's linear layers are: {names}."
            )
