"""How fast sampling is: ours against bare vLLM, prefix cache, swap against restart, transformers.

    python benchmarks/sampling.py [--repeats 5] [--quick] [--append FILE]

The contenders of a race live in processes of their own and get the same requests in turn, new ones in each
round. Bare vLLM is timed inside ``LLM.generate``, ours from requests to draws, so whatever we do around it
counts against us alone. Where the same seeds must give the same tokens and do not, the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import yaml
from bare import Bare
from common import DEVICE, ENVIRONMENT, ROOT, machine, publish, spread, table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from data import demo
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, Message, Prompts
from stasc.sampling import Draw, Request, Sampling, TransformersSampler, VLLMSampler
from stasc.training.weights import load_model

CONTEXT = 1024
KV_CACHE_GIB = 1.0
BARE, BARE_UNCACHED = "bare `LLM.generate`", "bare, prefix cache off"
OURS, TRANSFORMERS = "`VLLMSampler`", "`TransformersSampler`"
GREEDY = Sampling(temperature=0, top_p=1, max_tokens=16)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Draws = list[list[Draw]]


class Work(NamedTuple):
    """What a round asks of every contender."""

    requests: list[Request]
    sampling: Sampling
    stop_ids: tuple[int, ...]


# ---------------------------------------------------------------- models


def paper_prompts() -> Prompts:
    """Those of the paper: zero-shot for the initial answer, 2-shot for the correction."""
    texts = yaml.safe_load((ROOT / "configs/prompts/paper.yaml").read_text())
    return {name: [Message(**message) for message in texts[name]] for name in texts}


def paper_tokenizer() -> Qwen2Tokenizer:
    """One that cuts the paper's prompts into about as many tokens as Qwen2.5's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    prompts = paper_prompts()
    bpe.train_from_iterator(
        [message.content for message in (*prompts["initial"], *prompts["correction"])],
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learnt = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


def random_model(folder: Path, hidden: int, layers: int, heads: int) -> Path:
    """A random Qwen2 with the tokenizer for the paper's prompts."""
    tokenizer = paper_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.1,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(model: Path, folder: Path) -> Path:
    """Other weights of the same architecture."""
    torch.manual_seed(1)
    network = load_model(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn_like(parameter)
    network.save_pretrained(folder)
    return folder


def parameters(model: Path) -> str:
    """How large a model is, in words."""
    return f"{sum(parameter.numel() for parameter in load_model(model).parameters()) / 1e6:.1f}M"


# ---------------------------------------------------------------- contenders


class Contender:
    """A way to sample, in a process of its own."""

    def __init__(self, way: str, model: Path, log: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._log = log
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, way, model, log), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, work: Work) -> tuple[float, Draws]:
        """Seconds, and what was drawn."""
        try:
            self._pipe.send(work)
            return self._pipe.recv()
        except (EOFError, OSError):
            sys.exit(f"a contender died; the end of its log:\n{self._log.read_text()[-3000:]}")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, way: str, model: Path, log: Path) -> None:
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    run = _bare(way, model) if way in (BARE, BARE_UNCACHED) else _ours(way, model, log)
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            return
        pipe.send(run(work))


def _bare(way: str, model: Path) -> Callable[[Work], tuple[float, Draws]]:
    engine = Bare(model, CONTEXT, KV_CACHE_GIB, prefix_caching=way == BARE)

    def run(work: Work) -> tuple[float, Draws]:
        draws = [drawn for _, drawn in engine.sample(*work)]
        return engine.seconds, draws

    return run


def _ours(way: str, model: Path, log: Path) -> Callable[[Work], tuple[float, Draws]]:
    sampler = VLLMSampler(KV_CACHE_GIB) if way == OURS else TransformersSampler()
    sampler.start(model, device=DEVICE, context=CONTEXT, log=log)

    def run(work: Work) -> tuple[float, Draws]:
        started = time.perf_counter()
        draws = dict(sampler.sample(*work))
        seconds = time.perf_counter() - started
        return seconds, [draws[i] for i in range(len(draws))]

    return run


