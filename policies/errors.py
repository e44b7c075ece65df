"""The one exception that means: what the user gave cannot be used."""


class UserError(Exception):
    """A mistake in a file, key, row or folder that the user gave.

    The message says what is wrong, where (file, line, key), and what would be right. The command prints it without a
    traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the paragraphs that may follow; its kind where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
