"""Several judges and files of scores from Python, as `eval` measures them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError, JudgeError
from listener_reward.evaluate import evaluate
from listener_reward.evaluate.scores import Scores
from listener_reward.evaluate.several import evaluate_judges


@pytest.fixture(scope="module")
def pairs() -> Any:
    return load_pairs("tiny:id", limit=20)


@pytest.fixture
def mine(pairs: Any) -> Scores:
    """A file that always prefers the first image as the data has it."""
    return Scores("mine.jsonl", "score", pairs={name: (1.0, None) for name in pairs["id"]})


def test_one_judge_has_its_evaluation_and_no_leaderboard(FakeJudge, pairs):
    measured = evaluate_judges([FakeJudge()], pairs, progress=False)
    assert (measured.leaderboard, measured.pairs, measured.failures) == (None, [], ())
    alone = evaluate(FakeJudge(), pairs, progress=False).to_dict()
    assert measured.to_dict() | {"seconds": 0} == alone | {"seconds": 0}


def test_judges_and_scores_are_ordered_and_what_to_look_at_is_kept(FakeJudge, pairs, mine):
    judges = [FakeJudge(slope=-1.0, name="contrary"), FakeJudge(name="good")]
    measured = evaluate_judges(judges, pairs, scores=[mine], against=mine, mistakes=2, progress=False)
    assert measured.leaderboard is not None and measured.leaderboard.against == "mine.jsonl"
    values = [evaluation.protocols[0].value or 0.0 for evaluation in measured.evaluations]
    assert len(values) == 4 and values == sorted(values, reverse=True)
    assert measured.to_dict() == measured.leaderboard.to_dict()
    wrong = [pair for pair in measured.pairs if pair["model"] == "good" and pair["verdict"]["preferred"] is not None]
    assert 0 < len(wrong) <= 2 + 6 and {pair["model"] for pair in measured.pairs} == {"contrary", "good", "mine.jsonl"}


def test_a_judge_is_loaded_when_its_turn_comes_and_its_failure_costs_the_others_nothing(FakeJudge, pairs, mine):
    loaded: list[str] = []

    def loads(name: str, **how: Any) -> Any:
        return lambda: loaded.append(name) or FakeJudge(name=name, **how)

    def fails() -> Any:
        raise InputError("there is no such judge")

    broken = loads("broken", breaks_on=lambda *_: loaded == ["broken"])
    measured = evaluate_judges([broken, fails, loads("good")], pairs, progress=False)
    assert loaded == ["broken", "good"] and [one.judge for one in measured.evaluations] == ["good"]
    assert [type(error) for error in measured.failures] == [JudgeError, InputError]
    assert measured.leaderboard is not None, "more than one was asked for"
    none = evaluate_judges([fails, fails], pairs, progress=False)
    assert (none.evaluations, none.leaderboard, none.to_dict(), len(none.failures)) == ((), None, {}, 2)
    with pytest.raises(InputError, match="no such judge"):
        evaluate_judges([fails], pairs, progress=False)
    with pytest.raises(InputError, match="both empty"):
        evaluate_judges([], pairs, against=mine)


def test_files_alone_read_no_picture(tmp_path: Path, pairs, mine):
    blind = pairs.map(lambda row: {"images": [{"bytes": None, "path": str(tmp_path / "gone.png")}] * 2})
    measured = evaluate_judges([], blind, scores=[mine], progress=False)
    assert measured.evaluations[0].judge == "mine.jsonl" and measured.leaderboard is None
