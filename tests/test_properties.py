"""What holds for every input, tried on many that a tool makes up (hypothesis, the same on every day)."""

import math
import tempfile
import unicodedata
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stasc.algorithm import VARIANTS, STaSC
from stasc.answers import AfterMarker, InTag, LastLine, LastNumber, WholeCompletion
from stasc.filtering import improves, pair_all, stays_right
from stasc.reward import exact_match, f1, in_accuracy, normalize
from stasc.sampling import Draw, Request
from stasc.sampling.journal import Journal
from stasc.texts import printable
from stasc.training.batches import CorrectionBatches
from stasc.training.prefix_tree import prefix_tree
from stasc.trajectory import Answer, Example, Question, Records, Trajectory, from_json, to_json

settings.register_profile(
    "always the same",
    derandomize=True,
    database=None,
    max_examples=100,
    deadline=None,  # how long it takes depends on what else the machine does
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("always the same")

TEXTS = st.text(max_size=30)
"""Of all scripts, controls included; half characters are refused wherever texts come in."""

LATIN = st.text(st.characters(max_codepoint=0x24F, exclude_categories=["C"]), max_size=30)
REFERENCES = st.lists(st.one_of(TEXTS, LATIN), max_size=4)
PREDICTIONS = st.one_of(TEXTS, LATIN, REFERENCES.map(" ".join))
REWARDS = st.sampled_from([0.0, 0.25, 0.5, 1.0])
WHOLE = st.integers(0, 5)


# ---------------------------------------------------------------- rewards


@given(st.one_of(TEXTS, LATIN))
def test_words_are_without_space_and_the_same_in_every_form_of_unicode(text):
    words = normalize(text)
    assert all(word and not any(map(str.isspace, word)) for word in words)
    for form in ("NFC", "NFD"):
        assert normalize(unicodedata.normalize(form, text)) == words
    assert normalize(f"  {text}\n") == words


@given(PREDICTIONS, REFERENCES)
def test_rewards_lie_between_0_and_1_and_do_not_depend_on_the_order_of_references(prediction, references):
    for reward in (in_accuracy, exact_match, f1):
        found = reward(prediction, references)
        assert 0 <= found <= 1
        assert reward(prediction, references[::-1]) == found
        assert found <= reward(prediction, [*references, prediction])
    assert exact_match(prediction, references) <= f1(prediction, references)
    assert exact_match(prediction, references) <= in_accuracy(prediction, references)


@given(PREDICTIONS)
def test_a_text_is_its_own_reference_if_it_has_a_word(text):
    has_words = float(bool(normalize(text)))
    assert f1(text, [text]) == exact_match(text, [text]) == has_words
    assert in_accuracy(text, [text]) >= has_words


@given(PREDICTIONS, PREDICTIONS)
def test_f1_and_exact_match_are_symmetric(one, other):
    assert f1(one, [other]) == f1(other, [one])
    assert exact_match(one, [other]) == exact_match(other, [one])


@given(st.lists(st.from_regex(r"[b-s]{2,6}", fullmatch=True), min_size=1, max_size=5), st.data())
def test_what_stands_around_a_reference_does_not_hide_it(words, data):
    before, after = (data.draw(st.text("xyz .,!\n", max_size=8)) for _ in range(2))
    assert in_accuracy(f"{before} {' '.join(words)} {after}", [" ".join(words)]) == 1


# ---------------------------------------------------------------- answers


@given(TEXTS)
def test_an_answer_is_a_part_of_the_completion_without_space_around_it(completion):
    for finder in (WholeCompletion(), AfterMarker("Answer:"), InTag(), LastLine()):
        found = finder.find(completion)
        assert found in completion
        assert found == found.strip()


@given(TEXTS, TEXTS)
def test_what_is_marked_is_found(before, answer):
    assert AfterMarker("Answer:").find(f"{before}aNSWER:{answer}").endswith(answer.strip())
    if "<answer>" not in answer:
        assert InTag().find(f"{before}<answer>{answer}</answer>") == answer.strip()
    if answer.strip() and len(answer.splitlines()) == 1:
        assert LastLine().find(f"{before}\n{answer}\n \n") == answer.strip()


@given(st.integers(-(10**9), 10**9), st.sampled_from(["d", ",d"]), st.text("ab .;:\n", max_size=10))
def test_the_last_number_is_found_however_it_is_written(number, form, after):
    assert LastNumber().find(f"from 12 it is {number:{form}}{after}") == str(number)


@given(TEXTS)
def test_the_last_number_of_any_text_can_be_read(completion):
    found = LastNumber().find(completion)
    assert found == "" or all(map(math.isfinite, map(float, found.split("/"))))


# ---------------------------------------------------------------- filters


@st.composite
def trajectories(draw, most=3):
    """A chain of answers with any rewards."""
    question = Question(draw(TEXTS.filter(str.strip)), draw(TEXTS), tuple(draw(REFERENCES)))
    answers = [
        Answer(
            prompt="correction" if turn else "initial",
            number=draw(WHOLE),
            text=draw(TEXTS),
            token_ids=tuple(draw(st.lists(st.integers(0, 2**20), max_size=4))),
            finished=draw(st.booleans()),
            reward=draw(REWARDS),
        )
        for turn in range(draw(st.integers(1, most)))
    ]
    return Trajectory(question, tuple(answers))


@given(st.lists(trajectories(most=2), max_size=8), st.sampled_from([0.25, 0.5, 1.0]))
def test_improving_is_what_non_decreasing_keeps_less_what_stays_right(members, threshold):
    kept = {
        variant: [
            example.trajectory for example in STaSC(variant=variant, threshold=threshold).select(1, members)
        ]
        for variant in VARIANTS
    }
    for variant in VARIANTS:
        assert kept[variant] == kept[f"{variant[0]}{variant[1]}E"], "the filter is no fine-tuning"
    improving, lenient = kept["EIE"], kept["ENE"]
    assert improving == [t for t in members if improves(t)]
    assert [t for t in lenient if not stays_right(t, threshold)] == improving
    assert all(t.reward(2) >= t.reward(1) for t in lenient)
    for t in members:
        assert not (improves(t) and stays_right(t, threshold))


@given(st.lists(st.tuples(WHOLE, WHOLE), min_size=1, max_size=8, unique=True), st.lists(REWARDS, min_size=2))
def test_pairs_are_every_answer_with_every_correction(paths, rewards):
    members = [
        Trajectory(
            Question("q", "?"),
            (
                Answer("initial", j, f"{j}", (), True, rewards[j % len(rewards)]),
                Answer("correction", k, f"{j}/{k}", (), True, rewards[(j + k) % len(rewards)]),
            ),
        )
        for j, k in sorted(paths)
    ]
    pairs = list(pair_all(members))
    initial = {t.answers[0].text for t in members}
    assert len(pairs) == len({t.path for t in pairs}) == len(initial) * len(members)
    assert {(t.answers[0].text, t.answers[1].text) for t in pairs} == {
        (one, t.answers[1].text) for one in initial for t in members
    }


# ---------------------------------------------------------------- prefix trees and batches

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=10)


