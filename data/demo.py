"""The demo: a task, a noisy web about it, and the small model M_0 that grew up on that web.

The task is letter concatenation, a standard of the chain-of-thought literature: "What are the last letters
of Jacob, Tim and Ruth?" - "b-m-h". The model sees each name as one token, so the letter of a name is a fact
to be known, not read off. There are 188 facts, and train and test questions combine the same facts.

The web is wrong. About half of the facts are misconceptions, which most texts get wrong in the same way;
the others are wrong now and then. Greedy M_0 repeats the misconceptions, but the truth stays within reach of
sampling, and rewarding it is what Self-Taught Self-Correction does.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from filelock import FileLock
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, get_cosine_schedule_with_warmup

from stasc.errors import UserError
from stasc.prompting import Dialogue, Message, Prompts
from stasc.trajectory import Question

VERSION = 1  # Raise it when the code below makes another M_0 of the same constants.

# None begins or ends in "a": rewards drop articles, and "y-n-a" would become "y n", which is in "y-n-z".
NAMES = tuple(
    re.findall(
        r"\w+",
        """
        Beatrix Benjamin Bjorn Boris Bruno Caleb Carlos Carmen Charles Chen Chloe Colette Daniel David
        Deborah Diego Dmitri Edith Edward Elizabeth Emily Erik Esther Felix Frank Gabriel George Grace Hamid
        Hans Helen Henry Hiroshi Hugo Igor Ingrid Isabel Ivan Jacob Jens Joseph Judith Karen Kenji Khalid
        Kofi Kurt Kwame Leo Ling Luke Margot Mark Max Mei Michael Miriam Naomi Nikolai Nils Olaf Oleg Omar
        Oscar Otto Pablo Peter Philip Pilar Quentin Rajiv Rashid Robert Rolf Ruth Samuel Sarah Simon Susan
        Sven Tariq Thomas Tim Victor Vikram Wei Wendy William Wolf Yuki Yuri Yusuf Zaid Zoe
        """,
    )
)
POSITIONS = ("first", "last")
LETTERS = "bcdefghijklmnopqrstuvwxyz"

# Those of configs/prompts/demo.yaml: M_0 knows no others.
PROMPTS = Prompts(
    initial=[
        Message("system", "You are a helpful reasoning assistant."),
        Message(
            "user",
            "Question: {question}\n\nReason step by step very shortly, then conclude with the answer.",
        ),
    ],
    correction=[
        Message("system", "Your task is to correct the initial response if it is incorrect."),
        Message(
            "user",
            "Question: {question}\n\nInitial Answer: {initial_answer}\n\n"
            "Write a correction if the initial answer is incorrect.",
        ),
    ],
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END, PAD, ROLES = "<|end|>", "<|pad|>", ("<|system|>", "<|user|>", "<|assistant|>")
# Words are one token each, and so is whatever never varies: prompts and answers cost next to nothing.
PHRASES = [
    phrase
    for message in (*PROMPTS.initial, *PROMPTS.correction)
    for phrase in re.split(r"{\w+}", message.content)
    if phrase
]
WORDS = [f" {word}" for word in (*POSITIONS, "and", "gives", *NAMES, *LETTERS)]
TOKENS = tuple(
    dict.fromkeys(
        [*PHRASES, "What are the", " letters of", "Step-by-step reasoning:", "\nFinal Answer:", *WORDS]
    )
)

Split = Literal["train", "test", "pretraining"]
MAX_QUESTIONS = 20_000  # Per split; there are about 33,000.


# ---------------------------------------------------------------- the task


def questions(split: Literal["train", "test"], size: int, seed: int) -> list[Question]:
    """The first ``size`` questions of a split, in the order that ``seed`` gives.

    Train, test and pre-training never share a question, nor a re-ordering of one, whatever size and seed.
    """
    if not 1 <= size <= MAX_QUESTIONS:
        raise UserError(f"{size} demo questions were asked for: it must be 1 to {MAX_QUESTIONS}.")
    distinct: dict[str, Question] = {}
    for position, names in _draw(split, random.Random(f"{split} {seed}")):
        if (key := _key(position, names)) not in distinct:
            truth = "-".join(_true_letter(position, name) for name in names)
            question_id = f"{split}-{len(distinct) + 1:04d}"
            distinct[key] = Question(question_id, _question_text(position, names), (truth,))
        if len(distinct) == size:
            break
    return list(distinct.values())


def _draw(split: Split, rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Endless positions and names of a split; a set of names belongs to one split, whatever its order."""
    while True:
        position, names = rng.choice(POSITIONS), rng.sample(NAMES, 3)
        bucket = hashlib.sha256(_key(position, names).encode()).digest()[0] % 8
        if split == {0: "train", 1: "test"}.get(bucket, "pretraining"):
            yield position, names


def _key(position: str, names: list[str]) -> str:
    return " ".join([position, *sorted(names)])


def _true_letter(position: str, name: str) -> str:
    return name[0 if position == "first" else -1].lower()


def _question_text(position: str, names: list[str]) -> str:
    return f"What are the {position} letters of {names[0]}, {names[1]} and {names[2]}?"


def _answer_text(names: list[str], letters: list[str]) -> str:
    steps = ", ".join(f"{name} gives {letter}" for name, letter in zip(names, letters, strict=True))
    return f"Step-by-step reasoning: {steps}.\nFinal Answer: {'-'.join(letters)}"


