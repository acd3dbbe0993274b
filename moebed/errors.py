"""Errors that a person can cause: one clear line, and an exit code."""


class UserError(Exception):
    """Something the user asked for cannot be done.

    The message is one line that says what is wrong, where, and what to do. The command line prints it and
    exits with ``exit_code``; the traceback is shown with ``-v`` only.
    """

    exit_code = 2


class DivergedError(UserError):
    """The loss of a run is no longer finite. Its own exit code tells who started the run that it is no use to retry."""

    exit_code = 3


class ConfigError(UserError):
    """A configuration that no model or run can be built from."""
