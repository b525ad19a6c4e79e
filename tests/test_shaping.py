"""r = r_format + 0.5 * r_accuracy + 0.5 * r_listener of arXiv 2506.22832, worked by hand."""

from __future__ import annotations

import pytest

from listener_reward.shaping import (
    WEIGHTS,
    accuracy_reward,
    contradicted,
    format_reward,
    gain_reward,
    listener_reward,
)
from listener_reward.trace import Trace

FIRST, SECOND, MALFORMED = Trace("a thought", 1), Trace("a thought", 2), Trace("a thought", None)


@pytest.mark.parametrize(
    ("trace", "p_first", "p_listener", "parts", "total"),
    [
        # people: the first. Right, and the listener gives the first 0.8: 1 + 0.5 * 1 + 0.5 * 0.8
        (FIRST, 1.0, 0.8, (1, 1, 0.8), 1.9),
        # right, but the thought convinces the listener of the other image: 1 + 0.5 * 1 + 0.5 * 0.1
        (FIRST, 1.0, 0.1, (1, 1, 0.1), 1.55),
        # wrong, though the thought speaks for the right image: 1 + 0.5 * 0 + 0.5 * 0.8
        (SECOND, 1.0, 0.8, (1, 0, 0.8), 1.4),
        # people: the second. The listener's p of the right image is 1 - 0.25: 1 + 0.5 * 1 + 0.5 * 0.75
        (SECOND, 0.0, 0.25, (1, 1, 0.75), 1.875),
        (FIRST, 0.0, 1.0, (1, 0, 0), 1.0),
        # 73 of 100 people prefer the first. 1 + 0.5 * 0.73 + 0.5 * (1 - |0.53 - 0.73|)
        (FIRST, 0.73, 0.53, (1, 0.73, 0.8), 1.765),
        # the same with the second chosen: 1 + 0.5 * 0.27 + 0.5 * 0.8
        (SECOND, 0.73, 0.53, (1, 0.27, 0.8), 1.535),
        # a tie: either answer is half right, and an undecided listener is wholly right
        (FIRST, 0.5, 0.5, (1, 0.5, 1), 1.75),
        (SECOND, 0.5, 0.5, (1, 0.5, 1), 1.75),
        # a malformed completion gets nothing, whatever the listener would have said
        (MALFORMED, 1.0, 0.9, (0, 0, 0), 0.0),
        (MALFORMED, 0.0, None, (0, 0, 0), 0.0),
    ],
)
def test_hand_worked(trace, p_first, p_listener, parts, total):
    found = format_reward(trace), accuracy_reward(trace, p_first), listener_reward(trace, p_first, p_listener)
    assert found == pytest.approx(parts, abs=1e-12)
    assert sum(weight * part for weight, part in zip(WEIGHTS, found, strict=True)) == pytest.approx(total, abs=1e-12)


def test_weights_are_the_papers():
    assert WEIGHTS == (1.0, 0.5, 0.5)


def test_a_listener_that_failed_has_no_reward():
    with pytest.raises(ValueError, match="p_listener is None"):
        listener_reward(FIRST, 1.0, None)


@pytest.mark.parametrize(
    ("trace", "p_listener", "expected"),
    [
        (FIRST, 0.4, True),
        (FIRST, 0.6, False),
        (SECOND, 0.4, False),
        (SECOND, 0.6, True),
        (FIRST, 0.5, False),
        (SECOND, 0.5, False),
        (MALFORMED, 0.4, None),
    ],
)
def test_contradiction(trace, p_listener, expected):
    assert contradicted(trace, p_listener) is expected


@pytest.mark.parametrize("p_first", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("p_listener", [0.0, 0.3, 0.5, 1.0])
def test_swapping_the_pair_changes_no_reward(p_first, p_listener):
    assert accuracy_reward(FIRST, p_first) == pytest.approx(accuracy_reward(SECOND, 1 - p_first))
    assert listener_reward(FIRST, p_first, p_listener) == pytest.approx(
        listener_reward(SECOND, 1 - p_first, 1 - p_listener)
    )


# --- beyond the paper


@pytest.mark.parametrize(
    ("trace", "p_first", "p", "p_alone", "expected"),
    [
        (FIRST, 1.0, 0.9, 0.6, 0.3),  # from 0.4 off to 0.1 off
        (SECOND, 1.0, 0.9, 0.6, 0.3),
        (FIRST, 1.0, 0.5, 0.6, 0.0),  # misled by the thought
        (FIRST, 0.75, 0.8, 0.45, 0.25),  # from 0.3 off to 0.05 off
        (FIRST, 0.5, 0.5, 0.1, 0.4),
        (MALFORMED, 1.0, 0.9, 0.1, 0.0),
    ],
)
def test_a_thought_is_worth_what_it_gains(trace, p_first, p, p_alone, expected):
    assert gain_reward(trace, p_first, p, p_alone) == pytest.approx(expected)
