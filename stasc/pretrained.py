"""Models as Hugging Face folders: found, checked, loaded into a trainer, and written back as M_n."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stasc.errors import UserError
from stasc.lora import LoRA
from stasc.run import write_folder

_CONFIGURATION_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


def locate(model: str) -> Path:
    """The folder of a model given as a folder or as a hub id, which is downloaded once.

    Raises:
        UserError: There is no such folder or hub model.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.is_dir():
        raise UserError(f"{folder} has no config.json: model.base must be a model folder or a hub id.")
    if model.startswith((".", "/", "~")):
        raise UserError(f"model.base {model} does not exist: it must be a model folder or a hub id.")
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", *_CONFIGURATION_FILES]))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"model.base '{model}' is not a folder here, and the Hugging Face hub did not give it ({reason})."
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    return AutoTokenizer.from_pretrained(folder)


def load_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config of a model folder, if it has one."""
    present = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder) if present else None


def context_length(folder: Path) -> int:
    """Tokens that the model of a folder can take.

    Raises:
        UserError: Its config does not say.
    """
    tokens = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    if tokens is None:
        raise UserError(
            f"{folder / 'config.json'} has no max_position_embeddings: add it, the number of tokens that the "
            "model can take."
        )
    return tokens


def load_model(folder: Path, lora: LoRA | None = None) -> PreTrainedModel:
    """The model of a folder, in training mode, with float32 master weights whatever its files hold.

    With ``lora`` it is frozen and has new adapters, which alone train.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        lora.add_to(model)
    return model.train()


def load_weights(wrapped: torch.nn.Module, folder: Path, lora: LoRA | None = None) -> None:
    """Replace the weights of ``wrapped.model`` with those of a folder; a collective call on all ranks.

    Args:
        wrapped: ``trainer.strategy.model``: the LightningModule as one device, DDP or FSDP holds it.
        folder: Model folder of the same architecture.
        lora: The adapters that ``wrapped.model`` has; they start anew.
    """
    distributed = dist.is_initialized()
    weights = {}
    if not distributed or dist.get_rank() == 0:
        # from_pretrained ties what is tied, so lm_head comes with the embedding's values.
        weights = {f"model.{name}": tensor for name, tensor in load_model(folder, lora).state_dict().items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)
    set_model_state_dict(wrapped, weights, options=options)


def gather_weights(wrapped: torch.nn.Module, base: Path, lora: LoRA | None = None) -> dict[str, torch.Tensor]:
    """The weights of ``wrapped.model`` as the files of M_n shall hold them: whole, merged with the adapters
    of ``lora``, and in M_0's dtype.

    A collective call on all ranks; all but rank 0 get nothing.
    """
    weights = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.is_initialized() and dist.get_rank() != 0:
        return {}
    tied = shell(base).all_tied_weights_keys
    dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if lora:
        own = lora.merge(own, shell(base))
    return {name: tensor.to(dtype) for name, tensor in own.items() if name not in tied}


def write_model(weights: dict[str, torch.Tensor], base: Path, folder: Path) -> None:
    """Write gathered weights as the Hugging Face folder of M_n, atomically.

    Everything but the weights (tokenizer, chat template, generation config, config with its dtype) is that
    of the folder ``base``, so M_n goes wherever M_0 went.
    """
    with write_folder(folder) as unfinished:
        shell(base).save_pretrained(unfinished, state_dict=dict(weights))
        for pattern in _CONFIGURATION_FILES:
            for path in sorted(base.glob(pattern)):
                if not path.name.endswith(".index.json"):
                    shutil.copyfile(path, unfinished / path.name)


@torch.inference_mode()
def log_probabilities(
    weights: dict[str, torch.Tensor], base: Path, sequences: Sequence[Sequence[int]]
) -> list[list[float]]:
    """What gathered weights say of each token but the first, in float32 on the CPU.

    No file is read but the config of ``base``: this is what the trainer's own weights say, to compare an
    engine with that has read them from files.
    """
    empty = shell(base)
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


def shell(base: Path) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
