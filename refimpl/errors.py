"""The kinds of failure, told apart.

Invalid input must be rejected by every implementation.  Unsupported input is valid, but outside of what
this package does.  Missing and unreadable things come from the file system.  What is impossible is an
`assert`.  A message is one sentence: the thing, what was found, and what is required.
"""


class Error(Exception):
    """The base of every error that this package raises on purpose."""


class Invalid(Error, ValueError):
    """The input breaks a rule that every implementation has to enforce."""


class Unsupported(Error, ValueError):
    """The input is valid, but outside of what this package computes."""


class Missing(Error, KeyError):
    """A tensor, field or name that is required is not there."""

    __str__ = Exception.__str__  # KeyError would print the sentence in quotes


class Unreadable(Error, OSError):
    """A file that cannot be read or written, or whose bytes break its format."""

    __str__ = Exception.__str__
