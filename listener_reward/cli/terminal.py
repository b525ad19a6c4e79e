"""What reaches the terminal beside the answer: errors in one line, our own warnings, a spinner, no other noise."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.files import disk_error


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turns the errors a user can act on into one line on stderr and an exit code; all others are faults of ours."""
    try:
        yield
    except (InputError, MissingExtraError, JudgeError) as error:
        if debug:
            raise
        print_error(error)
        raise typer.Exit(3 if isinstance(error, JudgeError) else 2) from None
    except Exception as error:
        number = disk_error(error)
        if debug or number is None:
            raise
        print_error(_unwritten(error, number))
        raise typer.Exit(2) from None


def _unwritten(error: Exception, number: int) -> str:
    reason, name = os.strerror(number), getattr(error, "filename", None)
    if isinstance(error, OSError) and error.errno and error.strerror not in (None, reason):
        return f"{error.strerror}; make room, then resume"  # a sentence of our own: `checkpoints.saving`
    where = f"{name} " if name else "a file "
    return f"{where}cannot be written ({reason}); make room, or write elsewhere. What was there before is whole"


@contextmanager
def working(what: str, *, spinner: bool = True) -> Iterator[None]:
    """Keeps stdout for the answer, and other packages' bars and warnings off the screen; our own warnings stay."""
    quieten()
    console = stderr()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console.print(Text.assemble(("Warning: ", "bold yellow"), plain(str(message))), soft_wrap=True)

    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"listener_reward(\.|$)")
        warnings.showwarning = show
        if spinner and console.is_terminal:
            with console.status(what):
                yield
        else:
            yield


@contextmanager
def stopped_softly() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, keeps what was judged as Ctrl-C does."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quieten() -> None:
    """Takes effect because transformers is not imported yet; what the user has set stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says of kernels for CPUs that it has none to fetch
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():  # at a terminal a download of gigabytes should be seen
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_error(error: Exception | str) -> None:
    stderr().print(Text.assemble(("Error: ", "bold red"), plain(str(error))), soft_wrap=True)


def plain(text: str) -> str:
    """`text` without control characters: a model's words and a file's name must not drive the terminal."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)
