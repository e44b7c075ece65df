"""The exception for mistakes in what the user provides."""


class UserError(Exception):
    """A mistake in a file, key, row or folder that the user provides.

    The message says what is wrong, where (file, line, key), and what would be right. The command prints it without a
    traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of a library's error message; the name of the exception where the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__
