"""Which runs belong together: seeds of a system, systems of a bench, and what to call them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

from stasc.errors import UserError
from stasc.report.runs import RunResult, printable
from stasc.trajectory import Question

CLASS = "algorithm.class_path"
VARIANT = "algorithm.init_args.variant"
ITERATIONS = "algorithm.init_args.iterations"
SIZES = ("algorithm.init_args.n_init", "algorithm.init_args.n_corr")

VARIANTS = ("FIF", "FIE", "FNF", "FNE", "EIF", "EIE", "ENF", "ENE")
"""In the order of the paper's Table 2."""

_ORDER = (*VARIANTS, "STaR", "SelfRefine", "Reflexion")

_REMARKS = {"FIE": "SC", "Reflexion": "uses references at inference"}

T = TypeVar("T")


@dataclass(frozen=True)
class System:
    """Runs that differ in nothing but their seed.

    ``label`` tells it from the other systems of its bench, ``name`` from all others. ``bench`` says what
    was shared by the systems that it can be compared with: model, data, trainer.
    """

    algorithm: str
    bench: str
    label: str
    name: str
    runs: tuple[RunResult, ...]
    paper: bool

    @property
    def variant(self) -> str | None:
        """The three letters of a STaSC variant; None for another system."""
        return self.algorithm if self.algorithm in VARIANTS else None

    @property
    def options(self) -> dict[str, Any]:
        """What all its runs have in common."""
        return self.runs[0].options

    @property
    def sizes(self) -> tuple[int, int]:
        """(N_init, N_corr)."""
        n_init, n_corr = (self.options.get(name, 1) for name in SIZES)
        return n_init, n_corr

    @property
    def initialization(self) -> str | None:
        """The letter E or F of a variant; others that are trained stand with Evolving initialisation."""
        if self.variant:
            return self.variant[0]
        return "E" if self.runs[0].planned else None

    @property
    def uses_references(self) -> bool:
        """Whether it sees the references at inference, so that its rewards are an upper bound."""
        return self.algorithm == "Reflexion"

    @property
    def test_set(self) -> frozenset[Question]:
        """Its test questions."""
        return self.runs[0].test_set

    @property
    def counted(self) -> tuple[RunResult, ...]:
        """The runs that tables are about: the finished ones, or all if there is none."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def final(self) -> int:
        """The last iteration that all counted runs have."""
        return min(run.last for run in self.counted)


def group_runs(runs: Iterable[RunResult], *, paper: bool = False) -> list[System]:
    """The systems of some runs, in the order of the paper's Table 2.

    Raises:
        UserError: Two runs are the same run of the same system.
    """
    systems = list(_by(runs, lambda run: _key(run.options)).values())
    for seeds in systems:
        _check(seeds)
    benches = _names([_options(seeds, in_algorithm=False) for seeds in systems], always=("model.base",))
    labels = _labels(systems, benches)
    several = len(set(benches)) > 1
    return sorted(
        (
            System(
                algorithm=_algorithm(seeds),
                bench=f"paper: {bench}" if paper else bench,
                label=label,
                name=f"{label} · {bench}" if several else label,
                runs=tuple(sorted(seeds, key=lambda run: (str(run.seed).zfill(12), run.name))),
                paper=paper,
            )
            for seeds, bench, label in zip(systems, benches, labels, strict=True)
        ),
        key=_order,
    )


def _check(seeds: Sequence[RunResult]) -> None:
    """Raise UserError unless these are several seeds of one system."""
    first = seeds[0]
    for same in _by(seeds, lambda run: _key([run.seed])).values():
        if len(same) > 1:
            raise UserError(
                f"{same[0].name} and {same[1].name} are the same run with the same seed_everything "
                f"({same[0].seed}), which would count it twice: leave one of them out."
            )
    for other in seeds:
        if other.test_set != first.test_set:
            raise UserError(
                f"{first.name} and {other.name} have the same options but other test questions, so they are "
                "no two seeds of one system: report them apart."
            )


def _labels(systems: Sequence[Sequence[RunResult]], benches: Sequence[str]) -> list[str]:
    """The algorithm of each system, and what tells it from others of this algorithm on the same bench."""
    labels = [""] * len(systems)
    alike = _by(range(len(systems)), lambda i: (benches[i], _algorithm(systems[i])))
    for (_, algorithm), members in alike.items():
        names = _names([_options(systems[i], in_algorithm=True) for i in members])
        remark = f" ({_REMARKS[algorithm]})" if algorithm in _REMARKS else ""
        for i, differing in zip(members, names, strict=True):
            labels[i] = ", ".join(filter(None, (algorithm, differing))) + remark
    return labels


def _order(system: System) -> tuple[Any, ...]:
    rank = _ORDER.index(system.algorithm) if system.algorithm in _ORDER else len(_ORDER)
    return (system.bench, rank, system.algorithm, system.sizes, system.label)


def _algorithm(seeds: Sequence[RunResult]) -> str:
    options = seeds[0].options
    return printable(str(options.get(VARIANT) or options[CLASS].rpartition(".")[2]))


def _options(seeds: Sequence[RunResult], *, in_algorithm: bool) -> dict[str, Any]:
    return {
        name: value
        for name, value in seeds[0].options.items()
        if name.startswith("algorithm.") == in_algorithm and name not in (CLASS, VARIANT)
    }


def _names(all_options: Sequence[dict[str, Any]], always: Sequence[str] = ()) -> list[str]:
    """What tells each of some option sets from the others, in few words; ``always`` are told anyway."""
    told = list(dict.fromkeys([*always, *(name for options in all_options for name in options)]))
    values = {name: sorted({_key(options.get(name)) for options in all_options}) for name in told}
    told = [name for name in told if name in always or len(values[name]) > 1]

    def word(name: str, value: Any) -> str:
        if name in always:
            last_parts = {PurePath(str(options.get(name))).name for options in all_options}
            return printable(
                PurePath(str(value)).name if len(last_parts) == len(values[name]) else str(value)
            )
        short = name.rpartition(".")[2]
        if short == "class_path":
            return printable(str(value).rpartition(".")[2])
        if sum(other.rpartition(".")[2] == short for other in told) > 1:
            short = name
        if isinstance(value, list | dict):  # such as prompts: too long to be told
            return f"{short} no. {values[name].index(_key(value)) + 1}"
        return printable(f"{short}={value}")

    return [
        ", ".join(word(name, options[name]) for name in told if name in options) for options in all_options
    ]


@dataclass(frozen=True)
class Panel:
    """Systems to be seen in one picture: variants that share all other options, and other trained systems."""

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
        beside = [system for system in members if system.initialization and not system.variant]
        for group in groups or [[]]:
            sizes = f" {group[0].sizes}" if len(groups) > 1 or (group and group[0].paper) else ""
            if shown := (*group, *beside):
                found.append(Panel(f"{bench}{sizes}", shown))
    return found


def grid(systems: Sequence[System]) -> list[list[System]]:
    """Table 1: for each variant the systems that differ in nothing but N_init and N_corr, if several do."""
    trained = [system for system in systems if system.variant]
    families = _by(trained, lambda s: (s.paper, _key({k: v for k, v in s.options.items() if k not in SIZES})))
    return [family for family in families.values() if len(family) > 1]


def compared(systems: Sequence[System]) -> list[System]:
    """Table 2: all systems, less the cells of Table 1 whose sizes no other variant was run with."""
    in_grid = {id(system) for family in grid(systems) for system in family}
    trained = [system for system in systems if system.variant]
    alone = {id(group[0]) for group in _by(trained, _all_but_variant).values() if len(group) == 1}
    return [system for system in systems if id(system) not in in_grid & alone]


def _all_but_variant(system: System) -> Hashable:
    return system.paper, _key({k: v for k, v in system.options.items() if k not in (VARIANT, ITERATIONS)})


def _by(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
