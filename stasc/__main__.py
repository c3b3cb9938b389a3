"""The program, as ``python -m stasc`` and as the command ``stasc``."""

import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path

from stasc import __version__
from stasc.ending import end_after_mistakes, end_on_signals, end_with_rank_zero
from stasc.house import HOUSE
from stasc.progress import Progress

SCRIPTS = ("variants", "grid", "baselines", "search")
"""Commands that are scripts."""

HELP = """usage: python -m stasc COMMAND --config FILE [--OPTION VALUE ...]

Self-Taught Self-Correction: a small language model learns from its own corrections.

commands:
  fit       run the algorithm: sample, correct, filter, fine-tune, N times
  validate  evaluate a model folder on data.validation
  test      evaluate a model folder on data.test: --model.base FOLDER
  predict   answer and correct the questions of a file: --data.predict ...
  chat      answer and correct what you type: --model.base FOLDER
  check     rehearse a run: does it fit, and how long will it take?
  report    tables, figures and a page from run folders: report RUN... --out FOLDER
  variants, grid, baselines
            ablations: many runs of fit, by seeds and systems
  search    options chosen by the rewards on validation questions

  python -m stasc --version              the version
  python -m stasc COMMAND --help          the method's options (--help all: Lightning's too)
  python -m stasc COMMAND --print_config  the resulting configuration
                                          (--print_config=skip_default: what is no default)

--config takes a file, or a config that comes with the program by its name. Start with:
  python -m stasc fit --config quickstart"""


def main() -> None:
    """Run a command.

    After a mistake of the user it prints one sentence and exits with status 2. A signal ends it with a
    sentence and status 128 + its number, as 130 after Ctrl-C and 143 after SIGTERM.
    """
    with end_after_mistakes():
        _run()


def _run() -> None:
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(HELP)  # before the imports below, which take seconds
        sys.exit(0 if sys.argv[1:] else 2)
    if sys.argv[1] == "--version":
        print(f"stasc {__version__}")
        return
    if str(Path.cwd()) not in sys.path:  # as `python -m stasc` has it, for the user's own classes
        sys.path.insert(0, str(Path.cwd()))
    if sys.argv[1] in SCRIPTS:
        _run_script(sys.argv[1])
        return
    if sys.argv[1] == "report":  # does not need the libraries for training and sampling
        from stasc.report.command import main as report

        report(sys.argv[2:])
        return
    if sys.argv[1] == "chat":
        with suppress(KeyboardInterrupt):
            from stasc.command_line.chat import main as chat

            chat(sys.argv[2:])
        return
    if sys.argv[1] == "check":
        from stasc.command_line.check import main as check

        check(sys.argv[2:])
        return
    # Idle threads must not spin: sampling and training take turns on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    end_on_signals()
    end_with_rank_zero()
    with Progress("loading the libraries"):
        from stasc.command_line.cli import run

    run()


def _run_script(name: str) -> None:
    scripts = HOUSE / "scripts"
    sys.path.insert(0, str(scripts))  # they import each other
    del sys.argv[1]
    runpy.run_path(str(scripts / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
