"""What a user can get wrong."""


class UserError(Exception):
    """A user's mistake: one sentence that names the file, line, field or option, and what to do.

    The program prints the sentence on standard error and exits with status 2, without a traceback.
    """
