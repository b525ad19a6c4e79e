"""What a judge says of a pair, one `Verdict` made of `Thought`s, and the `Mode` in which it was made. No model."""

# What a caller or a file gives need not be what is annotated, and is checked all the same.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from listener_reward.errors import InputError

Aggregate = Literal["mean", "majority", "listener", "both"]
Orders = Literal["both", "one"]
LISTENING: tuple[Aggregate, ...] = ("listener", "both")
"""The aggregates that cannot do without a listener."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to make a verdict. A calibration belongs to one: more thoughts are surer than a curve for fewer knows."""

    think: bool = True
    thoughts: int = 1
    """Thoughts in each order; 1 where there are none."""
    aggregate: Aggregate = "mean"
    orders: Orders = "both"
    early_stop: float | None = None

    @property
    def planned(self) -> int:
        """How many answers a verdict rests on, unless it stops early."""
        return self.thoughts * (2 if self.orders == "both" else 1)

    def __str__(self) -> str:
        stop = "" if self.early_stop is None else f", early stop {self.early_stop:g}"
        thoughts = f"{self.thoughts} thought{'s' * (self.thoughts > 1)} an order" if self.think else "no thoughts"
        return f"{thoughts}, aggregate {self.aggregate!r}, orders {self.orders!r}{stop}"

    @classmethod
    def from_dict(cls, saved: Any) -> Mode:
        """Reads what `dataclasses.asdict` made of it.

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
    """One sampled line of reasoning, and what the listener made of it.

    Every number is about the caller's images, whichever order the reasoner saw them in.
    """

    text: str
    order: Literal["as given", "swapped"]
    """How the reasoner saw the pair; half of a judge's thoughts see it swapped, so that position cannot win."""
    answer: Literal[1, 2] | None
    """The image that the thought chose, 1 being the caller's first; None for a malformed completion."""
    p_first: float
    """This thought's own probability that the first image is preferred, in [0, 1]."""
    listener_p_first: float | None
    """The listener's probability after reading the thought, in [0, 1]; None where no listener read it."""
    contradicted: bool | None
    """Whether the listener prefers the other image than `answer`; None without a listener or an answer."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer to one pair. Swapping the images gives `1 - p_first` exactly."""

    p_first: float
    """Calibrated probability that people prefer the first image, in [0, 1]."""
    preferred: Literal[1, 2] | None
    """The preferred image; None for an exact tie, and where `p_first` lies within the calibration's tie band."""
    thoughts: tuple[Thought, ...]
    """The reasoning behind it, in the order it was sampled; empty where the judge did not think."""
    listener_p_first: float | None
    """The listener's mean probability over the thoughts, in [0, 1]; None without a listener."""
    contradicted: bool | None
    """Whether the listener prefers the other image than the reasoner; None without a listener or a preference."""
    position_gap: float
    """p_first with the pair shown in order, minus p_first with it shown swapped, in [-1, 1]; 0 is no position bias.

    Measured before the final calibration curve, for the model or models that decide; with `aggregate="both"`, the mean
    of the two gaps. NaN where the pair was shown in one order."""
    malformed: int
    """How many of the thoughts were malformed."""
    by_order: tuple[float | None, float | None] = (None, None)
    """p_first with the pair shown in order, and with it shown swapped, each in [0, 1], whose difference is
    `position_gap`; None for an order that was not asked."""
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

    `isinstance(x, PairJudge)` asks whether it has these two members.
    """

    name: str
    """What tables and logs call it."""

    def compare_many(
        self, prompts: Sequence[str], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        """One verdict for each pair of images or clips.

        Swapping the two gives exactly `1 - p_first`. `think` None is the judge's own setting; a judge that cannot think
        ignores it.

        Raises:
            InputError: unusable prompts or images.
            JudgeError: the judge broke, so that there is no verdict.
        """
        ...
