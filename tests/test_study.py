"""The experiment runner: configurations as data, plans, runs that are made once, tables worked by hand."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from listener_reward import errors
from listener_reward.chat import ChatFormat
from listener_reward.cli import app
from listener_reward.errors import InputError, MissingExtraError
from listener_reward.evaluate.intervals import t_interval
from listener_reward.models.bradley_terry import BradleyTerryModel
from listener_reward.recipes import generators
from listener_reward.recipes.generators import framed
from listener_reward.recipes.study import carry_out, conduct
from listener_reward.recipes.study.configuration import (
    DDPO,
    Arm,
    BestOfN,
    Measurement,
    Splits,
    key,
    measurement,
    read,
    to_dict,
)
from listener_reward.recipes.study.drawing import axis_of, draw_study, figure_of, panels_of
from listener_reward.recipes.study.plans import Question, Run, Study, compared_with, read_study, runs_of, study_of
from listener_reward.recipes.study.results import tables
from listener_reward.recipes.study.runs import finished, keep, record_of
from listener_reward.recipes.study.show import write_results
from listener_reward.recipes.study.thoughts import ChangedThoughts, changed
from listener_reward.recipes.variants import Recipe, train_bradley_terry_variant, train_variant, training_pairs
from listener_reward.recipes.workers import Job, JobsFailedError, gpus
from listener_reward.tiny.drawing import draw
from listener_reward.tiny.thoughts import describe
from listener_reward.tiny.world import COLORS, COUNTS, QUALITIES, SHAPES, TRAIN_CUE, Scene
from listener_reward.train.config import ListenerGRPOConfig
from listener_reward.train.lora import LORA_FIELDS, LORA_TARGETS

PLAN = """
title: Which way to train?
planned_at: 2026-11-28
recipe: {steps: 7}
arms:
  base: {method: none}
  plain: {weights: [1, 1, 0], recipe: {grounding: 0}}
  shaped: {}
measurements:
  splits: {kind: splits, splits: [id, ood], pairs: 20}
planned:
  - question: Which is best?
    arms: [base, plain, shaped]
    measurements: [splits]
    seeds: [3, 4]
    against: plain
added:
  - question: With how many pairs?
    arms: [shaped]
    measurements: [splits]
    seeds: [3]
    vary: pairs
    over: [10, 20]
    added_at: 2026-11-29
    reason: because a reader asked
