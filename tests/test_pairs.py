"""The pair: what it refuses, and that swapping is an involution."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair


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
        pair().p_first = 0.5  # type: ignore[misc]


def test_importing_pairs_and_images_loads_no_model_library():
    code = """
import sys
import listener_reward.errors, listener_reward.media.images, listener_reward.pairs
loaded = {"torch", "transformers", "datasets"} & set(sys.modules)
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
