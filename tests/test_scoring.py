"""Bulk scoring: every pair once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from listener_reward import Judge
from listener_reward.datasets import load_pairs
from listener_reward.errors import FormatError, InputError, JudgeError, UnreachableError
from listener_reward.evaluate import evaluate, evaluate_scores
from listener_reward.evaluate.scores import read_scores
from listener_reward.media.storyboards import as_picture
from listener_reward.scoring import COLUMNS, read_verdicts, run, score_pairs
from listener_reward.verdict import Verdict


class Brightness:
    """Prefers the brighter image; breaks on the prompts that say so, and counts what it was asked."""

    name = "brightness"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def compare_many(
        self, prompts: Sequence[str], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        verdicts = []
        for prompt, *sides in zip(prompts, firsts, seconds, strict=True):
            first, second = (np.asarray(as_picture(side, field="image")).mean() for side in sides)
            if "break" in prompt:
                raise JudgeError("it broke")
            p = float(1 / (1 + np.exp((second - first) / 50)))
            verdicts.append(Verdict(p, 1 if p > 0.5 else 2 if p < 0.5 else None, (), None, None, 0.0, 0))
        self.asked += prompts
        return verdicts


@pytest.fixture
def data(tmp_path: Path):
    """`data(n)` makes n pairs of grey squares without labels, and gives the file's name."""
    for level in range(0, 250, 25):
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / f"{level}.png")

    def make(n: int, **changed: str) -> str:
        rows = [
            {
                "prompt": changed.get(str(i), f"grey number {i}"),
                "image_first": f"{i * 25 % 250}.png",
                "image_second": f"{i * 75 % 250}.png",
                "id": f"p{i}",
            }
            for i in range(n)
        ]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def test_every_pair_has_a_row_in_the_order_of_the_data(data: Any, tmp_path: Path):
    scored = score_pairs(Brightness(), data(130), tmp_path / "out.parquet", progress=False)
    rows = list(read_verdicts(scored.out))
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(130)]
    assert [row["index"] for row in rows] == list(range(130)) and scored.pairs == 130
    assert rows[1]["p_first"] == pytest.approx(1 / (1 + np.exp(1))) and rows[1]["preferred"] == 2
    assert rows[0]["preferred"] is None and rows[0]["label"] is None and rows[0]["error"] is None
    assert pq.read_schema(scored.out).names == COLUMNS.names
    assert not (tmp_path / "out.parquet.parts").exists()


def test_a_verdict_is_kept_whole_and_read_by_eval(tmp_path: Path):
    judge = Judge.from_pretrained("tiny")
    pairs = load_pairs("tiny:id", limit=12)
    scored = score_pairs(judge, "tiny:id", tmp_path / "out.parquet", limit=12, progress=False)
    rows = list(read_verdicts(scored.out))
    verdicts = judge.compare_many(pairs["prompt"], *map(list, zip(*pairs["images"], strict=True)))
    for row, verdict in zip(rows, verdicts, strict=True):
        kept = json.loads(json.dumps(verdict.to_dict()))
        assert {name: row[name] for name in kept if name in row} == {name: kept[name] for name in kept if name in row}
    assert [row["label"] for row in rows] == pairs["p_first"]
    asked = evaluate(judge, pairs, progress=False, swap_check=0)
    read = evaluate_scores(read_scores(scored.out), pairs)
    assert (read.accuracy, read.ece, read.missing) == (asked.accuracy, pytest.approx(asked.ece), 0)


def test_shards_are_a_partition_and_read_as_one(data: Any, tmp_path: Path):
    name = data(23)
    for part in range(3):
        score_pairs(Brightness(), name, tmp_path / "out.parquet", shard=(part, 3), batch_size=4, progress=False)
    files = sorted(path.name for path in tmp_path.glob("out-*.parquet"))
    assert files == [f"out-{part:05}-of-00003.parquet" for part in range(3)]
    rows = [row for file in files for row in read_verdicts(tmp_path / file)]
    assert sorted(row["index"] for row in rows) == list(range(23)) and rows[0]["index"] == 0 and rows[1]["index"] == 3
    assert len(read_scores(tmp_path / "out-*.parquet").pairs) == 23


def test_a_failed_pair_has_its_reason_and_costs_no_other(data: Any, tmp_path: Path):
    name = data(30, **{"7": "break here"})
    (tmp_path / "75.png").write_bytes(b"no picture")
    scored = score_pairs(Brightness(), name, tmp_path / "out.parquet", max_failed=1, progress=False)
    rows = list(read_verdicts(scored.out))
    assert rows[7]["error"] == "JudgeError: it broke" and rows[7]["p_first"] is None
    assert rows[3]["error"].startswith("InputError: ") and "75.png" in rows[3]["error"]
    failed = {i for i in range(30) if 75 in (i * 25 % 250, i * 75 % 250)} | {7}
    assert {i for i, row in enumerate(rows) if row["error"]} == failed and scored.failed == len(failed)
    assert all((row["p_first"] is None) == (row["error"] is not None) for row in rows)


