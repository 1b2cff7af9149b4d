"""The one kind of error that the user can repair."""


class UserError(ValueError):
    """Bad input. The message is one sentence that says what is wrong and what to do; the command line exits with 2."""