# ---------------------------------------------------------------- races


def race(title: str, field: dict[str, Contender], rounds: list[Work]) -> list[list[str]]:
    """Rows of the table: every way on every round but the first, which is greedy and warms up."""
    ways = list(field)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens: dict[str, list[int]] = {way: [] for way in ways}
    for number, work in enumerate(rounds):
        turns = ways[number % len(ways) :] + ways[: number % len(ways)]  # who begins changes
        outcome = {way: field[way].run(work) for way in turns}
        expected = outcome[BARE][1]
        for way, (took, draws) in outcome.items():
            # Transformers draws other numbers from a seed, so only its greedy tokens must be the same.
            if (way != TRANSFORMERS or work.sampling == GREEDY) and draws != expected:
                off = sum(a != b for a, b in zip(draws, expected, strict=True))
                sys.exit(f"{title}, round {number}: {way} and {BARE} differ in {off} of {len(draws)}.")
            if number > 0:
                seconds[way].append(took)
                tokens[way].append(sum(len(draw.token_ids) for drawn in draws for draw in drawn))
    completions = sum(request.n for request in rounds[-1].requests)
    name = f"{title}, {prompt_length(rounds[-1])}, n={rounds[-1].requests[0].n}"
    rows = []
    for way in ways:
        tokens_per_second = median(t / s for t, s in zip(tokens[way], seconds[way], strict=True))
        # Round by round: what slows the machine down for a while slows neighbours down alike.
        shares = [bare / own for bare, own in zip(seconds[BARE], seconds[way], strict=True)]
        rows.append(
            [
                name,
                way,
                spread([completions / s for s in seconds[way]]),
                f"{tokens_per_second:,.0f}",
                "1" if way == BARE else spread(shares, 2),
            ]
        )
    print(f"({name}: done)", file=sys.stderr, flush=True)
    return rows


def works(
    model: Path, prompts: Prompts, which: str, size: int, n: int, sampling: Sampling, repeats: int
) -> list[Work]:
    """A greedy round to warm up, then ``repeats`` rounds, each with ``size`` questions of its own."""
    dialogue = Dialogue(ModelFolder(model).tokenizer(), prompts)
    questions = demo.questions("train", size * (repeats + 1), seed=0)
    requests = []
    for number, question in enumerate(questions):
        answer = f"Step-by-step reasoning: these are {question.references[0]}.\nFinal Answer: none"
        (prompt,) = dialogue.render(which, [{"question": question.text, "initial_answer": answer}])
        requests.append(Request(prompt, n, seed=1000 * number))
    warm_up = Work([request._replace(n=1) for request in requests[:size]], GREEDY, dialogue.stop_ids)
    return [
        warm_up,
        *(
            Work(requests[start : start + size], sampling, dialogue.stop_ids)
            for start in range(size, len(requests), size)
        ),
    ]