@given(SEQUENCES)
def test_a_prefix_tree_is_that_of_brute_force(sequences):
    tree = prefix_tree(sequences)
    prefixes = sorted({tuple(s[: n + 1]) for s in sequences for n in range(len(s))})
    assert tree.tokens.tolist() == [prefix[-1] for prefix in prefixes]
    assert tree.depths.tolist() == [len(prefix) - 1 for prefix in prefixes]
    for i, prefix in enumerate(prefixes):
        below = [j for j, other in enumerate(prefixes) if other[: len(prefix)] == prefix]
        assert below == list(range(i, tree.subtree_ends[i]))
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert [prefixes[i] for i in path] == [tuple(sequence[: n + 1]) for n in range(len(sequence))]


@st.composite
def packing(draw):
    """Examples of a few tokens, and how they are divided."""
    rendered = draw(
        st.lists(
            st.tuples(
                st.lists(st.integers(0, 2), min_size=1, max_size=6),
                st.lists(st.integers(3, 4), min_size=1, max_size=4),
            ),
            min_size=1,
            max_size=12,
        )
    )
    longest = max(len(prompt) + len(target) for prompt, target in rendered)
    options = {
        "batch_size": draw(st.integers(1, 6)),
        "token_budget": longest + draw(st.integers(0, 30)),
        "prefix_sharing": draw(st.booleans()),
        "group_corrections": draw(st.booleans()),
        "ranks": draw(st.integers(1, 3)),
        "accumulate": draw(st.integers(1, 3)),
        "seed": draw(WHOLE),
    }
    return rendered, options