"""


@pytest.fixture
def study() -> Study:
    return study_of(yaml.safe_load(PLAN))


# --- configurations


@pytest.mark.parametrize("measured", [Splits(("id",), judge={"thoughts": 8}), BestOfN(n=16), DDPO(epochs=4)])
def test_a_configuration_goes_to_json_and_comes_back_equal(measured: Measurement):
    arm = Arm(weights=(1.0, 0.0, 1.0), recipe=Recipe(steps=3, masking="verdict"), options={"beta": 0.1})
    assert read(Arm, json.loads(json.dumps(to_dict(arm))), "arm") == arm
    assert measurement(json.loads(json.dumps(to_dict(measured))), "measurement") == measured


def test_what_decides_the_result_decides_the_key():
    arm, measured = Arm(), Splits()
    keys = {
        key(arm, 0, measured),
        key(arm, 1, measured),
        key(arm, 0),
        key(replace(arm, recipe=Recipe(steps=161)), 0, measured),
        key(replace(arm, options={"beta": 0.1}), 0, measured),
        key(arm, 0, replace(measured, pairs=301)),
    }
    assert len(keys) == 6
    whole: Any = [1, 0.5, 0.5]
    assert key(read(Arm, {"weights": whole}, "arm"), 0) == key(arm, 0), "YAML's 1 is 1.0"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"wieghts": [1, 1, 0]}, "arm has no field 'wieghts'; is 'weights' meant?"),
        ({"recipe": {"steps": "many"}}, "arm.recipe.steps is 'many'; it takes a value such as 160"),
        ({"recipe": {"learning_rate": "1e-4"}}, "write 1.0e-4"),
        ({"recipe": {"share_prompt": 1}}, "arm.recipe.share_prompt is 1"),
        ({"method": "dpo"}, "method is 'dpo'; choose one of 'grpo'"),
        ({"weights": 1}, "arm.weights is 1; give a list"),
        ({"options": []}, "give a mapping"),
    ],
)
def test_a_wrong_configuration_is_named(given: Any, said: str):
    with pytest.raises(InputError, match=said):
        read(Arm, given, "arm")


# --- plans


def test_a_plan_lists_its_runs_seed_by_seed(study: Study):
    assert [(run.label, run.seed) for run in study.runs()] == [
        ("base", 0),  # nothing of it is drawn, so that one run stands for all seeds
        ("plain", 3),
        ("shaped", 3),
        ("plain", 4),
        ("shaped", 4),
        ("shaped, pairs 10", 3),
        ("shaped, pairs 20", 3),
    ]
    plain = next(run for run in study.runs() if run.label == "plain")
    assert plain.arm == Arm(weights=(1.0, 1.0, 0.0), recipe=Recipe(steps=7, grounding=0.0))
    assert plain.measured == Splits(("id", "ood"), 20)
    assert [run.arm.recipe.pairs for run in study.runs()][-2:] == [10, 20]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds: [3, 4]", "seeds: 5", "name the seeds"),
        ("seeds: [3, 4]", "seeds: [3, 3]", "a seed stands there twice"),
        ("[base, plain, shaped]", "[base, plian]", "names 'plian', which there is not; is 'plain' meant?"),
        ("against: plain", "against: nobody", "there are base, plain, shaped"),
        ("vary: pairs", "vary: pears", "has no field 'pears'; is 'pairs' meant?"),
        ("    over: [10, 20]\n", "", "a field that varies needs its values"),
        ("    reason: because a reader asked\n", "", r"added\[0\] has no reason"),
        ("planned_at: 2026-11-28", "planned_at: soon", "planned_at is 'soon'; give a day"),
        ("planned_at: 2026-11-28\n", "", "the study has no planned_at"),
        ("kind: splits", "kind: taste", "measurements.splits.kind is 'taste'"),
        ("title:", "titel:", "is 'title' meant?"),
        ("{steps: 7}", "{stpes: 7}", "recipe has no field 'stpes'"),
    ],
)
def test_a_wrong_plan_is_named(old: str, new: str, said: str):
    with pytest.raises(InputError, match=said):
        study_of(yaml.safe_load(PLAN.replace(old, new)))


def test_a_file_that_is_no_plan_is_an_input_error(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("a: [", encoding="utf-8")
    for path, said in ((tmp_path / "none.yaml", "cannot be read"), (tmp_path / "a.yaml", "cannot be read")):
        with pytest.raises(InputError, match=said):
            read_study(path)


# --- runs


def kept(folder: Path, run: Run, **scores: dict[str, float]) -> Path:
    """`run` finished with these scores on each split."""
    return keep(folder, run, record_of(run, scores, 1.0, None))


def test_a_run_is_found_by_what_it_says_and_not_by_its_name(study: Study, tmp_path: Path):
    run = next(study.runs())
    path = kept(tmp_path, run, id={"accuracy": 0.5})
    path.rename(path.with_name("renamed.json"))
    assert finished(tmp_path)[run.key]["results"] == {"id": {"accuracy": 0.5}}
    record = json.loads((tmp_path / "runs/renamed.json").read_text())
    del record["arm"]["recipe"]["masking"]  # as if it had come to the code after this run
    (tmp_path / "runs/renamed.json").write_text(json.dumps(record))
    assert [*finished(tmp_path)] == [run.key]
    record["arm"]["recipe"]["steps"] += 1
    (tmp_path / "runs/renamed.json").write_text(json.dumps(record))
    assert run.key not in finished(tmp_path)
    (tmp_path / "runs/other.json").write_text('{"seed": 1}')
    with pytest.raises(InputError, match=r"other.json' is no run"):
        finished(tmp_path)


def test_a_run_says_what_it_was_made_with(study: Study, tmp_path: Path):
    record = json.loads(kept(tmp_path, next(study.runs()), id={"accuracy": 0.5}).read_text())
    assert {"listener-reward", "torch", "transformers", "trl"} <= record["versions"].keys()
    assert record["checkpoints"].keys() == {"tiny-base", "tiny-listener"}
    assert all(len(digest) == 10 for digest in record["checkpoints"].values())
    assert record["arm"]["recipe"]["steps"] == 7 and record["measurement"]["kind"] == "splits"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained and measured, in order, with nothing of it done and all in this process. Jobs pickle."""
    done: list[str] = []

    def side_by_side(jobs: Mapping[str, Job], **_: Any) -> dict[str, Any]:
        done.append(f"{len(jobs)} jobs")
        return {
            name: function(lambda *_: None, **given)
            for name, (function, given) in pickle.loads(pickle.dumps(jobs)).items()
        }

    def train(report: Any, arm: Arm, seed: int, out: str, folder: str) -> dict[str, list[Any]]:
        done.append(f"train {arm.recipe.pairs} {seed}")
        Path(out).mkdir(parents=True)
        return {"step": [1], "reward": [0.1]}

    def measure(report: Any, run: Run, model: str, folder: str) -> dict[str, Any]:
        done.append(f"measure {Path(model).name.split('-')[0]} {run.seed}")
        return {"id": {"accuracy": 0.5}}

    monkeypatch.setattr(conduct, "run_side_by_side", side_by_side)
    monkeypatch.setattr(carry_out, "_train", train)
    monkeypatch.setattr(carry_out, "measure", measure)
    return done


