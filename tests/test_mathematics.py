"""Mathematical answers, equal in value, and the limit on what a verifier takes."""

import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stasc.mathematics import MathAnswer, time_limit

BOXED = r"Adding both gives $\frac{2}{4} = \boxed{\frac{1}{2}}$, that is \$0.50."


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("5 boxes hold 5*250=1250 pens.\n#### 1,250", ["1250", "1,250 pens", "$1250$"], ["1,25", "250", "5"]),
        (
            BOXED,
            ["1/2", "0.5", r"$\dfrac{1}{2}$", r"\frac12", "50%", r"\boxed{\frac24}"],
            ["2", "1/4", "0.05"],
        ),
        (
            "42",
            ["42 apples", "The answer is 42.", "**42**", r"\(42\)", r"first \boxed{41}, no: \boxed{42}"],
            [],
        ),
        ("42", ["blah " * 20_000 + "42"], ["blah " * 20_000 + "41", r"so \boxed{41}", "-42", "4.2"]),
        (r"\$18", ["18", "$18", r"\$18.00", "18 dollars"], ["1.8", "81"]),
        (r"10\text{ cm}", ["10", "10 cm"], ["100 cm"]),
        (r"90^\circ", ["90", "90°"], ["9"]),
        (r"50\%", ["50%", "50", "0.5"], ["5%"]),
        ("-3", ["\u22123", "x = -3"], ["3"]),
        ("(3,4)", ["(3, 4)", "$(3,4)$"], ["(4,3)", "4", "[3,4]"]),
        ("4", ["4.0"], ["(3, 4)"]),
        (r"\{1,2\}", ["{2, 1}", "1,2", "2 and 1"], ["{1}", "{1,3}"]),
        (
            r"(-\infty, 2]\cup[3,\infty)",
            [r"[3,\infty) \cup (-\infty,2]"],
            [r"(-\infty, 2)\cup[3,\infty)", "3"],
        ),
        ("x^2+2x+1", ["(x+1)^2", "$1 + 2x + x^2$", "(x+1)**2"], ["x^2+1"]),
        (r"2\sqrt{3}", ["2*sqrt(3)", r"\sqrt{12}"], ["3"]),
        (r"2\pi", ["2π", r"$2 \pi$"], ["2"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"], ["2"]),
        (r"\text{(E)}", ["(E)", "E", r"\text{(E)}"], ["(D)"]),
        (r"\text{Monday}", ["Monday", "monday."], ["Tuesday", "Mon"]),
    ],
)
def test_mathematical_values(reference, right, wrong):
    reward = MathAnswer()
    assert [reward.score(answer, [reference]) for answer in right] == [1] * len(right)
    assert [reward.score(answer, [reference]) for answer in wrong] == [0] * len(wrong)
    assert [reward.score(answer, ["7777", reference]) for answer in right] == [1] * len(right)


@pytest.mark.parametrize("answer", ["", "banana", "$$", "(" * 50_000, r"\frac{" * 2000, "9" * 5000, "####"])
def test_garbage_has_no_value(answer):
    assert MathAnswer().score(answer, ["42"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["9**9**9**9", "2^{2^{2^{2^{2^{2}}}}}"])
def test_what_takes_too_long_to_compute_has_no_value(answer):
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    assert MathAnswer().score(answer, ["9"]) == MathAnswer().score(answer, ["10"]) == 0
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_mathematics_in_a_thread_and_without_a_word(capfd):
    with ThreadPoolExecutor() as threads:
        assert threads.submit(MathAnswer().score, "1/2", ["0.5"]).result() == 1
    assert capfd.readouterr() == ("", "")


def test_time_limit():
    def never_ends() -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(1)

    with pytest.raises(TimeoutError, match=r"more than 0\.05 seconds"), time_limit(0.05):
        never_ends()
    with pytest.raises(KeyError), time_limit(5):
        raise KeyError