def test_a_strict_judge_of_another_format_stops_at_once(data: Any, tmp_path: Path):
    class Other(Brightness):
        def compare_many(self, *asked: Any, **options: Any) -> list[Verdict]:
            raise FormatError("thoughts are malformed")

    with pytest.raises(FormatError, match="thoughts are malformed"):
        score_pairs(Other(), data(3), tmp_path / "out.parquet", max_failed=1, progress=False)
    assert not (tmp_path / "out.parquet").exists()


def test_a_verdict_that_is_none_is_a_failure_and_no_row_goes_without_a_reason(data: Any, tmp_path: Path):
    class Odd(Brightness):
        def compare_many(self, prompts: Sequence[str], *args: Any, **more: Any) -> list[Verdict]:
            verdicts = super().compare_many(prompts, *args, **more)
            odd = [
                replace(verdict, p_first=np.nan) if prompt == "grey number 3" else verdict
                for prompt, verdict in zip(prompts, verdicts, strict=True)
            ]
            return odd[:-1] if "grey number 7" in prompts else odd

    scored = score_pairs(Odd(), data(12), tmp_path / "out.parquet", max_failed=1, progress=False)
    errors = {row["index"]: row["error"] for row in read_verdicts(scored.out) if row["p_first"] is None}
    assert errors == {
        3: "JudgeError: brightness answered p_first = nan for prompt 'grey number 3'",
        7: "JudgeError: brightness gave 0 verdicts on 1 pairs",
    }
    assert scored.failed == 2


def test_one_bad_pair_in_a_batch_costs_a_few_more_calls(data: Any, tmp_path: Path):
    class Counting(Brightness):
        calls = 0

        def compare_many(self, *args: Any, **more: Any) -> list[Verdict]:
            self.calls += 1
            return super().compare_many(*args, **more)

    judge = Counting()
    scored = score_pairs(judge, data(64, **{"5": "break"}), tmp_path / "out.parquet", progress=False)
    assert scored.failed == 1 and judge.calls == 13  # the whole, and two halves six times


def test_a_judge_whose_server_has_gone_is_asked_once_a_batch(data: Any, tmp_path: Path):
    class Gone(Brightness):
        calls = 0

        def compare_many(self, *args: Any, **more: Any) -> list[Verdict]:
            self.calls += 1
            raise UnreachableError("no response in 6 tries")

    judge = Gone()
    scored = score_pairs(judge, data(16), tmp_path / "out.parquet", batch_size=8, max_failed=1.0, progress=False)
    assert scored.failed == 16 and judge.calls == 2
    errors = pq.read_table(tmp_path / "out.parquet")["error"].to_pylist()
    assert errors == ["UnreachableError: no response in 6 tries"] * 16


def test_a_judge_that_keeps_failing_stops_and_its_pairs_are_asked_again(data: Any, tmp_path: Path):
    name, out = data(200, **{str(i): "break" for i in range(64, 128)}), tmp_path / "out.parquet"
    with pytest.raises(JudgeError, match=r"of 128 pairs have no verdict; the latest: JudgeError: it broke.*max-failed"):
        score_pairs(Brightness(), name, out, progress=False)
    assert not out.exists()
    scored = score_pairs(Brightness(), name, out, max_failed=1, progress=False)
    assert (scored.resumed, scored.failed) == (0, 64)


def test_after_a_stop_it_goes_on_and_asks_nothing_twice(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "PART_PAIRS", 16)
    name, out = data(50), tmp_path / "out.parquet"

    class Stopped(Brightness):
        def compare_many(self, prompts: Sequence[str], *args: Any, **more: Any) -> list[Verdict]:
            if len(self.asked) >= 24:
                raise KeyboardInterrupt
            return super().compare_many(prompts, *args, **more)

    first, second = Stopped(), Brightness()
    with pytest.raises(KeyboardInterrupt):
        score_pairs(first, name, out, batch_size=8, progress=False)
    scored = score_pairs(second, name, out, batch_size=8, progress=False)
    assert scored.resumed == 24 and first.asked + second.asked == [f"grey number {i}" for i in range(50)]
    again = Brightness()
    assert score_pairs(again, name, out, batch_size=8, progress=False).pairs == 50 and again.asked == []
    assert (
        score_pairs(again, name, out, batch_size=8, progress=False, fresh=True).pairs == 50 and len(again.asked) == 50
    )


