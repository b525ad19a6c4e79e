"""A card that is given for a checkpoint of any name, and the command that finds the format which such a card has."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from listener_reward.card import CARD, Card
from listener_reward.chat import CRITERIA, Chat, ChatFormat, default_criteria, default_edit_question
from listener_reward.cli import app
from listener_reward.errors import InputError
from listener_reward.formats import FORMS, OWN, best_of, try_formats
from listener_reward.judge import Judge
from listener_reward.listener import load_listener
from listener_reward.models.hub import resolve
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.pairs import PreferencePair
from listener_reward.reward import ListenerReward
from listener_reward.tiny.models import QUESTION
from listener_reward.train.trainer import ListenerGRPOTrainer

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
            assert judge.reasoner.turns.think_tag == "<answer>"  # pyright: ignore[reportAttributeAccessIssue]
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
    assert listener.chat_format == replace(OTHER, criteria=default_criteria())  # which are the judge's
    own = load_listener(random_judge, Card(), device="cpu").chat_format
    assert own == replace(Card.load(random_judge).format, criteria=default_criteria())


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


def test_training_takes_a_card(plain, tiny_pairs, grpo_config, tmp_path):
    """The policy is asked in the card's format, and the judge that comes of it has the card."""
    given = Card(format=OTHER, thoughts=2)
    given.write(tmp_path / "card.json")
    config = grpo_config(card=str(tmp_path / "card.json"), listener="none", reward_weights=[1.0, 1.0, 0.0])
    trainer = ListenerGRPOTrainer(plain, config, tiny_pairs)
    assert trainer.card == given and trainer.reward.chat_format == OTHER
    trainer.save_judge(str(tmp_path / "judge"))
    assert Card.load(tmp_path / "judge") == given
    with pytest.raises(InputError, match="there is no file"):
        ListenerGRPOTrainer(plain, grpo_config(card="nowhere.json"), tiny_pairs)


# ---------------------------------------------------------------- the command that finds one


