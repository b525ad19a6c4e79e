"""A clip: a few frames of a video and when each is shown, whoever reads it and whatever model looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

ASSUMED_RATE = 2.0
"""Frames per second where the times are not known: what Qwen-VL's own utilities sample of a video, and so the distance
between frames that these models have seen most."""


@dataclass(frozen=True, slots=True)
class Clip:
    """The frames of a video that are looked at, all of one size."""

    frames: tuple[Image, ...]
    seconds: tuple[float, ...] | None
    """When each is shown, from the first frame of the video on; None where the video's frame rate is not known."""

    @property
    def times(self) -> tuple[float, ...]:
        """`seconds`, or what is assumed: frames at `ASSUMED_RATE`.

        Frames all shown at one time, which a video of a single frame gives, have no rate either.
        """
        if self.seconds is None or self.seconds[-1] <= self.seconds[0]:
            return tuple(k / ASSUMED_RATE for k in range(len(self.frames)))
        return self.seconds

    @property
    def spacing(self) -> float:
        """Seconds from one frame to the next, on average; above 0."""
        times = self.times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / ASSUMED_RATE
