"""Lightning's checkpoints as files that are there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stasc.errors import UserError
from stasc.run import write_file


def check_checkpoint(path: Path) -> None:
    """Read a checkpoint as numbers and texts, which is all that it may hold.

    Lightning's FSDPStrategy would unpickle one without asking what is in it, and run whatever a stranger has
    put there.

    Raises:
        UserError: It is damaged, or holds objects.
    """
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises several types for damaged files
        raise UserError(
            f"{path} is damaged, or not a checkpoint of this program: remove it, and the run trains its "
            "iterations again from the files that it has."
        ) from error


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to disk and renames it.

    Lightning makes it whole in memory, writes it to the temporary folder, and moves it. Where that folder is
    another file system the move copies over the checkpoint before, and a kill leaves neither.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``, a local file."""
        with write_file(Path(path), "wb") as file:
            torch.save(checkpoint, file)
