"""Batches: prefix trees, their loss and gradient, weights, and what fits into a micro-batch."""

import math
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)

from stasc.errors import UserError
from stasc.training import loss
from stasc.training.batches import Batch, CorrectionBatches, TokenizedExample, pack, pad
from stasc.training.loss import NegativeLogLikelihood
from stasc.training.prefix_tree import prefix_tree
from stasc.trajectory import Answer, Example, Question, Trajectory

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # so large that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "phi3": Phi3Config(**SIZES, sliding_window=2047),
    "phi3-window": Phi3Config(**SIZES, sliding_window=6),
    "qwen2-mixed": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, sliding_window=6, final_logit_softcapping=5.0),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0, attention_multiplier=0.25),
}


def model(config: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    built = type(CONFIGS[config])(**{**CONFIGS[config].to_dict(), **changes})
    return AutoModelForCausalLM.from_config(built).train()


def words(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


DEMONSTRATIONS, ANSWER = words(20, 0), words(10, 1)
EXAMPLES: dict[str, list[TokenizedExample]] = {
    name: [TokenizedExample(prompt, target) for prompt, target in pairs]
    for name, pairs in {
        "shared": [
            (DEMONSTRATIONS + ANSWER, words(7, 2)),
            (DEMONSTRATIONS + words(5, 3), words(9, 4)),
            (DEMONSTRATIONS + ANSWER, words(12, 5)),
        ],
        "nothing shared": [([1, *words(8, 6)], words(3, 7)), ([2, *words(15, 8)], words(5, 9))],
        "one token": [(DEMONSTRATIONS, [3]), (DEMONSTRATIONS, [4]), ([5], [6])],
        "twice": [(DEMONSTRATIONS, words(5, 10)), ([7, 8], [9, 9]), (DEMONSTRATIONS, words(5, 10))],
        "targets share a prefix": [
            (ANSWER, words(6, 11)),
            (ANSWER, [*words(6, 11)[:3], 1, 2]),
            (ANSWER, words(6, 11)[:2]),
        ],
        "a target is another's prompt": [(ANSWER[:4], ANSWER[4:]), (ANSWER, words(4, 12))],
    }.items()
}


def one_by_one(model: PreTrainedModel, examples: Sequence[TokenizedExample]) -> Tensor:
    """The weighted sum over all targets by the model's own logits, one example at a time, without padding."""
    losses = []
    for prompt, target, weight, _ in examples:
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses.append(-weight * logits.log_softmax(-1)[range(len(target)), target].sum())
    return torch.stack(losses).sum()


def gradients(model: PreTrainedModel, summed: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    summed.backward()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: parameter.grad.clone() for name, parameter in trained}


# ---------------------------------------------------------------- the layout


def test_every_shared_prefix_is_laid_out_once():
    tree = prefix_tree([[1, 2, 3], [1, 2, 4, 5], [6], [1, 2]])
    assert tree.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert tree.depths.tolist() == [0, 1, 2, 2, 3, 0]
    assert tree.subtree_ends.tolist() == [5, 5, 3, 5, 5, 6]
    assert [path.tolist() for path in tree.paths] == [[0, 1, 2], [0, 1, 3, 4], [5], [0, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_the_ancestors_of_a_token_are_exactly_its_prefix(seed):
    draw = random.Random(seed)
    sequences = [draw.choices("ab", k=draw.randint(1, 8)) for _ in range(draw.randint(1, 12))]
    sequences = [[ord(letter) for letter in sequence] for sequence in sequences]
    tree = prefix_tree(sequences)
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert len(tree.tokens) == len(prefixes)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tree.tokens[path].tolist() == sequence
        assert tree.depths[path].tolist() == list(range(len(sequence)))
        for depth, index in enumerate(path.tolist()):
            ancestors = [j for j in range(index + 1) if index < tree.subtree_ends[j]]
            assert ancestors == path[: depth + 1].tolist()


# ---------------------------------------------------------------- loss and gradient


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("config", CONFIGS)
def test_trees_and_rows_give_the_loss_and_gradient_one_by_one(config, examples, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(loss, "MAX_LOGITS", 3 * VOCABULARY)
    of = model(config)
    alone = one_by_one(of, EXAMPLES[examples])
    expected = gradients(of, alone)
    for lay_out in (pack, pad):
        summed = NegativeLogLikelihood(of)(lay_out(EXAMPLES[examples], 1, ends_step=True))
        assert summed.item() == pytest.approx(alone.item(), rel=1e-5)
        for name, gradient in gradients(of, summed).items():
            assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-5, name


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", ["qwen2", "llama", "phi3-window", "gemma2", "granite"])
def test_weights_give_the_gradient_of_one_weighted_example_at_a_time(config, seed, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(loss, "MAX_LOGITS", 3 * VOCABULARY)
    draw = random.Random(seed)
    examples = [e._replace(weight=draw.gauss(0, 1)) for group in EXAMPLES.values() for e in group]
    for i in draw.sample(range(len(examples)), 3):
        examples[i] = examples[i]._replace(weight=0.0)
    assert min(e.weight for e in examples) < 0 < max(e.weight for e in examples)
    of = model(config)
    nll = NegativeLogLikelihood(of)
    assert nll.has_plain_head == (config not in ("gemma2", "granite"))
    alone = one_by_one(of, examples)
    expected = gradients(of, alone)
    for lay_out in (pack, pad):
        summed = nll(lay_out(examples, 1, ends_step=True))
        assert summed.item() == pytest.approx(alone.item(), rel=1e-5, abs=1e-4)
        for name, gradient in gradients(of, summed).items():
            assert float((gradient - expected[name]).norm() / expected[name].norm()) < 2e-5, name


@pytest.mark.parametrize("lay_out", [pack, pad])
def test_weights_of_a_shared_target_are_summed(lay_out):
    first, second, third = [1, 2], [1, 3], [2]
    weighted = [(first, 0.5), (second, -2.0), (first, 0.25), (second, 2.0), (third, 1.0)]
    examples = [TokenizedExample([7, 8], target, weight) for target, weight in weighted]
    batch = lay_out(examples, 1, ends_step=True)
    if lay_out is pack:
        found = zip(batch.predictors.tolist(), batch.targets.tolist(), batch.weights.tolist(), strict=True)
        assert list(found) == [(1, 1, 0.75), (1, 2, 1.0), (2, 2, 0.75), (2, 3, 0.0)]
    assert batch.weights.dtype == torch.float32
    assert float(batch.weights.sum()) == 2 * 0.75 + 1
    assert batch.tokens == 9


@pytest.mark.parametrize("config", ["phi3-window", "qwen2-mixed"])
def test_the_windows_of_these_tests_change_the_loss(config):
    batch = pack(EXAMPLES["shared"], 1, ends_step=True)
    with torch.no_grad():
        narrow = NegativeLogLikelihood(model(config))(batch)
        wider, wide = (NegativeLogLikelihood(model(config, sliding_window=w))(batch) for w in (7, 100))
    assert abs(float(narrow - wide)) > 1e-2
    assert abs(float(narrow - wider)) > 1e-2


class LogitRows(TorchDispatchMode):
    """Notes how many rows of logits each matrix product gives."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and found.shape[1] == VOCABULARY:
            self.rows.append(found.shape[0])
        return found


def test_logits_are_computed_once_at_the_targets_alone_and_few_at_once(monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS", 4 * VOCABULARY)
    summed = NegativeLogLikelihood(model("qwen2"))
    with LogitRows() as logits:
        summed(pack(EXAMPLES["shared"], 1, ends_step=True)).backward()
    assert logits.rows == [4] * 7  # of 7 + 9 + 12 targets


def test_under_autocast_chunked_logits_give_the_gradient_of_the_models_own(monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS", 4 * VOCABULARY)
    of = model("qwen2")
    batch = pack(EXAMPLES["shared"], 1, ends_step=True)
    by_chunk, by_model = NegativeLogLikelihood(of), NegativeLogLikelihood(of)
    by_model.has_plain_head = False
    with torch.autocast("cpu", torch.bfloat16):
        losses = [by_chunk(batch), by_model(batch)]
    assert losses[0].dtype == torch.float32
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    found, expected = (gradients(of, summed) for summed in losses)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 3e-2, name


def test_a_frozen_output_embedding_gets_no_gradient():
    of = model("qwen2", tie_word_embeddings=False)
    expected = gradients(of, one_by_one(of, EXAMPLES["shared"]))
    of.get_output_embeddings().requires_grad_(False)
    summed = NegativeLogLikelihood(of)(pack(EXAMPLES["shared"], 1, ends_step=True))
    found = gradients(of, summed)
    assert expected.keys() - found.keys() == {"lm_head.weight"}
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-5, name


def test_a_batch_without_targets_has_zero_loss_and_reaches_all_parameters():
    for config in ("qwen2", "granite"):
        of = model(config)
        for lay_out in (pack, pad):
            summed = NegativeLogLikelihood(of)(lay_out([TokenizedExample([1], [])], 1, ends_step=True))
            assert summed.item() == 0
            assert all(not gradient.any() for gradient in gradients(of, summed).values())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("config", ["llama", "phi3-window", "qwen2-mixed"])
def test_flex_attention_gives_the_same_loss(config, examples):
    """Forward only and not compiled: on a CPU FlexAttention has no more."""
    of = model(config)
    for lay_out in (pack, pad):
        batch = lay_out(EXAMPLES[examples], 1, ends_step=True)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            expected = NegativeLogLikelihood(of)(batch)
            found = NegativeLogLikelihood(model(config), "flex")(batch)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_prefix_sharing_is_refused_for_a_model_without_support():
    of = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=64, n_layer=2, n_head=4))
    summed = NegativeLogLikelihood(of)
    examples = EXAMPLES["shared"]
    rows = summed(pad(examples, 1, ends_step=True))
    assert rows.item() == pytest.approx(one_by_one(of, examples).item(), rel=1e-5)
    with pytest.raises(UserError, match=r"set data\.batches\.prefix_sharing to false"):
        summed(pack(examples, 1, ends_step=True))


# ---------------------------------------------------------------- what fits into a micro-batch


class LazyExamples(Sequence[Example]):
    """Three corrections of each of two initial answers of each question; remembers what is read."""

    def __init__(self, questions: int) -> None:
        self.size = 6 * questions
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(index)
        self.read.append(index)
        question, j, k = index // 6, index // 3 % 2, index % 3
        initial = Answer("initial", j, "", (), False, 0.0)
        correction = Answer("correction", k, "", tuple(words(5 + index % 7, index)), False, 1.0)
        return Trajectory(Question(f"q{question}", ""), (initial, correction)).learn(
            weight=WEIGHTS[index % 5]
        )


WEIGHTS = (1.0, -0.5, 0.0, 2.0, 0.25)


def render(example: Example) -> tuple[list[int], list[int]]:
    """Prompts of 30 tokens or more, 20 of which all share; that of q3 is huge."""
    question, j = int(example.trajectory.question.id[1:]), example.trajectory.path[0]
    huge = words(150, 1) if question == 3 else []
    return DEMONSTRATIONS + words(10, 100 + 2 * question + j) + huge, list(example.answer.token_ids)


def of_ranks(questions: int, ranks: int, **options: object) -> list[CorrectionBatches]:
    return [
        CorrectionBatches(LazyExamples(questions), render, 8, seed=0, rank=rank, ranks=ranks, **options)
        for rank in range(ranks)
    ]


def learnt(batches: Iterator[Batch]) -> tuple[int, float]:
    """Target tokens, and the sum of their weights."""
    found = [(batch.tokens, float(batch.weights.sum())) for batch in batches]
    return sum(tokens for tokens, _ in found), sum(weights for _, weights in found)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (2, 3)])
def test_no_micro_batch_is_larger_than_the_budget(ranks, accumulate, sharing):
    every = of_ranks(5, ranks, accumulate=accumulate, prefix_sharing=sharing, token_budget=210)
    whole = of_ranks(5, 1, prefix_sharing=sharing)[0]
    assert len({len(one) for one in every}) == 1
    assert whole.steps == every[0].steps == 4
    assert len(whole) == 4
    rows = list(zip(*every, strict=True))
    assert max(batch.input_ids.numel() for row in rows for batch in row) <= 210
    assert sum(batch.ends_step for (batch, *_) in rows) == 4
    examples = LazyExamples(5)
    tokens = [len(render(example)[1]) for example in examples]
    weights = sum(size * example.weight for size, example in zip(tokens, examples, strict=True))
    for epoch in ((batch for row in rows for batch in row), iter(whole)):
        assert learnt(epoch) == (sum(tokens), weights)
    ends = [i for i, (batch, *_) in enumerate(rows) if batch.ends_step]
    sizes = [b - a for a, b in zip([-1, *ends], ends, strict=False)]
    assert min(sizes) >= accumulate
    if accumulate == 1:
        assert len(set(sizes)) > 1  # steps with q3 need more


@pytest.mark.parametrize("sharing", [True, False])
def test_the_budget_is_exact(sharing):
    budgets = range(191, 400)
    of_budgets = [of_ranks(5, 1, prefix_sharing=sharing, token_budget=budget)[0] for budget in budgets]
    largest = [max(batch.input_ids.numel() for batch in batches) for batches in of_budgets]
    assert all(size <= budget for size, budget in zip(largest, budgets, strict=True))
    assert any(size == budget for size, budget in zip(largest, budgets, strict=True))


def test_a_step_is_divided_evenly():
    pair = of_ranks(2, 2, prefix_sharing=False)
    for one, other in zip(*pair, strict=True):
        assert abs(len(one.input_ids) - len(other.input_ids)) <= 2
        assert abs(one.input_ids.numel() - other.input_ids.numel()) < 60


def test_an_example_that_cannot_fit_is_named():
    with pytest.raises(
        UserError, match=r"data\.batches\.token_budget is 100, .* question 'q3' has \d+ tokens"
    ):
        of_ranks(5, 1, token_budget=100)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight):
    example = LazyExamples(1)[0].trajectory.learn(weight=weight)
    with pytest.raises(UserError, match=f"question 'q0' has weight {weight} and .* must give finite weights"):
        CorrectionBatches([example], render, 8, seed=0)


def test_only_the_current_step_is_read_and_only_once():
    (batches,) = of_ranks(100, 1, accumulate=2, longest=192, token_budget=192 * 4)
    assert len(batches) == 2 * 75
    assert batches.dataset.read == []
    first = [batches[0], batches[1]]
    assert len(batches.dataset.read) == 8
    assert sum(batch.tokens for batch in first) == first[0].step_tokens


def test_where_lengths_are_not_known_the_batches_are_the_same():
    (known,) = of_ranks(5, 1, accumulate=2, longest=192, token_budget=192 * 4)
    (unknown,) = of_ranks(5, 1, accumulate=2, token_budget=192 * 4)
    assert len(known) == len(unknown)
    for one, other in zip(known, unknown, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_a_wrong_bound_of_the_lengths_is_noticed():
    (batches,) = of_ranks(5, 1, longest=10, token_budget=210)
    with pytest.raises(RuntimeError, match="longer than"):
        list(batches)


def test_corrections_of_an_answer_can_be_kept_together():
    (scattered,) = of_ranks(20, 1)
    (together,) = of_ranks(20, 1, group_corrections=True)
    assert sorted(together.order.tolist()) == list(range(120))
    groups = together.order.reshape(-1, 3)
    assert (groups // 3 == groups[:, :1] // 3).all()
    assert groups[:, 0].tolist() != sorted(groups[:, 0].tolist())
    assert sum(b.input_ids.numel() for b in together) < 0.8 * sum(b.input_ids.numel() for b in scattered)
    assert learnt(iter(together)) == learnt(iter(scattered))
