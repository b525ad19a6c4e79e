"""What can go wrong, by whose fault: the caller's input, the judge, or a missing optional install."""

from __future__ import annotations


class InputError(ValueError):
    """What the caller gave cannot be used. The message names the field, the value and the fix."""


class JudgeError(RuntimeError):
    """A judge or a listener broke. It is raised, or masked by a named policy; it never becomes a score."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed. The message holds the pip line that installs it."""


class UnknownWordsWarning(UserWarning):
    """A judge's tokenizer does not know words of a prompt, and the judge reads a placeholder in their place."""
