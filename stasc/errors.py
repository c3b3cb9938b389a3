"""The exception for mistakes of the user, a check of what users write, and where an error comes from."""

from __future__ import annotations

from collections.abc import Iterator


class UserError(Exception):
    """A mistake of the user, such as a wrong option or a damaged file.

    The message is one sentence that names the file, line or option and how to fix it. The program prints it
    to standard error and exits with status 2, without a traceback.
    """


def check_text(text: str, name: str) -> None:
    """Find what no file name, tokenizer or file takes: zero bytes and half characters (lone surrogates).

    Raises:
        UserError: There is one; the message begins with ``name``.
    """
    if "\0" in text:
        raise UserError(f"{name} has a zero byte at place {text.index(chr(0)) + 1}: remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} has half a character, U+{ord(text[error.start]):04X} at place {error.start + 1}: write "
            "the whole one, or leave it out."
        ) from error


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from, each once, as those raised again can form a ring."""
    seen: list[BaseException] = []
    while error is not None and not any(error is one for one in seen):
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__