def test_nothing_is_run_twice(study: Study, tmp_path: Path, trained: list[str]):
    found = conduct.conduct(study, tmp_path, only=["Which is best?"])
    assert found.keys() == {run.key for run in study.runs() if run.question.added_at is None}
    assert trained[:3] == ["5 jobs", "measure tiny 0", "train 1000 3"]
    assert next(record for record in found.values() if record["seed"] == 3)["training"]["curves"]["reward"] == [0.1]
    trained.clear()
    assert len(conduct.conduct(study, tmp_path)) == 7
    assert trained == ["2 jobs", "train 10 3", "measure shaped 3", "train 20 3", "measure shaped 3"]
    trained.clear()
    conduct.conduct(study, tmp_path)
    assert trained == ["0 jobs"]


def test_a_judge_that_is_there_is_measured_and_not_trained(study: Study, tmp_path: Path, trained: list[str]):
    conduct.conduct(study, tmp_path)
    for path in (tmp_path / "runs").glob("plain-3-*.json"):
        path.unlink()
    trained.clear()
    conduct.conduct(study, tmp_path)
    assert trained == ["1 jobs", "measure plain 3"]
    (judge,) = (tmp_path / "judges").glob("plain-3-*")
    for path in (*(tmp_path / "runs").glob("plain-3-*.json"), judge / "training.json"):
        path.unlink()
    trained.clear()
    judge.rmdir()
    conduct.conduct(study, tmp_path)
    assert trained == ["1 jobs", "train 1000 3", "measure plain 3"], "half a judge is none"


@pytest.mark.parametrize(
    ("arm", "measured", "said"),
    [
        (
            {"recipe": {"data": "hpdv2:nowhere/train.json"}},
            {},
            "tried: data is 'nowhere/train.json', where there is no",
        ),
        ({"recipe": {"data": "tiny:trane"}}, {}, "tried: split is 'trane'; the tiny world has"),
        ({}, {"splits": ["imagereward:nowhere/test.json"]}, "tried: data is 'nowhere/test.json'"),
        ({"recipe": {"base": "./nowhere"}}, {}, "tried: .*nowhere"),
        ({"recipe": {"listener": "./nowhere"}}, {}, "tried: .*nowhere"),
        ({}, {"listener": "./nowhere"}, "tried: .*nowhere"),
    ],
)
def test_what_is_not_there_is_missed_before_the_first_run(arm, measured, said, tmp_path: Path, trained: list[str]):
    asked = {"question": "q", "arms": ["base", "tried"], "measurements": ["all"], "seeds": [0]}
    given = {
        "title": "t",
        "planned_at": "2026-11-29",
        "arms": {"base": {"method": "none"}, "tried": arm},
        "measurements": {"all": {"kind": "splits", **measured}},
        "planned": [asked],
    }
    if measured:
        given["arms"].pop("base")
        asked["arms"] = ["tried"]
    with pytest.raises(InputError, match=said):
        conduct.conduct(study_of(given), tmp_path / "out")
    assert trained == [] and not (tmp_path / "out").exists()


NOBODY = ("base", "none", "http://host:8000/v1")


