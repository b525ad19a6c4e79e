"""Several judges in one table, and the `eval` command that makes it."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from listener_reward.cli import app
from listener_reward.cli.printing import leaderboard_tables, protocols_table
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError, JudgeError
from listener_reward.evaluate import Evaluation, evaluate
from listener_reward.evaluate.judged import PROTOCOLS
from listener_reward.evaluate.leaderboard import leaderboard
from listener_reward.judge import Judge


@pytest.fixture
def data(tmp_path: Path, shade: Any) -> Path:
    """Forty pairs of ten prompts; people like what is redder, and always did so in the file's first place."""
    for red in range(0, 250, 6):
        shade(red).save(tmp_path / f"{red}.png")
    rows = [
        {
            "prompt": f"prompt {k % 10}",
            "image_first": f"{6 * (k + 1)}.png",
            "image_second": f"{6 * k}.png",
            "p_first": 1.0,
            "id": f"pair {k}",
        }
        for k in range(40)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(path: Path, right: int, of: int = 40) -> Path:
    """A file of scores that is right on the first `right` pairs."""
    rows = [{"id": f"pair {k}", "p_first": 0.8 if k < right else 0.3} for k in range(of)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluations(FakeJudge: Any, data: Path) -> list[Evaluation]:
    pairs = load_pairs(str(data))
    judges = [FakeJudge(noise=20.0, name="noisy"), FakeJudge(slope=-1.0, name="contrary"), FakeJudge(name="good")]
    return [evaluate(judge, pairs, progress=False) for judge in judges]


def test_the_best_is_first_and_all_are_tested_against_it(evaluations):
    board = leaderboard(evaluations)
    assert [one.judge for one in board.evaluations] == ["good", "noisy", "contrary"]
    assert (board.protocol, board.against) == ("imagereward", "good")
    assert board.tests[0] is None
    assert board.tests[2] is not None and board.tests[2].difference == -1 and board.tests[2].p_value < 0.01
    written = json.loads(json.dumps(board.to_dict()))
    assert [row["judge"] for row in written["judges"]] == ["good", "noisy", "contrary"]
    assert written["judges"][2]["paired"]["only_second"] == 40 and written["judges"][0]["paired"] is None


def test_tested_against_a_chosen_one(evaluations):
    board = leaderboard(evaluations, evaluations[1])
    assert board.against == "contrary" and [test is None for test in board.tests] == [False, False, True]
    assert board.tests[0] is not None and board.tests[0].difference == 1


def test_only_the_same_can_be_compared(evaluations):
    with pytest.raises(InputError, match="empty"):
        leaderboard([])
    with pytest.raises(InputError, match="different protocols"):
        leaderboard([evaluations[0], replace(evaluations[1], protocols=())])
    with pytest.raises(InputError, match="no judged pairs"):
        leaderboard([evaluations[0], replace(evaluations[1], judged=None)])


def printed(tables: Any, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_tables_fit_a_terminal_of_80_columns(FakeJudge: Any, data: Path):
    """All protocols there are, of judges with long names: no number and no header is cut, no short name folded."""
    pairs, names = load_pairs(str(data)), list(PROTOCOLS)
    judges = [FakeJudge(name=name) for name in ("a" * 20, "s2.jsonl", "openai:Qwen/Qwen2.5-VL-7B@http://localhost/v1")]
    board = leaderboard([evaluate(judge, pairs, progress=False, protocols=names) for judge in judges])
    text = printed(leaderboard_tables(board)) + printed([protocols_table(board.evaluations[0].protocols)])
    assert max(map(len, text.splitlines())) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in text
    shown = re.sub(r"\s+", "", text)
    for name in ("a" * 20, "s2.jsonl", *names):
        assert re.search(rf"(^|\s){name}(\s|$)", text) or all(part in shown for part in name.split("-")), name
    assert re.search(r"^ *s2\.jsonl +1\.000 ", text, re.M) and re.search(rf"^ *{'a' * 20} ", text, re.M)


def test_the_baseline_is_below_every_protocol(FakeJudge: Any, data: Path):
    """Also below those that do not decide; each judge's own numbers are above it."""
    names = ["imagereward", "hpsv2", "hpsv2-inversion", "mmrb2", "videogen-with-ties", "hpsv3-ranking", "tau-b"]
    pairs = load_pairs(str(data))
    judges = [FakeJudge(name="good"), FakeJudge(slope=-1.0, name="contrary")]
    board = leaderboard([evaluate(judge, pairs, progress=False, protocols=names) for judge in judges])
    *tables, habits = (printed([table]) for table in leaderboard_tables(board))
    assert len(tables) == 3 and "always first" not in habits
    results = board.evaluations[0].protocols
    for text, part in zip(tables, (results[:1], results[1:5], results[5:]), strict=True):
        (shown,) = re.findall(r"^ *always first +(.*?) *$", text, re.M)
        (in_file,) = re.findall(r"^ *in file order +(.*?) *$", text, re.M)
        assert shown.split() == [f"{result.always_first:.3f}" for result in part]
        assert in_file.split() == [f"{result.always_first_in_file:.3f}" for result in part]
        assert len(re.findall(r"^ *good +1\.000", text, re.M)) == 1


def test_a_file_s_name_drives_neither_the_table_nor_the_terminal(evaluations):
    """Markup is shown as it stands, and what a terminal would obey, or a line break, is replaced."""
    board = leaderboard([replace(evaluations[0], judge="[red]x\x1b[31m\ny")])
    for table in leaderboard_tables(board):
        assert "[red]x\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}y" in printed([table])


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch, FakeJudge: Any) -> dict[str, Any]:
    """What `Judge.from_pretrained` gives for a name."""
    named: dict[str, Any] = {
        "good": FakeJudge(name="good"),
        "contrary": FakeJudge(slope=-1.0, name="contrary"),
        "broken": FakeJudge(name="broken", breaks_on=lambda *_: True),
    }
    monkeypatch.setattr(Judge, "from_pretrained", lambda name, **options: named[name])
    return named


def test_several_judges_and_files_in_one_table(judges, data, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    mine = scores(tmp_path / "mine.jsonl", right=30)
    result = run("--data", data, "--judge", "contrary", "--judge", "good", "--scores", mine, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [row["judge"] for row in answer["judges"]] == ["good", "mine.jsonl", "contrary"]
    assert [row["accuracy"] for row in answer["judges"]] == [1.0, 0.75, 0.0]
    assert answer["judges"][1]["paired"]["difference"] == -0.25
    table = run("--data", data, "--judge", "contrary", "--judge", "good", "--scores", mine).stdout
    assert table.index("good") < table.index("mine.jsonl") < table.index("contrary")
    assert "always first" in table and "in file order" in table
    assert "40 pairs of 10 prompts count" in table


def test_a_file_alone_loads_no_judge(judges, data, tmp_path):
    result = run("--data", data, "--scores", scores(tmp_path / "mine.jsonl", right=30), "--json")
    answer = json.loads(result.stdout)
    assert (answer["judge"], answer["accuracy"], answer["protocols"]["imagereward"]["value"]) == (
        "mine.jsonl",
        0.75,
        0.75,
    )
    assert answer["protocols"]["imagereward"]["always_first_in_file"] == 1.0
    assert not judges["good"].calls


def test_against_a_file(judges, data, tmp_path):
    mine, theirs = scores(tmp_path / "mine.jsonl", right=30), scores(tmp_path / "theirs.jsonl", right=10)
    answer = json.loads(run("--data", data, "--scores", mine, "--against", theirs, "--json").stdout)
    assert answer["against"] == "theirs.jsonl"
    assert [row["paired"] and row["paired"]["difference"] for row in answer["judges"]] == [0.5, None]
    assert 0 < answer["judges"][0]["paired"]["p_value"] < 0.05


def test_a_protocol_by_name(judges, data, tmp_path):
    mine = scores(tmp_path / "mine.jsonl", right=30)
    options = ["--protocol", "videogen-with-ties", "--protocol", "mmrb2", "--json"]
    answer = json.loads(run("--data", data, "--scores", mine, *options).stdout)
    assert list(answer["protocols"]) == ["videogen-with-ties", "mmrb2"]
    result = run("--data", data, "--scores", mine, "--protocol", "hpsv9")
    assert result.exit_code == 2 and "hpsv2-inversion" in result.stderr


def test_one_broken_judge_does_not_lose_the_others(judges, data):
    result = run("--data", data, "--judge", "broken", "--judge", "good", "--json")
    assert result.exit_code == 3 and "the fake judge broke" in result.stderr
    assert [row["accuracy"] for row in json.loads(result.stdout)["judges"]] == [1.0]
    alone = run("--data", data, "--judge", "broken", "--json")
    assert (alone.exit_code, alone.stdout) == (3, "")
    both = run("--data", data, "--judge", "broken", "--judge", "broken", "--json", "--debug")
    assert isinstance(both.exception, JudgeError) and both.stdout == ""


def test_a_peer_that_is_not_installed_is_named(judges, data):
    result = run("--data", data, "--judge", "imscore:HPSv2")
    assert result.exit_code == 2 and "pip install imscore" in result.stderr


def test_a_validation_set_by_its_spec(judges, data, tmp_path):
    other = tmp_path / "validation.jsonl"
    other.write_text("".join(json.dumps(json.loads(line) | {"p_first": 0.5}) + "\n" for line in data.open()))
    asked = ["--data", data, "--judge", "good", "--protocol", "pickscore", "--json"]
    (result,) = json.loads(run(*asked, "--validation", other).stdout)["protocols"].values()
    assert len(result["thresholds"]) == 1 and result["value"] < 1, "all ties there, so that it ties here too"
    (alone,) = json.loads(run(*asked).stdout)["protocols"].values()
    assert len(alone["thresholds"]) == 2 and alone["value"] == 1
    refused = run(*asked, "--validation", data)
    assert refused.exit_code == 2 and "the data itself" in refused.stderr


def test_a_stream_gives_the_same(judges, data):
    whole = json.loads(run("--data", data, "--judge", "good", "--json").stdout)
    streamed = json.loads(run("--data", data, "--judge", "good", "--json", "--stream").stdout)
    assert whole | {"seconds": 0} == streamed | {"seconds": 0}