def test_other_settings_or_data_are_not_mixed(data: Any, tmp_path: Path):
    name, out = data(8), tmp_path / "out.parquet"
    score_pairs(Brightness(), name, out, settings={"thoughts": 4}, progress=False)
    with pytest.raises(InputError, match=r"thoughts is 8, and .* was begun with 4; .*--fresh"):
        score_pairs(Brightness(), name, out, settings={"thoughts": 8}, progress=False)
    with pytest.raises(InputError, match="limit is 5"):
        score_pairs(Brightness(), name, out, settings={"thoughts": 4}, limit=5, progress=False)

    class Stops(Brightness):
        def compare_many(self, *args: Any, **more: Any) -> list[Verdict]:
            if self.asked:
                raise KeyboardInterrupt
            return super().compare_many(*args, **more)

    with pytest.raises(KeyboardInterrupt):
        score_pairs(Stops(), name, tmp_path / "two.parquet", batch_size=4, progress=False)
    with pytest.raises(InputError, match="changed since"):
        score_pairs(Brightness(), data(8, **{"2": "another"}), tmp_path / "two.parquet", batch_size=4, progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard": (3, 3)}, "shard is 3/3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"max_failed": 2}, "max_failed is 2"),
        ({"out": "scores.csv"}, "ends in .parquet"),
        ({"data": "nowhere.jsonl"}, "no file"),
    ],
)
def test_what_cannot_be_used_is_said(options: dict[str, Any], said: str, data: Any, tmp_path: Path):
    arguments: dict[str, Any] = {"data": data(2), "out": "out.parquet"} | options
    with pytest.raises(InputError, match=said):
        score_pairs(Brightness(), arguments.pop("data"), tmp_path / arguments.pop("out"), progress=False, **arguments)


def test_a_file_of_another_kind_is_never_written_over(data: Any, tmp_path: Path):
    out = tmp_path / "mine.parquet"
    pq.write_table(pq.read_table(score_pairs(Brightness(), data(2), tmp_path / "a.parquet", progress=False).out), out)
    pq.write_table(pq.read_table(out).replace_schema_metadata(None), out)
    before = out.read_bytes()
    with pytest.raises(InputError, match="no file of score"):
        score_pairs(Brightness(), data(2), out, progress=False)
    assert out.read_bytes() == before
    with pytest.raises(InputError, match="no file of listener-reward score"):
        list(read_verdicts(out))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_killed_command_goes_on_where_it_was(how: signal.Signals, tmp_path: Path):
    """The command itself, with the embedded judge, in parts of a few pairs."""
    out = tmp_path / "out.parquet"
    code = "from listener_reward.scoring import run; run.PART_PAIRS = 4; from listener_reward.cli import main; main()"
    options = ["score", "--judge", "tiny", "--no-think", "--data", "tiny:id", "--limit", "40", "--pairs-at-once", "4"]
    command = [sys.executable, "-c", code, *options, "--out", str(out), "--json"]
    running = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    parts, deadline = tmp_path / "out.parquet.parts", time.monotonic() + 60
    while not list(parts.glob("*-*.parquet")) and not out.exists():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    running.send_signal(how)
    assert running.wait(60) == (-9 if how == signal.SIGKILL else 143) or out.exists()
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(ended.stdout)
    assert told["pairs"] == 40 and told["resumed"] > 0 and told["failed"] == 0
    assert [row["index"] for row in read_verdicts(out, ["index"])] == list(range(40))


def test_rays_workers_write_the_file_that_one_process_writes(tmp_path: Path):
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    options = ["score", "--judge", "tiny", "--no-think", "--data", "tiny:id", "--limit", "30", "--pairs-at-once", "4"]
    code = "from listener_reward.cli import main; main()"
    for out, more in (("one", []), ("two", ["--ray", "2"])):
        command = [sys.executable, "-c", code, *options, "--out", str(tmp_path / f"{out}.parquet"), *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    one, two = ([row | {"seconds": 0} for row in read_verdicts(tmp_path / f"{out}.parquet")] for out in ("one", "two"))
    assert [row["index"] for row in two] == list(range(30))
    for a, b in zip(one, two, strict=True):
        assert a["p_first"] == pytest.approx(b["p_first"], abs=1e-5) and a["id"] == b["id"]


def test_options_of_ray_without_ray_are_refused(capsys: pytest.CaptureFixture[str]):
    from typer.testing import CliRunner

    from listener_reward.cli import app

    ended = CliRunner().invoke(app, ["score", "--data", "tiny:id", "--out", "a.parquet", "--gpus-per-worker", "1"])
    assert ended.exit_code == 2 and "give their number by --ray" in ended.stderr
