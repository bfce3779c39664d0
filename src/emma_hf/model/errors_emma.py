"""Errors that a user can mend: the rule, the value received and the remedy are in their text."""


class EmmaError(ValueError):
    """A value, a file or a request that breaks a rule of this package."""


class MissingPackageError(EmmaError, ImportError):
    """An optional package that is not installed, or is of a version that cannot serve."""


__all__ = ["EmmaError", "MissingPackageError"]
