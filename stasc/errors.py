"""The exception for mistakes of the user, and a check of what users write anywhere."""


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