class Asked:
    """Answers each question as `says` has it, by what the question contains, and gives the labels all probability at
    the answer slot of what it said, and next to none elsewhere."""

    reserved: frozenset[str] = frozenset()

    def __init__(self, says: dict[str, str]):
        self.says = says

    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        return [self._answer(chat) for chat in chats]

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> torch.Tensor:
        mass = [
            1.0 if any(self._answer(chat).startswith(prefix + label) for label in labels) else 1e-3
            for chat, prefix in zip(chats, prefixes, strict=True)
        ]
        return (torch.tensor([[0.75, 0.25]] * len(chats)) * torch.tensor(mass)[:, None]).log()

    def read(
        self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.label_logprobs(chats, prefixes, labels), torch.zeros(len(chats))

    def _answer(self, chat: Chat) -> str:
        asked = str(chat.messages[-1]["content"][-1]["text"])
        return next((said for word, said in self.says.items() if word in asked), "No.")


PAIR = [PreferencePair("a fox", RED, BLUE, 1.0, str(number), "x") for number in range(4)]
TAGGED, PHRASED = "<think>a</think><answer>2</answer>", "<think>a</think><answer>Image 2 is better</answer>"


@pytest.mark.parametrize(
    ("says", "form", "asked"),
    [
        ({"": TAGGED}, "tags", "tags"),
        ({"": TAGGED.replace("2", "B")}, "letters in tags", "tags"),
        ({"": PHRASED}, "a phrase in tags", "tags"),
        ({"Image 1 is better": PHRASED}, "a phrase in tags", "a phrase in tags"),
        ({'"preferred"': '{"reasoning": "a", "preferred": "2"}'}, "JSON", "JSON"),
        ({'"preferred"': '```json\n{"reasoning": "a", "preferred": "2"}\n```'}, "JSON, fenced", "JSON"),
        ({'"preferred"': '<think>\na\n</think>\n{"preferred": "2"}'}, "JSON after a thought in tags", "JSON"),
        ({'"preferred"': 'a. {"preferred": "2"}'}, "JSON without a thought", "JSON"),
        ({"": "a.\n<answer>2</answer>"}, "an answer tag alone", "tags"),
        ({"like this: <answer>1": "<answer>2</answer>"}, "an answer tag alone", "an answer tag alone"),
    ],
)
def test_the_format_of_a_model_is_found(says, form, asked):
    best = best_of(try_formats(Asked(says), PAIR))
    assert best is not None and (best.form, best.asked, best.lenient) == (form, asked, False)
    assert (best.malformed, best.label_mass) == (0.0, 1.0)
    judge = Judge(Asked(says), card=Card(format=best.chat_format), strict=True)
    verdict = judge.compare("a fox", RED, BLUE)
    assert verdict.malformed == 0 and verdict.label_mass == 1.0
    assert {thought.order: thought.answer for thought in verdict.thoughts} == {"as given": 2, "swapped": 1}
    for criterion in (None, "alignment"):  # the form is asked for in those questions too
        edit = judge.compare("make it blue", RED, BLUE, sources=BLUE, criterion=criterion)
        assert edit.malformed == 0 and edit.label_mass == 1.0
    assert tuple(best.chat_format.known_criteria) == CRITERIA


def test_criteria_of_the_card_are_kept_in_another_form_and_a_given_question_has_them():
    own = ChatFormat(question=QUESTION, criteria={"color": "red or blue ?"})
    best = best_of(try_formats(Asked({'"preferred"': '{"reasoning": "a", "preferred": "2"}'}), PAIR, own=own))
    assert best is not None and best.form == "JSON" and best.chat_format.criteria == own.criteria
    mine = "{first}{second} Choose! {prompt} Now choose!"
    best = best_of(try_formats(Asked({"Now choose!": TAGGED}), PAIR, question=mine))
    assert best is not None and best.chat_format.edit_question is None and best.chat_format.known_criteria == {}


def test_the_question_about_edits_ends_as_the_form_wants_it():
    wordings = {fit.asked: fit.chat_format for fit in try_formats(Asked({}), PAIR) if fit.asked == fit.form}
    for asked in ("JSON", "a phrase in tags", "an answer tag alone"):
        question, edits = wordings[asked].question, wordings[asked].edit_question
        assert edits is not None and edits.startswith(default_edit_question().rpartition("\n\n")[0])
        example = question[question.index("ike this: ") :]
        assert edits.endswith(example) and default_edit_question().count("\n\n") == edits.count("\n\n")


def test_a_model_of_a_lenient_format_is_found_after_all_strict_ones():
    found = try_formats(Asked({"": "a fox.\n**2**"}), PAIR)
    best = best_of(found)
    assert best is not None and best.lenient and best.form == "tags"
    assert not any(fit.fits for fit in found if not fit.lenient)
    strict = best_of(try_formats(Asked({'"preferred"': '{"reasoning": "a", "preferred": "2"}', "": "**2**"}), PAIR))
    assert strict is not None and strict.form == "JSON"


def test_a_model_that_answers_in_no_format_fits_none():
    found = try_formats(Asked({"": "Both are nice."}), PAIR)
    assert best_of(found) is None and {fit.malformed for fit in found} == {1.0}
    assert {fit.form for fit in found} == set(FORMS)
    assert {fit.example for fit in found} == {"Both are nice."}
    with pytest.raises(InputError, match="pairs is empty"):
        try_formats(Asked({}), [])


def test_the_cards_own_format_and_a_given_question_are_tried_first():
    own = ChatFormat(question=QUESTION, answer=("[", "]"))
    says = {"which is better": "<think>a</think>[2]"}
    best = best_of(try_formats(Asked(says), PAIR, own=own))
    assert best is not None and best.form == OWN and best.chat_format == own
    mine = "{first}{second} Choose! {prompt} Now choose!"
    best = best_of(try_formats(Asked({"Now choose!": TAGGED}), PAIR, question=mine))
    assert best is not None and best.asked == "the question given" and best.chat_format.question == mine
    with pytest.raises(InputError, match="question has the slots"):
        try_formats(Asked({}), PAIR, question="which?")


def test_what_a_chat_template_opens_is_part_of_the_format(random_judge, tmp_path, monkeypatch):
    """A model that is asked with an open thought continues it; a form without thoughts has no use for the tag."""
    folder = tmp_path / "thinking"
    shutil.copytree(random_judge, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"), encoding="utf-8")
    vlm = TransformersVLM.from_pretrained(folder, device="cpu")
    ids = vlm.tokenizer.encode("a right </think><answer>1</answer>", add_special_tokens=False)
    said = vlm.tokenizer.decode(ids)
    monkeypatch.setattr(TransformersVLM, "_sampler", lambda *_: lambda places, _: torch.tensor([ids] * len(places)))
    pairs = [replace(pair, prompt="two red circles") for pair in PAIR]
    found = {fit.form: fit for fit in try_formats(vlm, pairs, own=ChatFormat(question=QUESTION), max_new_tokens=99)}
    assert found["tags"].malformed == 0 and found["tags"].example == f"<think>\n{said}"
    assert found["an answer tag alone"].example == said
    assert vlm.turns.think_tag == "<think>", "as it was"
    cut = try_formats(vlm, pairs, own=ChatFormat(question=QUESTION), max_new_tokens=len(ids))
    assert {fit.cut for fit in found.values()} == {0.0} and {fit.cut for fit in cut} == {1.0}


def card(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["card", *map(str, arguments)])


@pytest.fixture
def speaking(plain, monkeypatch) -> Callable[[dict[str, str]], Path]:
    """`speaking(says)` is a checkpoint whose model is `Asked(says)`."""

    def install(says: dict[str, str]) -> Path:
        monkeypatch.setattr(Judge, "from_pretrained", lambda name, **options: Judge(Asked(says)))
        return plain

    return install


def test_the_command_writes_a_card_that_fits(speaking, tmp_path):
    name, out = speaking({'"preferred"': '{"reasoning": "a", "preferred": "2"}'}), tmp_path / "made" / "card.json"
    ended = card(name, "--out", out, "--pairs", 3, "--max-new-tokens", 99)
    assert ended.exit_code == 0, ended.stderr
    assert "JSON" in ended.stdout and "malformed" in ended.stdout and '"preferred": "2"' in ended.stdout
    assert f"card={str(out)!r})" in ended.stderr
    written = Card.read(out)
    assert written.format.answer == ('"preferred": "', '"}') and '"preferred": "1"' in written.format.question
    assert written == Card(format=written.format, max_new_tokens=99)


def test_the_command_replaces_no_file_unasked(speaking, tmp_path):
    name, out = speaking({"": TAGGED}), tmp_path / "card.json"
    out.write_text("mine", encoding="utf-8")
    ended = card(name, "--out", out)
    assert ended.exit_code == 2 and "which exists; give another name, or --force" in ended.stderr
    assert out.read_text(encoding="utf-8") == "mine"
    assert card(name, "--out", out, "--force").exit_code == 0
    assert Card.read(out).format == ChatFormat()


def test_the_command_writes_nothing_where_nothing_fits(speaking, tmp_path):
    name, out = speaking({"": "Both [bold]are[/] nice."}), tmp_path / "card.json"
    ended = card(name, "--out", out)
    assert ended.exit_code == 1 and "No format fits, and no card is written" in ended.stderr
    assert "Both [bold]are[/] nice." in ended.stdout and not out.exists()
    ended = card(name, "--out", out, "--unfit")
    assert ended.exit_code == 1 and "the nearest one is in" in ended.stderr and Card.read(out).format == ChatFormat()


def test_the_command_says_that_a_format_is_lenient(speaking, tmp_path):
    ended = card(speaking({"": "a fox.\n**2**"}), "--out", tmp_path / "card.json")
    assert (
        ended.exit_code == 0 and "lenient=True)" in ended.stderr and "only if answers are read lenient" in ended.stderr
    )


def test_the_command_in_json(speaking, tmp_path):
    ended = card(speaking({"": TAGGED}), "--out", tmp_path / "card.json", "--json")
    said = json.loads(ended.stdout)
    assert said["fits"] is True and said["written"] == str(tmp_path / "card.json")
    assert said["formats"][0]["form"] == "tags" and ChatFormat.from_dict(said["formats"][0]["format"]) == ChatFormat()


def test_the_command_reads_data_and_a_question(speaking, tmp_path):
    for name, image in (("a", RED), ("b", BLUE)):
        image.save(tmp_path / f"{name}.png")
    row = {"prompt": "a fox", "image_first": "a.png", "image_second": "b.png", "p_first": 1.0}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "question.txt").write_text("{first}{second}{prompt} Choose!\n", encoding="utf-8")
    name, out = speaking({"Choose!": TAGGED}), tmp_path / "card.json"
    ended = card(name, "--data", tmp_path / "pairs.jsonl", "--question", tmp_path / "question.txt", "--out", out)
    assert ended.exit_code == 0, ended.stderr
    assert Card.read(out).format.question == "{first}{second}{prompt} Choose!"
    (tmp_path / "question.txt").write_text("Choose!", encoding="utf-8")
    ended = card(name, "--question", tmp_path / "question.txt", "--out", out, "--force")
    assert ended.exit_code == 2 and "question has the slots" in ended.stderr
    ended = card(name, "--question", tmp_path / "nowhere.txt", "--out", out, "--force")
    assert ended.exit_code == 2 and "which cannot be read" in ended.stderr


def test_an_embedded_judge_keeps_its_card(tmp_path):
    ended = card("tiny", "--out", tmp_path / "card.json", "--pairs", 2)
    assert ended.exit_code == 0, ended.stderr
    assert Card.read(tmp_path / "card.json") == Card.load(resolve("tiny"))


def test_the_command_explains_itself():
    text = " ".join(card("--help").stdout.split())
    for words in ("card.json", "--max-new-tokens", "exit code is 1", "listener_reward.json", "--question"):
        assert words in text