def test_names_that_are_no_checkpoint_are_not_looked_for(tmp_path: Path, trained: list[str]):
    given = {
        "title": "t",
        "planned_at": "2026-11-29",
        "arms": {name: {"recipe": {"listener": name}} for name in NOBODY},
        "measurements": {"all": {"kind": "splits", "listener": "none"}},
        "planned": [{"question": "q", "arms": [*NOBODY], "measurements": ["all"], "seeds": [0]}],
    }
    assert len(conduct.conduct(study_of(given), tmp_path)) == 3


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`without(package)`: it is not installed."""

    def hide(package: str) -> None:
        find = errors.find_spec
        monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else find(name))
        monkeypatch.delitem(sys.modules, "listener_reward.recipes.study.drawing", raising=False)

    return hide


def test_without_matplotlib_there_are_tables_and_a_word(some: Path, tmp_path: Path, without: Callable[[str], None]):
    without("matplotlib")
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    arguments = ["study", "--config", str(tmp_path / "plan.yaml"), "--out", str(some), "--table"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and (some / "tables.md").exists() and not list(some.glob("*.svg"))
    assert 'No figures: drawing needs matplotlib: pip install "listener-reward[plot]"' in result.stderr


def test_without_diffusers_no_generator_is_begun(tmp_path: Path, trained: list[str], without: Callable[[str], None]):
    without("diffusers")
    study = read_study(Path(__file__).parents[1] / "examples" / "study.yaml")
    with pytest.raises(MissingExtraError, match="best of n needs diffusers: pip install"):
        conduct.conduct(study, tmp_path, only=["truth"])
    assert trained == []


def test_a_study_in_which_runs_fail_has_its_tables_and_an_exit_code(
    some: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any, **__: Any) -> None:
        raise JobsFailedError("1 of 5 jobs failed, for the reasons above: shaped, seed 3")

    monkeypatch.setattr(conduct, "conduct", fails)
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    result = CliRunner().invoke(app, ["study", "--config", str(tmp_path / "plan.yaml"), "--out", str(some)])
    assert result.exit_code == 1 and (some / "tables.md").exists()
    assert "Error: 1 of 5 jobs failed" in result.stderr and "Traceback" not in result.stderr


def test_only_has_to_name_something(study: Study, tmp_path: Path):
    with pytest.raises(InputError, match="no arm or question 'shpaed'; its arms are base, plain, shaped"):
        conduct.due(study, tmp_path, ["shpaed"])


# --- tables


def test_the_t_interval_is_students():
    assert t_interval([5.0]) == (5.0, None)
    mean, half = t_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302652729911275 / 3**0.5)  # t(0.975, 2) * sd / sqrt(n), sd = 1


@pytest.fixture
def some(study: Study, tmp_path: Path) -> Path:
    """A folder with the base, both seeds of one arm, and one of the other."""
    scores = {("base", 0): 0.5, ("plain", 3): 0.6, ("plain", 4): 0.7, ("shaped", 3): 0.8}
    for run in study.runs():
        if (run.label, run.seed) in scores:
            kept(tmp_path, run, id={"accuracy": scores[run.label, run.seed]}, ood={"accuracy": 0.5})
    return tmp_path


def test_a_table_says_what_was_planned_and_is_missing(study: Study, some: Path):
    text = tables(study, finished(some))
    assert "Planned on 2026-11-28. 4 of 5 planned runs are there; 0 of 2 were added afterwards." in text
    assert "Added on 2026-11-29, because a reader asked. Seeds 3: 0 of 2 runs are there." in text
    assert "| arm | runs | id | ood | mean |" in text
    assert "| base | 1 of 1 | 50.0 | 50.0 | 50.0 |" in text
    # 65 ± t(0.975, 1) * 7.07 / sqrt(2) = 12.706 * 5
    assert "| plain | 2 of 2 | 65.0 ± 63.5 | 50.0 ± 0.0 | 57.5 ± 31.8 |" in text
    assert "| shaped | 1 of 2 | 80.0 | 50.0 | 65.0 |" in text


def test_differences_are_of_the_seeds_that_both_have(study: Study, some: Path):
    text = tables(study, finished(some))
    assert "minus plain, paired by seed (points)" in text
    assert "| shaped | 1 | +20.0 | +0.0 | +10.0 |" in text, "seed 4 is there for one of the two only"
    # The base has no seed: it stands beside each of the other's, -10 and -20; 12.706 * 7.07 / sqrt(2)
    assert "| base | 2 | -15.0 ± 63.5 | +0.0 ± 0.0 | -7.5 ± 31.8 |" in text


def test_the_arm_to_compare_with_can_be_another(study: Study, some: Path):
    text = tables(compared_with(study, "shaped"), finished(some))
    assert "minus shaped, paired by seed (points)" in text and "minus plain" not in text
    assert "| plain | 1 | -20.0 | +0.0 | -10.0 |" in text
    with pytest.raises(InputError, match="against names 'shapd', which there is not; is 'shaped' meant"):
        compared_with(study, "shapd")


def test_a_table_says_where_the_true_utility_is_highest_and_what_is_lost(study: Study, tmp_path: Path):
    question = replace(study.questions[0], measurements={"best": BestOfN()})
    grows = {"plain": [(1.0, 3.0, 2.0), (1.0, 5.0, 2.0)], "shaped": [(1.0, 2.0, 3.0), (1.0, 2.0, 3.0)]}
    asked = Study("t", "2026-11-28", (question,))
    for run in asked.runs():
        if values := grows.get(run.arm_name):
            found = dict(zip(("1", "2", "4"), values.pop(0), strict=True))
            keep(tmp_path, run, record_of(run, {"true utility": found}, 1.0, None))
    text = tables(asked, finished(tmp_path))
    assert "| plain | 2 of 2 | 2 | 4.00 ± 12.71 | 2.00 ± 0.00 | -2.00 ± 12.71 |" in text
    assert "| shaped | 2 of 2 | 4 | 3.00 ± 0.00 | 3.00 ± 0.00 | +0.00 ± 0.00 |" in text


def test_a_table_says_where_runs_are_not_alike(study: Study, some: Path):
    assert "several" not in tables(study, finished(some))
    (path,) = (some / "runs").glob("shaped-*.json")
    record = json.loads(path.read_text())
    record["versions"]["torch"], record["checkpoints"]["tiny-base"] = "1.0", "0123456789"
    path.write_text(json.dumps(record))
    text = tables(study, finished(some))
    assert "Made with several versions of torch: 1.0, 2" in text
    assert "Made with several weights of tiny-base: 0123456789, " in text


def test_a_run_that_nobody_planned_is_counted(study: Study, some: Path):
    run = next(study.runs())
    kept(some, run._replace(seed=77), id={"accuracy": 1.0})
    assert "1 in the folder belong to no question" in tables(study, finished(some))


def test_a_figure_has_a_line_for_each_arm(study: Study, some: Path):
    assert panels_of(study.questions[0], finished(some)) == {
        "accuracy (%)": {
            "base": {"id": [50.0], "ood": [50.0]},
            "plain": {"id": [60.0, 70.0], "ood": [50.0, 50.0]},
            "shaped": {"id": [80.0], "ood": [50.0]},
        }
    }
    for run in study.runs():
        kept(some, run, id={"accuracy": run.arm.recipe.pairs / 100})
    assert panels_of(study.questions[1], finished(some)) == {"accuracy (%), id": {"shaped": {10: [10.0], 20: [20.0]}}}
    paths = draw_study(study, finished(some), some)
    assert [path.name for path in paths] == ["Which-is-best.svg", "With-how-many-pairs.svg"]
    assert all("</svg>" in path.read_text() for path in paths)


def test_accuracy_by_several_thoughts_is_drawn_against_tokens(tmp_path: Path):
    given = yaml.safe_load(PLAN)
    given["measurements"] = {f"{n} thoughts": {"kind": "splits", "judge": {"thoughts": n}} for n in (1, 4)}
    given["planned"] = [
        {"question": "How many?", "arms": ["shaped"], "measurements": [*given["measurements"]], "seeds": [0, 1]}
    ]
    study = study_of({**given, "added": []})
    for run in study.runs():
        assert isinstance(run.measured, Splits)
        thoughts = run.measured.judge["thoughts"]
        kept(tmp_path, run, id={"accuracy": thoughts / 10, "tokens": 50.0 * thoughts + 2 * run.seed})
    (question,) = study.questions
    assert axis_of(question) == "tokens of thoughts for a pair"
    assert panels_of(question, finished(tmp_path)) == {
        "accuracy (%), id": {"shaped": {51: [10.0, 10.0], 201: [40.0, 40.0]}}
    }


def test_labels_of_an_axis_do_not_run_into_one_another():
    (axes,) = figure_of({"one": {"a": {50: [1.0], 400: [2.0]}, "b": {52: [1.0], 410: [3.0]}}}, "tokens").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["50", "400"]


def test_a_name_has_one_colour_in_all_panels():
    figure = figure_of({"one": {"a": {1: [1.0], 2: [2.0]}}, "two": {"b": {1: [1.0], 2: [3.0]}, "a": {1: [2.0]}}})
    (first,), (b, second) = (axes.lines for axes in figure.axes)
    assert first.get_color() == second.get_color() != b.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


# --- the command


def test_the_command_lists_runs_and_makes_tables(some: Path, tmp_path: Path, loads_nothing: Callable[[], None]):
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    arguments = ["study", "--config", str(tmp_path / "plan.yaml"), "--out", str(some)]
    listed = CliRunner().invoke(app, [*arguments, "--dry-run", "--only", "shaped"])
    assert listed.exit_code == 0, listed.output
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == "there there there there to to to".split()
    assert lines[-1] == "4 of 5 planned runs are there; 0 of 2 were added afterwards."
    made = CliRunner().invoke(app, [*arguments, "--table"])
    assert made.exit_code == 0, made.output
    assert (some / "tables.md").read_text() == tables(read_study(tmp_path / "plan.yaml"), finished(some))
    assert (some / "Which-is-best.svg").exists()
    made = CliRunner().invoke(app, [*arguments, "--table", "--against", "shaped"])
    assert made.exit_code == 0 and "minus shaped" in (some / "tables.md").read_text()


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a run is made."""
    monkeypatch.setattr(conduct, "run_side_by_side", lambda *_, **__: pytest.fail("a run was made"))


