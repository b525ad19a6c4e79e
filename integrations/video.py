"""Videos, judged by a judge of images: `rank_videos`, and `VideoReward` for trainers.

A clip is first reduced to a few frames and these to one picture, its *storyboard*: a grid of the frames in reading
order. A storyboard is an image like any other, so whatever takes images takes clips. What the judge makes of it is the
strategy:

- `storyboard`: it is shown the grid as it is. One comparison a pair; for large judges, which read small print.
- `frames`: the grid is cut up again, frames of the same place are compared, and the probabilities averaged. As many
  comparisons as frames, no notion of motion; the one for a judge that knows single pictures, such as the tiny one.
- `clip`: the frames of a side stand in the chat one after another, as several images. The backbone's own way of reading
  a video, less the time stamps. A judge trained on pairs of single images has never been asked so: measure it first.

The video tokens of Qwen-VL (`<|video_pad|>`) are not used: they need torchvision's video processor, merge frames by two
before the model sees them, and no judge here is trained on them.
"""

from __future__ import annotations

import io
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image, ImageSequence

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import InputError, MissingExtraError
from listener_reward.images import MAX_PIXELS, MAX_SIDE, to_pil
from listener_reward.ranking import Ranking, rank_images
from listener_reward.reward import PAPER_CHECKPOINT, ListenerReward
from listener_reward.verdict import Verdict

if TYPE_CHECKING:
    from listener_reward.judge import Judge

Strategy = Literal["storyboard", "frames", "clip"]

FRAMES = 8
"""Frames of a clip that are looked at, as in UnifiedReward and Pref-GRPO."""

MAX_FRAMES = 64

_GAP = 4
"""White pixels between the frames of a storyboard, so that two frames do not read as one picture."""

_ANIMATED = ("GIF", "WEBP", "PNG")

