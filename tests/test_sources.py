"""Prompts with source images or a criterion: told apart, asked about, judged, and never dropped in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from listener_reward import Judge, ListenerReward, Mixture, Prompt
from listener_reward.chat import CRITERIA, ChatFormat, default_criteria, default_edit_question
from listener_reward.errors import InputError
from listener_reward.integrations.contract import score
from listener_reward.media.images import Picture, to_picture
from listener_reward.pairs import PreferencePair, as_prompt, check_company, plain_texts, prompt_with, with_sources
from listener_reward.peers.scorers import ScoreJudge
from listener_reward.tiny.models import QUESTION
from listener_reward.verdict import Verdict

# That words are unknown is tested with the backend.
pytestmark = pytest.mark.filterwarnings("ignore::listener_reward.errors.UnknownWordsWarning")

RED, GREEN, BLUE, GREY = (Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue", "grey"))
EDITS = {
    "format": {
        "question": QUESTION,
        "edit_question": "image {source} image 1 {first} image 2 {second} prompt : {prompt} . which is better ?",
        "criteria": {"color": "red or blue ?", "shape": "circle or square ?"},
    }
}


def test_a_prompt_is_told_by_text_sources_and_criterion():
    plain, edit = Prompt("make it red"), Prompt("make it red", (BLUE,))
    assert edit == Prompt("make it red", [BLUE.copy()]) and hash(edit) == hash(Prompt("make it red", BLUE))
    assert len({plain, edit, Prompt("make it red", (GREEN,)), Prompt("make it red", criterion="color")}) == 4
    keys = [
        each.key for each in (plain, edit, Prompt("make it red", (BLUE, GREEN)), Prompt("make it red", (GREEN, BLUE)))
    ]
    assert len(set(keys)) == 4 and keys[0] == "make it red"
    assert prompt_with("a text") == "a text" and prompt_with("a text", BLUE) == Prompt("a text", (BLUE,))
    assert prompt_with(edit, (), "color") == Prompt("make it red", (BLUE,), "color")
    assert as_prompt("a text") == Prompt("a text")


def test_what_cannot_be_a_prompt_names_its_field():
    with pytest.raises(InputError, match="prompt is 3"):
        Prompt(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"sources\[1\]"):
        Prompt("make it red", (BLUE, "nowhere.png"))
    with pytest.raises(InputError, match="criterion is 3"):
        Prompt("make it red", criterion=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="sources is given, and the prompt 'make it red' has its own"):
        prompt_with(Prompt("make it red", (BLUE,)), GREEN)


def test_a_pair_keeps_its_sources_when_its_images_are_exchanged():
    pair = PreferencePair("make it red", RED, GREEN, 1.0, "0", "test", (BLUE,), "color")
    assert pair.swapped().sources == (BLUE,) and pair.question == Prompt("make it red", (BLUE,), "color")
    assert PreferencePair("a text", RED, GREEN, 1.0, "0", "test").question == "a text"


def test_sources_come_before_the_images_in_the_chat():
    chat = ChatFormat().chat(Prompt("make it red", (BLUE, GREY)), RED, GREEN)
    assert [picture.image.getpixel((0, 0)) for picture in chat.images] == [
        image.getpixel((0, 0)) for image in (BLUE, GREY, RED, GREEN)
    ]
    content = chat.messages[0]["content"]
    assert [block["type"] for block in content] == ["text", "image", "image", "text", "image", "text", "image", "text"]
    assert content[0]["text"].startswith("An image editor was given an instruction")
    assert chat.messages == ChatFormat().messages("make it red", sources=2)


def test_a_criterion_is_asked_last_so_that_all_have_their_beginning_in_common():
    plain, *asked = (ChatFormat().messages("a cat", criterion=name)[0]["content"] for name in (None, *CRITERIA))
    beginning = plain[-1]["text"]
    assert len({each[-1]["text"] for each in asked}) == len(CRITERIA)
    for each, text in zip(asked, default_criteria().values(), strict=True):
        assert each[:-1] == plain[:-1] and each[-1]["text"] == f"{beginning}\n{text}"


def test_a_question_may_say_where_the_criterion_stands():
    own = ChatFormat(question="{first}{second}{prompt} {criterion} Choose!", criteria={"color": "By colour."})
    assert own.messages("x", criterion="color")[0]["content"][-1]["text"] == "x By colour. Choose!"
    assert own.messages("x")[0]["content"][-1]["text"] == "x  Choose!"
    assert ChatFormat.from_dict(own.to_dict()) == own


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"edit_question": "{first}{second}{prompt}"}, "edit_question has the slots"),
        ({"edit_question": "{first}{source}{second}{prompt}"}, "in this order"),
        ({"edit_question": 3}, "edit_question is a int"),
        ({"criteria": {"color": ""}}, "both not empty"),
        ({"criteria": ["color"]}, "give {name: what is asked}"),
        ({"criteria": {"color": "{prompt}"}}, "criteria has 'color' with a slot"),
    ],
)
def test_a_format_that_cannot_ask_is_refused(fields: Any, said: str):
    with pytest.raises(InputError, match=said.replace("{", r"\{")):
        ChatFormat(**fields)


def test_a_format_of_its_own_refuses_what_it_has_no_question_about():
    own = ChatFormat(question=QUESTION)
    with pytest.raises(InputError, match="1 source images, and the format of this checkpoint has no edit_question"):
        own.chat(Prompt("make it red", (BLUE,)), RED, GREEN)
    with pytest.raises(InputError, match="criterion is 'color', and this checkpoint has none"):
        own.messages("a cat", criterion="color")
    with pytest.raises(InputError, match="criterion is 'color', and this checkpoint has 'alignment', 'quality'"):
        ChatFormat().messages("a cat", criterion="color")
    assert "{source}" in default_edit_question()


@pytest.fixture(scope="module")
def judge(random_judge) -> Judge:
    return Judge.from_pretrained(random_judge, device="cpu", card=EDITS, think=False)


def test_a_verdict_depends_on_sources_and_criterion_and_swaps_exactly(judge):
    plain = judge.compare("a red circle", RED, GREEN)
    edit = judge.compare("a red circle", RED, GREEN, sources=BLUE)
    other = judge.compare("a red circle", RED, GREEN, sources=[GREY])
    by_color = judge.compare("a red circle", RED, GREEN, criterion="color")
    assert len({one.p_first for one in (plain, edit, other, by_color)}) == 4
    assert judge.compare("a red circle", GREEN, RED, sources=BLUE).p_first == 1 - edit.p_first
    assert judge.compare(Prompt("a red circle", (BLUE,)), RED, GREEN).p_first == edit.p_first
    together = judge.compare_many(["a red circle", Prompt("a red circle", (BLUE,))], [RED] * 2, [GREEN] * 2)
    assert [one.p_first for one in together] == pytest.approx([plain.p_first, edit.p_first], abs=1e-5)


def test_ranking_and_reward_ask_about_the_same_sources(judge):
    images = [RED, GREEN, GREY]
    ranking = judge.rank("a red circle", images, sources=BLUE)
    assert ranking.scores == judge.rank(Prompt("a red circle", (BLUE,)), images).scores
    assert ranking.scores != judge.rank("a red circle", images).scores
    reward = ListenerReward(judge, scheme="group")
    scores, _ = reward(images, ["a red circle"] * 3, sources=[BLUE] * 3)
    by_metadata, _ = reward(images, ["a red circle"] * 3, [{"sources": [BLUE]}] * 3)
    assert scores.tolist() == by_metadata.tolist()
    assert scores.tolist() != reward(images, ["a red circle"] * 3)[0].tolist()


def test_one_instruction_on_two_sources_is_two_groups(judge):
    images, prompts = [RED, GREEN, RED, GREEN], ["a red circle"] * 4
    sources = [BLUE, BLUE, GREY, GREY]
    scores, info = ListenerReward(judge, scheme="group")(images, prompts, sources=sources)
    assert info["comparisons"].tolist() == [1] * 4
    assert scores[:2].sum() == pytest.approx(0, abs=1e-6) and scores[2:].sum() == pytest.approx(0, abs=1e-6)
    mixed, _ = Mixture({"judge": (ListenerReward(judge, scheme="group"), 1.0)})(
        images, prompts, [{"sources": source} for source in sources]
    )
    assert mixed.tolist() == scores.tolist()


def test_a_source_of_a_group_is_read_once(monkeypatch):
    read: list[Any] = []

    def counted(image: Any, **how: Any) -> Picture:
        if not isinstance(image, Picture):
            read.append(image)
        return to_picture(image, **how)

    monkeypatch.setattr("listener_reward.pairs.to_picture", counted)
    asked = with_sources(["x"] * 6, 6, [{"sources": [BLUE, GREY]} for _ in range(4)] + [{"sources": BLUE}] * 2)
    assert len(read) == 3
    assert asked == [Prompt("x", (BLUE, GREY))] * 4 + [Prompt("x", BLUE)] * 2


def test_a_reference_belongs_to_a_prompt_and_its_sources(judge):
    reward = ListenerReward(judge, scheme="reference")
    opened, _ = reward([RED, RED], ["a red circle"] * 2, sources=[BLUE, GREY])
    assert opened.tolist() == [0, 0] and len(reward.state_dict()["references"]) == 2
    again, info = reward([GREEN, GREEN, GREEN], ["a red circle"] * 3, sources=[BLUE, GREY, None])
    assert info["comparisons"].tolist() == [1, 1, 0] and again[0] != again[1]


def test_sources_that_do_not_fit_name_their_field(judge):
    reward = ListenerReward(judge)
    for sources, said in ((BLUE, "sources is a Image"), ([BLUE], "sources has 1 entries"), (3, "sources is a int")):
        with pytest.raises(InputError, match=f"{said} for 2 images"):
            reward([RED, GREEN], ["a red circle"] * 2, sources=sources)
    with pytest.raises(InputError, match="metadata has sources too"):
        reward([RED, GREEN], ["a red circle"] * 2, [{"sources": BLUE}] * 2, sources=[BLUE] * 2)
    with pytest.raises(InputError, match=r"sources\[1\]"):
        reward([RED, GREEN], ["a red circle"] * 2, sources=[BLUE, "nowhere.png"])


def test_a_lone_edit_has_no_company_in_a_call(judge):
    with pytest.raises(InputError, match="2 of the prompts have one image in this call, such as 'a red circle'"):
        score(
            ListenerReward(judge, scheme="group"),
            [RED, GREEN],
            ["a red circle"] * 2,
            [{"sources": BLUE}, {"sources": GREY}],
        )
    check_company([Prompt("x", (BLUE,)), Prompt("x", (BLUE,))])


def test_a_peer_that_reads_texts_alone_refuses_sources():
    scorer = ScoreJudge(
        "by redness", lambda prompts, images: [float(np.asarray(image)[..., 0].mean()) for image in images]
    )
    said: list[Verdict] = scorer.compare_many(["x", Prompt("x")], [RED, RED], [GREEN, GREEN])
    assert [one.preferred for one in said] == [1, 1]
    with pytest.raises(InputError, match=r"prompts\[0\] has source images, which by redness cannot judge by"):
        scorer.compare_many([Prompt("x", (BLUE,))], [RED], [GREEN])
    with pytest.raises(InputError, match=r"prompts\[1\] has the criterion 'color'"):
        plain_texts(["x", Prompt("x", criterion="color")], "it")
