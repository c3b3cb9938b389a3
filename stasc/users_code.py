"""Errors in what a user brings along: whose class it was, and in which line."""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import CodeType, FrameType

from stasc.errors import chain
from stasc.house import HOUSE

_INSTALLED = {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
_LIBRARIES = [
    Path(path).resolve() for path in {sys.base_prefix, *sysconfig.get_paths().values(), *_INSTALLED}
]
_ROOMS = [(HOUSE / room).resolve() for room in ("stasc", "data", "callbacks", "scripts")]


def blame(error: BaseException) -> str | None:
    """What went wrong in the user's own code, in one sentence; None if the error did not pass through any.

    The sentence has the class and method, the file and line that came last, and the error with its notes.
    """
    for link in chain(error):
        frames = [frame for frame in traceback.walk_tb(link.__traceback__) if _is_users(frame[0])]
        if frames:
            frame, line = frames[-1]
            code = frame.f_code
            notes = "".join(f", {note}" for note in getattr(link, "__notes__", ()))
            reason = " ".join(f"{type(link).__name__}: {link}".split()).rstrip(": .")
            return (
                f"{code.co_qualname} of yours failed{notes} ({reason}): see {code.co_filename}, line {line}."
            )
        if isinstance(link, SyntaxError) and "null bytes" in link.msg:  # Python does not say in which
            return "a Python file of yours has zero bytes in it: write it anew."
        if isinstance(link, SyntaxError) and link.filename and _is_users_file(link.filename):
            return f"{link.filename}, line {link.lineno}: this is not Python ({link.msg})."
        if isinstance(link, TypeError) and (code := _called_wrongly(str(link))):
            return (
                f"{code.co_qualname} of yours does not take what it is given ({link}): see "
                f"{code.co_filename}, line {code.co_firstlineno}."
            )
    return None


def _called_wrongly(refusal: str) -> CodeType | None:
    """The user's function that Python says has other arguments; None if it says something else."""
    called = re.match(r"([\w.]+)\(\) (?:takes|missing|got)", refusal)
    for module in list(sys.modules.values()) if called else ():
        if _is_users_file(getattr(module, "__file__", None) or "<"):
            found = module
            for name in called[1].split("."):
                found = getattr(found, "__dict__", {}).get(name)  # some modules make up whatever is asked for
            if code := getattr(found, "__code__", None):
                return code
    return None


def _is_users(frame: FrameType) -> bool:
    return _is_users_file(frame.f_code.co_filename)


def _is_users_file(name: str) -> bool:
    if name.startswith("<"):
        return False
    path = Path(name).resolve()
    return not any(path.is_relative_to(place) for place in (*_LIBRARIES, *_ROOMS))
