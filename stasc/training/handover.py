"""The weights that train, on their way to the engines between two on-policy updates."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from stasc import processes
from stasc.model_folder import ModelFolder
from stasc.run import write_folder
from stasc.training.lora import LoRA
from stasc.training.weights import gather_weights, write_model


class Handover:
    """Gives the engines the trainer's weights as model folders whose weights stay in memory.

    Such a folder has M_0's small files, and a link to a file that exists in the memory of rank 0 alone
    (``memfd_create``). So engines read it as any other folder, even one that is started anew, and what a kill
    leaves behind are some kilobytes. Where there is no such memory (more than one node, no Linux), or where
    M_0's files know the weights by names of their own, the weights are written to disk.

    Args:
        folder: Where the folders lie; what an earlier start has left there is removed.
        base: Model folder of M_0.
        nodes: Number of machines.
    """

    def __init__(self, folder: Path, base: Path, nodes: int) -> None:
        self.folder = folder
        self.base = base
        self.in_memory = nodes == 1 and hasattr(os, "memfd_create")
        self._given: list[tuple[Path, int | None]] = []
        if processes.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)

    def give(self, update: int, wrapped: torch.nn.Module, lora: LoRA | None) -> Path:
        """A folder with the weights after so many updates; a collective call on all ranks.

        The folder before it stays until the next call, as engines hold on to it until they have loaded this.

        Args:
            update: The number that the folder is named by.
            wrapped: ``trainer.strategy.model``: the LightningModule, as wrapped by DDP or FSDP.
            lora: The adapters of ``wrapped.model``.
        """
        weights = gather_weights(wrapped, self.base, lora)
        folder = self.folder / f"update-{update}"
        if processes.rank() == 0:
            self._forget(all_but=1)
            self._given.append((folder, self._write(weights, folder)))
        processes.wait_for(folder)
        return folder

    def close(self) -> None:
        """Give the memory back; engines that are started anew need another folder by then."""
        self._forget(all_but=0)
        if processes.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, weights: dict[str, Tensor], folder: Path) -> int | None:
        """Write a folder; the descriptor of the file in memory, if that is where its weights are."""
        files = ModelFolder(self.base)
        if not self.in_memory or weights.keys() != files.tensor_shapes().keys():
            write_model(weights, self.base, folder)
            return None
        memory = os.memfd_create("weights")
        with open(memory, "wb", closefd=False) as file:
            file.write(save(weights, metadata={"format": "pt"}))
        with write_folder(folder) as unfinished:
            for path in files.files_beside_weights():
                shutil.copyfile(path, unfinished / path.name)
            (unfinished / "model.safetensors").symlink_to(f"/proc/{os.getpid()}/fd/{memory}")
        return memory

    def _forget(self, *, all_but: int) -> None:
        while len(self._given) > all_but:
            folder, memory = self._given.pop(0)
            shutil.rmtree(folder, ignore_errors=True)
            if memory is not None:
                os.close(memory)
