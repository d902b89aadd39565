"""The base of every error that is the user's to mend: commands print it as it is and exit with status 2."""


class UserError(ValueError):
    """Wrong usage or wrong input; the message has one line a fault: what, where, got, expected, what to do.

    Attributes:
      status: that the command exits with.
    """

    status = 2


class MissingData(UserError):
    """A data set is not there; the message is one line and names the command that makes it."""
