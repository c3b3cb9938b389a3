"""Which runs belong together: seeds of a system, systems of a bench, and what to call them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pandas as pd

from stasc.algorithm import VARIANTS
from stasc.errors import UserError
from stasc.report.runs import RunResult
from stasc.report.table import to_frame
from stasc.run import SystemRecord
from stasc.texts import printable
from stasc.trajectory import TRANSITIONS, Question

BASE = "model.base"
SIZES = ("algorithm.init_args.n_init", "algorithm.init_args.n_corr")
_ITERATIONS = "algorithm.init_args.iterations"
_THRESHOLD = "algorithm.init_args.threshold"
_VARIANT = "algorithm.init_args.variant"
_MOST_NAMED = 4
"""Options in a name; where more differ, as between tasks, it has as few as tell the systems apart."""
_LONGEST_NAMED = 60
"""Characters of a value in a name; a longer one is numbered."""

T = TypeVar("T")


@dataclass(frozen=True)
class System:
    """Runs that differ in nothing but their seed.

    Attributes:
        bench: What is shared by the systems that it can be compared with: model, questions, trainer.
        label: Distinguishes it from the other systems of its bench.
        name: Distinguishes it from all other systems.
        runs: At least one, in the order of their seeds.
        paper: Whether it is a curve of the paper.
    """

    bench: str
    label: str
    name: str
    runs: tuple[RunResult, ...]
    paper: bool

    @property
    def algorithm(self) -> str:
        """The name of its algorithm; for STaSC the variant."""
        return self.record.name

    @property
    def variant(self) -> str | None:
        """The three letters of a STaSC variant; None for another system."""
        return self.algorithm if self.algorithm in VARIANTS else None

    @property
    def options(self) -> dict[str, Any]:
        """What all its runs have in common besides the algorithm, by dotted name."""
        return _options(self.runs[0])

    @property
    def sizes(self) -> tuple[int, int]:
        """(N_init, N_corr)."""
        n_init, n_corr = (self.options.get(name, 1) for name in SIZES)
        return n_init, n_corr

    @property
    def initialization(self) -> str | None:
        """The letter E or F of a variant; other trained systems are shown with Evolving initialisation."""
        if self.variant:
            return self.variant[0]
        return "E" if self.record.iterations else None

    @property
    def record(self) -> SystemRecord:
        """What its runs say of it; the seed is that of one of them."""
        return self.runs[0].record

    @property
    def test_set(self) -> frozenset[Question]:
        """Its test questions."""
        return self.runs[0].test_set

    @property
    def counted(self) -> tuple[RunResult, ...]:
        """The runs that tables summarise: the finished ones, or all if there is none."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def final(self) -> int:
        """The last iteration in which all counted runs were tested."""
        last = min(run.last for run in self.counted)
        tested = (n for n in range(last, 0, -1) if all(run.points[n].rewards for run in self.counted))
        return last if self.paper else next(tested, 0)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Every iteration of every run, in the columns of the file ``curves.csv``."""
        return to_frame(
            {
                "source": "paper" if self.paper else "runs",
                "bench": self.bench,
                "system": self.label,
                "run": run.name,
                "seed": None if self.paper else run.record.seed,
                "iteration": n,
                "r1": point.r1,
                "r2": point.r2,
                "delta": None if point.r1 is None or point.r2 is None else point.r2 - point.r1,
                "repeated": point.repeated,
                "validation_r2": point.validation,
                "dataset_size": point.size,
                **{name: point.transitions.get(name) for name in TRANSITIONS},
            }
            for run in self.runs
            for n, point in enumerate(run.points)
        )

    def curve(self, name: str) -> pd.DataFrame:
        """Mean, min, max and count over runs of a column of ``curves``, by iteration where any is known."""
        known = self.curves.dropna(subset=name).astype({name: float})
        return known.groupby("iteration")[name].agg(["mean", "min", "max", "count"])


def group_runs(runs: Iterable[RunResult], *, paper: bool = False) -> list[System]:
    """The systems of some runs: variants in the order of the paper's Table 2, then others.

    Raises:
        UserError: Two runs are the same run of the same system.
    """
    groups = list(_by(runs, lambda run: _key([run.record.name, _options(run)])).values())
    for seeds in groups:
        _check(seeds)
    firsts = [seeds[0] for seeds in groups]
    benches = _names([_part(run, in_algorithm=False) for run in firsts], always=BASE)
    if paper:
        benches = [f"paper: {bench}" for bench in benches]
    labels = _labels(firsts, benches)
    several = len(set(benches)) > 1
    systems = [
        System(
            bench=bench,
            label=label,
            name=f"{bench}: {label}" if paper else f"{label} · {bench}" if several else label,
            runs=tuple(sorted(seeds, key=lambda run: (run.record.seed, run.name))),
            paper=paper,
        )
        for seeds, bench, label in zip(groups, benches, labels, strict=True)
    ]
    return sorted(systems, key=_order)


def _check(seeds: Sequence[RunResult]) -> None:
    """Raise UserError unless these are several seeds of one system."""
    first = seeds[0]
    for same in _by(seeds, lambda run: run.record.seed).values():
        if len(same) > 1:
            raise UserError(
                f"{same[0].name} and {same[1].name} are the same run with the same seed_everything "
                f"({same[0].record.seed}), which would count it twice: leave one of them out."
            )
    for other in seeds:
        if other.test_set != first.test_set:
            raise UserError(
                f"{first.name} and {other.name} have the same options but other test questions, so they are "
                "no two seeds of one system: report them apart."
            )


def _labels(runs: Sequence[RunResult], benches: Sequence[str]) -> list[str]:
    """The name of each run's system, and what distinguishes it from others of this name on its bench."""
    labels = [""] * len(runs)
    for members in _by(range(len(runs)), lambda i: (benches[i], runs[i].record.name)).values():
        names = _names([_part(runs[i], in_algorithm=True) for i in members])
        for i, differing in zip(members, names, strict=True):
            record = runs[i].record
            remark = " (SC)" if record.name == "FIE" else ""
            if record.uses_references:
                remark = " (uses references at inference)"
            labels[i] = ", ".join(filter(None, (record.name, differing))) + remark
    return labels


