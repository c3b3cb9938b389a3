"""Trains on the processes of a strategy with every accumulation and kind of batch, and records the steps.

Usage: python fit_places.py STRATEGY MODEL OUTPUT
"""

import sys
from pathlib import Path

from conftest import tiny_tokenizer
from cpu_fsdp import CPUFSDPStrategy
from test_training import KINDS, PROMPTS, fit
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from stasc.prompting import Dialogue
from stasc.training import loss

if __name__ == "__main__":
    strategy, model, output = sys.argv[1:]
    loss.MAX_LOGITS = 1000  # so that even a tiny model has several chunks
    for accumulate in (1, 2, 4):
        for kind, options in KINDS.items():
            fit(
                Path(model),
                Dialogue(tiny_tokenizer("qwen2"), PROMPTS),
                Path(output) / f"{accumulate}-{kind}",
                1e-3,
                options,
                accumulate_grad_batches=accumulate,
                devices=1 if strategy == "one" else 2,
                strategy={"one": "auto", "ddp": "ddp"}.get(strategy)
                or CPUFSDPStrategy(auto_wrap_policy={Qwen2DecoderLayer}),
            )
