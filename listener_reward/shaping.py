"""The shaped reward of arXiv 2506.22832: pure arithmetic from trace, label and the listener's confidence.

    r = r_format + 0.5 * r_accuracy + 0.5 * r_listener

`p_first` is the fraction of people who prefer the first image, in [0, 1]. `p_listener` is the listener's probability,
in [0, 1], that the first image is preferred, given the thought. A malformed completion gets 0 for every part: it is
data about the policy. A listener that fails raises, and never reaches this module. `gain_reward` is beyond the paper.
"""

from __future__ import annotations

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


def gain_reward(trace: Trace, p_first: float, p_listener: float, p_alone: float) -> float:
    """`max(0, |p_alone - p_first| - |p_listener - p_first|)`, in [0, 1]: how much nearer to the label a thought brings
    the listener than it was without one, at `p_alone`.

    A loss counts as no gain. Without that bound the reward would differ from `listener_reward` by a number that is the
    same for all completions of a group, and so teach the same.
    """
    if trace.answer is None:
        return 0.0
    return max(0.0, abs(p_alone - p_first) - abs(p_listener - p_first))


def contradicted(trace: Trace, p_listener: float) -> bool | None:
    """Whether the listener, having read the thought, prefers the other image; None for a malformed trace."""
    if trace.answer is None:
        return None
    return p_listener < 0.5 if trace.answer == 1 else p_listener > 0.5
