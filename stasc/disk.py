"""What the operating system says of a disk or a place that does not do, with the name of the file."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stasc.errors import UserError, chain

_REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO),
)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the disk name the file or folder that is written, as Python's own often does not.

    Raises:
        OSError: As the operating system has it, also where a library has made another error of it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = _origin(error)
        if refused is None or (refused is error and refused.filename):
            raise
        raise OSError(refused.errno, refused.strerror, refused.filename or str(path)) from error


def refusal(error: BaseException) -> str | None:
    """One sentence for an error of the disk; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in _REFUSALS:
        return None
    what = error.filename or "a file of the run"
    return (
        f"{what} cannot be written or read ({error.strerror}): see to that, or choose another --run_dir; "
        "what is finished is kept, and the same command goes on."
    )


def _origin(error: BaseException) -> OSError | None:
    """The operating system's own error, of which a library has made this one."""
    for link in chain(error):
        if isinstance(link, OSError) and link.errno in _REFUSALS:
            return link
        number = re.search(r"\(os error (\d+)\)$", str(link))  # safetensors, which is written in Rust
        if number and int(number[1]) in _REFUSALS:
            return OSError(int(number[1]), os.strerror(int(number[1])))
    return None