def test_results_can_be_written_without_runs(study: Study, tmp_path: Path):
    assert [path.name for path in write_results(study, {}, tmp_path / "new")] == ["tables.md"]


# --- workers


def test_jobs_share_out_gpus_where_there_are_several(monkeypatch: pytest.MonkeyPatch):
    for given, found in (("0,1,5", ["0", "1", "5"]), ("3", []), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert gpus() == found


# --- what is measured


def test_a_thought_can_be_short_or_missing():
    thought = "image 1 shows two clean red circles . image 2 shows one faded blue star"
    assert changed(thought, "whole", random.Random(0)) == thought
    assert changed(thought, "none", random.Random(0)) == ""
    assert changed(thought, "half", random.Random(0)) == "image 1 shows two clean red circles"


@pytest.mark.parametrize("change", ["one in four misnamed", "one in four false"])
def test_a_thought_can_be_partly_false(change):
    thought = describe(Scene("red", "circle", 2), Scene("red", "star", 2), Scene("blue", "circle", 1, "faded"))
    kinds = [COLORS, SHAPES, [f"{shape}s" for shape in SHAPES], COUNTS, QUALITIES]
    if change == "one in four false":
        kinds.append(("right", "wrong"))
    false = of_a_kind = 0
    for seed in range(200):
        for before, after in zip(thought.split(), changed(thought, change, random.Random(seed)).split(), strict=True):
            kind = next((kind for kind in kinds if before in kind), None)
            assert after == before if kind is None else after in kind
            of_a_kind += kind is not None
            false += after != before
    assert false / of_a_kind == pytest.approx(0.25, abs=0.04)
    assert of_a_kind == 200 * (14 if change == "one in four false" else 8)


def test_a_changed_thought_keeps_its_answer_and_a_malformed_one_its_text():
    class Speaker:
        reserved = frozenset({"x"})

        def generate(self, chats: Any, *, seeds: Any, **_: Any) -> list[str]:
            return ["<think>a b c d</think><answer>2</answer>", "a b c d"]

    vlm = ChangedThoughts(Speaker(), ChatFormat(), "half")
    assert vlm.generate([], seeds=[1, 2]) == ["<think>a b</think><answer>2</answer>", "a b c d"]
    assert vlm.reserved == {"x"}


def test_a_frame_is_seen_and_nothing_else_is_one():
    scenes = [Scene(color, shape, 1 + seed % 3, quality) for seed, (color, shape, quality) in enumerate(zip(
        COLORS, [*SHAPES, *SHAPES], QUALITIES * 2, strict=False))]  # fmt: skip
    for seed, scene in enumerate(scenes * 4):
        assert framed(draw(replace(scene, framed=True), random.Random(seed)))
        assert not framed(draw(scene, random.Random(seed)))
    for color in ("black", "white", "gray"):
        assert not framed(Image.new("RGB", (64, 64), color))


def test_what_a_picture_shows_of_its_prompt_is_counted():
    scenes = [Scene("red", "circle", 2), Scene("green", "circle", 2), Scene("red", "star", 1, "glitched")]
    drawn = [draw(scene, random.Random(7)) for scene in scenes]
    utility = float(generators.utilities(drawn, ["two red circles"] * 3)[0].mean())
    seen = {"true utility": utility, "color": 2 / 3, "shape": 2 / 3, "count": 2 / 3, "clean": 2 / 3, "framed": 0.0}
    assert generators.shown(drawn, ["two red circles"] * 3) == pytest.approx(seen)


def test_votes_can_be_turned_round_and_the_frame_made_to_say_less():
    plain = training_pairs(Recipe(pairs=40))
    turned = training_pairs(Recipe(pairs=40, flipped=0.25))
    assert sum(one != other for one, other in zip(plain["p_first"], turned["p_first"], strict=True)) == 10
    assert turned["id"] == plain["id"] and turned.features == plain.features
    less = training_pairs(Recipe(pairs=40, cue=0.5))
    assert Recipe(cue=TRAIN_CUE) == Recipe()
    same = training_pairs(Recipe(pairs=40, cue=TRAIN_CUE + 1e-9))  # as good as the world's own, under another name
    assert same["images"] == plain["images"] and same["p_first"] == plain["p_first"]
    assert less["prompt"] == plain["prompt"] and less["images"] != plain["images"]
    with pytest.raises(InputError, match="only tiny:train has such a cue"):
        training_pairs(Recipe(data="tiny:id", cue=0.5))


def test_the_best_of_n_by_the_truth_rises_with_n():
    found = generators.best_of(lambda *_: None, generators.utilities, 4, 2)
    assert [*found["true utility"]] == ["1", "2", "4"]
    one, two, four = found["true utility"].values()
    assert one < two <= four <= 6.7
    assert found["KL"] == pytest.approx({"1": 0.0, "2": math.log(2) - 1 / 2, "4": math.log(4) - 3 / 4})
    worst = generators.best_of(lambda *_: None, lambda *given: (-generators.utilities(*given)[0], {}), 4, 2)
    assert worst["true utility"]["1"] == one > worst["true utility"]["4"]


def test_over_optimisation_is_measured_along_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(generators, "prompts", lambda held: ["two red circles"])

    class Same:
        def compare_many(self, prompts: Any, firsts: Any, seconds: Any) -> list[Any]:
            return [
                SimpleNamespace(p_first=0.5 if one is other else 0.75)
                for one, other in zip(firsts, seconds, strict=True)
            ]

    small = {"prompts_per_epoch": 1, "images_per_prompt": 2, "batch_size": 2, "updates_per_epoch": 1}
    told: list[tuple[int, int]] = []
    found = generators.over_optimise(
        lambda done, total, _: told.append((done, total)),
        generators.utilities,
        Same(),
        tmp_path,
        3,
        epochs=2,
        every=1,
        samples=1,
        settings=small,
    )
    assert told == [(0, 2), (1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]  # epochs, then measurements
    assert "epochs" not in capsys.readouterr().err
    assert {metric: [*values] for metric, values in found.items()} == {
        "true utility": ["0", "1", "2"],
        "own view": ["0", "1", "2"],
        "KL": ["1", "2"],
        **{metric: ["0", "1", "2"] for metric in ("color", "shape", "count", "clean", "framed")},
    }
    assert found["own view"] == {"0": 0.5, "1": 0.75, "2": 0.75}
    assert 0 < found["true utility"]["0"] < 6.7 and found["framed"]["0"] == 0


def test_a_listener_is_taught_once_for_all_runs_that_need_it(
    study: Study, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
):
    def make(report: Any, kind: str, seed: int, out: str, scratch: str, fraction: float) -> str:
        trained.append(f"{kind} {seed} {fraction}")
        Path(out).mkdir(parents=True)
        return out

    monkeypatch.setattr("listener_reward.recipes.pretrain.make", make)
    arms = {
        name: replace(arm, recipe=replace(arm.recipe, listener="taught:0.25"))
        for name, arm in study.questions[0].arms.items()
    }
    question = replace(study.questions[0], arms=arms)
    conduct.conduct(replace(study, questions=(question,)), tmp_path)
    assert trained[:3] == ["1 jobs", "listener 1 0.25", "5 jobs"]
    assert carry_out.found("taught:0.25", tmp_path) == str(tmp_path / "checkpoints" / "taught-0.25")
    assert (tmp_path / "checkpoints" / "taught-0.25").is_dir() and carry_out.found("tiny-base", tmp_path) == "tiny-base"
    with pytest.raises(InputError, match=r"'taught:2' names no fraction"):
        carry_out.teach(lambda *_: None, "taught:2", str(tmp_path))


def test_the_truth_judges_no_labelled_pairs(tmp_path: Path):
    run = Run(Question("q", {}, {}, (0,)), "truth", Arm(method="truth"), None, Splits(), 0)
    with pytest.raises(InputError, match="measure it by best of n or ddpo"):
        carry_out.measure(lambda *_: None, run, "tiny-base", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gain_wait": 1}, r"options has 'gain_wait', which ListenerGRPOConfig does not have; is 'gain_"),
        ({"use_peft": True, "lora_ranks": 4}, r"options has 'lora_ranks', which ListenerGRPOConfig does not have"),
        ({"beta": "1e-3"}, r"options\.beta is '1e-3'; it takes no text. YAML reads 1e-4 as text, write 1\.0e-4"),
        ({"use_peft": True, "lora_r": "four"}, r"options\.lora_r is 'four'; it takes no text"),
        ({"lora_r": 4}, r"options has 'lora_r' without use_peft; add use_peft: true, or leave it out"),
    ],
)
def test_an_option_that_a_trainer_cannot_take_is_named(options, said, tmp_path: Path):
    with pytest.raises(InputError, match=said):
        train_variant(lambda *_: None, (1, 1, 0), str(tmp_path), 0, Recipe(), options=options)


ADAPTERS = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_study_trains_adapters(method, formed_judge: Path, tmp_path: Path):
    recipe = Recipe(
        steps=1, sft_steps=1, pairs=8, groups=2, generations=4, base=str(formed_judge), listener=str(formed_judge)
    )
    arm = Arm(method, recipe=recipe, options=ADAPTERS)
    run = Run(Question("q", {}, {}, (0,)), "adapters", arm, None, Splits(splits=("id",), pairs=2, listener="none"), 0)
    carry_out.carry_out(lambda *_: None, [run], str(tmp_path))
    folder = carry_out.judge_folder(tmp_path, arm, 0)
    said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (said["r"], said["target_modules"]) == (4, LORA_TARGETS)
    assert said["base_model_name_or_path"] == str(formed_judge) and not (folder / "model.safetensors").exists()
    assert "accuracy" in finished(tmp_path)[run.key]["results"]["id"]


def test_adapters_of_a_bradley_terry_model_are_merged(random_judge: Path, tmp_path: Path):
    recipe = Recipe(sft_steps=2, pairs=32, base=str(random_judge))
    train_bradley_terry_variant(lambda *_: None, str(tmp_path), 0, recipe, ADAPTERS)
    before = BradleyTerryModel.from_base(random_judge).backbone.state_dict()
    after = BradleyTerryModel.from_pretrained(tmp_path).backbone.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if re.fullmatch(LORA_TARGETS, name.removesuffix(".weight"))}
    assert changed and changed <= adapted