@given(packing())
def test_every_token_is_learnt_once_and_no_batch_is_larger_than_the_budget(given_):
    rendered, options = given_
    dataset = [
        Trajectory(
            Question(f"{i // 3}", "?"),
            (Answer("initial", 0, "", (), True, 0.0), Answer("correction", i, "", (), True, 1.0)),
        ).learn()
        for i in range(len(rendered))
    ]

    def render(example: Example) -> tuple[list[int], list[int]]:
        return rendered[example.trajectory.path[1]]

    ranks = options["ranks"]
    every = [CorrectionBatches(dataset, render, rank=rank, **options) for rank in range(ranks)]
    assert len({len(one) for one in every}) == 1
    batches = [one[i] for i in range(len(every[0])) for one in every]
    assert all(batch.input_ids.numel() <= options["token_budget"] for batch in batches)
    assert sum(batch.tokens for batch in batches) == sum(len(target) for _, target in rendered)
    assert sum(float(batch.weights.sum()) for batch in batches) == sum(len(target) for _, target in rendered)
    assert sorted(every[0].order.tolist()) == list(range(len(rendered)))
    assert sum(batch.ends_step for batch in batches) == ranks * every[0].steps
    step_tokens = sum(batch.step_tokens for batch in batches if batch.ends_step)
    assert step_tokens == ranks * sum(len(target) for _, target in rendered)


# ---------------------------------------------------------------- files

LEARNT = st.builds(
    lambda trajectory, weight: trajectory.learn(weight=weight),
    trajectories(),
    st.floats(allow_nan=False, allow_infinity=False),
)


@given(st.lists(st.one_of(trajectories(), LEARNT), max_size=4), st.integers(0, 400))
def test_records_come_back_and_whole_lines_survive_a_cut(records, cut):
    lines = [to_json(record) for record in records]
    assert [from_json(line) for line in lines] == records
    content = "".join(f"{line}\n" for line in lines).encode()
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "records.jsonl").write_bytes(content)
        assert list(Records(path)) == records
        path.write_bytes(left := content[: -cut or None])
        whole = left.count(b"\n")
        found = Records(path)
        assert whole <= len(found) <= whole + 1
        assert [found[i] for i in range(whole)] == records[:whole]


REQUESTS = st.lists(
    st.builds(Request, st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), st.just(2), WHOLE),
    min_size=1,
    max_size=5,
    unique=True,
)


@given(REQUESTS, st.integers(0, 500))
def test_a_journal_that_was_cut_gives_its_whole_lines_and_those_that_follow(requests, cut):
    draws = [[Draw((i, j), bool(j)) for j in range(2)] for i in range(len(requests))]
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), "a stage", 0, "M_0")
        for request, drawn in zip(requests, draws, strict=True):
            journal.add(request, drawn)
        assert journal.read(requests) == dict(enumerate(draws))
        content = journal.path.read_bytes()
        journal.path.write_bytes(left := content[: -cut or None])
        resumed = Journal(Path(folder), "a stage", 0, "M_0")
        found = resumed.read(requests)
        assert found.items() <= dict(enumerate(draws)).items()
        assert len(found) >= left.count(b"\n")
        for i in range(len(requests)):
            if i not in found:
                resumed.add(requests[i], draws[i])
        assert resumed.read(requests) == dict(enumerate(draws))


@given(TEXTS)
def test_what_is_shown_has_the_length_of_what_it_is_and_nothing_to_obey(text):
    shown = printable(text, keep="\n")
    assert len(shown) == len(text)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert printable(shown, keep="\n") == shown
