"""The exception for mistakes of the user."""


class UserError(Exception):
    """A mistake of the user, such as a wrong option or a damaged file.

    The message is one sentence that names the file, line or option and how to fix it. The program prints it
    to standard error and exits with status 2, without a traceback.
    """
