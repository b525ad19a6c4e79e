"""A card that is given: for a checkpoint of any name, and in the place of the checkpoint's own."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from listener_reward.card import CARD, Card
from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.listener import load_listener
from listener_reward.reward import ListenerReward
from listener_reward.tiny.models import QUESTION

RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
OTHER = ChatFormat(question=QUESTION, think=("<answer>", "</answer>"), answer=("<think>", "</think>"))
"""The tiny vocabulary's tags the other way round."""


@pytest.fixture
def plain(random_judge: Path, tmp_path: Path) -> Path:
    """A checkpoint without a card."""
    folder = tmp_path / "plain"
    shutil.copytree(random_judge, folder)
    (folder / CARD).unlink()
    return folder


def test_a_card_is_read_from_wherever_it_is(tmp_path):
    card = Card(format=OTHER, thoughts=3, listener="org/listener")
    card.save(tmp_path)
    card.write(tmp_path / "card.json")
    saved = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    for given in (card, saved, tmp_path, str(tmp_path), tmp_path / "card.json", str(tmp_path / "card.json")):
        assert Card.read(given) == card
    assert Card.read({}) == Card() and Card.read({"thoughts": 2}) == Card(thoughts=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, r"card is 3; give a Card, its fields, or the name of a JSON file"),
        ("nowhere.json", r"card is 'nowhere.json', and there is no file 'nowhere.json'; `listener-reward card` finds"),
        ("x" * 9999, r"card is 'x+\.\.\.', and there is no file"),
        ("a\0b", r"there is no file"),
        ({"thougts": 3}, r"card has unknown fields \['thougts'\]; it may have \['aggregate'"),
        ({"thoughts": 0}, r"card: thoughts is 0; give a whole number of at least 1"),
        ({"format": {"labels": ["1"]}}, r"card: labels is \('1',\); give two strings"),
        ({"format": {"answers": ["1"]}}, r"card: format has unknown fields \['answers'\]; it may have"),
        ({"calibration": 3}, r"card: calibration is 3; it may have answer"),
        ({"temperature": -1}, r"card: temperature is -1; give a finite number"),
    ],
)
def test_a_card_that_cannot_be_used_says_what_is_wrong(given, message):
    with pytest.raises(InputError, match=message):
        Card.read(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"card\.json holds a list; it has to be a JSON object"),
        ("{", r"card\.json is not JSON \(.*\); mend it"),
        ('{"thoughts": 0}', r"card\.json: thoughts is 0; give a whole number of at least 1"),
    ],
)
def test_a_file_that_is_no_card_is_named(tmp_path, text, message):
    (tmp_path / "card.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Card.read(tmp_path / "card.json")
    with pytest.raises(InputError, match=rf"there is no file '.*{CARD}'"):
        Card.read(tmp_path)


def test_a_given_card_wins_over_the_checkpoints_own(random_judge, plain, tmp_path):
    card = Card(format=OTHER, thoughts=2, max_new_tokens=4)
    card.write(tmp_path / "card.json")
    for name in (random_judge, plain):
        for given in (card, tmp_path / "card.json", json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))):
            judge = Judge.from_pretrained(name, device="cpu", card=given)
            assert judge.card == card and judge.listener is None
            assert judge.reasoner.think_tag == "<answer>"  # pyright: ignore[reportAttributeAccessIssue]
    assert Judge.from_pretrained(plain, device="cpu", card=card, thoughts=5).card == replace(card, thoughts=5)
    assert Judge.from_pretrained(random_judge, device="cpu").card == Card.load(random_judge)


def test_an_embedded_judge_takes_a_card_too():
    judge = Judge.from_pretrained("tiny", card=Card(format=ChatFormat(question=QUESTION), thoughts=3))
    assert judge.card.thoughts == 3 and judge.listener is None
    verdict = judge.compare("two red circles", RED, BLUE)
    assert len(verdict.thoughts) == 6 and verdict.malformed == 0


def test_a_relative_listener_is_relative_to_the_checkpoint(random_judge, plain, tmp_path):
    """The card lies elsewhere; its listener is the checkpoint itself, asked in the card's format as the reasoner is."""
    (tmp_path / "elsewhere").mkdir()
    Card(format=OTHER, listener=".").write(tmp_path / "elsewhere" / "card.json")
    for name in (random_judge, plain):
        judge = Judge.from_pretrained(name, device="cpu", card=tmp_path / "elsewhere" / "card.json")
        assert judge.listener is not None and judge.listener.vlm is judge.reasoner
        assert judge.listener.chat_format == OTHER
    shutil.copytree(random_judge, plain / "ear")
    judge = Judge.from_pretrained(plain, device="cpu", card={"listener": "./ear", "format": OTHER.to_dict()})
    assert judge.listener is not None and judge.listener.vlm is not judge.reasoner
    assert judge.listener.chat_format == Card.load(random_judge).format, "a listener with a card is asked as it says"


def test_a_relative_listener_of_a_name_on_the_hub():
    assert Card.load("org/model", {"listener": "."}).listener == "org/model"
    assert Card.load("org/model", {"listener": "org/other"}).listener == "org/other"
    with pytest.raises(
        InputError, match=r"listener is '\./ear', a folder beside the checkpoint, and 'org/model' is on"
    ):
        Card.load("org/model", {"listener": "./ear"})


def test_a_listener_takes_a_card(random_judge):
    listener = load_listener(random_judge, Card(), own={"format": OTHER.to_dict()}, device="cpu")
    assert listener.chat_format == OTHER
    assert load_listener(random_judge, Card(), device="cpu").chat_format == Card.load(random_judge).format


def test_a_judge_with_a_card_pickles_without_its_file(plain, tmp_path, monkeypatch):
    (tmp_path / "card.json").write_text(json.dumps({"thoughts": 2, "format": OTHER.to_dict()}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    judge = Judge.from_pretrained(plain, device="cpu", card="card.json", max_new_tokens=4)
    Path("card.json").unlink()
    copy: Any = pickle.loads(pickle.dumps(judge))
    assert copy.card == judge.card == Card(format=OTHER, thoughts=2, max_new_tokens=4)


def test_a_reward_takes_a_card(plain):
    reward = ListenerReward(str(plain), card=Card(format=OTHER, max_new_tokens=4), device="cpu")
    scores, info = pickle.loads(pickle.dumps(reward))([RED, BLUE], ["two red circles"] * 2)
    assert scores.shape == (2,) and info["comparisons"].tolist() == [1, 1]
    with pytest.raises(InputError, match="card would have no effect on a judge already loaded"):
        ListenerReward(Judge.from_pretrained(plain, device="cpu"), card=Card())
