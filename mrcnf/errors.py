"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user supplied: one line that says what, where and what to do.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
