"""Storyboards: a clip as one picture, so that whatever takes images takes clips, and back.

Where the judge is to be told when each frame is shown, the times are written as pixels into a strip below the frames:
so they come through whatever copies, compares or keeps a picture, and two clips of equal frames at different times are
different pictures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from listener_reward.errors import InputError
from listener_reward.media.clips import Clip
from listener_reward.media.images import MAX_SIDE, to_pil
from listener_reward.media.videos import FRAMES, is_video, read_clip

_GAP = 4
"""White pixels between the frames of a storyboard, so that two frames do not read as one picture."""

_MARK = b"seconds:"
"""What a strip of times begins with."""


def storyboard(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames as one picture: a grid in reading order, no larger than `MAX_SIDE` a side, so that nothing resizes it."""
    return _board(frames, MAX_SIDE)


def timed_storyboard(clip: Clip) -> Image.Image:
    """A clip as one picture, with a strip of its times below: `read_timed` gives both back to the bit."""
    times = math.nan if clip.seconds is None else clip.seconds
    data = _MARK + np.broadcast_to(np.asarray(times, "<f8"), len(clip.frames)).tobytes()
    board = _board(clip.frames, MAX_SIDE - math.ceil(len(data) / 3))  # enough for a board one pixel wide
    rows = math.ceil(len(data) / (3 * board.width))
    strip = Image.frombytes("RGB", (board.width, rows), data.ljust(3 * board.width * rows, b"\0"))
    whole = Image.new("RGB", (board.width, board.height + rows))
    whole.paste(board, (0, 0))
    whole.paste(strip, (0, board.height))
    return whole


def read_timed(board: Image.Image, n: int) -> Clip:
    """The clip of `n` frames that a storyboard shows; of one without a strip the times are not known."""
    length = len(_MARK) + 8 * n
    height = board.height - math.ceil(length / (3 * board.width))
    if height >= 1:
        data = board.crop((0, height, board.width, board.height)).tobytes()
        if data.startswith(_MARK):
            times = np.frombuffer(data[len(_MARK) : length], "<f8")
            board = board.crop((0, 0, board.width, height))
            return Clip(tuple(cut(board, n)), None if np.isnan(times).any() else tuple(times.tolist()))
    return Clip(tuple(cut(board, n)), None)


def _board(frames: Sequence[Image.Image], height_limit: int) -> Image.Image:
    if not frames:
        raise InputError("frames is empty; a storyboard needs at least one")
    rows, columns = _grid(len(frames))
    width, height = frames[0].size
    room = (MAX_SIDE - _GAP * (columns - 1)) // columns, (height_limit - _GAP * (rows - 1)) // rows
    scale = min(1.0, room[0] / width, room[1] / height)
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    size = columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP
    board = Image.new("RGB", size, "white")
    for place, frame in enumerate(frames):
        cell = frame if frame.size == (width, height) else frame.resize((width, height), Image.Resampling.LANCZOS)
        board.paste(cell, (place % columns * (width + _GAP), place // columns * (height + _GAP)))
    return board


def cut(board: Image.Image, n: int) -> list[Image.Image]:
    """The `n` frames of a storyboard."""
    rows, columns = _grid(n)
    width, height = (board.width + _GAP) / columns - _GAP, (board.height + _GAP) / rows - _GAP
    if width != int(width) or height != int(height) or min(width, height) < 1:
        raise InputError(f"an image of {board.width} x {board.height} pixels is no storyboard of {n} frames")
    width, height = int(width), int(height)
    corners = [(k % columns * (width + _GAP), k // columns * (height + _GAP)) for k in range(n)]
    return [board.crop((left, top, left + width, top + height)) for left, top in corners]


def _grid(n: int) -> tuple[int, int]:
    rows = math.isqrt(n)
    return rows, math.ceil(n / rows)


def as_picture(
    media: Any, *, frames: int = FRAMES, fps: float | None = None, rate: float | None = None, field: str = "image"
) -> Image.Image:
    """An image as it is, a video as its storyboard, for hosts that hand over either.

    A video is an array of rank 4, a list of frames, or a file that is a video; everything else is an image, and so is
    an animation that `images.to_pil` can read.
    """
    if is_video(media):
        return storyboard(read_clip(media, frames=frames, fps=fps, rate=rate, field=field).frames)
    return to_pil(media, field=field)


def as_pictures(
    videos: Any,
    *,
    frames: int = FRAMES,
    fps: float | None = None,
    rate: float | None = None,
    timed: bool = False,
    field: str = "videos",
) -> list[Image.Image]:
    """A batch of videos as storyboards, with a strip of times if `timed`; see `read_clip` for what a video is."""
    if isinstance(videos, (str, bytes, os.PathLike, Image.Image)) or getattr(videos, "ndim", 5) == 4:
        raise InputError(f"{field} is one video and not a batch; wrap it in a list")
    if not isinstance(videos, Iterable):
        raise InputError(f"{field} is a {type(videos).__name__}; give a list of videos, or an array of rank 5")
    clips = (
        read_clip(video, frames=frames, fps=fps, rate=rate, field=f"{field}[{i}]") for i, video in enumerate(videos)
    )
    return [timed_storyboard(clip) if timed else storyboard(clip.frames) for clip in clips]
