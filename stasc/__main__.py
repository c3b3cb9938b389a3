"""``python -m stasc fit|validate|test|predict --config FILE``."""

import os
import sys

HELP = """usage: python -m stasc COMMAND --config FILE [--OPTION VALUE ...]

Self-Taught Self-Correction: a small language model learns from its own corrections.

commands:
  fit       run the algorithm: sample, correct, filter, fine-tune, N times
  validate  evaluate a model folder, as test does
  test      evaluate a model folder: --model.base FOLDER
  predict   answer and correct the questions of a file: --data.predict ...

  python -m stasc COMMAND --help          all options of a command
  python -m stasc COMMAND --print_config  the configuration that would run

Start with: python -m stasc fit --config configs/quickstart.yaml"""


def main() -> None:
    """Run the program; a user's mistake ends in one sentence and status 2."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(HELP)  # before any import: the libraries take seconds to load
        sys.exit(0 if sys.argv[1:] else 2)
    # Threads that wait must not spin: sampling and training take turns on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from stasc.cli import run

    run()


if __name__ == "__main__":
    main()
