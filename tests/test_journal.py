"""An evaluation that is stopped, however, goes on where it was and ends as one that was not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import FakeJudge, shade_image
from typer.testing import CliRunner

from listener_reward.cli import app
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError, JudgeError
from listener_reward.evaluate import evaluate
from listener_reward.evaluate.calibrate import calibrate
from listener_reward.evaluate.journal import KEPT_DAYS, Journal, forget_old
from listener_reward.judge import Judge

REDS = (0, 40, 90, 200)
PROMPTS, FIRSTS, SECONDS = ["a dog"] * 4, [shade_image(red) for red in REDS], [shade_image(100)] * 4
ASKED = (PROMPTS, FIRSTS, SECONDS)


class Stopped(BaseException):
    """As Ctrl-C would, but only here."""


def rich_judge(**options: Any) -> FakeJudge:
    """Its verdicts have all that a verdict can have."""
    return FakeJudge(listener_slope=3.0, malformed=True, bias=0.01, noise=0.5, **options)


def test_verdicts_come_back_as_they_were(tmp_path: Path):
    wanted = rich_judge().compare_many(*ASKED)
    file = tmp_path / "new" / "one.jsonl"
    journal = Journal(rich_judge(), file)
    assert journal.compare_many(*ASKED) == wanted and (journal.said_now, journal.said_before) == (4, 0)
    judge = rich_judge()
    journal = Journal(judge, file)
    assert journal.earlier == 4 and journal.name == "fake"
    assert journal.compare_many(*ASKED) == wanted
    assert judge.calls == [] and (journal.said_now, journal.said_before) == (0, 4)
    journal.remove()
    assert not file.exists()


def test_only_what_was_asked_before_is_known(tmp_path: Path):
    """Another prompt, other pixels, the other order and another way of thinking are other questions."""
    file = tmp_path / "one.jsonl"
    Journal(rich_judge(), file).compare_many(["a dog"], FIRSTS[:1], SECONDS[:1])
    for asked, think in (
        ((["a cat"], FIRSTS[:1], SECONDS[:1]), None),
        ((["a dog"], FIRSTS[1:2], SECONDS[:1]), None),
        ((["a dog"], SECONDS[:1], FIRSTS[:1]), None),
        ((["a dog"], FIRSTS[:1], SECONDS[:1]), True),
    ):
        judge = rich_judge()
        assert Journal(judge, file).compare_many(*asked, think=think) == rich_judge().compare_many(*asked)
        assert len(judge.calls) == 1
    judge = rich_judge()
    known = Journal(judge, file).compare_many(*ASKED)
    assert known == rich_judge().compare_many(*ASKED) and judge.calls == [[("a dog", red, 100) for red in REDS[2:]]]


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_what_a_kill_cut_short_is_judged_again(cut: int, tmp_path: Path):
    file, wanted = tmp_path / "one.jsonl", rich_judge().compare_many(*ASKED)
    Journal(rich_judge(), file).compare_many(*ASKED)
    os.truncate(file, file.stat().st_size - cut)
    left = 4 if cut == 1 else 3  # the last line is whole but for its end
    for known in (left, 4):
        journal = Journal(rich_judge(), file)
        assert journal.earlier == known
        assert journal.compare_many(*ASKED) == wanted


def test_a_journal_of_another_judge_is_refused(tmp_path: Path):
    file = tmp_path / "one.jsonl"
    Journal(rich_judge(), file, about={"thoughts": 2}).compare_many(*ASKED)
    for judge, about in ((rich_judge(), {"thoughts": 3}), (rich_judge(name="another"), {"thoughts": 2})):
        with pytest.raises(InputError, match="is of another judge, of one with other settings"):
            Journal(judge, file, about=about)
    assert Journal(rich_judge(), file, about={"thoughts": 3}, fresh=True).earlier == 0
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="no journal"):
        Journal(rich_judge(), file)


def test_no_broken_verdict_is_kept(tmp_path: Path):
    file = tmp_path / "one.jsonl"
    broken = rich_judge(breaks_on=lambda prompt, first, second: first == 90, answers_nan=True)
    Journal(broken, file).compare_many(*ASKED)
    assert Journal(rich_judge(), file).earlier == 0
    with pytest.raises(InputError, match="seconds"):
        Journal(rich_judge(), file).compare_many(PROMPTS, FIRSTS, SECONDS[1:])


def test_a_journal_that_cannot_be_written_costs_no_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    journal = Journal(rich_judge(), tmp_path / "gone" / "one.jsonl")
    shutil.rmtree(tmp_path / "gone")
    with caplog.at_level(logging.WARNING, "listener_reward"):
        for _ in range(2):
            assert journal.compare_many(*ASKED) == rich_judge().compare_many(*ASKED)
    assert [record.getMessage()[:40] for record in caplog.records] == ["verdicts are no longer kept for a later "]


@pytest.mark.parametrize("end", ["removed", "begun anew"])
def test_a_journal_that_another_process_ends_costs_no_verdict(end: str, tmp_path: Path):
    file, wanted = tmp_path / "one.jsonl", rich_judge().compare_many(*ASKED)
    Journal(rich_judge(), file).compare_many(*ASKED)
    journal, other = Journal(rich_judge(), file), Journal(rich_judge(), file)
    if end == "removed":
        other.remove()
    else:
        Journal(rich_judge(), file, fresh=True).compare_many(PROMPTS, SECONDS, FIRSTS)
    assert journal.compare_many(*ASKED) == wanted


def test_old_journals_are_forgotten(tmp_path: Path):
    for name, days in (("old", KEPT_DAYS + 1), ("new", KEPT_DAYS - 1)):
        (tmp_path / f"{name}.jsonl").touch()
        os.utime(tmp_path / f"{name}.jsonl", (then := time.time() - 86400 * days, then))
    forget_old(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new.jsonl"]


def test_a_stopped_evaluation_ends_as_one_that_was_not(tmp_path: Path):
    """Stopped in the third batch; validation pairs and swapped copies are kept as well."""
    pairs, apart = load_pairs("tiny:ood", limit=40), load_pairs("tiny:id", limit=10)
    how: Any = {"batch_size": 8, "swap_check": 12, "progress": False, "protocols": ["pickscore"], "validation": apart}
    watched: list[int] = []

    def watch(rows: Any, verdicts: list[Any]) -> None:
        watched.append(len(verdicts))
        if len(watched) == 3:
            raise Stopped

    wanted = evaluate(rich_judge(), pairs, **how, keep=True)
    with pytest.raises(Stopped):
        evaluate(Journal(rich_judge(), tmp_path / "one.jsonl"), pairs, **how, watch=watch)
    judge = rich_judge()
    journal = Journal(judge, tmp_path / "one.jsonl")
    found = evaluate(journal, pairs, **how, keep=True)
    assert found.to_dict() | {"seconds": 0} == wanted.to_dict() | {"seconds": 0}
    assert found.verdicts == wanted.verdicts
    assert journal.said_before == 10 + 3 * 8 + 12 and sum(map(len, judge.calls)) == 16


def test_a_stopped_calibration_ends_as_one_that_was_not(tmp_path: Path):
    """Of a judge with thoughts and a listener, in both orders; then without thoughts, which are other judgements."""
    pairs = load_pairs("tiny:id", limit=52)
    judge = Judge.from_pretrained("tiny", thoughts=1, max_new_tokens=8)
    how: Any = {"batch_size": 20, "progress": False}
    wanted = calibrate(judge, pairs, **how)
    calls: list[int] = []

    class Stopping(Journal):
        def judgements(self, prompts: Any, *asked: Any, **how: Any) -> Any:
            if len(calls) == 2:
                raise Stopped
            calls.append(len(prompts))
            return super().judgements(prompts, *asked, **how)

    with pytest.raises(Stopped):
        calibrate(cast("Any", Stopping(judge, tmp_path / "one.jsonl")), pairs, **how)
    journal: Any = Journal(judge, tmp_path / "one.jsonl")
    found = calibrate(journal, pairs, **how)
    assert (journal.earlier, journal.said_before, journal.said_now) == (40, 40, 12)
    assert found.to_dict() == wanted.to_dict() and found.calibration == wanted.calibration
    assert all(
        np.array_equal(getattr(found, each), getattr(wanted, each)) for each in ("labels", "p_before", "p_after")
    )
    rows: Any = next(pairs.iter(batch_size=2))
    asked = rows["prompt"], *map(list, zip(*rows["images"], strict=True))
    assert journal.judgements(*asked) == judge.judgements(*asked)
    assert journal.judgements(*asked, think=False) == judge.judgements(*asked, think=False)


# --- the command


SCRIPT = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    sys.path.insert(0, sys.argv.pop(1))
    from conftest import FakeJudge
    import listener_reward.cli.journals as journals
    from listener_reward.cli import main

    journals.load_rater = lambda name, **how: FakeJudge(name=name, delay=0.3, listener_slope=3.0, noise=0.5)
    main()
"""
LINE = ["eval", "--judge", "tiny", "--data", "tiny:ood", "--limit", "200", "--json"]


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b'{"pair"') for path in folder.glob("eval/*.jsonl"))


