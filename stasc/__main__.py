"""``python -m stasc fit|validate|test|predict --config FILE`` and ``python -m stasc report RUN...``."""

import os
import signal
import sys

HELP = """usage: python -m stasc COMMAND --config FILE [--OPTION VALUE ...]

Self-Taught Self-Correction: a small language model learns from its own corrections.

commands:
  fit       run the algorithm: sample, correct, filter, fine-tune, N times
  validate  evaluate a model folder, as test does
  test      evaluate a model folder: --model.base FOLDER
  predict   answer and correct the questions of a file: --data.predict ...
  report    tables, figures and a page from run folders: report RUN... --out FOLDER

  python -m stasc COMMAND --help          all options of a command
  python -m stasc COMMAND --print_config  the configuration that would run

Start with: python -m stasc fit --config configs/quickstart.yaml"""


def main() -> None:
    """Run the program; a user's mistake ends in one sentence and status 2, Ctrl-C in one and status 130."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(HELP)  # before any import: the libraries take seconds to load
        sys.exit(0 if sys.argv[1:] else 2)
    if sys.argv[1] == "report":  # needs none of the libraries that train and sample
        from stasc.report.command import main as report

        report(sys.argv[2:])
        return
    # Threads that wait must not spin: sampling and training take turns on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from stasc.cli import run

        run()
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning makes the second of the first, with status 1
        if KeyboardInterrupt not in (type(end), type(end.__context__)):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Lightning has put our handler back
        if os.environ.get("LOCAL_RANK", "0") == "0":
            said = "stasc: interrupted; the same command goes on from what is finished."
            print(said, file=sys.stderr, flush=True)
        sys.exit(130)


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one must not cut the end short
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
