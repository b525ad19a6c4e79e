"""Runs jobs side by side, one process and one thread each, with a progress bar for every one.

Models this small do not use a second core; two of them do. One thread each also makes a job's result independent of
how many cores there are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any

from rich.console import Console

from listener_reward.progress import progress_bars

Report = Callable[[int, int, str], None]
"""What a job calls as it goes: steps done, steps in all, and a few words on how it stands."""

Job = tuple[Callable[..., Any], Mapping[str, Any]]
"""A module-level function that takes `report` first, and its keyword arguments; both must pickle."""


def run_side_by_side(jobs: Mapping[str, Job], *, at_once: int = 2, console: Console | None = None) -> dict[str, Any]:
    """Runs every job and returns their results by name, in the order given.

    Raises:
        RuntimeError: a job failed; its traceback is in the message, and the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    waiting = list(jobs.items())
    running: dict[str, Any] = {}
    results: dict[str, Any] = {}
    told: dict[str, int] = {}
    with progress_bars(console=console) as progress:
        bars = {name: progress.add_task(name, total=None, start=False) for name in jobs}
        try:
            while len(results) < len(jobs):
                while waiting and len(running) < at_once:
                    name, (function, arguments) = waiting.pop(0)
                    process = context.Process(target=_work, args=(messages, name, function, dict(arguments)))
                    process.start()
                    running[name] = process
                    progress.start_task(bars[name])
                try:
                    kind, name, content = messages.get(timeout=1.0)
                except Empty:
                    _check_alive(running)
                    continue
                if kind == "report":
                    done, total, note = content
                    progress.update(bars[name], completed=done, total=total, note=note)
                    if not progress.console.is_terminal and done * 10 // total > told.get(name, 0):
                        told[name] = done * 10 // total  # a log file gets a line for every tenth instead of bars
                        progress.console.print(f"{name}: {done}/{total} {note}", highlight=False)
                elif kind == "result":
                    results[name] = content
                    running.pop(name).join()
                else:
                    raise RuntimeError(f"{name} failed:\n{content}")
        finally:
            for process in running.values():
                process.terminate()
    return {name: results[name] for name in jobs}


def _work(messages: Any, name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    import datasets
    import torch
    import transformers

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
    except BaseException:
        messages.put(("error", name, traceback.format_exc()))


def _check_alive(running: Mapping[str, Any]) -> None:
    for name, process in running.items():
        if not process.is_alive() and process.exitcode:
            raise RuntimeError(f"{name} was killed (exit code {process.exitcode}); is there enough memory?")
