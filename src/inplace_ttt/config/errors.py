"""Define UserError, and shorten the errors of libraries so that a message can quote them."""


class UserError(Exception):
    """Report input that cannot work. The message is one sentence that names the input and what would work."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 200 characters, or the name of its type if it is empty."""
    return " ".join(str(error).split())[:200] or type(error).__name__
