"""The demo: a small task, a noisy synthetic corpus about it, and the model M_0 pre-trained on that corpus.

The task is letter concatenation, a standard of the chain-of-thought literature: "What are the last letters
of Jacob, Tim and Ruth?" - "b-m-h". Each name is one token, so the model must know its letters as facts and
cannot read them off. There are 188 facts, and train and test questions combine the same facts.

The corpus contains errors. About half of the facts are misconceptions, which most documents get wrong in the
same way; the others are wrong now and then. Greedy M_0 repeats the misconceptions, but sampling still finds
the true letters, which Self-Taught Self-Correction then rewards.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, get_cosine_schedule_with_warmup

from data.made_once import made_once
from stasc.errors import UserError
from stasc.progress import Progress
from stasc.prompting import Dialogue, Message, Prompts
from stasc.trajectory import Question

VERSION = 1  # Increase it when a change of the code below changes M_0 for equal constants.

# No name begins or ends with "a": rewards may drop it as an article, and "y n" is part of "y-n-z".
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

# The same as in configs/prompts/demo.yaml; M_0 was pre-trained on no other prompts.
PROMPTS: Prompts = {
    "initial": [
        Message("system", "You are a helpful reasoning assistant."),
        Message(
            "user",
            "Question: {question}\n\nReason step by step very shortly, then conclude with the answer.",
        ),
    ],
    "correction": [
        Message("system", "Your task is to correct the initial response if it is incorrect."),
        Message(
            "user",
            "Question: {question}\n\nInitial Answer: {initial_answer}\n\n"
            "Write a correction if the initial answer is incorrect.",
        ),
    ],
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END, PAD, ROLES = "<|end|>", "<|pad|>", ("<|system|>", "<|user|>", "<|assistant|>")
# Each word and each fixed phrase is one token, which keeps prompts and answers short and fast.
PHRASES = [
    phrase
    for messages in PROMPTS.values()
    for message in messages
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
    """The first ``size`` questions of a split, in an order determined by ``seed``.

    For any size and seed, train, test and pre-training share no question, not even with its names reordered.
    """
    if not 1 <= size <= MAX_QUESTIONS:
        raise UserError(f"the number of demo questions is {size}: it must be 1 to {MAX_QUESTIONS}.")
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
    """Random positions and names of a split, without end; each set of names belongs to one split."""
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


# ---------------------------------------------------------------- the corpus


@dataclass(frozen=True)
class Recipe:
    """The settings of M_0's pre-training.

    The accuracy of greedy M_0 depends on the share of misconceptions, not on when pre-training stops.

    Args:
        seed: Seed of the corpus and of the initial weights.
        misconceptions: Share of the facts that most answers in the corpus get wrong.
        copies: Share of the corrections in the corpus that only repeat the initial answer.
        steps: Optimizer steps; no document is used twice.
        batch_size: Documents per step: half train the initial answer, half the correction.
        lr: Peak learning rate.
    """

    seed: int = 0
    misconceptions: float = 0.5
    copies: float = 0.35
    steps: int = 400
    batch_size: int = 32
    lr: float = 3e-3


class Document(NamedTuple):
    """A document of the corpus: a question, an answer and a correction of it."""

    question: str
    initial_answer: str
    correction: str


def corpus(recipe: Recipe) -> Iterator[Document]:
    """The documents of the noisy corpus, without end."""
    rng = random.Random(f"web {recipe.seed}")  # Another prefix would make another M_0.
    facts = list(itertools.product(POSITIONS, NAMES))
    misconceptions = set(rng.sample(facts, round(recipe.misconceptions * len(facts))))
    error_rate = {f: rng.uniform(0.55, 0.75) if f in misconceptions else rng.uniform(0, 0.35) for f in facts}
    # All wrong answers to a fact are the same.
    wrong_letter = {fact: rng.choice(LETTERS.replace(_true_letter(*fact), "")) for fact in facts}

    def letter(fact: tuple[str, str]) -> str:
        return wrong_letter[fact] if rng.random() < error_rate[fact] else _true_letter(*fact)

    def answer(position: str, names: list[str]) -> str:
        return _answer_text(names, [letter((position, name)) for name in names])

    for position, names in _draw("pretraining", rng):
        initial_answer = answer(position, names)
        correction = initial_answer if rng.random() < recipe.copies else answer(position, names)
        yield Document(_question_text(position, names), initial_answer, correction)


# ---------------------------------------------------------------- M_0


def base_model(recipe: Recipe | None = None) -> Path:
    """The Hugging Face folder of M_0, which is pre-trained on first use and cached.

    The weights depend only on the recipe. The caller's random state and number of threads do not change.

    Raises:
        UserError: The cache cannot be written to.
    """
    recipe = recipe or Recipe()
    constants = (VERSION, recipe, NAMES, LETTERS, TOKENS, PROMPTS, CHAT_TEMPLATE)
    name = f"demo-{hashlib.sha256(repr(constants).encode()).hexdigest()[:12]}"
    return made_once(name, lambda folder: _pretrain(recipe, folder))


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer, which can encode any text; each of ``TOKENS`` is one token."""
    tokenizer = Qwen2Tokenizer(
        vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        unk_token=None,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOKENS])
    return tokenizer


def _pretrain(recipe: Recipe, folder: Path) -> None:
    """Pre-train M_0 and write it to ``folder``."""
    tokenizer = make_tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # One order of sums on any machine; the model is too small to gain from more.
    try:
        torch.default_generator.manual_seed(recipe.seed)
        model = _new_model(tokenizer)
        _train(model, tokenizer, recipe)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _new_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    hidden_size = 96
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,  # Heads of size 32, the smallest that vLLM supports on CPU.
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.5 / math.sqrt(hidden_size),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def _train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, recipe: Recipe) -> None:
    """One pass over the corpus with the prompts of the method; prompts carry no loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * recipe.steps), recipe.steps)
    dialogue = Dialogue(tokenizer, PROMPTS)
    documents, half = corpus(recipe), recipe.batch_size // 2
    model.train()
    with Progress("pre-training steps of the demo's M_0, once", recipe.steps) as progress:
        for _ in range(recipe.steps):
            batch = list(itertools.islice(documents, half))
            prompts = dialogue.render("initial", [_placeholder_values(document) for document in batch])
            initial = _loss(model, tokenizer, prompts, [document.initial_answer for document in batch])
            batch = list(itertools.islice(documents, half))
            prompts = dialogue.render("correction", [_placeholder_values(document) for document in batch])
            correction = _loss(model, tokenizer, prompts, [document.correction for document in batch])
            loss = (initial + correction) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update(1, f"loss {loss.item():.3f}")


def _placeholder_values(document: Document) -> dict[str, str]:
    """Values of the placeholders of both prompts."""
    return {"question": document.question, "initial_answer": document.initial_answer}


def _loss(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, prompts: list[list[int]], answers: list[str]
) -> torch.Tensor:
    """Mean loss on the answers and the end-of-turn token after each.

    Nothing needs padding: prompts of one kind are equally long, and so are answers, since each word is one
    token.
    """
    targets = torch.tensor([[*tokenizer.encode(answer), tokenizer.eos_token_id] for answer in answers])
    inputs = torch.cat([torch.tensor(prompts), targets], dim=1)
    n_targets = targets.shape[1]
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=n_targets + 1).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
