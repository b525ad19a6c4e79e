"""One video, in whatever form it comes, to the few frames of it that are looked at, and when each is shown."""

# What a caller or a file gives need not be what is annotated, and is checked all the same.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import io
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image, ImageSequence

from listener_reward.errors import InputError, MissingExtraError
from listener_reward.media.clips import Clip
from listener_reward.media.containers import demuxer, head_of
from listener_reward.media.images import MAX_PIXELS, Picture, to_picture

FRAMES = 8
"""Frames of a clip that are looked at, as in UnifiedReward and Pref-GRPO."""

MAX_FRAMES = 64

_ANIMATED = ("GIF", "WEBP", "PNG")


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
        return demuxer(head_of(cast("str | os.PathLike[str] | bytes", media))) is not None
    return getattr(media, "ndim", 0) == 4


def claimed_video_pixels(file: bytes) -> int:
    """How many pixels the `FRAMES` frames have that `read_clip` looks at, as the content of a video file says, with
    nothing decoded; 0 where it cannot be read."""
    try:
        import av

        with av.open(io.BytesIO(file), format=demuxer(head_of(file))) as reader:
            codec = reader.streams.video[0].codec_context
            return FRAMES * codec.width * codec.height
    except Exception:  # without PyAV, too; whoever reads the frames says what is wrong
        return 0


def _open(video: Any, field: str) -> _Source:
    if isinstance(video, (str, os.PathLike, bytes)):
        return _open_file(cast("str | os.PathLike[str] | bytes", video), field)
    if isinstance(video, Image.Image):
        raise InputError(f"{field} is a PIL image, one frame; give a list of frames, an array of rank 4 or a file")
    shape = getattr(video, "shape", None)
    if shape is not None and len(shape) != 4:
        raise InputError(f"{field} has shape {tuple(shape)}; one video is (T, H, W, C) or (T, C, H, W)")
    if not isinstance(video, Sequence) and shape is None:
        raise InputError(f"{field} is a {type(video).__name__}; give a list of frames, an array of rank 4 or a file")

    frames = cast("Sequence[Any]", video)

    def pick(chosen: list[int]) -> list[Picture]:
        pictures = {k: to_picture(frames[k], field=f"{field}[{k}]") for k in dict.fromkeys(chosen)}
        return [pictures[k] for k in chosen]

    return _Source(len(frames), None, pick)


def _open_file(video: str | os.PathLike[str] | bytes, field: str) -> _Source:
    if not isinstance(video, bytes):
        if "://" in str(video):
            raise InputError(f"{field} is the URL {str(video)[:200]!r}; download it and give the file")
        if not os.path.isfile(video):
            raise InputError(f"{field} is {str(video)[:200]!r}, where there is no file; check the path")
    container = demuxer(head_of(video))
    return _open_animation(video, field) if container is None else _open_container(video, container, field)


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


