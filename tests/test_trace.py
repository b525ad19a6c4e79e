"""What counts as an answer, and what the listener must not read."""

from __future__ import annotations

import time

import pytest

from listener_reward.chat import ChatFormat
from listener_reward.trace import Trace, mask_verdict, parse

FORMAT = ChatFormat()

WELL_FORMED = [
    ("<think>a</think><answer>1</answer>", "a", 1),
    ("<think>a</think><answer>2</answer>", "a", 2),
    ("<think></think><answer>1</answer>", "", 1),
    ("<think> \n </think><answer>2</answer>", "", 2),
    ("  <think>a</think>\n\n<answer>1</answer>\n", "a", 1),
    ("<think>\na\nb\n</think>\n<answer> 2 </answer>", "a\nb", 2),
    ("<think>a</think><answer>\n1\n</answer>", "a", 1),
    ("<think>the answer is 2, so image 2</think><answer>1</answer>", "the answer is 2, so image 2", 1),
    ("<think>1 < 2 > 0 <b>bold</b> </answer</think><answer>2</answer>", "1 < 2 > 0 <b>bold</b> </answer", 2),
    ("<think>🦊 שלום</think><answer>1</answer>", "🦊 שלום", 1),
    ("<think>{first} \\1 %s</think><answer>1</answer>", "{first} \\1 %s", 1),
]

MALFORMED = [
    "",
    " ",
    "1",
    "image 1 is better",
    "<answer>1</answer>",
    "<think>a</think>",
    "<think>a</think>1",
    "<think>a</think><answer></answer>",
    "<think>a</think><answer>1",
    "<think>a</think>1</answer>",
    "<think>a<answer>1</answer>",
    "a</think><answer>1</answer>",
    "<think>a</think><answer>3</answer>",
    "<think>a</think><answer>0</answer>",
    "<think>a</think><answer>11</answer>",
    "<think>a</think><answer>12</answer>",
    "<think>a</think><answer>1.0</answer>",
    "<think>a</think><answer>1 2</answer>",
    "<think>a</think><answer>1 or 2</answer>",
    "<think>a</think><answer>one</answer>",
    "<think>a</think><answer>image 1</answer>",
    "<think>a</think><answer>\uff11</answer>",
    "<think>a</think><answer>1</answer><answer>2</answer>",
    "<think>a</think><answer>1</answer><answer>1</answer>",
    "<think>a</think><think>b</think><answer>1</answer>",
    "<think><think>a</think><answer>1</answer>",
    "<think>a</think></think><answer>1</answer>",
    "<think>a<answer>2</answer></think><answer>1</answer>",
    "<think>a<answer>2</think><answer>1</answer>",
    "<think>a</answer></think><answer>1</answer>",
    "<answer>1</answer><think>a</think>",
    "So: <think>a</think><answer>1</answer>",
    "<think>a</think><answer>1</answer>.",
    "<think>a</think> so <answer>1</answer>",
    "<think>a</think><answer>1</answer><think>b</think>",
    "<THINK>a</THINK><ANSWER>1</ANSWER>",
    "< think>a</think><answer>1</answer>",
    "<think>a</think><answer>1</answer></answer>",
    "<think>a</think><answer>1</answer>\x00",
    "</think><think>a<answer>1</answer>",
]


@pytest.mark.parametrize(("completion", "thought", "answer"), WELL_FORMED)
def test_well_formed(completion, thought, answer):
    trace = parse(completion, FORMAT)
    assert trace == Trace(thought, answer)
    assert trace.well_formed


@pytest.mark.parametrize("completion", MALFORMED)
def test_malformed_has_no_answer_and_no_tag(completion):
    trace = parse(completion, FORMAT)
    assert trace.answer is None
    assert not trace.well_formed
    assert not any(tag in trace.thought for tag in (*FORMAT.think, *FORMAT.answer))


def test_a_thought_that_was_cut_short_is_kept():
    assert parse("<think>image 1 shows a", FORMAT) == Trace("image 1 shows a", None)
    assert parse("<think>a</think><answer>maybe 1</answer>", FORMAT) == Trace("a", None)


