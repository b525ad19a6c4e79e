"""How far long work has come: bars on standard error, in one style."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Note(ProgressColumn):
    """The field `note` of a task, where it has one."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("note", "")))


def progress_bars(*, visible: bool = True, transient: bool = False, console: Console | None = None) -> Progress:
    """A context in which `add_task` or `track` shows a bar: what is done, of how much, the time it took and will take.

    `update(task, note="...")` writes a few words behind the bar.

    Args:
        visible: False shows nothing, and everything can be called all the same.
        transient: the bars go away at the end.
        console: where to draw; None is standard error.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        _Note(),
        console=console or Console(stderr=True),
        transient=transient,
        disable=not visible,
    )
