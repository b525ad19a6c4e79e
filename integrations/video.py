"""Videos, judged by a judge of images: `rank_videos`, and `VideoReward` for trainers.

A clip is first reduced to a few frames and these to one picture, its *storyboard*: a grid of the frames in reading
order. A storyboard is an image like any other, so whatever takes images takes clips. What the judge makes of it is the
strategy:

- `storyboard`: it is shown the grid as it is. One comparison a pair; for large judges, which read small print.
- `frames`: the grid is cut up again, frames of the same place are compared, and the probabilities averaged. As many
  comparisons as frames, no notion of motion; the one for a judge that knows single pictures, such as the tiny one.
- `video`: the frames of a side are one video of the chat, through the model's own video input, with the time of each.
  What a Qwen-VL was trained to watch videos by. Two frames are one patch, so each costs half of an image.
- `clip`: the frames of a side stand in the chat one after another, as several images: all detail, no time.

A judge trained on pairs of single images has never been asked by `video` or `clip`: measure it first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import InputError
from listener_reward.media.storyboards import as_pictures, cut, read_timed
from listener_reward.media.videos import FRAMES, check_frames
from listener_reward.ranking import Ranking, rank_images
from listener_reward.reward import PAPER_CHECKPOINT, ListenerReward
from listener_reward.verdict import Verdict

if TYPE_CHECKING:
    from listener_reward.judge import Judge

__all__ = [
    "ClipJudge",
    "Strategy",
    "VideoReward",
    "rank_videos",
]

Strategy = Literal["storyboard", "frames", "clip", "video"]


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
        strategy: "storyboard", "frames", "clip" or "video"; the module's docstring says which is for what.
        frames, fps, rate: see `read_clip`.

    Returns:
        Log-odds with mean zero and their standard errors, in the order of `videos`; see `Ranking`.

    Raises:
        InputError: a video that cannot be read, or fewer than one of them.
        JudgeError: the judge broke.
        MissingExtraError: a video file, and PyAV is not installed.
    """
    asked = ClipJudge(judge, strategy, frames)  # before the reading, which takes longer
    return asked.rank(prompt, as_pictures(videos, frames=frames, fps=fps, rate=rate, timed=strategy == "video"))


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
        self.reading: dict[str, Any] = {"frames": frames, "fps": fps, "rate": rate, "timed": strategy == "video"}

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
        check_frames(frames)
        if strategy == "video" and frames < 2:
            raise InputError(f"frames is {frames}; strategy='video' needs at least 2, a video of one frame is an image")
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
            in_chat = self.strategy in ("clip", "video")
            self._asked = _with_clips_in_chat(judge, self.frames, self.strategy) if in_chat else judge
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


# ---------------------------------------------------------------- clips in the chat


@dataclass(frozen=True, slots=True)
class _ClipFormat(ChatFormat):
    """The same question, with a side's video or all its frames where its image stood."""

    frames: int = FRAMES
    moving: bool = False
    """A side as one video, and not as so many images."""

    def chat(self, prompt: str, first: Image.Image, second: Image.Image, reserved: Any = ()) -> Chat:
        chat = ChatFormat.chat(self, prompt, first, second, reserved)
        blocks = [{"type": "video"}] if self.moving else [{"type": "image"}] * self.frames
        messages = [
            turn | {"content": [b for block in turn["content"] for b in (blocks if _is_image(block) else [block])]}
            for turn in chat.messages
        ]
        clips = read_timed(first, self.frames), read_timed(second, self.frames)
        if self.moving:
            return replace(chat, messages=messages, images=(), videos=clips)
        return replace(chat, messages=messages, images=(*clips[0].frames, *clips[1].frames))


def _is_image(block: dict[str, Any]) -> bool:
    return block["type"] == "image"


def _with_clips_in_chat(judge: Any, frames: int, strategy: Strategy) -> Judge:
    from listener_reward.judge import Judge
    from listener_reward.listener import Listener

    if not isinstance(judge, Judge):
        raise InputError(
            f"judge is a {type(judge).__name__}; strategy={strategy!r} writes the chat itself, which needs a "
            "listener_reward.Judge: load one, or use 'storyboard' or 'frames'"
        )

    def with_frames(chat_format: ChatFormat) -> _ClipFormat:
        own = {field.name: getattr(chat_format, field.name) for field in fields(ChatFormat)}
        return _ClipFormat(**own, frames=frames, moving=strategy == "video")

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
