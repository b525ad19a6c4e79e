"""One video, in whatever form it comes, to the few frames of it that are looked at, and when each is shown."""

from __future__ import annotations

import io
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from listener_reward.errors import InputError, MissingExtraError
from listener_reward.media.clips import Clip
from listener_reward.media.images import MAX_PIXELS, Picture, to_picture

FRAMES = 8
"""Frames of a clip that are looked at, as in UnifiedReward and Pref-GRPO."""

MAX_FRAMES = 64

_ANIMATED = ("GIF", "WEBP", "PNG")

HEAD_BYTES = 16
"""First bytes of a file that tell its container."""

_DEMUXERS = ((4, b"ftyp", "mov"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"))
"""Where a container says what it is, and FFmpeg's name for it. No other is opened: some, such as playlists, make FFmpeg
read further files, or the network."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A video of which only the wanted frames are made into pictures."""

    count: int
    seconds: list[float] | None
    pick: Callable[[list[int]], list[Picture]]
    """Pictures of the frames at ascending positions, which may repeat."""


def read_clip(
    video: Any,
    *,
    frames: int = FRAMES,
    fps: float | None = None,
    rate: float | None = None,
    field: str = "video",
) -> Clip:
    """A few frames of one video, as RGB. A `Clip` is handed back as it is.

    Args:
        video: an array or tensor `(T, H, W, C)` or `(T, C, H, W)`, uint8 or floats in [0, 1]; a sequence of frames; or
            a file, by its path or its bytes: mp4, mov, webm, mkv and avi by PyAV, animated gif, webp and png by Pillow.
        frames: how many; a video of fewer frames repeats some.
        fps: the video's frames per second. Files know theirs, and this overrides it; arrays and lists do not, and
            diffusers does not say it either.
        rate: frames to look at per second of the video, from its start; a shorter video repeats its last frame. None
            spreads them evenly from the first frame to the last, whatever the time between them. Set it where videos of
            different rates or lengths are to be compared at the same moments.

    Raises:
        InputError: nothing readable is there, or `rate` is given and the video's own is unknown.
        MissingExtraError: a video file, and PyAV is not installed.
    """
    if isinstance(video, Clip):
        return video
    check_frames(frames)
    for name, value in (("fps", fps), ("rate", rate)):
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise InputError(f"{name} is {value!r}; give frames per second, above 0")
    source = _open(video, field)
    if source.count < 1:
        raise InputError(f"{field} has no frames")
    seconds = source.seconds if fps is None else [k / fps for k in range(source.count)]
    if rate is None:
        chosen = [round(k * (source.count - 1) / max(frames - 1, 1)) for k in range(frames)]
    elif seconds is None:
        raise InputError(f"{field} does not know its frame rate, which rate={rate:g} needs; give it as fps=")
    else:
        chosen = [max(bisect_right(seconds, k / rate + 1e-6) - 1, 0) for k in range(frames)]
    pictures = source.pick(chosen)
    return Clip(tuple(pictures), None if seconds is None else tuple(seconds[k] for k in chosen))


def check_frames(frames: Any) -> None:
    """Raises InputError unless so many frames can be looked at."""
    if not isinstance(frames, int) or not 1 <= frames <= MAX_FRAMES:
        raise InputError(f"frames is {frames!r}; choose 1 to {MAX_FRAMES}")


def is_video(media: Any) -> bool:
    """A clip, an array of rank 4, a list of frames or a video file; an animation that Pillow reads is not.

    A file is opened for its first bytes.
    """
    if isinstance(media, (Clip, list, tuple)):
        return True
    if isinstance(media, (str, os.PathLike, bytes)):
        return _demuxer(media) is not None
    return getattr(media, "ndim", 0) == 4


def container(head: bytes) -> str | None:
    """FFmpeg's name of the container (mov for mp4 too, matroska for webm too, avi) whose file starts with `head`."""
    return next((name for at, magic, name in _DEMUXERS if head[at:].startswith(magic)), None)


def _open(video: Any, field: str) -> _Source:
    if isinstance(video, (str, os.PathLike, bytes)):
        return _open_file(video, field)
    if isinstance(video, Image.Image):
        raise InputError(f"{field} is a PIL image, one frame; give a list of frames, an array of rank 4 or a file")
    shape = getattr(video, "shape", None)
    if shape is not None and len(shape) != 4:
        raise InputError(f"{field} has shape {tuple(shape)}; one video is (T, H, W, C) or (T, C, H, W)")
    if not isinstance(video, Sequence) and shape is None:
        raise InputError(f"{field} is a {type(video).__name__}; give a list of frames, an array of rank 4 or a file")

    def pick(chosen: list[int]) -> list[Picture]:
        pictures = {k: to_picture(video[k], field=f"{field}[{k}]") for k in dict.fromkeys(chosen)}
        return [pictures[k] for k in chosen]

    return _Source(len(video), None, pick)


def _open_file(video: str | os.PathLike[str] | bytes, field: str) -> _Source:
    if not isinstance(video, bytes):
        if "://" in str(video):
            raise InputError(f"{field} is the URL {str(video)[:200]!r}; download it and give the file")
        if not os.path.isfile(video):
            raise InputError(f"{field} is {str(video)[:200]!r}, where there is no file; check the path")
    demuxer = _demuxer(video)
    return _open_animation(video, field) if demuxer is None else _open_container(video, demuxer, field)


def _demuxer(video: str | os.PathLike[str] | bytes) -> str | None:
    """FFmpeg's name of the file's format, None where it is not one of ours."""
    if isinstance(video, bytes):
        return container(video[:HEAD_BYTES])
    try:
        with open(video, "rb") as file:
            return container(file.read(HEAD_BYTES))
    except (OSError, ValueError):  # a ValueError for a name with a null byte
        return None


def _open_animation(video: str | os.PathLike[str] | bytes, field: str) -> _Source:
    """Pillow's animations, with the time that each frame is shown for."""

    def opened() -> Image.Image:
        return Image.open(io.BytesIO(video) if isinstance(video, bytes) else video, formats=_ANIMATED)

    try:
        with opened() as animation:
            if animation.width * animation.height > MAX_PIXELS:
                raise InputError(f"{field} is {animation.width} x {animation.height} pixels; reduce it")
            durations = [frame.info.get("duration", 0) / 1000 for frame in ImageSequence.Iterator(animation)]
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
        raise InputError(
            f"{field} is no video that can be read ({type(error).__name__}); give mp4, mov, webm, mkv, avi or gif"
        ) from error
    starts = [0.0, *np.cumsum(durations[:-1]).tolist()]

    def pick(chosen: list[int]) -> list[Picture]:
        with opened() as animation:
            pictures = {}
            for k in dict.fromkeys(chosen):
                animation.seek(k)
                pictures[k] = to_picture(animation.convert("RGBA"), field=f"{field}[{k}]")
        return [pictures[k] for k in chosen]

    return _Source(len(durations), starts if all(durations) else None, pick)


def _open_container(video: str | os.PathLike[str] | bytes, demuxer: str, field: str) -> _Source:
    """A video file by PyAV. The first pass reads the packets' times and decodes nothing; the second stops early."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError('reading video files needs PyAV: pip install "listener-reward[video]"') from error

    @contextmanager
    def opened() -> Iterator[Any]:
        # An open file and a named format, so that FFmpeg itself opens nothing.
        with (
            io.BytesIO(video) if isinstance(video, bytes) else open(video, "rb") as file,
            av.open(file, format=demuxer) as container,
        ):
            yield container

    def unreadable(error: Exception) -> InputError:
        return InputError(f"{field} does not decode ({type(error).__name__}: {error}); save it anew")

    try:
        with opened() as container:
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                raise InputError(f"{field} is larger than {MAX_PIXELS:,} pixels a frame; reduce it")
            packets = [packet for packet in container.demux(stream) if packet.size]
            rate = float(stream.average_rate) if stream.average_rate else None
            stamps = sorted(float(packet.pts * packet.time_base) for packet in packets if packet.pts is not None)
    except (av.FFmpegError, IndexError) as error:
        raise unreadable(error) from error
    if len(stamps) == len(packets):
        seconds = [stamp - stamps[0] for stamp in stamps]
    else:
        seconds = None if rate is None else [k / rate for k in range(len(packets))]

    def pick(chosen: list[int]) -> list[Picture]:
        wanted, pictures, last = set(chosen), {}, None
        try:
            with opened() as container:
                for k, frame in enumerate(container.decode(video=0)):
                    if k in wanted:
                        last = pictures[k] = to_picture(frame.to_image(), field=f"{field}[{k}]")
                    if k >= chosen[-1]:
                        break
        except av.FFmpegError as error:
            raise unreadable(error) from error
        if last is None:
            raise InputError(f"{field} holds no frame that decodes; save it anew")
        return [pictures.get(k, last) for k in chosen]  # a file cut short lacks its last frames

    return _Source(len(packets), seconds, pick)
