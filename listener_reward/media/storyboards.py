"""Storyboards: a clip as one picture, so that whatever takes images takes clips."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

from PIL import Image

from listener_reward.errors import InputError
from listener_reward.media.clips import Clip, Visual
from listener_reward.media.images import MAX_SIDE, ImageLike, Picture, entries_of, to_picture
from listener_reward.media.videos import FRAMES, is_video, read_clip

_GAP = 4
"""White pixels between the frames of a storyboard, so that two frames do not read as one picture."""


def storyboard(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames as one picture: a grid in reading order, no larger than `MAX_SIDE` a side, so that nothing resizes it."""
    if not frames:
        raise InputError("frames is empty; a storyboard needs at least one")
    rows, columns = _grid(len(frames))
    width, height = frames[0].size
    room = (MAX_SIDE - _GAP * (columns - 1)) // columns, (MAX_SIDE - _GAP * (rows - 1)) // rows
    scale = min(1.0, room[0] / width, room[1] / height)
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    size = columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP
    board = Image.new("RGB", size, "white")
    for place, frame in enumerate(frames):
        cell = frame if frame.size == (width, height) else frame.resize((width, height), Image.Resampling.LANCZOS)
        board.paste(cell, (place % columns * (width + _GAP), place // columns * (height + _GAP)))
    return board


def _grid(n: int) -> tuple[int, int]:
    rows = math.isqrt(n)
    return rows, math.ceil(n / rows)


def to_still(visual: Visual) -> Picture:
    """A picture as it is, a clip as its storyboard."""
    return visual if isinstance(visual, Picture) else to_picture(storyboard([frame.image for frame in visual.frames]))


def to_visual(media: Any, *, field: str = "image") -> Visual:
    """What a judge compares: a clip or a video file as a `Clip`, anything else that `images.to_picture` reads.

    Raises:
        InputError: nothing readable is there.
    """
    if isinstance(media, Clip) or (isinstance(media, (str, bytes, os.PathLike)) and is_video(media)):
        return read_clip(media, field=field)
    return to_picture(cast("ImageLike", media), field=field)


def to_visuals(batch: Any, *, field: str = "images") -> list[Visual]:
    """A batch of pictures or clips; see `images.entries_of` for what a batch is.

    Raises:
        InputError: an entry that cannot be read, or no batch.
    """
    return [to_visual(media, field=name) for name, media in entries_of(batch, field=field)]


def as_picture(
    media: Any, *, frames: int = FRAMES, fps: float | None = None, rate: float | None = None, field: str = "image"
) -> Image.Image:
    """An image as it is, a video as its storyboard, for hosts that hand over either.

    A video is an array of rank 4, a list of frames, or a file that is a video; everything else is an image, and so is
    an animation that `images.to_pil` can read.
    """
    if is_video(media):
        return to_still(read_clip(media, frames=frames, fps=fps, rate=rate, field=field)).image
    return to_picture(media, field=field).image


def as_pictures(videos: Any, *, field: str = "videos", **reading: Any) -> list[Image.Image]:
    """A batch of videos as storyboards; `reading` is `read_clip`'s."""
    return [to_still(clip).image for clip in read_clips(videos, field=field, **reading)]


def read_clips(videos: Any, *, field: str = "videos", **reading: Any) -> list[Clip]:
    """A batch of videos by `read_clip`, which says what a video is and what `reading` may hold.

    Raises:
        InputError: this is one video, or an entry that cannot be read.
    """
    if isinstance(videos, (str, bytes, os.PathLike, Image.Image, Clip)) or getattr(videos, "ndim", 5) == 4:
        raise InputError(f"{field} is one video and not a batch; wrap it in a list")
    if not isinstance(videos, Iterable):
        raise InputError(f"{field} is a {type(videos).__name__}; give a list of videos, or an array of rank 5")
    entries = cast("Iterable[Any]", videos)
    return [read_clip(video, field=f"{field}[{i}]", **reading) for i, video in enumerate(entries)]