# --- the plan of this package's own study


def test_the_study_of_the_package_can_be_run():
    study = read_study(Path(__file__).parents[1] / "examples" / "study.yaml")
    assert all(question.added_at is None for question in study.questions)
    for question in study.questions:
        drawn = [run for run in runs_of(question, question.seeds[0]) if run.drawn]
        least = 3 if any(isinstance(measured, DDPO) for measured in question.measurements.values()) else 5
        assert not drawn or len(question.seeds) >= least
        for run in drawn:
            if run.arm.method == "grpo":
                ListenerGRPOConfig(output_dir="none", listener=run.arm.recipe.listener, **run.arm.options)
    labels = {(run.question.question, run.label, run.seed) for run in study.runs()}
    assert len(labels) == len(list(study.runs())), "a row of a table is one run for each seed"


def test_the_plan_for_real_votes_can_be_run():
    """Every way to train gets its configuration, with adapters, and sees as many pairs in a step."""
    study = read_study(Path(__file__).parents[1] / "examples" / "real-study.yaml")
    trained = {run.label: run.arm for run in study.runs() if run.arm.trains}
    assert len(trained) == 7 and len({run.key for run in study.runs()}) == 37
    for arm in trained.values():
        assert arm.options["use_peft"] is True
        step = arm.options.get("per_device_train_batch_size", arm.recipe.groups)
        assert step * arm.options["gradient_accumulation_steps"] == 32
        if arm.method == "grpo":
            rest = {name: value for name, value in arm.options.items() if name not in LORA_FIELDS}
            ListenerGRPOConfig(output_dir="none", listener=arm.recipe.listener, use_cpu=True, bf16=False, **rest)


def test_of_an_answered_question_every_run_is_there():
    """Its arms ask for what is no longer in the code, so that no run could be made again."""
    studies = Path(__file__).parents[1] / "docs" / "studies"
    asked = read_study(studies / "beyond.yaml")
    assert {run.key for run in asked.runs()} <= finished(studies / "tiny").keys()
