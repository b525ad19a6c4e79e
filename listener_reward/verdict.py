"""A judge's result for one pair: `Verdict`, its `Thought`s, and the `Mode` of judging. No model is loaded."""

# What a caller or a file gives need not be what is annotated, and is checked all the same.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from listener_reward.errors import InputError, JudgeError
from listener_reward.pairs import PromptLike, as_prompt

Aggregate = Literal["mean", "majority", "listener", "both"]
Orders = Literal["both", "one"]
LISTENING: tuple[Aggregate, ...] = ("listener", "both")
"""The aggregates that need a listener."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How a verdict is made. A calibration belongs to one mode: more thoughts make a verdict more certain."""

    think: bool = True
    thoughts: int = 1
    """Thoughts in each order; 1 where there are none."""
    aggregate: Aggregate = "mean"
    orders: Orders = "both"
    early_stop: float | None = None

    @property
    def planned(self) -> int:
        """How many judgements a verdict rests on, unless it stops early."""
        return self.thoughts * (2 if self.orders == "both" else 1)

    def __str__(self) -> str:
        stop = "" if self.early_stop is None else f", early stop {self.early_stop:g}"
        thoughts = f"{self.thoughts} thought{'s' * (self.thoughts > 1)} an order" if self.think else "no thoughts"
        return f"{thoughts}, aggregate {self.aggregate!r}, orders {self.orders!r}{stop}"

    @classmethod
    def from_dict(cls, saved: Any) -> Mode:
        """Reads a mode that `dataclasses.asdict` wrote.

        Raises:
            InputError: it is something else.
        """
        try:
            mode = cls(**saved)
        except TypeError:
            mode = None
        if (
            mode is None
            or not (isinstance(mode.think, bool) and isinstance(mode.thoughts, int) and mode.thoughts >= 1)
            or mode.aggregate not in get_args(Aggregate)
            or mode.orders not in get_args(Orders)
            or not isinstance(mode.early_stop, int | float | None)
        ):
            names = ", ".join(field.name for field in fields(cls))
            raise InputError(f"calibration has mode {saved!r}; give {names} as a card has them")
        return mode


@dataclass(frozen=True, slots=True)
class Thought:
    """One sampled thought, with both models' probabilities.

    Every field is about the caller's images, in whichever order the models saw them.
    """

    text: str
    order: Literal["as given", "swapped"]
    """The order of the two images in the question. With `orders="both"`, half of the thoughts are sampled swapped, so
    that a position bias cancels."""
    answer: Literal[1, 2] | None
    """The image that the completion chose, 1 being the caller's first; None for a malformed completion."""
    p_first: float
    """The reasoner's probability, after this thought, that the first image is preferred, in [0, 1]."""
    listener_p_first: float | None
    """The listener's probability after reading the thought, in [0, 1]; None without a listener."""
    contradicted: bool | None
    """Whether the listener prefers the other image than `answer`; None without a listener or an answer."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's result for one pair. Swapping the images gives `1 - p_first` exactly."""

    p_first: float
    """Calibrated probability that people prefer the first image, in [0, 1]."""
    preferred: Literal[1, 2] | None
    """The preferred image; None for an exact tie, and where `p_first` lies within the calibration's tie band."""
    thoughts: tuple[Thought, ...]
    """The sampled thoughts, in the order of sampling; empty if the judge did not think."""
    listener_p_first: float | None
    """The listener's mean probability over the thoughts, in [0, 1]; None without a listener."""
    contradicted: bool | None
    """Whether the listener prefers the other image than the reasoner; None without a listener or a preference."""
    position_gap: float
    """p_first in the given order, minus p_first in the swapped order, in [-1, 1]; 0 is no position bias.

    Measured before the final calibration curve, for the model or models that decide; with `aggregate="both"`, the mean
    of the two gaps. NaN if only one order was asked."""
    malformed: int
    """How many of the thoughts were malformed."""
    by_order: tuple[float | None, float | None] = (None, None)
    """p_first in the given order and in the swapped order, each in [0, 1]. Their difference is `position_gap`. None for
    an order that was not asked."""
    label_mass: float | None = None
    """The two labels' total probability at the reasoner's answer slot, in [0, 1], the mean over its judgements; near 0
    the model would have answered in another format. None for a judge that has no answer slot."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; the thoughts become a list of dicts."""
        return asdict(self) | {
            "thoughts": [thought.to_dict() for thought in self.thoughts],
            "by_order": list(self.by_order),
        }


@runtime_checkable
class PairJudge(Protocol):
    """Whatever judges pairs: a `Judge`, another model (`peers`), or a class of the user's own.

    `isinstance(x, PairJudge)` checks that `x` has these two members.
    """

    name: str
    """The judge's name in tables and logs."""

    def compare_many(
        self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        """One verdict for each pair of images or clips.

        A prompt is a text, or a `Prompt` with source images or a criterion; a judge that knows none of them refuses it
        by `pairs.plain_texts`.

        Swapping the two gives exactly `1 - p_first`. `think` None is the judge's own setting; a judge that cannot think
        ignores it.

        Raises:
            InputError: unusable prompts or images.
            JudgeError: the judge broke, so that there is no verdict.
        """
        ...


def checked(verdicts: Sequence[Verdict], prompts: Sequence[PromptLike], who: str) -> list[Verdict]:
    """The verdicts on pairs of these prompts, of a judge that may be anybody's.

    Raises:
        JudgeError: there are more or fewer of them, or one has a p_first outside [0, 1], as NaN is. `who` is named.
    """
    if len(verdicts) != len(prompts):
        raise JudgeError(f"{who} gave {len(verdicts)} verdicts on {len(prompts)} pairs")
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        if not 0 <= verdict.p_first <= 1:
            raise JudgeError(f"{who} answered p_first = {verdict.p_first} for prompt {as_prompt(prompt).text!r}")
    return list(verdicts)
