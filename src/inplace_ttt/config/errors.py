"""Define the error that a user can act on, and quote the errors of libraries in it."""


class UserError(Exception):
    """Something the user gave cannot work; the message is one sentence that says what would."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
