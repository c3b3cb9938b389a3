"""Seeds that follow from the seed of a run."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *path: str | int) -> int:
    """The seed of one thing that is random in a run: 32 bits, all that torch's CPU generator takes in.

    Args:
        seed: Of the run.
        *path: What is random, such as a stage, a prompt and a question.
    """
    key = "/".join(map(str, (seed, *path))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")
