"""Lightning's checkpoints as files that are there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stasc.run import write_file


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
