"""The one kind of error that the user can repair."""


class UserError(ValueError):
    """Bad input. The message is one sentence that says what is wrong and what to do; the command line exits with 2."""


def one_line(error: Exception) -> str:
    """What an error of another library says, in one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