# ---------------------------------------------------------------- the noisy web


@dataclass(frozen=True)
class Recipe:
    """How M_0 is made.

    The share of misconceptions sets how often greedy M_0 is right, not the moment pre-training stops.

    Args:
        seed: Of the web and of the first weights.
        misconceptions: Share of the facts that most answers on the web get wrong.
        copies: Share of the corrections on the web that only repeat the initial answer.
        steps: Optimiser steps; no page is seen twice.
        batch_size: Pages per step, half of them for their initial answer, half for their correction.
        lr: Peak learning rate.
    """

    seed: int = 0
    misconceptions: float = 0.5
    copies: float = 0.35
    steps: int = 400
    batch_size: int = 32
    lr: float = 3e-3


class Page(NamedTuple):
    """A page of the web: somebody answers a question, and somebody writes a correction."""

    question: str
    initial_answer: str
    correction: str


def web(recipe: Recipe) -> Iterator[Page]:
    """Endless pages of the noisy web."""
    rng = random.Random(f"web {recipe.seed}")
    facts = list(itertools.product(POSITIONS, NAMES))
    misconceptions = set(rng.sample(facts, round(recipe.misconceptions * len(facts))))
    error_rate = {f: rng.uniform(0.55, 0.75) if f in misconceptions else rng.uniform(0, 0.35) for f in facts}
    # Everyone who is wrong about a fact is wrong in the same way.
    wrong_letter = {fact: rng.choice(LETTERS.replace(_true_letter(*fact), "")) for fact in facts}

    def letter(fact: tuple[str, str]) -> str:
        return wrong_letter[fact] if rng.random() < error_rate[fact] else _true_letter(*fact)

    def answer(position: str, names: list[str]) -> str:
        return _answer_text(names, [letter((position, name)) for name in names])

    for position, names in _draw("pretraining", rng):
        initial_answer = answer(position, names)
        correction = initial_answer if rng.random() < recipe.copies else answer(position, names)
        yield Page(_question_text(position, names), initial_answer, correction)


# ---------------------------------------------------------------- M_0


def base_model(recipe: Recipe | None = None, progress: bool = True) -> Path:
    """The Hugging Face folder of M_0; pre-trains it on first use and keeps it in the user's cache.

    The cache is ``$STASC_CACHE``, else ``$XDG_CACHE_HOME/stasc``, else ``~/.cache/stasc``. The weights depend
    on the recipe alone, and the caller's random numbers and threads stay as they are.
    """
    recipe = recipe or Recipe()
    constants = (VERSION, recipe, NAMES, LETTERS, TOKENS, PROMPTS, CHAT_TEMPLATE)
    folder = _cache() / f"demo-{hashlib.sha256(repr(constants).encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():  # Another process may have been quicker.
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                _pretrain(recipe, partial, progress)
                partial.replace(folder)
    except OSError as error:
        raise UserError(
            f"the demo's model could not be kept in {folder.parent} ({error.strerror}): "
            "set STASC_CACHE to a folder with some free space."
        ) from error
    return folder


def _cache() -> Path:
    if cache := os.environ.get("STASC_CACHE"):
        return Path(cache).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stasc"


def tokenizer() -> Qwen2Tokenizer:
    """Byte-level, so that it can read any text; ``TOKENS`` are one token each."""
    words = Qwen2Tokenizer(
        vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        unk_token=None,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
    )
    words.add_tokens([AddedToken(token, normalized=False) for token in TOKENS])
    return words


def _pretrain(recipe: Recipe, folder: Path, progress: bool) -> None:
    """Write M_0 to ``folder``."""
    words = tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Sums in one order on any number of cores; the model is too small for more.
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            model = _new_model(words)
        _learn(model, words, recipe, progress)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def _new_model(words: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    width = 96
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,  # Heads of 32: vLLM takes no smaller ones on a CPU.
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.5 / math.sqrt(width),
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def _learn(model: Qwen2ForCausalLM, words: Qwen2Tokenizer, recipe: Recipe, progress: bool) -> None:
    """One pass over the web, with the prompts of the method; what follows a prompt is learned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * recipe.steps), recipe.steps)
    dialogue = Dialogue(words, PROMPTS)
    pages, half = web(recipe), recipe.batch_size // 2
    model.train()
    with tqdm(total=recipe.steps, desc="Pre-training the demo's M_0, once", disable=not progress) as bar:
        for _ in range(recipe.steps):
            initial = [
                (dialogue.initial_prompt(page.question), page.initial_answer)
                for page in itertools.islice(pages, half)
            ]
            correction = [
                (dialogue.correction_prompt(page.question, page.initial_answer), page.correction)
                for page in itertools.islice(pages, half)
            ]
            loss = (_loss(model, words, initial) + _loss(model, words, correction)) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()


def _loss(model: Qwen2ForCausalLM, words: Qwen2Tokenizer, texts: list[tuple[list[int], str]]) -> torch.Tensor:
    """Mean loss on the tokens that follow the prompts, the end of the turn included.

    Texts of one kind are equally long, since every word is one token: there is nothing to pad.
    """
    targets = torch.tensor([[*words.encode(target), words.eos_token_id] for _, target in texts])
    inputs = torch.cat([torch.tensor([prompt for prompt, _ in texts]), targets], dim=1)
    learned = targets.shape[1]
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=learned + 1).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
