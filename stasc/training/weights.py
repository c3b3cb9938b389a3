"""Weights between model folders and the trainer: loaded for training, gathered, and written as M_n."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from stasc.errors import UserError
from stasc.manual import Manual
from stasc.model_folder import ModelFolder
from stasc.run import write_folder
from stasc.training.lora import LoRA


def load_model(folder: Path, lora: LoRA | None = None) -> PreTrainedModel:
    """The model of a folder, in training mode and in float32, whatever the dtype of its files.

    With ``lora`` the model is frozen and has new adapters, which alone train.

    Raises:
        UserError: Its config.json or generation_config.json is damaged.
    """
    model = ModelFolder(folder).model(torch.float32)
    if lora:
        lora.add_to(model)
    return model.train()


def empty_model(folder: Path) -> PreTrainedModel:
    """A model of the folder's architecture without weights: its parameters are on the meta device."""
    config = ModelFolder(folder).model_config()
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a wrong value of the config leads to
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder / 'config.json'} makes no model ({type(error).__name__}: {reason[:200]}): get it anew."
        ) from error


def check_weights(base: ModelFolder) -> None:
    """Find weights that are not of the model that config.json describes, or that are broken numbers.

    Raises:
        UserError: A weight is missing, unknown, of another shape or dtype, or not finite.
    """
    empty, found = empty_model(base.path), base.tensor_shapes()
    tied = empty.all_tied_weights_keys
    expected = {name: tuple(t.shape) for name, t in empty.state_dict().items() if name not in tied}
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys() - set(tied)
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            raise UserError(
                f"the weights in {base.path} are not those of its config.json: {name} has the shape "
                f"{list(found[name])}, not {list(expected[name])}."
            )
    # Where both are there, transformers may know the weights by other names.
    if len(missing) == len(expected) or (bool(missing) != bool(unknown)):
        kind, names = ("lack", missing) if missing else ("have, and its config.json does not,", unknown)
        raise UserError(f"the weights in {base.path} {kind} {', '.join(sorted(names)[:3])}: get them anew.")
    for path in base.weight_files():
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point() or not tensor.isfinite().all():
                    what = (
                        "holds numbers that are not finite" if tensor.is_floating_point() else "is quantised"
                    )
                    raise UserError(f"{path}: {name} {what}, so that nothing can be learnt: get it anew.")


def load_weights(wrapped: torch.nn.Module, folder: Path, lora: LoRA | None = None) -> None:
    """Replace the weights of ``wrapped.model`` with those of a folder; a collective call on all ranks.

    Args:
        wrapped: ``trainer.strategy.model``: the LightningModule, as wrapped by DDP or FSDP.
        folder: Model folder of the same architecture.
        lora: The adapters of ``wrapped.model``, which are drawn anew.
    """
    distributed = dist.is_initialized()
    weights = {}
    if not distributed or dist.get_rank() == 0:
        # from_pretrained ties weights, so a tied lm_head has an entry here even if the files have none.
        weights = {f"model.{name}": tensor for name, tensor in load_model(folder, lora).state_dict().items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)
    set_model_state_dict(wrapped, weights, options=options)


def gather_weights(wrapped: torch.nn.Module, base: Path, lora: LoRA | None = None) -> dict[str, Tensor]:
    """The weights of ``wrapped.model`` as the files of M_n hold them; a collective call on all ranks.

    They are unsharded, on the CPU, merged with the adapters, without tied copies, and in M_0's dtype.

    Args:
        wrapped: ``trainer.strategy.model``: the LightningModule, as wrapped by DDP or FSDP.
        base: Model folder of M_0.
        lora: The adapters of ``wrapped.model``.

    Returns:
        The weights by name on rank 0, and nothing on the other ranks.

    Raises:
        UserError: The adapters are not finite.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(wrapped, options=options)
    if dist.is_initialized() and dist.get_rank() != 0:
        return {}
    tied = empty_model(base).all_tied_weights_keys
    dtype = getattr(torch, ModelFolder(base).dtype)
    weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if lora:
        weights = lora.merge(weights, empty_model(base))
    return {name: tensor.to(dtype) for name, tensor in weights.items() if name not in tied}


def write_model(weights: dict[str, Tensor], base: Path, folder: Path, manual: Manual | None = None) -> None:
    """Write gathered weights as a Hugging Face folder, atomically; that of an M_n has a manual.

    All other files (config, tokenizer, chat template, generation config) are copied from the folder ``base``
    of M_0, so that whatever can load M_0 can load M_n. Who may read the folder may read all files in it.
    """
    with write_folder(folder) as unfinished:
        empty_model(base).save_pretrained(unfinished, state_dict=dict(weights))
        for path in ModelFolder(base).files_beside_weights():
            shutil.copyfile(path, unfinished / path.name)
        if manual:
            manual.write(unfinished)
        mode = (unfinished / "config.json").stat().st_mode
        for path in unfinished.glob("*.safetensors"):
            path.chmod(mode)  # safetensors makes files that only their owner can read


@torch.inference_mode()
def log_probabilities(
    weights: dict[str, Tensor] | None, base: Path, sequences: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Log-probability of each token but the first of each sequence, in float32 on the CPU.

    The weights are taken from memory, as gathered from the trainer, to compare them with an engine that has
    read its own from files. Of the folder ``base`` only the config is read; without weights they are its own.
    """
    if weights is None:
        model = load_model(base)
    else:
        empty = empty_model(base)
        model = type(empty).from_pretrained(
            None, config=empty.config, state_dict=dict(weights), dtype=torch.float32
        )
    model.eval()
    found = []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        scores = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found
