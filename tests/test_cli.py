"""The command line: what it prints where, what it passes on, and how it fails. The judge is a fake."""

from __future__ import annotations

import errno
import io
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import edits
import numpy as np
import pytest
from typer.testing import CliRunner

import listener_reward
from listener_reward.cli import app, main
from listener_reward.cli.options import JudgeOptions
from listener_reward.cli.printing import print_calibrated
from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.judge import Judge
from listener_reward.pairs import Prompt
from listener_reward.reward import JUDGE_OPTIONS, PAPER_CHECKPOINT, ListenerReward
from listener_reward.verdict import Thought, Verdict

COMPARE_KEYS = (
    "p_first preferred thoughts listener_p_first contradicted position_gap malformed by_order label_mass"
).split()
EVAL_KEYS = "accuracy accuracy_interval contradiction_rate malformed_rate swap_consistency ece n".split()

Loads = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Loads]:
    """`loads(judge)` makes `Judge.from_pretrained` give `judge`, and returns the list of the calls it will get."""

    def install(judge: Any) -> Loads:
        calls: Loads = []
        monkeypatch.setattr(Judge, "from_pretrained", lambda name, **options: calls.append((name, options)) or judge)
        return calls

    return install


@pytest.fixture
def pictures(tmp_path: Path, shade: Any) -> tuple[str, str, str]:
    """Files of three pictures, the reddest in the middle."""
    paths = []
    for name, red in (("some", 100), ("most", 250), ("none", 0)):
        paths.append(str(tmp_path / f"{name}.png"))
        shade(red).save(paths[-1])
    return paths[0], paths[1], paths[2]


def instead(judge: Any, act: Callable[[], Any]) -> Any:
    """`judge`, calling `act` before it judges; what `act` returns, if anything, is the answer."""
    compare, rank = judge.compare, judge.rank
    judge.compare = lambda *arguments: act() or compare(*arguments)
    judge.rank = lambda *arguments, **options: act() or rank(*arguments, **options)
    return judge


def failing(judge: Any, error: Exception) -> Any:
    def fail() -> None:
        raise error

    return instead(judge, fail)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


# --- answers