def prompt_length(work: Work) -> str:
    """Tokens of a prompt, and how many of them are the same in all."""
    prompts = [request.prompt_ids for request in work.requests]
    shared = next(i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    return f"{round(median(map(len, prompts)))} prompt tokens ({shared} shared)"


# ---------------------------------------------------------------- swap against restart


def swap_and_restart(name: str, model: Path, scratch: Path, repeats: int) -> list[list[str]]:
    """Rows of the table: new weights by ``load``, and by an engine that is started again."""
    other = changed(model, scratch / f"{model.name}-changed")
    log = scratch / "engine.log"
    probe = works(model, demo.PROMPTS, "initial", 8, 1, GREEDY, 0)[0]
    sampler = VLLMSampler(KV_CACHE_GIB)

    def start(folder: Path) -> None:
        sampler.start(folder, device=DEVICE, context=CONTEXT, log=log)

    def timed(ready: Callable[[], None]) -> tuple[float, float, Draws]:
        """Seconds of ``ready``, seconds to the first token, and then a few greedy completions."""
        started = time.perf_counter()
        ready()
        loaded = time.perf_counter()
        list(sampler.sample(probe.requests[:1], Sampling(0, 1, 1), probe.stop_ids))
        first = time.perf_counter()
        draws = dict(sampler.sample(*probe))
        return loaded - started, first - started, [draws[i] for i in range(len(draws))]

    def restart(folder: Path) -> None:
        sampler.close()
        start(folder)

    turns = [other, model] * repeats
    start(model)
    timed(lambda: sampler.load(model))  # warms up
    swaps = [timed(lambda to=folder: sampler.load(to)) for folder in turns]
    restarts = [timed(lambda to=folder: restart(to)) for folder in turns[:4]]
    sampler.close()
    if any(swap[2] != fresh[2] for swap, fresh in zip(swaps, restarts, strict=False)):
        sys.exit(f"{name}: after a swap the engine does not draw what a fresh one draws.")
    if swaps[0][2] == swaps[1][2]:
        sys.exit(f"{name}: two models draw the same, so a swap that does nothing would pass.")
    loads, firsts, fresh = [s[0] for s in swaps], [s[1] for s in swaps], [r[1] for r in restarts]
    return [
        [name, "`load`", spread(loads, 3), f"{median(fresh) / median(loads):.0f}"],
        [name, "`load` and first token", spread(firsts, 3), f"{median(fresh) / median(firsts):.0f}"],
        [name, "restart and first token", spread(fresh, 3), "1"],
    ]


def main() -> None:
    """Run all races and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of every race")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: the demo's model alone, two rounds"
    )
    parser.add_argument("--append", type=Path, help="write the tables to the end of this file too")
    options = parser.parse_args()
    repeats, part = (2, 5) if options.quick else (options.repeats, 1)
    heading = f"{machine()} {repeats} rounds; median (lowest..highest)."
    os.environ.update(ENVIRONMENT)
    disable_progress_bar()
    papers, papers_sampling = paper_prompts(), Sampling(temperature=0.6, top_p=0.9, max_tokens=32)
    demos_sampling = Sampling(temperature=1, top_p=1, max_tokens=64)
    everything = [BARE, BARE_UNCACHED, OURS, TRANSFORMERS]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        small = demo.base_model()
        tiny = random_model(scratch / "tiny", hidden=96, layers=2, heads=3)
        large = random_model(scratch / "large", hidden=512, layers=7, heads=8)
        # title, model, ways; then prompts, which of them, questions in a round, n, sampling
        fields = [
            ("demo", small, [BARE, OURS, TRANSFORMERS], [(demo.PROMPTS, "initial", 1000, 2, demos_sampling)]),
            (
                *("random", tiny, everything),
                [
                    (papers, "correction", 400, 1, papers_sampling),
                    (papers, "correction", 100, 5, papers_sampling),
                ],
            ),
            (
                *("random", large, everything),
                [(papers, "initial", 60, 2, papers_sampling), (papers, "correction", 12, 5, papers_sampling)],
            ),
        ]
        rows, swaps = [], []
        for title, model, ways, runs in fields[: 1 if options.quick else None]:
            name = f"{title} {parameters(model)}"
            field = {way: Contender(way, model, scratch / "log") for way in ways}
            for prompts, which, size, n, sampling in runs:
                rows += race(name, field, works(model, prompts, which, size // part, n, sampling, repeats))
            for contender in field.values():
                contender.close()
            if model != tiny:
                swaps += swap_and_restart(name, model, scratch, 2 * repeats)
    head = ("model and prompts", "way", "completions/s", "tokens/s", "of bare, with the cache")
    note = "Prefix cache off is bare vLLM's: our sampler has it always on."
    publish(f"### Sampling\n\n{heading}\n\n{table(head, rows)}\n\n{note}\n", options.append)
    head = ("model", "new weights by", "seconds", "times faster than a restart")
    publish(f"{table(head, swaps)}\n", options.append)


if __name__ == "__main__":
    main()
