"""The shaped reward of arXiv 2506.22832: pure arithmetic from trace, label and the listener's confidence.

    r = r_format + 0.5 * r_accuracy + 0.5 * r_listener

`p_first` is the fraction of people who prefer the first image, in [0, 1]. `p_listener` is the listener's probability,
in [0, 1], that the first image is preferred, given the thought. A malformed completion gets 0 for every part: it is
data about the policy. A listener that fails raises, and never reaches this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from listener_reward.errors import check_choice
from listener_reward.trace import Trace

WEIGHTS = (1.0, 0.5, 0.5)
"""Weights of format, accuracy and listener in the paper's reward."""


def format_reward(trace: Trace) -> float:
    """1 for a well-formed completion, else 0."""
    return float(trace.well_formed)


def accuracy_reward(trace: Trace, p_first: float) -> float:
    """The fraction of people who agree with the answer, in [0, 1]. With a hard label: 1 if right, 0 if wrong."""
    if trace.answer is None:
        return 0.0
    return p_first if trace.answer == 1 else 1.0 - p_first


def listener_reward(trace: Trace, p_first: float, p_listener: float | None) -> float:
    """`1 - |p_listener - p_first|`, in [0, 1]. With a hard label: the listener's probability of the right image."""
    if trace.answer is None:
        return 0.0
    if p_listener is None:
        raise ValueError("p_listener is None for a well-formed trace; a listener that failed must raise instead")
    return 1.0 - abs(p_listener - p_first)


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the paper: docs/method.md has each equation and its source
# ---------------------------------------------------------------------------------------------------------------------

Combine = Literal["mean", "least"]
"""How the rewards of several listeners become one."""


def counterfactual_reward(trace: Trace, p_first: float, p_listener: float, p_exchanged: float) -> float:
    """`max(0, (2 p_first - 1) (p_listener - p_exchanged))`, in [0, 1]: what of a thought's force the images give it.

    `p_exchanged` is the listener's probability of whichever image stands in first place, when the two images have
    changed places and the thought is the same. A thought that persuades whatever stands before it earns nothing; one
    that the exchange turns into a false one earns what it loses. A tie earns nothing.
    """
    if trace.answer is None:
        return 0.0
    return max(0.0, (2 * p_first - 1) * (p_listener - p_exchanged))


def gain_reward(trace: Trace, p_first: float, p_listener: float, p_alone: float) -> float:
    """`max(0, |p_alone - p_first| - |p_listener - p_first|)`, in [0, 1]: how much nearer to the label a thought brings
    the listener than it was without one, at `p_alone`.

    A loss counts as no gain. Without that bound the reward would differ from `listener_reward` by a number that is the
    same for all completions of a group, and so teach the same.
    """
    if trace.answer is None:
        return 0.0
    return max(0.0, abs(p_alone - p_first) - abs(p_listener - p_first))


def smoothed_label(p_first: float, p_alone: float, smoothing: float) -> float:
    """The label, moved by `smoothing` in [0, 1] towards the listener's own view where the two prefer different images.

    It is the listener's view without the thought, because the policy could move the other one.
    """
    if (p_first - 0.5) * (p_alone - 0.5) >= 0:
        return p_first
    return (1 - smoothing) * p_first + smoothing * p_alone


def combined(rewards: Sequence[float], how: Combine) -> float:
    """The rewards by several listeners as one: their mean, or that by the least convinced of them."""
    check_choice("how", how, get_args(Combine))
    return min(rewards) if how == "least" else math.fsum(rewards) / len(rewards)


def contradicted(trace: Trace, p_listener: float) -> bool | None:
    """Whether the listener, having read the thought, prefers the other image; None for a malformed trace."""
    if trace.answer is None:
        return None
    return p_listener < 0.5 if trace.answer == 1 else p_listener > 0.5