def test_an_answer_in_the_middle_of_a_thought_costs_it_nothing_and_says_nothing():
    quotes = ("</think><answer>1</answer>", "<answer>1</answer><answer>1</answer>", "</think><answer>", "<answer> 2")
    for quoted in quotes:
        for said in (f"{quoted} a fox", f"a fox {quoted}"):
            trace = parse(f"<think>{said}</think><answer>2</answer>", FORMAT)
            assert trace == Trace("a fox", None), said
    assert parse("<think><answer>10 foxes</think><answer>1</answer>", FORMAT).thought == "10 foxes"


def test_other_tags_and_labels():
    other = ChatFormat(labels=("first", "second"), think=("[r]", "[/r]"), answer=("(((", ")))"))
    assert parse("[r]a <think> 1[/r] (((second)))", other) == Trace("a <think> 1", 2)
    assert parse("<think>a</think><answer>1</answer>", other).answer is None


def test_a_label_that_begins_with_the_other():
    longer = ChatFormat(labels=("1", "10"))
    assert parse("<think>a</think><answer>10</answer>", longer).answer == 2


@pytest.mark.parametrize(
    "completion",
    [
        "<think>" + "</think>" * 120_000,
        "<think>" + ("</think>" + " " * 1000) * 1000,
        "<think>" + "</think><answer>" * 60_000,
        "<think></think><answer>1</answer>" * 30_000,
        "<think></think><answer>" + " " * 1_000_000,
        "<think></think><answer>1</answer>" + " " * 1_000_000 + "x",
        " " * 1_000_000,
        "<think>" * 150_000,
    ],
    ids=lambda completion: completion[:24].strip() or "spaces",
)
def test_a_megabyte_is_read_in_linear_time(completion):
    started = time.process_time()
    assert parse(completion, FORMAT).answer is None
    assert time.process_time() - started < 5  # 0.02 s on an idle core


# ---------------------------------------------------------------- the verdict in words

VERDICTS = [
    "so image 1 is better .",
    "Therefore, the first image is better.",
    "I prefer Image 2.",
    "Overall, Image A is superior to Image B.",
    "The second image wins.",
    "So the answer is 2.",
    "My answer: 1",
    "I would go with 2 because it is sharper.",
    "The winner is B.",
    "The left image is the stronger one.",
    "The one on the right beats the other.",
    "Weighing both, 1 is better than 2.",
    "Picture two outperforms picture one.",
    "I choose A.",
    "Option 2 is my choice.",
    "The latter is preferable.",
    "The former is worse.",
    "Image #2 comes out ahead.",
    "The best image is the second one.",
]

DESCRIPTIONS = [
    "image 1 : two clean red circles .",
    "The first image shows two red circles on white.",
    "In this image a dog picks a flower.",
    "Image 2 has six fingers on the left hand.",
    "The prompt asks for 2 better houses than before.",
    "At first glance, the colours look better than usual.",
    "The second image is blurred.",
    "It has 1 circle and 2 squares.",
    "Both follow the prompt.",
    "The composition is better balanced.",
    "The man on the right holds a glass.",
    "The prompt wants the best of both worlds.",
    "The answer to the prompt needs 2 circles.",
    "A dog wins a race.",
]


@pytest.mark.parametrize("verdict", VERDICTS)
def test_verdicts_are_dropped(verdict):
    assert mask_verdict(verdict) == ""
    assert mask_verdict(f"Image 1 shows a fox. {verdict}") == "Image 1 shows a fox."


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_descriptions_are_kept(description):
    assert mask_verdict(description) == description


def test_a_tiny_thought_loses_its_verdict_and_nothing_else():
    told = "image 1 : two clean red circles . image 2 : one faded blue star ."
    assert mask_verdict(f"{told} so image 2 is better .") == told


def test_masking_is_the_listeners_choice():
    trace = Trace("Image 1 is sharp. So image 1 is better.", 1)
    assert trace.for_listener() == trace.thought
    assert trace.for_listener("verdict") == "Image 1 is sharp."


@pytest.mark.parametrize(
    "piece",
    ["x", "image ", "image 1 ", "better ", "answer ", ".", "go ", "image" + " " * 99, "answer is", " ", "on the "],
)
def test_masking_a_megabyte_takes_linear_time(piece):
    started = time.process_time()
    mask_verdict(piece * (1_000_000 // len(piece)))
    assert time.process_time() - started < 10  # 0.2 s on an idle core