_DEMUXERS = ((4, b"ftyp", "mov"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"))
"""Where a container says what it is, and FFmpeg's name for it. No other is opened: some, such as playlists, make FFmpeg
read further files, or the network."""


# ---------------------------------------------------------------- ranking and reward


def rank_videos(
    judge: Any,
    prompt: str,
    videos: Any,
    *,
    strategy: Strategy = "storyboard",
    frames: int = FRAMES,
    fps: float | None = None,
    rate: float | None = None,
) -> Ranking:
    """Orders videos of one prompt by comparing every pair of them.

    Args:
        judge: a judge's name or folder, or a loaded judge.
        prompt: what the videos were made from.
        videos: n videos, each as `read_clip` takes it: the `.frames` of a diffusers pipeline in any of its three output
            types, or files.
        strategy: "storyboard", "frames" or "clip"; the module's docstring says which is for what.
        frames, fps, rate: see `read_clip`.

    Returns:
        Log-odds with mean zero and their standard errors, in the order of `videos`; see `Ranking`.

    Raises:
        InputError: a video that cannot be read, or fewer than one of them.
        JudgeError: the judge broke.
        MissingExtraError: a video file, and PyAV is not installed.
    """
    asked = ClipJudge(judge, strategy, frames)  # before the reading, which takes longer
    return asked.rank(prompt, as_pictures(videos, frames=frames, fps=fps, rate=rate))


class VideoReward:
    """`ListenerReward` for videos: `reward(videos, prompts, metadata) -> (scores, info)`, with the same contract."""

    __name__ = "listener_video_reward"

    def __init__(
        self,
        judge: Any = PAPER_CHECKPOINT,
        *,
        strategy: Strategy = "storyboard",
        frames: int = FRAMES,
        fps: float | None = None,
        rate: float | None = None,
        **options: Any,
    ):
        """`options` are those of `ListenerReward`; the others those of `rank_videos`."""
        taken = {name: options.pop(name) for name in ("scheme", "reference", "on_failure") if name in options}
        clip_judge: Any = ClipJudge(judge, strategy, frames, **options)  # has of a judge what the reward calls
        self.reward = ListenerReward(clip_judge, **taken)
        self.reading: dict[str, Any] = {"frames": frames, "fps": fps, "rate": rate}

    def __call__(
        self, videos: Any, prompts: Sequence[str], metadata: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores B videos: an array or tensor `(B, F, C, H, W)` or `(B, F, H, W, C)`, or a sequence of clips."""
        return self.reward(as_pictures(videos, **self.reading), prompts, metadata)

    def state_dict(self) -> dict[str, Any]:
        """The storyboards kept as references; see `ListenerReward.state_dict`."""
        return self.reward.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reward.load_state_dict(state)


class ClipJudge:
    """A judge of storyboards: the given judge of images, asked by one of the strategies.

    It has the methods of a judge that `ListenerReward` calls, so every scheme works. Like any judge it is symmetric:
    swapping the storyboards gives exactly `1 - p_first`.
    """

    def __init__(self, judge: Any, strategy: Strategy = "storyboard", frames: int = FRAMES, **options: Any):
        """
        Args:
            judge: what `Judge.from_pretrained` takes, loaded on first use with `options`, or a judge.
            strategy: see the module's docstring.
            frames: how many frames every storyboard holds.
        """
        if strategy not in get_args(Strategy):
            raise InputError(f"strategy is {strategy!r}; choose one of {', '.join(map(repr, get_args(Strategy)))}")
        by_name = isinstance(judge, (str, os.PathLike))
        if not by_name and not hasattr(judge, "compare_many"):
            raise InputError(f"judge is a {type(judge).__name__}; give a checkpoint's name, its folder, or a Judge")
        if options and not by_name:
            raise InputError(f"{', '.join(options)} would have no effect on a judge already loaded; give its name")
        _check_frames(frames)
        self.judge: Any = os.fspath(judge) if by_name else judge
        self.strategy: Strategy = strategy
        self.frames = frames
        self.options = options
        self.name: str = self.judge if by_name else judge.name
        self._asked: Any = None

    def compare_many(
        self,
        prompts: Sequence[str],
        firsts: Sequence[Image.Image],
        seconds: Sequence[Image.Image],
        *,
        think: bool | None = None,
    ) -> list[Verdict]:
        """One verdict for each pair of storyboards. By `frames` it is the mean of the frames' verdicts."""
        judge = self._judge()
        if self.strategy != "frames":
            return judge.compare_many(prompts, firsts, seconds, think=think)
        n = self.frames
        verdicts = judge.compare_many(
            [prompt for prompt in prompts for _ in range(n)],
            [frame for board in firsts for frame in cut(board, n)],
            [frame for board in seconds for frame in cut(board, n)],
            think=think,
        )
        return [_mean_verdict(verdicts[start : start + n]) for start in range(0, len(verdicts), n)]

    def compare(self, prompt: str, first: Image.Image, second: Image.Image, *, think: bool | None = None) -> Verdict:
        return self.compare_many([prompt], [first], [second], think=think)[0]

    def rank(self, prompt: str, images: Sequence[Image.Image]) -> Ranking:
        """Orders storyboards of one prompt by comparing every pair."""

        def compare_batch(pairs: Sequence[tuple[int, int]]) -> list[float]:
            firsts, seconds = [images[i] for i, _ in pairs], [images[j] for _, j in pairs]
            return [verdict.p_first for verdict in self.compare_many([prompt] * len(pairs), firsts, seconds)]

        return rank_images(compare_batch, len(images))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_asked": None}

    def _judge(self) -> Any:
        if self._asked is None:
            from listener_reward.judge import Judge  # imports torch: only once a judge is wanted

            judge = Judge.from_pretrained(self.judge, **self.options) if isinstance(self.judge, str) else self.judge
            self._asked = _with_clips_in_chat(judge, self.frames) if self.strategy == "clip" else judge
        return self._asked


def _mean_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    p_first = _mean([verdict.p_first for verdict in verdicts])
    heard = [verdict.listener_p_first for verdict in verdicts if verdict.listener_p_first is not None]
    listener_p_first = _mean(heard) if heard else None
    preferred: Literal[1, 2] | None = None if p_first == 0.5 else 1 if p_first > 0.5 else 2
    return Verdict(
        p_first=p_first,
        preferred=preferred,
        thoughts=tuple(thought for verdict in verdicts for thought in verdict.thoughts),
        listener_p_first=listener_p_first,
        contradicted=None
        if listener_p_first is None or preferred is None
        else (listener_p_first < 0.5 if preferred == 1 else listener_p_first > 0.5),
        position_gap=math.fsum(verdict.position_gap for verdict in verdicts) / len(verdicts),
        malformed=sum(verdict.malformed for verdict in verdicts),
    )


def _mean(probabilities: Sequence[float]) -> float:
    """Rounded to a grid on which 1 - p is exact, as a judge's own probabilities are: the mean stays symmetric."""
    return round(math.fsum(probabilities) / len(probabilities) * 2**40) / 2**40


# ---------------------------------------------------------------- the clip strategy


@dataclass(frozen=True, slots=True)
class _ClipFormat(ChatFormat):
    """The same question, with a side's frames one after another where its image stood."""

    frames: int = FRAMES

    def chat(self, prompt: str, first: Image.Image, second: Image.Image, reserved: Any = ()) -> Chat:
        chat = ChatFormat.chat(self, prompt, first, second, reserved)
        messages = [
            turn
            if isinstance(turn["content"], str)
            else turn
            | {"content": [b for block in turn["content"] for b in [block] * (self.frames if _is_image(block) else 1)]}
            for turn in chat.messages
        ]
        return replace(chat, messages=messages, images=(*cut(first, self.frames), *cut(second, self.frames)))


def _is_image(block: dict[str, Any]) -> bool:
    return block["type"] == "image"


def _with_clips_in_chat(judge: Any, frames: int) -> Judge:
    from listener_reward.judge import Judge
    from listener_reward.listener import Listener

    if not isinstance(judge, Judge):
        raise InputError(
            f"judge is a {type(judge).__name__}; strategy='clip' writes the chat itself, which needs a "
            "listener_reward.Judge: load one, or use 'storyboard' or 'frames'"
        )

    def with_frames(chat_format: ChatFormat) -> _ClipFormat:
        return _ClipFormat(**{f.name: getattr(chat_format, f.name) for f in fields(ChatFormat)}, frames=frames)

    heard = judge.listener
    listener = heard and Listener(
        heard.vlm,
        with_frames(heard.chat_format),
        temperature=heard.temperature,
        masking=heard.masking,
        grounding=heard.grounding,
    )
    card = replace(judge.card, format=with_frames(judge.card.format))
    return Judge(judge.reasoner, listener, card, name=judge.name, think=judge.think, seed=judge.seed)


# ---------------------------------------------------------------- storyboards


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
    if _is_video(media):
        return storyboard(read_clip(media, frames=frames, fps=fps, rate=rate, field=field).frames)
    return to_pil(media, field=field)


def as_pictures(
    videos: Any, *, frames: int = FRAMES, fps: float | None = None, rate: float | None = None, field: str = "videos"
) -> list[Image.Image]:
    """A batch of videos as storyboards; see `read_clip` for what a video is."""
    if isinstance(videos, (str, bytes, os.PathLike, Image.Image)) or getattr(videos, "ndim", 5) == 4:
        raise InputError(f"{field} is one video and not a batch; wrap it in a list")
    if not isinstance(videos, Iterable):
        raise InputError(f"{field} is a {type(videos).__name__}; give a list of videos, or an array of rank 5")
    return [
        storyboard(read_clip(video, frames=frames, fps=fps, rate=rate, field=f"{field}[{i}]").frames)
        for i, video in enumerate(videos)
    ]


def _is_video(media: Any) -> bool:
    if isinstance(media, (list, tuple)):
        return True
    if isinstance(media, (str, os.PathLike, bytes)):
        return _demuxer(media) is not None
    return getattr(media, "ndim", 0) == 4


# ---------------------------------------------------------------- clips


@dataclass(frozen=True, slots=True)
class Clip:
    """The frames of a video that are looked at."""

    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...] | None
    """When each is shown, from the first frame of the video on; None where the video's frame rate is not known."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A video of which only the wanted frames are made into pictures."""

    count: int
    seconds: list[float] | None
    pick: Callable[[list[int]], list[Image.Image]]
    """Pictures of the frames at ascending positions, which may repeat."""


def read_clip(
    video: Any,
    *,
    frames: int = FRAMES,
    fps: float | None = None,
    rate: float | None = None,
    field: str = "video",
) -> Clip:
    """A few frames of one video, as RGB.

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
    _check_frames(frames)
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


def _check_frames(frames: Any) -> None:
    if not isinstance(frames, int) or not 1 <= frames <= MAX_FRAMES:
        raise InputError(f"frames is {frames!r}; choose 1 to {MAX_FRAMES}")


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

    def pick(chosen: list[int]) -> list[Image.Image]:
        pictures = {k: to_pil(video[k], field=f"{field}[{k}]") for k in dict.fromkeys(chosen)}
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
        head = video[:16]
    else:
        try:
            with open(video, "rb") as file:
                head = file.read(16)
        except (OSError, ValueError):  # a ValueError for a name with a null byte
            return None
    return next((name for at, magic, name in _DEMUXERS if head[at:].startswith(magic)), None)


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

    def pick(chosen: list[int]) -> list[Image.Image]:
        with opened() as animation:
            pictures = {}
            for k in dict.fromkeys(chosen):
                animation.seek(k)
                pictures[k] = to_pil(animation.convert("RGBA"), field=f"{field}[{k}]")
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

    def pick(chosen: list[int]) -> list[Image.Image]:
        wanted, pictures, last = set(chosen), {}, None
        try:
            with opened() as container:
                for k, frame in enumerate(container.decode(video=0)):
                    if k in wanted:
                        last = pictures[k] = to_pil(frame.to_image(), field=f"{field}[{k}]")
                    if k >= chosen[-1]:
                        break
        except av.FFmpegError as error:
            raise unreadable(error) from error
        if last is None:
            raise InputError(f"{field} holds no frame that decodes; save it anew")
        return [pictures.get(k, last) for k in chosen]  # a file cut short lacks its last frames

    return _Source(len(packets), seconds, pick)
