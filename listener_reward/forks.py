"""What holds locks or threads is made anew in the child of a fork: the thread that held a lock was not copied to it."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Renewed(Protocol):
    """What `renew` is told of."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""
        ...


_MADE: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renew(thing: Renewed) -> None:
    """Has every child of a fork call `thing.after_fork()`, for as long as `thing` lives."""
    _MADE.add(thing)


def _after_fork() -> None:
    for thing in _MADE:
        thing.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
