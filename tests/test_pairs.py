"""The pair: what it refuses, and that swapping is an involution."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.pairs import PreferencePair, check_prompts, check_questions
from listener_reward.remote import RemoteReward
from listener_reward.reward import ListenerReward


def pair(p_first: float = 0.73, prompt: str = "a red circle") -> PreferencePair:
    return PreferencePair(prompt, "first.png", "second.png", p_first, "7", "test")


def test_swapping_exchanges_images_and_votes_and_nothing_else():
    swapped = pair(0.75).swapped()
    assert swapped == PreferencePair("a red circle", "second.png", "first.png", 0.25, "7", "test")
    assert swapped.swapped() == pair(0.75)


@pytest.mark.parametrize(("p_first", "majority"), [(1.0, 1), (0.51, 1), (0.5, None), (0.49, 2), (0, 2)])
def test_majority(p_first, majority):
    assert pair(p_first).majority == majority


@pytest.mark.parametrize("p_first", [-0.01, 1.01, math.nan, math.inf, "0.5", None, 1j])
def test_a_share_outside_zero_to_one_is_refused(p_first):
    with pytest.raises(InputError, match=r"p_first is .*from 0 to 1"):
        pair(p_first)


@pytest.mark.parametrize("prompt", [None, 3, b"a red circle", ["a red circle"], "half a smile \ud83d"])
def test_a_prompt_that_no_tokenizer_could_read_is_refused(prompt):
    with pytest.raises(InputError, match="prompt is"):
        pair(prompt=prompt)


def test_a_pair_cannot_be_changed():
    with pytest.raises(AttributeError):
        pair().p_first = 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_pairs_and_images_loads_no_model_library():
    code = """
import sys
import listener_reward.errors, listener_reward.media.images, listener_reward.pairs
loaded = {"torch", "transformers", "datasets"} & set(sys.modules)
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- prompts of a batch

NO_PROMPTS = [
    (None, " is of type NoneType; give a list"),
    (7, " is of type int; give a list"),
    ((text for text in "ab"), " is of type generator; give a list"),
    (iter(["a", "b"]), " is of type list_iterator; give a list"),
    ({"a": 1, "b": 2}, " is of type dict; give a list"),
    ({"a", "b"}, " is of type set; give a list"),
    ("ab", " is one string, 'ab'"),
    (b"ab", " is one string, b'ab'"),
    (["a"], " has 1 entries for 2 images"),
]
NO_PROMPT = [
    ([None, None], r"\[0\] is a NoneType; a prompt is a string"),
    (["a", 3], r"\[1\] is a int; a prompt is a string"),
    ([["a"], ["b"]], r"\[0\] is a list; a prompt is a string"),
    (["a", b"b"], r"\[1\] is a bytes; a prompt is a string"),
    (["a", " "], r"\[1\] is empty"),
]


@pytest.mark.parametrize(("prompts", "says"), NO_PROMPTS + NO_PROMPT)
@pytest.mark.parametrize("who", ["check_prompts", "ListenerReward", "RemoteReward"])
def test_prompts_are_checked_before_anything_is_made_of_them(who, prompts, says, monkeypatch):
    images = [np.zeros((8, 8, 3), np.float32)] * 2
    remote = RemoteReward("http://127.0.0.1:9")
    monkeypatch.setattr(remote, "_post", lambda *_: pytest.fail("something was sent"))
    calls = {
        "check_prompts": lambda: check_prompts(prompts, 2),
        "ListenerReward": lambda: ListenerReward("no judge is loaded")(images, prompts),
        "RemoteReward": lambda: remote(images, prompts),
    }
    with pytest.raises(InputError, match=rf"^prompts{says}"):
        calls[who]()


@pytest.mark.parametrize("prompts", [["a", "b"], ("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], object)])
def test_lists_tuples_and_arrays_of_text_are_prompts(prompts):
    check_prompts(prompts, 2)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (None, "prompts is of type NoneType; give a list"),
        (7, "prompts is of type int; give a list"),
        ((text for text in "a"), "prompts is of type generator; give a list"),
        ("a", "prompts is the single text 'a'"),
        ([None], r"prompts\[0\] is a NoneType; a prompt is a string"),
        ([["a"]], r"prompts\[0\] is a list; a prompt is a string"),
        (["a", "b"], "lengths 2, 1 and 1"),
    ],
)
def test_questions_are_checked_before_their_length(prompts, says):
    with pytest.raises(InputError, match=says):
        check_questions(prompts, ["first.png"], ["second.png"])
    check_questions([""], ["first.png"], ["second.png"])


@pytest.mark.parametrize("prompt", [["a"], None, 3, b"a"])
def test_a_judge_takes_one_text(prompt):
    tiny = Judge.from_pretrained("tiny")
    image = np.zeros((8, 8, 3), np.float32)
    for ask in (tiny.compare, ListenerReward(tiny).compare):
        with pytest.raises(InputError, match=r"^prompts\[0\] is a .*; a prompt is a string"):
            ask(prompt, image, image)
    for rank in (tiny.rank, ListenerReward(tiny).rank):
        with pytest.raises(InputError, match="a prompt is a string"):
            rank(prompt, [image, image + 1])
