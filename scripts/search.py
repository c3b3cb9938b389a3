"""Options chosen by the rewards on the validation questions, with Optuna; the paper searched none.

python scripts/search.py --config configs/quickstart.yaml --space space.yaml --trials 12 --data.validation 0.2

The space is a YAML file: for each option of fit a list of values, or the bounds of a number.

    algorithm.n_corr: [1, 2, 4]
    model.learning_rate: {low: 1e-5, high: 1e-3, log: true}
    data.prompts: [prompts/a.yaml, prompts/b.yaml]    # files as on the command line
    config: [null, configs/baselines/star.yaml]       # a file to lay over the config, or none
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablation
import pandas as pd
import yaml
from filelock import FileLock, Timeout

from stasc.errors import UserError
from stasc.run import Run, read_json, write_lines

try:
    import optuna
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError:
    sys.exit("the search needs Optuna, which is not installed: pip install 'stasc[search]'")

SELDOM = ("--data.evaluation.test_every", "1000000")  # the test questions have no part in a search
ASKED = 20  # so many values for each trial, at most, of which those that were tried before are left out


def read_space(path: Path) -> dict[str, list[str] | dict[str, Any]]:
    """For each option its values as they are typed on the command line, or the bounds of a number."""
    try:
        space = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(space, dict) or not space:
        raise UserError(f"{path} must map options to lists of values or to bounds: write option: [1, 2].")
    for option, values in space.items():
        if option in ("run_dir", "reuse", "seed_everything"):
            raise UserError(f"{path}: {option} is for the search to set: remove it.")
        if isinstance(values, list) and values:
            space[option] = [value if isinstance(value, str) else json.dumps(value) for value in values]
        elif isinstance(values, dict):  # YAML reads 1e-6 as text
            space[option] = {name: float(v) if isinstance(v, str) else v for name, v in values.items()}
        else:
            raise UserError(f"{path}: {option} is {values}: write a list of values, or {{low: 1, high: 9}}.")
    return space


def choose(trial: Trial, space: Mapping[str, Any]) -> None:
    """Give a trial the values that it has not yet."""
    for option, values in space.items():
        try:
            if isinstance(values, list):
                trial.suggest_categorical(option, values)
            elif any(isinstance(value, float) for value in values.values()):
                trial.suggest_float(option, **values)
            else:
                trial.suggest_int(option, **values)
        except (ValueError, TypeError) as error:
            raise UserError(f"the space's {option} cannot be {values}: {error}") from error


def typed(params: Mapping[str, Any]) -> list[str]:
    """The values of a trial as options of ``fit``, the overlay first: all others count more."""
    words = []
    for option in sorted(params, key=lambda option: option != "config"):
        value = params[option] if isinstance(params[option], str) else json.dumps(params[option])
        words += [f"--{option}", value] if (option, value) != ("config", "null") else []
    return words


def whole_config(options: Sequence[str]) -> dict[str, Any]:
    """What ``fit`` makes of its options, before anything runs."""
    command = [sys.executable, "-m", "stasc", "fit", *options, "--print_config"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise UserError(process.stderr.strip().splitlines()[-1])
    config = yaml.safe_load(process.stdout)
    if config["data"]["validation"] is None:
        raise UserError(
            "a search needs questions that are not the test's: set data.validation, such as "
            "--data.validation 0.2 for a fifth of the training questions."
        )
    return config


@dataclass(frozen=True)
class Search:
    """A study, and what its trials share."""

    arguments: argparse.Namespace
    options: Sequence[str]
    space: Mapping[str, Any]
    study: optuna.Study

    def go_on(self, signals_received: Sequence[int]) -> None:
        """Run trials, first the one that was interrupted, until all are done or a signal is received."""
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            self._seed(trial.number)
            self._run(Trial(self.study, trial._trial_id), signals_received)  # as `ask` made it
        while len(self._trials()) < self.arguments.trials and not signals_received:
            if (number := len(self.study.trials)) >= ASKED * self.arguments.trials:
                print("the space has hardly any other values: all that were found have been tried")
                return
            self._seed(number)
            self._run(self.study.ask(), signals_received)

    def _trials(self) -> list[FrozenTrial]:
        """All but those that would have repeated another."""
        return [trial for trial in self.study.trials if "repeats" not in trial.user_attrs]

    def _seed(self, number: int) -> None:
        """Set what chooses a trial: it has its own seed, so that a restart changes no choice."""
        seed = random.Random(f"{self.arguments.seed_everything}, trial {number}").getrandbits(32)
        if number and "repeats" in self.study.trials[number - 1].user_attrs:  # TPE would insist on it
            self.study.sampler = optuna.samplers.RandomSampler(seed)
        else:
            startup = self.arguments.startup
            self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)

    def _run(self, trial: Trial, signals_received: Sequence[int]) -> None:
        choose(trial, self.space)
        for other in self.study.trials[: trial.number]:
            if other.params == trial.params:
                trial.set_user_attr("repeats", other.number)
                self.study.tell(trial, state=TrialState.FAIL)  # so that it counts for nothing
                return
        name, start = f"trial-{trial.number:03d}", time.monotonic()
        print(f"{name}: {shlex.join(typed(trial.params))}", flush=True)
        state = self._follow(trial, signals_received)
        if state is not None:
            complete = state is TrialState.COMPLETE
            value = self._evaluations(trial)[-1][self.arguments.objective] if complete else None
            outcome = self._outcome(self.study.tell(trial, value, state))
            print(f"{name}: {outcome} after {time.monotonic() - start:.0f} s", flush=True)
            self.write_tables()

    def _follow(self, trial: Trial, signals_received: Sequence[int]) -> TrialState | None:
        """Run a trial to its end or until it is pruned; None if a signal came first."""
        job, process = self._job(trial), None
        if job.under_way():
            print(f"{job.name}: waiting for its run, which a killed search left behind", flush=True)
        while job.under_way() and not signals_received:
            time.sleep(0.5)
        if not (signals_received or job.finished()):
            process = job.start(ablation.Slot())
        n = 1
        try:
            while not signals_received:
                status = process.poll() if process else 0  # before the files: at the end all are there
                evaluations = self._evaluations(trial)
                while n < len(evaluations):
                    trial.report(evaluations[n][self.arguments.objective], n)
                    if n < Run(job.folder).read_system().iterations and trial.should_prune():
                        return TrialState.PRUNED
                    n += 1
                if status is not None:
                    return TrialState.FAIL if status else TrialState.COMPLETE
                time.sleep(0.5)
        finally:
            ablation.stop([process] if process else [])
        return None

    def _job(self, trial: Trial | FrozenTrial) -> ablation.Job:
        out, seed = self.arguments.out, self.arguments.seed_everything
        options = (*SELDOM, *self.options, *typed(trial.params))
        return ablation.Job.of(out / f"trial-{trial.number:03d}", out, (), options, seed, reuse=out)

    def _evaluations(self, trial: Trial | FrozenTrial) -> list[dict[str, float]]:
        """Metrics on the validation questions of M_0, M_1 and so on, until where it was pruned."""
        pruned = isinstance(trial, FrozenTrial) and trial.state is TrialState.PRUNED
        run, found = Run(self._job(trial).folder), []
        while (file := run.iteration(len(found)).metrics).is_file():
            found.append(read_json(file)["validation"])
        return found[: trial.last_step + 1] if pruned else found

    def _outcome(self, trial: FrozenTrial) -> str:
        if trial.state is TrialState.FAIL:
            return f"failed: {self._job(trial).last_line()}"
        word = {TrialState.PRUNED: f"pruned at {trial.last_step}", TrialState.RUNNING: "under way"}
        return word.get(trial.state, "complete")

    def write_tables(self) -> str:
        """Write ``search.csv`` and ``search.md``, the best trial first, and return the text of the latter."""
        objective, out, rows = self.arguments.objective, self.arguments.out, []
        order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL]
        trials = sorted(self._trials(), key=lambda trial: (order.index(trial.state), -(trial.value or 0)))
        for trial in trials:
            row = {"trial": trial.number, "outcome": self._outcome(trial), **trial.params}
            if found := self._evaluations(trial):
                best = max(range(len(found)), key=lambda n: found[n][objective])
                for name, n in (("last", len(found) - 1), ("best", best)):
                    figures = {key: found[n].get(key) for key in ("r1", "r2", "delta", "delta_se")}
                    row |= {f"{name} {key}": figure for key, figure in {"n": n, **figures}.items()}
            rows.append(row)
        table = pd.DataFrame(rows).convert_dtypes()
        write_lines(out / "search.csv", table.to_csv(index=False).splitlines())
        lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
        text = f"By {objective} of the last iteration on the validation questions:\n\n"
        text += "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)
        if trials and trials[0].state is TrialState.COMPLETE:
            number, place = trials[0].number, shlex.quote(str(out / "test" / f"trial-{trials[0].number:03d}"))
            options = shlex.join([*self.options, *typed(trials[0].params)])
            text += (
                "\nThe best of many looks better on the questions that it was chosen by than on others. "
                f"Trial {number} on the test questions, with other seeds:\n\n```\nfor seed in 1 2 3; do\n"
                f"  python -m stasc fit {options} --seed_everything $seed --run_dir {place}/seed-$seed\n"
                f"done\npython -m stasc report {place} --out {place}/report\n```\n"
            )
        write_lines(out / "search.md", text.splitlines())
        return text


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is pd.NA else str(value).replace("|", "/")


def search(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Start the search or go on with it, and return the exit status."""
    out, space = arguments.out, read_space(arguments.space)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", message=".*already reported.*")  # before a trial was interrupted
    settings = {"space": space, **{name: vars(arguments)[name] for name in ("objective", "startup")}}
    if arguments.trials:
        first = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        choose(first, space)
        seed = ("--seed_everything", str(arguments.seed_everything))
        settings["config or option"] = whole_config([*options, *typed(first.params), *seed])
        out.mkdir(parents=True, exist_ok=True)
    elif not (out / "study.db").is_file():
        raise UserError(f"{out} holds no search yet: start it with --trials 12.")
    study = optuna.create_study(
        storage=f"sqlite:///{out / 'study.db'}",
        study_name="search",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=arguments.startup),
        load_if_exists=True,
    )
    for name, value in settings.items():
        if study.user_attrs.get(name, value) != value:
            raise UserError(f"{out} holds a search with another {name}: choose another --out, or remove it.")
        study.set_user_attr(name, value)
    this, signals_received = Search(arguments, options, space, study), ablation.note_signals()
    if arguments.trials:
        try:
            with FileLock(out / "search.lock", timeout=0):
                this.go_on(signals_received)
        except Timeout:
            raise UserError(f"another search is under way in {out}: see its table with --trials 0.") from None
    print(f"\n{this.write_tables()}", flush=True)
    return ablation.interrupted(signals_received) if signals_received else 0


def main() -> int:
    """Read the command line and search; a mistake ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Other options are those of fit and passed to every trial, such as --algorithm.iterations 5.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--space", type=Path, required=True, metavar="FILE", help="see above")
    add("--trials", type=int, default=12, help="how many in all (12); 0 shows what there is")
    add("--objective", choices=["r2", "delta"], default="r2", help="of the last iteration (r2)")
    add("--startup", type=int, default=4, help="random trials, completed before any is pruned (4)")
    add("--seed_everything", type=int, default=42, help="seed of the choices and of every run (42)")
    add("--out", type=Path, default=Path("runs/search"), help="folder of the study (runs/search)")
    try:
        return search(*parser.parse_known_args())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
