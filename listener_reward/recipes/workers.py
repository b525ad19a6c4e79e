"""Runs jobs side by side, one process and one thread each, with a progress bar for every one.

Models this small do not use a second core; two of them do. One thread each also makes a job's result independent of
how many cores there are.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from glob import glob
from queue import Empty
from typing import Any

from rich.console import Console

from listener_reward.errors import InputError, MissingExtraError
from listener_reward.progress import progress_bars

Report = Callable[[int, int, str], None]
"""What a job calls as it goes: steps done, steps in all, and a few words on how it stands."""

Job = tuple[Callable[..., Any], Mapping[str, Any]]
"""A module-level function that takes `report` first, and its keyword arguments; both must pickle."""


MANY = 12
"""Jobs beyond which only those that run have a bar, and one bar stands for all."""


class JobsFailedError(RuntimeError):
    """Some jobs of `run_side_by_side` did not come to their end."""


def run_side_by_side(
    jobs: Mapping[str, Job], *, at_once: int = 2, console: Console | None = None, keep_going: bool = False
) -> dict[str, Any]:
    """Runs every job and returns their results by name, in the order given.

    Where this machine has several GPUs, each job sees one of them, so that as many can run as there are.

    Args:
        jobs: by name.
        at_once: how many run side by side.
        console: for the progress bars.
        keep_going: whether the other jobs go on where one fails, for jobs that keep what they did themselves.

    Raises:
        JobsFailedError: a job failed; its traceback is in the message, or the message of its `InputError`. The others
            are stopped, or with `keep_going` have come to their end; then each failure has been shown, and is named.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    waiting = list(jobs.items())
    running: dict[str, Any] = {}
    taken: dict[str, str | None] = {}
    results: dict[str, Any] = {}
    told: dict[str, int] = {}
    failures: dict[str, str] = {}
    many = len(jobs) > MANY
    devices = gpus()
    with progress_bars(console=console) as progress:
        together = progress.add_task("all runs", total=len(jobs), visible=many)
        bars = {name: progress.add_task(name, total=None, start=False, visible=not many) for name in jobs}
        try:
            while len(results) + len(failures) < len(jobs):
                while waiting and len(running) < at_once:
                    name, (function, arguments) = waiting.pop(0)
                    device = next((one for one in devices if one not in taken.values()), None)
                    process = context.Process(target=_work, args=(messages, name, function, dict(arguments), device))
                    process.start()
                    running[name], taken[name] = process, device
                    progress.start_task(bars[name])
                    progress.update(bars[name], visible=True)
                kind: str
                content: Any
                try:
                    kind, name, content = messages.get(timeout=1.0)
                except Empty:
                    if (name := _killed(running)) is None:
                        continue
                    kind = "error"
                    content = f"it was killed (exit code {running[name].exitcode}); is there enough memory?"
                if kind == "report":
                    done, total, note = content
                    progress.update(bars[name], completed=done, total=total, note=note)
                    if not progress.console.is_terminal and done * 10 // total > told.get(name, 0):
                        told[name] = done * 10 // total  # a log file gets a line for every tenth instead of bars
                        progress.console.print(f"{name}: {done}/{total} {note}", highlight=False)
                    continue
                running.pop(name).join()
                del taken[name]
                progress.advance(together)
                progress.update(bars[name], visible=not many)
                if kind == "result":
                    results[name] = content
                    continue
                failures[name] = f"{name} failed:\n{content}"
                if not keep_going:
                    break
                progress.console.print(failures[name], highlight=False, markup=False)
        finally:
            for process in running.values():
                process.terminate()
    if failures and keep_going:
        named = "; ".join(failures)
        raise JobsFailedError(f"{len(failures)} of {len(jobs)} jobs failed, for the reasons above: {named}")
    if failures:
        raise JobsFailedError("\n".join(failures.values()))
    return {name: results[name] for name in jobs}


def gpus() -> list[str]:
    """The GPUs of this machine by their numbers, or those that CUDA_VISIBLE_DEVICES names; nothing where there is one
    or none, which needs no sharing out."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        found = [one for one in named.split(",") if one]
    else:  # torch would say so too, and takes seconds to load
        found = [str(number) for number in range(len(glob("/dev/nvidia[0-9]*")))]
    return found if len(found) > 1 else []


def _work(
    messages: Any, name: str, function: Callable[..., Any], arguments: dict[str, Any], device: str | None
) -> None:
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before torch is imported
    import datasets
    import torch
    import transformers

    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says across the bars that a CPU has no kernels to fetch
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    def report(done: int, total: int, note: str = "") -> None:
        messages.put(("report", name, (done, total, note)))

    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # trainers print; we have bars
            messages.put(("result", name, function(report, **arguments)))
    except (InputError, MissingExtraError) as error:
        messages.put(("error", name, str(error)))
    except BaseException:
        messages.put(("error", name, traceback.format_exc()))


def _end_with_parent() -> None:
    """A killed parent stops nobody by itself, and its runs would go on, unseen, beside those of the next command."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _killed(running: Mapping[str, Any]) -> str | None:
    """The first of the jobs whose process ended without a word."""
    return next((name for name, process in running.items() if not process.is_alive() and process.exitcode), None)