def _open_container(video: str | os.PathLike[str] | bytes, container: str, field: str) -> _Source:
    """A video file by PyAV. The first pass reads the packets' times and decodes nothing; the second stops early.

    What an edit list cuts away is no frame of the video: FFmpeg marks such packets, and its decoders drop them.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise MissingExtraError('reading video files needs PyAV: pip install "listener-reward[video]"') from error

    @contextmanager
    def opened() -> Generator[Any]:
        # An open file and a named format, so that FFmpeg itself opens nothing.
        with (
            io.BytesIO(video) if isinstance(video, bytes) else open(video, "rb") as file,
            av.open(file, format=container) as reader,
        ):
            yield reader

    def unreadable(error: Exception) -> InputError:
        reason = getattr(error, "strerror", None) or str(error)
        return InputError(f"{field} does not decode ({reason}); save it anew")

    try:
        with opened() as reader:
            if not reader.streams.video:
                raise InputError(f"{field} has no video in it, only {_listed(reader)}; give a file with a video")
            stream = reader.streams.video[0]
            if stream.codec_context is None:
                raise InputError(f"{field} is in a codec that FFmpeg has no decoder for; save it as H.264 or VP9")
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                raise InputError(f"{field} is larger than {MAX_PIXELS:,} pixels a frame; reduce it")
            packets = [packet for packet in reader.demux(stream) if packet.size and not packet.is_discard]
            rate = float(stream.average_rate) if stream.average_rate else None
            stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
            tick = float(stream.time_base) if stream.time_base else 0.0
    except FFmpegError as error:
        raise unreadable(error) from error
    timed = len(stamps) == len(packets)
    if timed:
        seconds = [(stamp - stamps[0]) * tick for stamp in stamps]
    else:
        seconds = None if rate is None else [k / rate for k in range(len(packets))]

    def pick(chosen: list[int]) -> list[Picture]:
        """By their times where these are known: a broken packet then costs its own frame, and moves no other."""
        wanted = sorted(set(chosen))
        pictures: dict[int, Picture] = {}
        last: Any = None
        ratio: Any = None
        try:
            with opened() as reader:
                for k, frame in enumerate(_frames(reader)):
                    at = frame.pts if timed and frame.pts is not None else None
                    while wanted and last is not None and (stamps[wanted[0]] < at if at is not None else wanted[0] < k):
                        due = wanted.pop(0)
                        pictures[due] = to_picture(_shown(last, ratio), field=f"{field}[{due}]")
                    if not wanted:
                        break
                    last, ratio = frame, reader.streams.video[0].sample_aspect_ratio
        except FFmpegError as error:
            raise unreadable(error) from error
        if last is None:
            raise InputError(f"{field} holds no frame that decodes; save it anew")
        if wanted:  # the last frame is looked at, and a file cut short lacks some
            end = to_picture(_shown(last, ratio), field=f"{field}[{wanted[0]}]")
            pictures |= dict.fromkeys(wanted, end)
        return [pictures[k] for k in chosen]

    return _Source(len(packets), seconds, pick)


def _listed(reader: Any) -> str:
    kinds = {"sound" if stream.type == "audio" else str(stream.type) for stream in reader.streams}
    return " and ".join(sorted(kinds)) or "its container"


def _frames(reader: Any) -> Iterator[Any]:
    """The shown frames of the first video, with their transparency if it has any.

    FFmpeg's own decoders of VP8 and VP9 drop it, and libvpx does not.
    """
    import av

    stream = reader.streams.video[0]
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if stream.metadata.get("alpha_mode") != "1" or decoder not in av.codecs_available:
        yield from reader.decode(stream)
        return
    context: Any = av.CodecContext.create(decoder, "r")
    for packet in reader.demux(stream):
        yield from context.decode(packet)


def _shown(frame: Any, ratio: Any) -> Image.Image:
    """A frame as players show it: its transparency kept, its pixels square, upright.

    `ratio` is a pixel's width by its height; None and 0 where the file does not say.
    """
    transparent = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    image = Image.fromarray(frame.to_ndarray(format="rgba")) if transparent else frame.to_image()
    if ratio and ratio != 1 and 1 / _MOST_STRETCH <= ratio <= _MOST_STRETCH:
        image = image.resize((max(1, round(image.width * ratio)), image.height), Image.Resampling.BICUBIC)
    turn = next((_turn(memoryview(data)) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    return image if turn is None else image.transpose(turn)


_MOST_STRETCH = 4
"""Pixels that are said to be longer than this are a file's mistake."""


def _turn(matrix: memoryview) -> Image.Transpose | None:
    """What a display matrix does to a picture, to the next quarter turn, mirrored or not; None if it does nothing.

    The matrix is nine int32: x goes to (a, b) and y to (c, d), with y pointing down.
    """
    a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].astype(float)
    straight = abs(a) + abs(d) >= abs(b) + abs(c)
    signs = (np.sign(a), 0, 0, np.sign(d)) if straight else (0, np.sign(b), np.sign(c), 0)
    turns: dict[tuple[float, ...], Image.Transpose] = {
        (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
        (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
        (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
        (0, 1, -1, 0): Image.Transpose.ROTATE_270,
        (0, -1, 1, 0): Image.Transpose.ROTATE_90,
        (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
        (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    }
    return turns.get(tuple(map(int, signs)))
