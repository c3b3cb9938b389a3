"""Runs the program several times in the same processes, which load their libraries once.

The environment variable RUNS holds the arguments of each run in JSON, as Lightning starts further ranks with
those of a run and not with those of this script. A run may fail.
"""

import json
import os
import sys
from contextlib import suppress

from stasc.command_line.cli import run
from stasc.ending import end_after_mistakes, end_with_rank_zero

if __name__ == "__main__":
    end_with_rank_zero()
    for arguments in json.loads(os.environ["RUNS"]):
        sys.argv = [__file__, *arguments]
        with suppress(SystemExit), end_after_mistakes():
            run()