def test_compare_json_is_one_object_and_nothing_else(loads: Any, FakeJudge: Any, pictures: Any):
    calls = loads(instead(FakeJudge(listener_slope=-4.0), lambda: print("a third party's progress")))
    result = run("compare", "--judge", "tiny", "--prompt", "red", pictures[1], pictures[0], "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)  # fails on anything beside the object
    assert list(answer) == COMPARE_KEYS
    assert answer["p_first"] > 0.9 > 0.1 > answer["listener_p_first"]
    assert (answer["preferred"], answer["contradicted"]) == (1, True)
    assert answer["thoughts"][0]["text"] == "The first is redder."
    assert "a third party's progress" in result.stderr
    assert calls == [("tiny", {"think": True})]


def test_compare_passes_its_options_on(loads: Any, FakeJudge: Any, pictures: Any):
    calls = loads(FakeJudge())
    run("compare", "-p", "red", *pictures[:2], "--no-think", "--thoughts", "3", "--listener", "other")
    assert calls == [(PAPER_CHECKPOINT, {"think": False, "thoughts": 3, "listener": "other"})]


@pytest.mark.parametrize("command", ["compare", "rank"])
def test_videos_are_looked_at_as_asked(loads: Any, FakeJudge: Any, pictures: Any, command: str):
    calls = loads(FakeJudge())
    assert run(command, "--judge", "tiny", "-p", "red", *pictures[:2], "--clips", "frames").exit_code == 0
    assert calls == [("tiny", {"think": True, "clips": "frames"})]


JUDGING = {
    "compare": ["--prompt", "red", "a.png", "b.png"],
    "rank": ["--prompt", "red", "a.png", "b.png"],
    "rank-videos": ["--prompt", "red", "a.gif", "b.gif"],
    "eval": ["--data", "tiny:id", "--limit", "2"],
    "score": ["--data", "tiny:id", "--limit", "2", "--out", "scores.parquet"],
    "anchors": ["--images", "images.json", "--out", "anchors"],
    "calibrate": ["--data", "tiny:id", "--limit", "2", "--out", "calibrated"],
    "serve": [],
}
"""Every command that loads a judge, with what it cannot do without."""

MODEL_OPTIONS_GIVEN = {
    "backend": "vllm",
    "engine": {"tensor_parallel_size": 2},
    "device_map": "auto",
    "dtype": "bfloat16",
    "quantization": "4bit",
    "attn_implementation": "sdpa",
    "revision": "v2",
    "max_pixels": 200704,
    "batch_size": 4,
    "token_budget": 9000,
    "vision_bytes": 1000,
    "memory": "8GB",
    "card": Path("card.json"),
    "thoughts": 2,
    "aggregate": "both",
    "orders": "one",
    "early_stop": 0.9,
    "max_new_tokens": 99,
    "sampling_temperature": 0.7,
    "masking": "verdict",
    "listener": "other",
}


@pytest.mark.parametrize("command", JUDGING)
def test_every_command_takes_the_same_options_of_a_judge(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def load(name: str, **options: Any) -> Any:
        calls.append((name, options))
        raise InputError("far enough")

    calls: Loads = []
    monkeypatch.setattr(Judge, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.json").write_text('{"red": ["images.json"]}', encoding="utf-8")  # a file that is there
    given = MODEL_OPTIONS_GIVEN | ({} if command == "rank-videos" else {"clips": "frames"})
    written = given | {"engine": json.dumps(given["engine"])}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in written.items()]
    options += ["--strict", "--lenient", "--accept-less", "--no-shared-prefix", "--no-think"]
    options += ["--listener-option", "quantization=8bit", "--listener-option", "batch-size=64"]
    result = run(command, "--judge", "tiny", *JUDGING[command], *options)
    assert (result.exit_code, result.stderr) == (2, "Error: far enough\n")
    flags = {"strict": True, "lenient": True, "accept_less": True, "shared_prefix": False, "think": False}
    listener = {"listener_options": {"quantization": "8bit", "batch_size": 64}}
    assert calls == [("tiny", given | flags | listener)]


def test_every_option_of_a_judge_can_be_given_on_the_command_line():
    given = {*JudgeOptions.__annotations__, "think", "shared_prefix", "listener_options"}
    assert set(JUDGE_OPTIONS) - {"seed"} == given - {"no_think", "no_shared_prefix", "listener_option"}
    assert {*MODEL_OPTIONS_GIVEN, "clips", "device", "strict", "lenient", "accept_less"} == {
        name for name in JudgeOptions.__annotations__ if name not in ("no_think", "no_shared_prefix", "listener_option")
    }


def test_help_has_the_options_of_a_judge_in_panels_of_their_own():
    text = run("compare", "-h").stdout
    judge, model = text.index(" The judge "), text.index(" Model, memory and speed ")
    assert text.index("--prompt") < judge < text.index("--card") < model < text.index("--quantization")
    assert "`" not in text[judge:]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--listener-option", "4bit"], "give NAME=VALUE"),
        (["--listener-option", "batch_size=many"], "batch_size is a whole number"),
        (["--listener-option", "shared_prefix=maybe"], "shared_prefix is true or false"),
        (["--listener-option", "bits=4"], "listener_options: bits: no option of a model"),
        (["--device-map", "{0: 1}"], "which is no JSON"),
        (["--engine", "tensor_parallel_size=2"], "engine is 'tensor_parallel_size=2', which is no JSON"),
        (["--backend", "vllm!"], "choose 'transformers', 'vllm', or an address"),
        (["--device-map", "auto", "--device", "cpu"], "leave one of them out"),
        (["--quantization", "5bit"], "choose '4bit' or '8bit'"),
        (["--card", "no-such-card.json"], "no-such-card.json"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(pictures: Any, option: list[str], said: str):
    result = run("compare", "--judge", "tiny", "-p", "red", *pictures[:2], *option)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_nan_is_printed_as_null(loads: Any, FakeJudge: Any, pictures: Any):
    loads(FakeJudge(breaks_on=lambda *_: True, answers_nan=True))
    result = run("compare", "--prompt", "red", *pictures[:2], "--json")
    answer = json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert answer["p_first"] is None
    assert answer["thoughts"][0]["p_first"] is None


def test_compare_for_people_names_the_file_and_marks_what_is_wrong(loads: Any, FakeJudge: Any, pictures: Any):
    loads(FakeJudge(listener_slope=-4.0, malformed=True))
    output = run("compare", "--prompt", "red", *pictures[:2]).stdout
    assert "most.png is preferred, p = 0.9" in output
    assert "contradicts" in output
    assert "malformed 1 of 2" in output


def test_a_thought_drives_neither_the_table_nor_the_terminal(loads: Any, FakeJudge: Any, pictures: Any):
    thought = Thought("[red]not markup[/red] \x1b[31m", "as given", None, 0.5, None, None)
    loads(instead(FakeJudge(), lambda: Verdict(0.5, None, (thought,), None, None, 0.0, 1)))
    output = run("compare", "--prompt", "red", *pictures[:2]).stdout
    assert "An exact tie." in output
    assert "[red]not markup[/red]" in output
    assert "\x1b" not in output


def test_a_tie_within_the_band_is_not_called_exact(loads: Any, FakeJudge: Any, pictures: Any):
    loads(instead(FakeJudge(), lambda: Verdict(0.58, None, (), None, None, 0.0, 0)))
    output = run("compare", "--prompt", "red", *pictures[:2]).stdout
    assert "No preference: p = 0.580 for the first image, within the tie band." in output
    assert "exact" not in output


def test_rank_json_has_the_files_best_first(loads: Any, FakeJudge: Any, pictures: Any):
    loads(FakeJudge())
    answer = json.loads(run("rank", "--judge", "tiny", "--prompt", "red", *pictures, "--json").stdout)
    assert list(answer) == ["order", "scores", "standard_errors", "comparisons", "files"]
    assert (answer["order"], answer["comparisons"]) == ([1, 0, 2], 3)
    assert answer["files"] == [pictures[1], pictures[0], pictures[2]]
    assert answer["scores"][1] > answer["scores"][0] > answer["scores"][2]


def test_rank_within_a_budget(loads: Any, FakeJudge: Any, pictures: Any):
    loads(FakeJudge())
    answer = json.loads(run("rank", "--judge", "tiny", "--prompt", "red", *pictures, "--budget", "2", "--json").stdout)
    assert (answer["comparisons"], sorted(answer["order"])) == (2, [0, 1, 2])
    assert run("rank", "--judge", "tiny", "--prompt", "red", *pictures, "--budget", "0").exit_code == 2


@pytest.mark.parametrize("command", ["compare", "rank", "rank-videos"])
def test_an_edit_is_judged_with_its_source(loads: Any, tmp_path: Path, command: str):
    judge = edits.EditJudge()
    loads(judge if command == "rank-videos" else ListenerReward(judge))
    images = {"dark": edits.DARK, "bright": edits.BRIGHT, "good": edits.GOOD, "too-much": edits.BRIGHT_GOOD}
    names = {}
    for name, image in images.items():
        names[name] = str(tmp_path / f"{name}.png")
        image.save(names[name])
        if command == "rank-videos" and image not in (edits.DARK, edits.BRIGHT):
            names[name] = str(tmp_path / f"{name}.gif")
            image.save(names[name], save_all=True, append_images=[image] * 3, duration=100)
    for source, best in (("dark", "good"), ("bright", "too-much")):
        sides = [names["good"], names["too-much"]]
        asked = [command, "--prompt", edits.INSTRUCTION, "--source", names[source], *sides, "--json"]
        result = run(*asked)
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        found = sides[answer["preferred"] - 1] if command == "compare" else answer["files"][0]
        assert found == names[best]
    two = run(*asked, "--source", names["dark"])
    assert two.exit_code == 2 and "got 2 sources" in " ".join(two.stderr.split())
    absent = run(command, "--prompt", "x", "--source", "nowhere.png", *sides)
    assert absent.exit_code == 2 and "sources[0] is 'nowhere.png', where there is no file" in absent.stderr


@pytest.mark.parametrize("command", ["compare", "rank"])
def test_a_criterion_is_asked_of_the_judge(loads: Any, FakeJudge: Any, pictures: Any, command: str):
    asked: list[Any] = []

    def note(prompt: Any, *_: Any, **__: Any) -> Any:
        asked.append(prompt)
        raise JudgeError("enough")

    loads(SimpleNamespace(compare=note, rank=note))
    for options in (["--criterion", "quality"], []):
        assert run(command, "--prompt", "red", *pictures[:2], *options).exit_code == 3
    assert asked == [Prompt("red", (), "quality"), "red"]


def test_ways_of_judging_reach_the_judge(loads: Any, FakeJudge: Any, pictures: Any):
    calls = loads(FakeJudge())
    options = ["--thoughts", "4", "--aggregate", "majority", "--orders", "one", "--early-stop", "0.9"]
    run("compare", "--judge", "tiny", "--prompt", "red", *pictures[:2], *options)
    wanted = {"think": True, "thoughts": 4, "aggregate": "majority", "orders": "one", "early_stop": 0.9}
    assert calls == [("tiny", wanted)]


def test_rank_for_people_is_in_order(loads: Any, FakeJudge: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "400")
    loads(FakeJudge())
    output = run("rank", "--prompt", "red", *pictures).stdout
    assert output.index("most.png") < output.index("some.png") < output.index("none.png")


def test_eval_json(loads: Any, FakeJudge: Any):
    loads(FakeJudge(listener_slope=4.0))
    result = run("eval", "--judge", "tiny", "--data", "tiny:id", "--limit", "4", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer.keys() >= set(EVAL_KEYS)
    assert (answer["n"], answer["swap_consistency"], answer["contradiction_rate"]) == (4, 1.0, 0.0)


def test_eval_for_people(loads: Any, FakeJudge: Any):
    loads(FakeJudge())
    assert "contradiction rate" in run("eval", "--judge", "tiny", "--data", "tiny:id", "--limit", "4").stdout


def test_eval_passes_its_ways_of_judging_on(loads: Any, FakeJudge: Any):
    calls = loads(FakeJudge())
    options = ["--thoughts", "4", "--aggregate", "majority", "--orders", "one", "--early-stop", "0.9"]
    result = run("eval", "--judge", "tiny", "--data", "tiny:id", "--limit", "2", *options)
    assert result.exit_code == 0, result.output
    wanted = {"think": True, "thoughts": 4, "aggregate": "majority", "orders": "one", "early_stop": 0.9}
    assert calls == [("tiny", wanted)]


def test_eval_writes_a_page(loads: Any, FakeJudge: Any, tmp_path: Path):
    loads(FakeJudge(slope=1.0, noise=3.0, listener_slope=4.0))
    page = tmp_path / "new" / "page.html"
    options = ["--limit", "30", "--html", str(page), "--mistakes", "2"]
    result = run("eval", "--judge", "tiny", "--data", "tiny:id", *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n"] == 30
    assert f"report: {page}" in result.stderr
    html = page.read_text(encoding="utf-8")
    assert "<title>fake on tiny:id</title>" in html and "The first is redder." in html
    assert (html.count("\N{BALLOT X} wrong"), html.count("\N{CHECK MARK} right")) == (2, 6)
    assert html.count('src="data:image/png;base64,') == 2 * 8


def test_a_page_of_judges_and_score_files(loads: Any, FakeJudge: Any, tmp_path: Path):
    from listener_reward.datasets import load_pairs

    loads(FakeJudge(breaks_on=lambda *_: True))
    theirs, mine = tmp_path / "theirs.jsonl", tmp_path / "mine.jsonl"
    rows: Any = load_pairs("tiny:id", limit=20)
    theirs.write_text("".join(json.dumps({"id": row["id"], "margin": row["p_first"] - 0.6}) + "\n" for row in rows))
    mine.write_text("".join(json.dumps({"id": row["id"], "p_first": 0.9}) + "\n" for row in rows))
    page = tmp_path / "page.html"
    data = ["--data", "tiny:id", "--limit", "20", "--scores", str(mine), "--against", str(theirs)]
    result = run("eval", *data, "--judge", "tiny", "--html", str(page), "--json")
    assert result.exit_code == 3  # the judge broke, which costs the others nothing
    assert [row["judge"] for row in json.loads(result.stdout)["judges"]] == ["theirs.jsonl", "mine.jsonl"]
    html = page.read_text(encoding="utf-8")
    assert "Not measured: the fake judge broke on" in html and "difference to <bdi>theirs.jsonl</bdi>" in html
    assert "score of picture 1 minus picture 2" in html and html.count('src="data:image/png;base64,') > 20


@pytest.mark.parametrize("place", [".", "file/page.html"])
def test_a_page_that_cannot_be_written_is_refused_before_the_judging(
    loads: Any, FakeJudge: Any, tmp_path: Path, place: str
):
    calls = loads(FakeJudge())
    (tmp_path / "file").write_text("")
    result = run("eval", "--judge", "tiny", "--data", "tiny:id", "--html", str(tmp_path / place))
    assert (result.exit_code, calls) == (2, []) and "html is" in result.stderr


def test_our_warnings_are_shown_and_others_are_not(loads: Any, FakeJudge: Any, pictures: Any):
    def warn() -> None:
        warnings.warn_explicit("a word it does not know", UserWarning, "judge.py", 1, "listener_reward.judge")
        warnings.warn_explicit("of no interest", UserWarning, "other.py", 1, "transformers.other")

    loads(instead(FakeJudge(), warn))
    result = run("compare", "--prompt", "red", *pictures[:2], "--json")
    assert result.stderr == "Warning: a word it does not know\n"


# --- failures


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("first is 'a.png', which is not there; give an image file"), 2),
        (MissingExtraError('trl is missing: pip install "listener-reward[train]"'), 2),
        (JudgeError("the listener gave NaN"), 3),
    ],
)
@pytest.mark.parametrize("command", ["compare", "rank"])
def test_an_error_is_one_line_on_stderr(
    loads: Any, FakeJudge: Any, pictures: Any, command: str, error: Exception, code: int
):
    loads(failing(FakeJudge(), error))
    result = run(command, "--prompt", "red", *pictures[:2], "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"Error: {error}\n")


def test_debug_shows_the_traceback(loads: Any, FakeJudge: Any, pictures: Any):
    loads(failing(FakeJudge(), JudgeError("the listener gave NaN")))
    assert isinstance(run("compare", "--prompt", "red", *pictures[:2], "--debug").exception, JudgeError)


def test_a_fault_of_ours_is_not_dressed_up_as_the_users(loads: Any, FakeJudge: Any, pictures: Any):
    loads(failing(FakeJudge(), ZeroDivisionError()))
    assert isinstance(run("compare", "--prompt", "red", *pictures[:2]).exception, ZeroDivisionError)


def test_a_missing_picture_is_named(loads: Any, FakeJudge: Any, pictures: Any):
    loads(FakeJudge())
    result = run("compare", "--prompt", "red", pictures[0], "no-such-file.png")
    assert result.exit_code == 2
    assert "no-such-file.png" in result.stderr


def test_missing_data_is_named(loads: Any, FakeJudge: Any):
    loads(FakeJudge())
    result = run("eval", "--judge", "tiny", "--data", "no-such-file.jsonl", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no-such-file.jsonl" in result.stderr


def test_a_checkpoint_out_of_reach_leads_to_tiny(pictures: Any, monkeypatch: pytest.MonkeyPatch):
    """The default judge, with the Hub switched off and nothing in the cache; no fake here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("compare", "--prompt", "red", *pictures[:2], "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert PAPER_CHECKPOINT in result.stderr
    assert "tiny" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--prompt", "red", "a.png"],
        ["compare", "a.png", "b.png"],
        ["rank", "--prompt", "red"],
        ["eval"],
        ["compare", "--prompt", "red", "a.png", "b.png", "--thoughts", "0"],
        ["eval", "--data", "tiny:id", "--limit", "0"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]):
    assert run(*arguments).exit_code == 2


# --- demo, train, help


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls: list[tuple[Any, ...]] = []
    fake_module(monkeypatch, "listener_reward.recipes.demo", run_demo=lambda *arguments: calls.append(arguments))
    assert run("demo").exit_code == 0
    assert run("demo", "--out", str(tmp_path), "--steps", "5", "--seed", "7", "--quick").exit_code == 0
    assert calls == [(Path("listener-reward-demo"), None, 0, False), (tmp_path, 5, 7, True)]


def test_train_passes_every_argument_on_as_it_is(monkeypatch: pytest.MonkeyPatch):
    calls: list[list[str]] = []
    fake_module(monkeypatch, "listener_reward.train.run", main=calls.append)
    arguments = ["--config", "train.yaml", "--seed", "-1", "--weights", "1", "0.5", "--beta=0", "--debug", "x", "-h"]
    assert run("train", *arguments).exit_code == 0
    assert run("train", "--debug", *arguments).exit_code == 0
    assert calls == [arguments, arguments]


def test_train_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def main(argv: list[str]) -> None:
        raise MissingExtraError('trl is missing: pip install "listener-reward[train]"')

    fake_module(monkeypatch, "listener_reward.train.run", main=main)
    result = run("train", "--config", "train.yaml")
    assert result.exit_code == 2
    assert 'pip install "listener-reward[train]"' in result.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], ["compare"], ["rank"], ["eval"], ["card"], ["demo"], ["study"], ["train"]])
def test_every_command_explains_itself(command: list[str], flag: str):
    result = run(*command, flag)
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_train_help_teaches():
    text = run("train", "-h").stdout
    for word in ("train.yaml", "listener:", "--resume_from_checkpoint", "listener-reward[train]"):
        assert word in text


def test_version():
    assert run("--version").stdout == f"listener-reward {listener_reward.__version__}\n"


# --- terminals that know few characters


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """`told(encoding, *arguments)`: the console script's exit code and stdout on a terminal of this encoding."""

    def tell(encoding: str, *arguments: str) -> tuple[int, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "argv", ["listener-reward", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        streams[0].flush()
        return int(left.value.code or 0), streams[0].buffer.getvalue().decode(encoding)

    return tell


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_few_characters_ends_no_command(
    encoding: str, told: Any, loads: Any, FakeJudge: Any, shade: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "400")
    names = [str(tmp_path / name) for name in ("\u96ea.png", "\N{SNOWMAN}\N{FULL BLOCK}.png")]
    for name, red in zip(names, (250, 0), strict=True):
        shade(red).save(name)
    loads(FakeJudge())
    code, output = told(encoding, "rank", "--judge", "tiny", "--prompt", "red", *names)
    assert code == 0 and (Path(names[0]).name if encoding == "utf-8" else "?.png") in output
    code, output = told(encoding, "compare", "--judge", "tiny", "--prompt", "red", *names)
    assert code == 0 and "is preferred" in output


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "command", ["compare", "rank", "eval", "calibrate", "card", "demo", "study", "serve", "train", "launch-config"]
)
def test_help_is_shown_on_any_terminal(encoding: str, command: str, told: Any):
    code, output = told(encoding, command, "-h")
    assert code == 0 and "Usage" in output


def test_a_calibration_is_shown_on_any_terminal(told: Any, monkeypatch: pytest.MonkeyPatch):
    """Its bars are blocks. That was found out after the calibration had been written."""
    labels, p = np.array([1.0, 0.0] * 20), np.linspace(0.1, 0.9, 40)
    losses = {"before": {"log_loss": 0.7}, "after": {"log_loss": 0.6}, "listener_before": None, "listener_after": None}
    band, sizes = SimpleNamespace(tie_band=0.0), dict.fromkeys(("n_fit", "n_validation", "n_test"), 1)
    shown = SimpleNamespace(labels=labels, p_after=p, calibration=band, **losses, **sizes)

    def run_app(**_: Any) -> None:
        print_calibrated(shown, Path("\u96ea"))  # pyright: ignore[reportArgumentType]
        raise SystemExit(0)

    monkeypatch.setattr("listener_reward.cli.app", run_app)
    code, output = told("ascii")
    assert code == 0 and "people who agree" in output and "????" in output


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "--prompt", "red", "a.png", "b.png"],
        ["eval", "--data", "tiny:id", "--limit", "2"],
        ["serve", "--port", "0"],
    ],
)
def test_quantisation_without_its_package_is_one_line(command: list[str], monkeypatch: pytest.MonkeyPatch):
    """As where it is not installed: it is neither found nor imported."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = run(*command, "--judge", "tiny", "--quantization", "4bit")
    said = "Error: quantization='4bit' needs bitsandbytes: pip install \"listener-reward[large]\"\n"
    assert (result.exit_code, result.stderr) == (2, said)
    result = run(*command, "--judge", "tiny", "--listener-option", "quantization=8bit")
    assert result.exit_code == 2 and result.stderr.endswith(said.replace("4", "8"))


def test_a_full_disk_is_one_line(loads: Any, FakeJudge: Any, pictures: Any):
    error = OSError(errno.ENOSPC, "No space left on device", "a.html")
    loads(failing(FakeJudge(), error))
    result = run("compare", "--judge", "tiny", "--prompt", "red", *pictures[:2])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "a.html cannot be written (No space left on device); make room" in result.stderr


def test_a_strict_comparison_fails_where_its_answers_are_in_another_format(pictures: Any, tmp_path: Path):
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"format": {"labels": ["A", "B"]}}), encoding="utf-8")
    asked = ["--judge", "tiny", "--card", str(card), "-p", "two red circles", *pictures[:2]]
    for command in ("compare", "rank"):
        strict, told = run(command, *asked, "--strict"), run(command, *asked)
        assert (strict.exit_code, told.exit_code) == (3, 0)
        assert "Error: 2 of the judge's first 2 thoughts are malformed" in " ".join(strict.stderr.split())
        assert "Warning: 2 of the judge's first 2 thoughts are malformed" in " ".join(told.stderr.split())
    few = ["--judge", "tiny", "--card", str(card), "--data", "tiny:id", "--limit", "2", "--fresh"]
    strict = run("eval", *few, "--strict")
    assert strict.exit_code == 3 and "thoughts are malformed" in " ".join(strict.stderr.split())


@pytest.mark.parametrize(
    ("argv", "who"),
    [
        (["score", "--judge", "pickscore", "--out", "out.parquet"], "pickscore takes no options"),
        (["eval", "--judge", "pickscore", "--judge", "openai:m@http://x"], "pickscore, openai:m@http://x takes no"),
        (["eval", "--scores", "scores.csv"], "no judge is asked"),
    ],
)
def test_options_of_a_judge_are_refused_where_nobody_takes_them(
    argv: list[str], who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("scores.csv").write_text("id,p_first\na,0.5\n", encoding="utf-8")
    result = run(*argv, "--data", "tiny:id", "--strict", "--card", "card.json")
    assert result.exit_code == 2
    assert f"--card, --strict: options of a judge of this package, and {who}" in " ".join(result.stderr.split())
