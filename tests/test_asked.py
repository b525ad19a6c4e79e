"""Evaluation, calibration and training ask each pair its own question, refuse early, and count by criterion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import datasets
import pytest
from PIL import Image

from listener_reward import Judge, Prompt
from listener_reward.card import Card
from listener_reward.chat import CRITERIA, ChatFormat
from listener_reward.cli.printing import criteria_table
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate, evaluate_scores
from listener_reward.evaluate.asked import CriterionResult
from listener_reward.evaluate.calibrate import calibrate
from listener_reward.evaluate.intervals import wilson
from listener_reward.evaluate.journal import Journal
from listener_reward.evaluate.scores import Scores
from listener_reward.listener import Listener
from listener_reward.peers.endpoint import EndpointJudge
from listener_reward.peers.scorers import ScoreJudge
from listener_reward.tiny.models import QUESTION
from listener_reward.train.chats import as_chats
from listener_reward.verdict import Verdict

pytestmark = pytest.mark.filterwarnings("ignore::listener_reward.errors.UnknownWordsWarning")

EDITS = {
    "format": {
        "question": QUESTION,
        "edit_question": "image {source} image 1 {first} image 2 {second} prompt : {prompt} . which is better ?",
        "criteria": {"color": "red or blue ?", "shape": "circle or square ?"},
    }
}


def colored(*names: str) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), name) for name in names]


def pairs_of(*rows: dict[str, Any]) -> datasets.Dataset:
    """Rows on top of a plain pair; the columns `sources` and `criterion` are there where some row has them."""
    base = {"prompt": "a red circle", "images": colored("red", "green"), "p_first": 1.0, "dataset": "test"}
    full = [base | {"id": str(number), "swapped": False} | row for number, row in enumerate(rows)]
    optional = [name for name in ("sources", "criterion") if any(name in row for row in rows)]
    columns: dict[str, Any] = {name: [row.get(name) for row in full] for name in [*base, "id", "swapped", *optional]}
    kinds: dict[str, Any] = {"images": datasets.List(datasets.Image(decode=False))}
    if "sources" in optional:
        columns["sources"] = [some or [] for some in columns["sources"]]
        kinds["sources"] = kinds["images"]
    if "criterion" in optional:
        kinds["criterion"] = datasets.Value("string")
    texts = {name: datasets.Value("string") for name in ("prompt", "dataset", "id")}
    kinds |= texts | {"p_first": datasets.Value("float64"), "swapped": datasets.Value("bool")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({name: kinds[name] for name in columns}))


class Scripted:
    """Says what it is told to, in the order of the pairs, and keeps what it was asked."""

    name = "scripted"

    def __init__(self, *p_first: float):
        self.said, self.asked = list(p_first), []

    def compare_many(
        self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        self.asked += prompts
        return [Verdict(p, 1 if p > 0.5 else 2, (), None, None, 0.0, 0) for p in (self.said.pop(0) for _ in prompts)]


# ---------------------------------------------------------------- by criterion


LABELS = [("quality", 1.0), ("quality", 0.0), ("quality", 0.5), ("alignment", 1.0), (None, 0.0), ("alignment", 1.0)]


def rows() -> list[dict[str, Any]]:
    return [{"criterion": name, "p_first": p, "prompt": f"prompt {k}"} for k, (name, p) in enumerate(LABELS)]


def test_metrics_by_criterion_worked_by_hand():
    # quality: right, wrong, a tie of people; alignment: right, wrong; as a whole: right.
    judge = Scripted(0.9, 0.9, 0.9, 0.8, 0.1, 0.3)
    record = evaluate(judge, pairs_of(*rows()), progress=False, swap_check=0)
    assert record.accuracy == 3 / 5
    assert [(one.criterion, one.n, one.n_ties, one.accuracy) for one in record.by_criterion] == [
        ("alignment", 2, 0, 1 / 2),
        ("quality", 3, 1, 1 / 2),
        ("general", 1, 0, 1.0),
    ]
    alignment, quality, general = record.by_criterion
    assert alignment.accuracy_interval == pytest.approx(wilson(1, 2))
    # Confidences of 0.8 and 0.7, of which people agree with 1 and 0: (0.2 + 0.7) / 2. Then three of 0.9 in one bin,
    # agreements 1, 0 and 1/2: 0.9 - 0.5. Then 0.9 against 1.
    assert [one.ece for one in (alignment, quality, general)] == pytest.approx([0.45, 0.4, 0.1])
    saved = record.to_dict()
    assert saved["by_criterion"]["quality"]["accuracy"] == 1 / 2 and list(saved["by_criterion"]) == [
        "alignment",
        "quality",
        "general",
    ]
    assert [str(one.criterion) if isinstance(one, Prompt) else one for one in judge.asked] == [
        "quality",
        "quality",
        "quality",
        "alignment",
        "prompt 4",
        "alignment",
    ]
    table = criteria_table(record.by_criterion)
    assert [*table.columns[0].cells] == ["alignment", "quality", "general"]


def test_a_file_of_scores_is_measured_by_criterion_too():
    scores = Scores("theirs", "score", {str(k): (margin, None) for k, margin in enumerate((1, 1, 0, 1, -1, 1))})
    record = evaluate_scores(scores, pairs_of(*rows()))
    assert [(one.criterion, one.accuracy, one.ece) for one in record.by_criterion] == [
        ("alignment", 1.0, None),
        ("quality", 1 / 2, None),
        ("general", 1.0, None),
    ]


def test_data_without_criteria_has_nothing_by_criterion():
    record = evaluate(Scripted(0.9), pairs_of({}), progress=False, swap_check=0)
    assert record.by_criterion == () and "by_criterion" not in record.to_dict()
    nothing = CriterionResult("text", 1, 1, None, None, None)
    assert nothing.to_dict()["accuracy_interval"] is None


# ---------------------------------------------------------------- refused early


def unasked(*_: Any, **__: Any) -> Any:
    raise AssertionError("a pair was judged")


@pytest.fixture(scope="module")
def plain(random_judge) -> Judge:
    """A judge that knows neither edits nor criteria."""
    return Judge.from_pretrained(random_judge, device="cpu", think=False)


@pytest.fixture(scope="module")
def editor(random_judge) -> Judge:
    return Judge.from_pretrained(random_judge, device="cpu", card=EDITS, think=False)


@pytest.mark.parametrize("what", ["criterion", "sources"])
def test_a_judge_without_the_question_refuses_before_any_pair(plain, tmp_path, monkeypatch, what):
    late = {"criterion": "quality"} if what == "criterion" else {"sources": colored("blue")}
    pairs = pairs_of({}, {}, late)
    said = "criterion is 'quality', and this checkpoint has none.*#general" if what == "criterion" else "edit_question"
    monkeypatch.setattr(Judge, "judgements", unasked)
    for judge in (plain, Journal(plain, tmp_path / "journal.jsonl")):
        with pytest.raises(InputError, match=said):
            evaluate(judge, pairs, batch_size=1, progress=False)
    many = pairs_of(*[{"prompt": f"{k}"} | late for k in range(60)])
    with pytest.raises(InputError, match=said):
        calibrate(plain, many, criterion="quality" if what == "criterion" else None, progress=False)
    with pytest.raises(InputError, match=said):
        evaluate(plain, pairs_of({}), progress=False, protocols=["pickscore"], validation=pairs)


def test_peers_say_what_they_cannot_be_asked(plain):
    scorer = ScoreJudge("by size", unasked)
    with pytest.raises(InputError, match=r"the criterion 'text', which by size cannot judge by.*#general"):
        evaluate(scorer, pairs_of({}, {"criterion": "text"}), batch_size=1, progress=False)
    with pytest.raises(InputError, match=r"source images, which by size cannot judge by; take a Judge$"):
        evaluate(scorer, pairs_of({}, {"sources": colored("blue")}), batch_size=1, progress=False)
    endpoint = EndpointJudge("model", "http://localhost:9")
    for name in CRITERIA:
        endpoint.check_question(sources=2, criterion=name)
    with pytest.raises(InputError, match="criterion is 'beauty'"):
        endpoint.check_question(criterion="beauty")
    plain.check_question()


def test_the_listener_has_to_know_the_question_too(editor, plain):
    editor.check_question(sources=2, criterion="shape")
    two = Judge(editor.reasoner, Listener(plain.reasoner, plain.card.format), editor.card, think=True)
    with pytest.raises(InputError, match="no edit_question"):
        two.check_question(sources=1)


# ---------------------------------------------------------------- asked as they should be


@pytest.mark.parametrize("criterion", ["color", "shape", None])
def test_calibration_asks_the_pairs_of_its_criterion_their_own_question(editor, monkeypatch, criterion):
    names = ["color", "shape", None]
    table: list[dict[str, Any]] = [
        {"prompt": f"a red circle {k}", "criterion": names[k % 3], "sources": colored("blue") if k % 2 else []}
        | {"p_first": float(k % 4 > 1)}
        for k in range(150)
    ]
    asked: list[Any] = []
    judgements = Judge.judgements
    monkeypatch.setattr(
        Judge,
        "judgements",
        lambda self, prompts, *more, **how: asked.extend(prompts) or judgements(self, prompts, *more, **how),
    )
    found = calibrate(editor, pairs_of(*table), criterion=criterion, progress=False)
    assert found.n_fit + found.n_validation + found.n_test == 50
    blue = colored("blue")
    wanted = [
        Prompt(row["prompt"], blue if row["sources"] else (), row["criterion"])
        if row["sources"] or row["criterion"]
        else row["prompt"]
        for row in table
        if row["criterion"] == criterion
    ]
    assert asked == wanted and len(asked) == 50


def test_training_chats_ask_for_the_criterion_and_show_the_sources():
    card = Card(ChatFormat(**EDITS["format"]))
    pairs = pairs_of({"criterion": "color"}, {"sources": colored("blue", "gray"), "criterion": "shape"}, {})
    chats: Any = as_chats(pairs, card, frozenset())
    assert [len(row["images"]) for row in chats] == [2, 4, 2]
    texts = ["".join(block.get("text") or "" for block in row["prompt"][0]["content"]) for row in chats]
    assert ["red or blue ?" in text for text in texts] == [True, False, False]
    assert ["circle or square ?" in text for text in texts] == [False, True, False]
    with pytest.raises(InputError, match="criterion is 'motion', and this checkpoint has 'color', 'shape'"):
        as_chats(pairs_of({"criterion": "motion"}), card, frozenset())
    assert dataclasses.replace(card).format.criteria == EDITS["format"]["criteria"]
