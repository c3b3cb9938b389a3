"""How the program ends before its work is done: by a mistake, a signal, or with what has started it.

Signals need no farewell. Whatever is done is on disk at any moment (``stasc/run.py``), so the program ends at
once, and the kernel ends with it whatever it has started: the other ranks and the engines.
"""

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from stasc.disk import refusal
from stasc.errors import UserError
from stasc.progress import speaks
from stasc.texts import printable
from stasc.users_code import blame

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; SLURM, docker and kill; a closed terminal; a time limit that is near, as SLURM can tell.

Lightning would answer the last one with a checkpoint in the midst of an epoch, which no start can go on from.
"""

_FULL_MEMORY = " (was memory full? lower data.batches.token_budget, or sampler.kv_cache_gib)"

_CONNECTION_LOST = re.compile("Connection (reset|closed) by|Broken pipe|remote process exited")
"""What gloo and NCCL say of a process that is gone."""

_heard: set[signal.Signals] = set()
"""Those that end this process."""

_PR_SET_PDEATHSIG = 1
_STARTED_BY = "STASC_STARTED_BY"


@contextmanager
def end_after_mistakes() -> Iterator[None]:
    """End the program after a mistake with one sentence on standard error and status 2.

    Mistakes are a ``UserError``, an error in code of the user's own or that this code ends the program, and a
    place or disk that does not take what is written. Other errors are ours and pass. A reader of standard
    output that goes away, as ``head`` does, ends the program without a word, and with status 141 as others.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
        return
    except UserError as mistake:
        sentence = str(mistake)
    except BaseException as error:
        unwritten = _output_is_closed(error)
        if unwritten == errno.EPIPE:
            sys.exit(128 + signal.SIGPIPE)
        sentence = blame(error) or refusal(error)
        if sentence is None and isinstance(error, Exception):
            from stasc.memory import ran_out  # imports torch, which a command without an error may not need

            sentence = ran_out(error) or _left_alone(error)
        if unwritten:
            sentence = f"standard output cannot be written ({os.strerror(unwritten)}): see to that."
        if sentence is None and isinstance(error, KeyboardInterrupt):
            print("\nstasc: interrupted.", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        if sentence is None:
            raise
    if not speaks():
        time.sleep(1)  # rank 0 has the word, if it is an error of all, and ends this process
    with suppress(OSError):
        print(f"stasc: {printable(' '.join(sentence.split()))}", file=sys.stderr)
    sys.exit(2)


def _output_is_closed(error: BaseException) -> int | None:
    """The number of the error if it is one of standard output, which is then written nowhere; else None."""
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    try:
        print(flush=True)  # an empty line, if the error was another
    except OSError as again:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails with it at its end
        return again.errno
    return None


def _left_alone(error: BaseException) -> str | None:
    """A sentence for the loss of another training process; None for other errors."""
    if not isinstance(error, RuntimeError) or not _CONNECTION_LOST.search(str(error)):
        return None
    time.sleep(5)  # if it ran on this machine, then meanwhile that was said, and this process was ended
    return (
        "another training process has ended or is out of reach: see what it has printed, and run the same "
        "command again to go on."
    )


def end_on_signals() -> None:
    """From now on a signal ends this process, with one sentence and status 128 + the signal's number.

    Signals that are ignored now, as nohup ignores SIGHUP, stay ignored. A thread waits for the signals,
    because the main thread may wait for another process, and Python would not run a handler until then.
    """
    _heard.update(number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)
    set_handlers()
    received, sent = os.pipe()
    os.set_blocking(sent, False)
    signal.set_wakeup_fd(sent)
    os.register_at_fork(after_in_child=_be_a_child)
    threading.Thread(target=_end_on, args=[received], daemon=True).start()


def set_handlers() -> None:
    """Have the signals end this process and do nothing else, whatever handlers were set meanwhile.

    Lightning's handler of SIGTERM begins to talk to the other ranks, in the midst of what they do.
    """
    for number in _heard:
        signal.signal(number, lambda *_: None)  # without a handler Python would not tell the thread


def end_with_rank_zero() -> None:
    """Have the ranks that Lightning starts, with this same command, end with the process that starts them."""
    starter = os.environ.get(_STARTED_BY)
    os.environ[_STARTED_BY] = str(os.getpid())
    if starter and os.environ.get("LOCAL_RANK", "0") != "0":
        end_with(int(starter))


def end_with_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """From now on end this process, with a sentence, when a rank that it has started has failed.

    It would wait for that rank, over NCCL for hours. Lightning's own observer, in whose place this is, kills
    both after up to 5 s, without a word.

    Args:
        ranks: Those from 1 on.
    """
    threading.Thread(target=_end_with_ranks, args=[ranks], daemon=True).start()


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that is, or now if it has ended.

    To be exact, when the thread of the parent ends that has started this process. Only Linux does this.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _end_with_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    while not any(ended := [process.poll() for process in ranks]):
        time.sleep(0.1)
    number, status = next((number, status) for number, status in enumerate(ended, start=2) if status)
    status = 128 - status if status < 0 else status
    if status != 2:  # then it has said itself what was wrong
        how = "failed, as it says above"
        if status - 128 in signal.valid_signals():
            name = signal.Signals(status - 128).name
            how = f"was ended by {name}" + _FULL_MEMORY * (name == "SIGKILL")
        _say(f"process {number} of {len(ended) + 1} {how}; run the same command again to go on.")
    os._exit(status)


def _say(sentence: str) -> None:
    """Not through sys.stderr, whose lock the main thread may hold."""
    os.write(2, f"\nstasc: {sentence}\n".encode())


def _end_on(received: int) -> None:
    while (number := os.read(received, 1)[0]) not in _heard:
        pass
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    if all(os.environ.get(rank, "0") == "0" for rank in ranks):
        name = signal.Signals(number).name
        _say(f"stopped by {name}; run the same command again to go on.")
    else:
        time.sleep(1)  # rank 0 has the word, and would lament a lost connection if it lived longer
    os._exit(128 + number)


def _be_a_child() -> None:
    """In a forked process, such as one of a pool of the user's: signals for it are not for its parent."""
    signal.set_wakeup_fd(-1)
    for number in _heard:
        signal.signal(number, signal.SIG_DFL)
    end_with(os.getppid())
