"""Errors that a user can mend: the rule, the value received and the remedy are in their text."""


class EmmaError(ValueError):
    """A value, a file or a request that breaks a rule of this package."""


class MissingPackageError(EmmaError, ImportError):
    """An optional package that is not installed, or is of a version that cannot serve."""


class HubError(OSError):
    """What the Hub or the network refuses: no connection, no token, no right."""


class HubNotFoundError(HubError, FileNotFoundError):
    """A repository, revision or file that the Hub does not have, or does not show."""


__all__ = ["EmmaError", "HubError", "HubNotFoundError", "MissingPackageError"]