def test_eval_goes_on_after_any_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache, seen = tmp_path / "cache", [0]
    monkeypatch.setenv("LISTENER_REWARD_CACHE", str(cache))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(Path(__file__).parent), *LINE]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while lines(cache) == seen[-1] and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert process.returncode != 0 and out == "", err
        seen.append(lines(cache))
        assert seen[-1] > seen[-2]
        assert seen[-2] == 0 or f"{seen[-2]} verdicts of tiny are taken over from a run that was stopped" in err
        assert number != signal.SIGINT or f"{seen[-1]} verdicts are kept, and the same line goes on from there" in err
    assert seen[-1] < 200 + 32

    judge = FakeJudge(name="tiny", listener_slope=3.0, noise=0.5)
    monkeypatch.setattr("listener_reward.cli.journals.load_rater", lambda name, **how: judge)
    found = CliRunner().invoke(app, LINE)
    assert f"{seen[-1]} verdicts of tiny are taken over" in found.stderr
    assert sum(map(len, judge.calls)) == 232 - seen[-1]
    assert lines(cache) == 0, "what is done is forgotten"
    judge.calls.clear()
    whole = CliRunner().invoke(app, LINE)
    assert "taken over" not in whole.stderr and sum(map(len, judge.calls)) == 232
    results = [json.loads(each.stdout) | {"seconds": 0} for each in (found, whole)]
    assert results[0] == results[1] and results[0]["n"] == 200


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An evaluation that broke after its first batch, and its command line; then `load_rater` gives a sound judge."""
    monkeypatch.setenv("LISTENER_REWARD_CACHE", str(tmp_path / "cache"))
    line = ["eval", "--judge", "fake", "--data", "tiny:ood", "--limit", "90", "--json"]
    judge = FakeJudge()
    monkeypatch.setattr("listener_reward.cli.journals.load_rater", lambda name, **how: judge)

    def breaks(*asked: Any, **how: Any) -> Any:
        if judge.calls and len(asked[0]) < 32:
            raise JudgeError("the endpoint is gone")
        return FakeJudge.compare_many(judge, *asked, **how)

    with monkeypatch.context() as patch:
        patch.setattr(judge, "compare_many", breaks)
        assert CliRunner().invoke(app, line).exit_code == 3
    assert lines(tmp_path / "cache") == 64 + 32
    return line


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ([], True),
        (["--fresh"], False),
        (["--thoughts", "2"], False),
        (["--orders", "one"], False),
        (["--seed", "1"], False),
        (["--judge", "fake"], True),
    ],
)
def test_another_evaluation_begins_anew(stopped: list[str], changes: list[str], taken: bool):
    done = CliRunner().invoke(app, stopped + changes)
    assert ("96 verdicts of fake are taken over" in done.stderr) == taken, done.stderr


def test_a_changed_checkpoint_begins_anew(stopped: list[str], tmp_path: Path):
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    line = [str(folder) if each == "fake" else each for each in stopped]

    def journal_names() -> set[str]:
        from listener_reward.cli.journals import Journals

        journals = Journals({}, {}, fresh=False)
        journals.load(str(folder))
        return {path.name for path in journals.paths}

    first = journal_names()
    assert journal_names() == first
    (folder / "model.safetensors").write_bytes(b"another")
    assert journal_names() != first
    assert CliRunner().invoke(app, line).exit_code == 0


def test_one_judge_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch):
    judges: list[weakref.ref[FakeJudge]] = []

    def loads(name: str, **how: Any) -> FakeJudge:
        assert all(judge() is None for judge in judges)
        judge = FakeJudge(name=name)
        judges.append(weakref.ref(judge))
        return judge

    monkeypatch.setattr("listener_reward.cli.journals.load_rater", loads)
    line = ["eval", "--judge", "one", "--judge", "two", "--data", "tiny:ood", "--limit", "9", "--json"]
    assert CliRunner().invoke(app, line).exit_code == 0 and len(judges) == 2


def test_calibrate_keeps_what_it_judged_until_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`--sure` cannot be had, which is known once all is judged; without it nothing is judged again."""
    monkeypatch.setenv("LISTENER_REWARD_CACHE", str(tmp_path / "cache"))
    line = ["calibrate", "--judge", "tiny", "--no-think", "--data", "tiny:id", "--limit", "60"]
    line += ["--out", str(tmp_path / "out"), "--json"]
    failed = CliRunner().invoke(app, [*line, "--sure", "1"])
    assert failed.exit_code == 2 and "sure is 1.0" in failed.stderr
    assert lines(tmp_path / "cache") == 60
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0 and "60 verdicts of tiny are taken over" in done.stderr
    assert lines(tmp_path / "cache") == 0 and (tmp_path / "out" / "listener_reward.json").exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LISTENER_REWARD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("listener_reward.cli.journals.load_rater", lambda name, **how: FakeJudge())
    done = CliRunner().invoke(app, ["eval", "--judge", "fake", "--data", "tiny:ood", "--limit", "9", "--json"])
    assert done.exit_code == 0 and "verdicts are not kept for a later run" in done.stderr
