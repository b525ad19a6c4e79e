"""A clip: a few frames of a video and when each is shown, whoever reads it and whatever model looks at it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from listener_reward.errors import InputError
from listener_reward.media.images import Picture

ASSUMED_RATE = 2.0
"""Frames per second where the times are not known: what Qwen-VL's own utilities sample of a video, and so the distance
between frames that these models have seen most."""

ClipView = Literal["storyboard", "frames", "clip", "video"]
"""How a judge looks at a clip:

- `storyboard`: as one picture, a grid of its frames in reading order. One comparison a pair; for large judges, which
  read small print.
- `frames`: frame against frame of the same place, and the mean of the verdicts. As many comparisons as frames, no
  notion of motion; the one for a judge that knows single pictures, such as the tiny one.
- `video`: as a video of the chat, through the model's own video input, with the time of each frame. What a Qwen-VL was
  trained to watch videos by. Two frames are one patch, so each costs half of an image.
- `clip`: its frames one after another in the chat, as several images: all detail, no time.
"""


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are looked at, all of one size."""

    frames: tuple[Picture, ...]
    seconds: tuple[float, ...] | None = None
    """When each is shown, from the first frame of the video on; None where the video's frame rate is not known."""

    @property
    def times(self) -> tuple[float, ...]:
        """`seconds`, or what is assumed: frames at `ASSUMED_RATE`.

        Frames all shown at one time, which a video of a single frame gives, have no rate either.
        """
        if self.seconds is None or self.seconds[-1] <= self.seconds[0]:
            return assumed_times(len(self.frames))
        return self.seconds

    @property
    def spacing(self) -> float:
        """Seconds from one frame to the next, on average; above 0."""
        return spacing_of(self.times)

    @cached_property
    def looks(self) -> bytes:
        """A digest of the frames without their times, 32 bytes: all that a vision tower sees."""
        return hashlib.sha256(b"".join([b"clip", *(frame.digest for frame in self.frames)])).digest()

    @cached_property
    def digest(self) -> bytes:
        """A digest of frames and times, 32 bytes: clips of equal frames at other times are other clips."""
        return hashlib.sha256(self.looks + struct.pack(f"<{len(self.times)}d", *self.times)).digest()

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded frames, each distinct one counted once."""
        return sum(frame.nbytes for frame in {frame.digest: frame for frame in self.frames}.values())


def frame_by_frame(one: Clip, other: Clip, fields: tuple[str, str]) -> list[tuple[Picture, Picture]]:
    """The frames of the same place of both clips.

    Raises:
        InputError: one has more frames; `fields` are the names of both in the message.
    """
    if len(one.frames) != len(other.frames):
        raise InputError(
            f"{fields[0]} has {len(one.frames)} frames and {fields[1]} {len(other.frames)}; they are compared frame by "
            "frame: read both with the same number of frames"
        )
    return list(zip(one.frames, other.frames, strict=True))


def assumed_times(frames: int) -> tuple[float, ...]:
    """When so many frames are shown, at `ASSUMED_RATE`."""
    return tuple(k / ASSUMED_RATE for k in range(frames))


def spacing_of(times: Sequence[float]) -> float:
    """Seconds from one frame to the next, on average; above 0."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / ASSUMED_RATE


Visual: TypeAlias = Picture | Clip
"""What a judge compares: a picture or a clip. Both have a `digest`, and `nbytes`."""
