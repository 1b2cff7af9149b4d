"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Bad input. The message is one sentence that says what is wrong and what to do; the command line exits with 2."""
