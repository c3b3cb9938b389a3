"""Models that are made on this machine on first use, and kept in a cache for all runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from stasc.errors import UserError
from stasc.run import write_folder


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The model folder ``name`` in the cache; ``make`` fills it if it is not there yet.

    The cache is ``$STASC_CACHE``, else ``$XDG_CACHE_HOME/stasc``, else ``~/.cache/stasc``. Of several
    processes one makes the folder, and the others wait. The caller's random state does not change.

    Raises:
        UserError: The cache cannot be written to.
    """
    folder = _cache() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(name + ".lock")):
            if not folder.is_dir():  # Another process may have made it meanwhile.
                with write_folder(folder) as unfinished, torch.random.fork_rng(devices=[]):
                    make(unfinished)
    except OSError as error:
        raise UserError(
            f"the model {name} could not be written to {folder.parent} ({error.strerror or error}): "
            "set STASC_CACHE to a writable folder with free space."
        ) from error
    return folder


def _cache() -> Path:
    if cache := os.environ.get("STASC_CACHE"):
        return Path(cache).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stasc"