def _order(system: System) -> tuple[Any, ...]:
    """By bench; in it variants, then other systems: trained ones, untrained ones, and upper bounds last."""
    variant = VARIANTS.index(system.variant) if system.variant else len(VARIANTS)
    untrained = not system.variant and not system.record.iterations
    kind = (variant, system.record.uses_references, untrained, system.algorithm)
    return (system.bench, *kind, system.sizes, system.label)


def _options(run: RunResult) -> dict[str, Any]:
    """All options that make the system, but for the variant, which is its name."""
    record = run.record
    options = record.options | {_ITERATIONS: record.iterations, _THRESHOLD: record.threshold}
    return _without(options, _VARIANT)


def _part(run: RunResult, *, in_algorithm: bool) -> dict[str, Any]:
    """The options of the algorithm, and of how it samples; or all others."""
    options = _options(run).items()
    parts = ("algorithm.", "data.sampling.")
    return {name: value for name, value in options if name.startswith(parts) == in_algorithm}


def _names(option_sets: Sequence[dict[str, Any]], always: str = "") -> list[str]:
    """What distinguishes each of some option sets from the others, in few words, and ``always`` anyway."""
    values = {
        name: sorted({_key(options.get(name)) for options in option_sets})
        for name in dict.fromkeys([always, *(name for options in option_sets for name in options)])
    }
    named = [name for name in values if name == always or len(values[name]) > 1]
    if len(named) > _MOST_NAMED:
        named = _enough(option_sets, named, always)

    def word(name: str, value: Any) -> str:
        short = name.rpartition(".")[2]
        if name == always or short == "class_path":
            separator = "/" if name == always else "."
            return _last_part(str(value), {str(options.get(name)) for options in option_sets}, separator)
        if sum(other.rpartition(".")[2] == short for other in named) > 1:
            short = name
        if isinstance(value, list | dict) or len(str(value)) > _LONGEST_NAMED:  # such as prompts
            return f"{short} no. {values[name].index(_key(value)) + 1}"
        return f"{short}={value}"

    return [
        printable(", ".join(word(name, options[name]) for name in named if name in options))
        for options in option_sets
    ]


def _enough(option_sets: Sequence[dict[str, Any]], names: Sequence[str], always: str) -> list[str]:
    """As few of the options as tell the sets apart, one by one that which tells most; ``always`` first."""

    def told_apart(by: Sequence[str]) -> int:
        return len({_key([options.get(name) for name in by]) for options in option_sets})

    enough = [always]
    while told_apart(enough) < told_apart(names):
        # Of several that tell as much, that of the test questions is the one to read.
        enough.append(
            max(names, key=lambda name: (told_apart([*enough, name]), name.startswith("data.test")))
        )
    return [name for name in names if name in enough]


def _last_part(path: str, paths: set[str], separator: str) -> str:
    """What follows the last separator, or the whole path where two of ``paths`` have the same end."""
    ends = {one.rstrip(separator).rpartition(separator)[2] for one in paths}
    return path.rstrip(separator).rpartition(separator)[2] if len(ends) == len(paths) else path


@dataclass(frozen=True)
class Panel:
    """Systems that are drawn together: variants that share all other options, and other trained systems."""

    title: str
    systems: tuple[System, ...]


def panels(systems: Sequence[System]) -> list[Panel]:
    """For each bench one for each set of options with several variants, or for each one if none has several.

    How many iterations were asked for does not matter here.
    """
    found = []
    for bench, members in _by(systems, lambda system: system.bench).items():
        groups = list(_by([system for system in members if system.variant], _all_but_variant).values())
        groups = [group for group in groups if len(group) > 1] or groups
        others = [system for system in members if system.initialization and not system.variant]
        options = [_part(group[0].runs[0], in_algorithm=True) for group in groups]
        names = _names([_without(one, *SIZES, _ITERATIONS) for one in options])
        for group, name in zip(groups, names, strict=True):
            sizes = f"{bench} {group[0].sizes}" if len(groups) > 1 or group[0].paper else bench
            found.append(Panel(", ".join(filter(None, (sizes, name))), (*group, *others)))
        if others and not groups:
            found.append(Panel(bench, tuple(others)))
    return found


def grid(systems: Sequence[System]) -> list[list[System]]:
    """Table 1: for each variant the systems that differ in nothing but N_init and N_corr, if several do."""

    def all_but_sizes(system: System) -> Hashable:
        return system.paper, system.algorithm, _key(_without(system.options, *SIZES))

    families = _by([system for system in systems if system.variant], all_but_sizes)
    return [family for family in families.values() if len(family) > 1]


def compared(systems: Sequence[System]) -> list[System]:
    """Table 2: all systems, less the cells of Table 1 whose sizes no other variant was run with."""
    in_grid = {system.name for family in grid(systems) for system in family}
    groups = _by([system for system in systems if system.variant], _all_but_variant).values()
    alone = {group[0].name for group in groups if len(group) == 1}
    return [system for system in systems if system.name not in in_grid & alone]


def _all_but_variant(system: System) -> Hashable:
    return system.paper, _key(_without(system.options, _ITERATIONS))


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _by(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
