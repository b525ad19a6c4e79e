"""An evaluation on two processes: the same numbers as on one, every pair judged once, and no process waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from listener_reward.cli import app
from listener_reward.evaluate import processes
from listener_reward.verdict import PairJudge

ROOT = Path(__file__).parents[1]
# By batches of one: whoever judges a pair, its shapes are the same, and so are all bits.
LINE = ["eval", "--judge", "tiny", "--no-think", "--data", "tiny:id", "--limit", "20", "--batch-size", "1", "--json"]

BREAKS_ON_ONE = """
import sys
from listener_reward.cli import journals, main
from listener_reward.errors import JudgeError
from listener_reward.evaluate.processes import place

class Half:
    name = "half"

    def compare_many(self, prompts, firsts, seconds, *, think=None):
        raise JudgeError(f"process {place()[0]} of {len(prompts)} pairs broke")

class Whole(Half):
    def compare_many(self, prompts, firsts, seconds, *, think=None):
        from listener_reward.verdict import Verdict
        return [Verdict(0.5, None, (), None, None, 0.0, 0) for _ in prompts]

journals.load_rater = lambda *_, **__: Half() if place()[0] == 1 else Whole()
sys.argv = ["listener-reward", *sys.argv[1:]]
main()
"""

MISFITS_ON_ONE = """
import sys
from listener_reward.cli import journals, main
from listener_reward.errors import FormatError
from listener_reward.evaluate.processes import place
from listener_reward.verdict import Verdict

class Judge:
    name = "strict"

    def compare_many(self, prompts, firsts, seconds, *, think=None):
        return [Verdict(0.5, None, (), None, None, 0.0, 0) for _ in prompts]

    def check_format(self):
        if place()[0] == 1:
            raise FormatError(f"process {place()[0]} answers in another format")

journals.load_rater = lambda *_, **__: Judge()
sys.argv = ["listener-reward", *sys.argv[1:]]
main()
"""


def launched(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`command` by `accelerate launch` on two processes, as its own configuration for one machine has it."""
    (cwd / "ddp.yaml").write_bytes((ROOT / "listener_reward/train/launch/ddp.yaml").read_bytes())
    launch = ["--config_file", "ddp.yaml", "--num_processes", "2", "--main_process_port", "0"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, *command],
        cwd=cwd,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        | {"LISTENER_REWARD_CACHE": str(cwd / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_find_what_one_finds(tmp_path: Path):
    page = tmp_path / "page.html"
    done = launched("-m", "listener_reward.cli", *LINE, "--html", str(page), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    alone = CliRunner().invoke(app, LINE)
    both, one = json.loads(done.stdout), json.loads(alone.stdout)
    assert both.pop("seconds") > 0 < one.pop("seconds")
    assert both == one and one["n"] == 20
    assert done.stderr.count("report: ") == 1 and page.exists()


def test_what_breaks_on_one_process_ends_all(tmp_path: Path):
    (tmp_path / "half.py").write_text(BREAKS_ON_ONE)
    done = launched("half.py", *LINE, cwd=tmp_path)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("Error: process 1 of 10 pairs broke") == 1


def test_a_strict_judge_of_another_format_on_one_process_ends_all(tmp_path: Path):
    """Ten pairs a process: fewer judgements than speak for themselves."""
    (tmp_path / "strict.py").write_text(MISFITS_ON_ONE)
    done = launched("strict.py", *LINE, cwd=tmp_path)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("Error: process 1 answers in another format") == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("pairs", [1, 7])
def test_each_pair_goes_to_one_process_and_its_verdict_to_its_place(
    monkeypatch: pytest.MonkeyPatch, rank: int, pairs: int
):
    class Echo:
        name = "echo"

        def compare_many(
            self, prompts: Sequence[str], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
        ) -> list[Any]:
            asked.extend(zip(prompts, firsts, seconds, strict=True))
            return list(prompts)

    def gathered(work: Callable[[], Any]) -> list[Any]:
        """What this process has judged, and in the other's place what that one would have."""
        found: list[Any] = [words[number::2] for number in (0, 1)]
        found[rank] = work()
        return found

    asked: list[Any] = []
    words = [f"pair {number}" for number in range(pairs)]
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "together", gathered)
    judge = processes.divided(Echo)()
    assert isinstance(judge, processes.Divided) and isinstance(judge, PairJudge)
    assert judge.compare_many(words, words, words) == words
    assert asked == [(word, word, word) for word in words[rank::2]]


def test_without_a_launcher_a_judge_is_as_it_is(monkeypatch: pytest.MonkeyPatch, FakeJudge: Any):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.place() == (0, 1)
    assert isinstance(processes.divided(FakeJudge)(), FakeJudge)
    assert processes.together(lambda: "mine") == ["mine"]
    with processes.joined(), processes.first_speaks():
        pass
