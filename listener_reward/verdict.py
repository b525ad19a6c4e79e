"""What a judge says of a pair: one `Verdict`, made of the `Thought`s behind it. Plain data, no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


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
    """The preferred image; None for an exact tie."""
    thoughts: tuple[Thought, ...]
    """The reasoning behind it, in the order it was sampled; empty where the judge did not think."""
    listener_p_first: float | None
    """The listener's mean probability over the thoughts, in [0, 1]; None without a listener."""
    contradicted: bool | None
    """Whether the listener prefers the other image than the verdict; None without a listener or a preference."""
    position_gap: float
    """p_first with the pair shown in order, minus p_first with it shown swapped, in [-1, 1]; 0 is no position bias."""
    malformed: int
    """How many of the thoughts were malformed."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; the thoughts become a list of dicts."""
        return asdict(self) | {"thoughts": [thought.to_dict() for thought in self.thoughts]}
