"""Errors of whoever uses thaw, which are shown as one message without a traceback."""


class UserError(ValueError):
    """A setting, a file or an input that cannot work. The message names it, what is allowed and the next step.

    Only errors that thaw raises on purpose are shown without a traceback. Another ValueError, of a library or of a
    user's own class, needs its place in the code.
    """


class UserFileError(OSError, UserError):
    """A file or folder that cannot be read or written."""


class UnreachableError(UserFileError, ConnectionError):
    """A server that cannot be reached, or does not have what is needed; `reason` is its answer, in a few words."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class LostProcessError(UserError):
    """Another process of the run was killed or hangs; the run's last checkpoint can be trusted."""


class RunPrunedError(Exception):
    """Ends a run that another one has left behind; its record says so and counts as no failure."""


def is_interruption(error: BaseException) -> bool:
    """Whether an error is Ctrl-C or a signal, also where Lightning has turned it into SystemExit."""
    by_lightning = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    return by_lightning or isinstance(error, KeyboardInterrupt) or type(error).__name__ == "SIGTERMException"
