"""Bars: what they say, and that nothing depends on whether they are shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from listener_reward.progress import progress_bars


def test_a_bar_says_what_is_done_of_how_much_and_its_note_as_it_is():
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with progress_bars(console=console) as bars:
        task = bars.add_task("judging", total=12)
        bars.update(task, advance=12, note="61.2% [right]")
    (line,) = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert line.startswith("judging ") and "12/12 0:00:00 0:00:00" in line and line.rstrip().endswith("61.2% [right]")


def test_a_total_that_nobody_knows_is_no_hindrance():
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with progress_bars(console=console) as bars:
        assert list(bars.track((number for number in range(3)), description="checking")) == [0, 1, 2]
    assert "3/?" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_not_shown_works_all_the_same(capsys: pytest.CaptureFixture[str]):
    with progress_bars(visible=False) as bars:
        bars.update(bars.add_task("judging", total=None), advance=1, note="half")
        assert list(bars.track(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_bars_are_on_standard_error(capsys: pytest.CaptureFixture[str]):
    with progress_bars() as bars:
        bars.update(bars.add_task("judging", total=1), advance=1)
    shown = capsys.readouterr()
    assert shown.out == "" and "judging" in shown.err
