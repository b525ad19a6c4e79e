"""The demo with a few steps, and the workers that a user's runs on."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from listener_reward.errors import InputError
from listener_reward.recipes import demo
from listener_reward.recipes.demo import run_demo
from listener_reward.recipes.study import conduct
from listener_reward.recipes.variants import SPLITS, VARIANTS
from listener_reward.recipes.workers import Job, JobsFailedError, Report, run_side_by_side


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a spawned process import this file by the name that pytest gave it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


def count_to(report: Report, n: int) -> int:
    for i in range(n):
        report(i + 1, n, "counting")
    return n


def break_down(report: Report) -> None:
    raise ValueError("the tower leans")


def test_jobs_run_side_by_side_and_come_back_in_order() -> None:
    jobs = {name: (count_to, {"n": n}) for name, n in (("long", 30), ("short", 2), ("none", 0))}
    assert run_side_by_side(jobs) == {"long": 30, "short": 2, "none": 0}


def test_a_job_that_fails_is_named_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match=r"leaning failed:(?s:.*)the tower leans"):
        run_side_by_side({"leaning": (break_down, {}), "fine": (count_to, {"n": 1})})


def die(report: Report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask(report: Report) -> None:
    raise InputError("there is no such tower")


def test_the_other_jobs_come_to_their_end_where_one_fails(tmp_path: Path) -> None:
    jobs: dict[str, Job] = {
        "leaning": (break_down, {}),
        "dead": (die, {}),
        "asking": (ask, {}),
        "fine": (leave, {"path": tmp_path / "here"}),
    }
    told = StringIO()
    with pytest.raises(JobsFailedError, match=r"3 of 4 jobs failed, for the reasons above: leaning; dead; asking"):
        run_side_by_side(jobs, at_once=1, keep_going=True, console=Console(file=told, width=200))
    assert (tmp_path / "here").exists()
    leaning, dead, asking = (told.getvalue().index(f"{name} failed:") for name in ("leaning", "dead", "asking"))
    assert "Traceback" in told.getvalue()[leaning:dead] and "enough memory" in told.getvalue()[dead:asking]
    assert "there is no such tower" in told.getvalue()[asking:] and "Traceback" not in told.getvalue()[asking:]


def leave(report: Report, path: Path) -> None:
    path.touch()


def stay(report: Report, path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(600)


def start_and_stay(path: Path) -> None:
    run_side_by_side({"one": (stay, {"path": path})})


def test_runs_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    command = multiprocessing.get_context("spawn").Process(target=start_and_stay, args=(tmp_path / "number",))
    command.start()
    run = int(until(lambda: (tmp_path / "number").exists() and (tmp_path / "number").read_text()))
    command.kill()
    until(lambda: not alive(run))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def until(there: Callable[[], Any], seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def in_this_process(jobs: Mapping[str, Job], **options: Any) -> dict[str, Any]:
    """What `run_side_by_side` gives, without the eight processes that each import torch anew. Jobs pickle as there."""
    jobs = pickle.loads(pickle.dumps(dict(jobs)))
    return {name: function(lambda *_: None, **arguments) for name, (function, arguments) in jobs.items()}


def test_the_demo_writes_results_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (demo, conduct):
        monkeypatch.setattr(module, "run_side_by_side", in_this_process)
    results = run_demo(tmp_path, quick=True)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert set(results["curves"]) == set(VARIANTS)
    for curve in results["curves"].values():
        assert curve["step"] == [1, 2, 3]
        assert all(len(values) == 3 for values in curve.values())
    rows = {(row["model"], row["split"]) for row in results["table"]}
    assert rows == {(model, split) for model in ("base", "SFT", "Bradley-Terry", *VARIANTS) for split in SPLITS}
    assert len(results["pairs"]) == 12
    assert sorted(results["ranking"]["order"]) == list(range(6))
    page = (tmp_path / "report.html").read_text()
    assert "In distribution" in page and "Out of distribution" in page and "falls below 50 %" in page
    assert "listener-shaped GRPO" in page and "http://" not in page.replace("http://www.w3.org", "")
