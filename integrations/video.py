"""Videos, judged by a judge of images: `rank_videos`, and `VideoReward` for trainers.

A video is first reduced to a few frames, a `Clip`. How the judge looks at clips is the strategy, a
`clips.ClipView`: "storyboard", "frames", "clip" or "video". A judge trained on pairs of single images has never been
asked by the last two: measure it first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from listener_reward.anchors import identity_of
from listener_reward.conclude import mean_verdict
from listener_reward.errors import InputError, check_choice
from listener_reward.media.clips import ClipView, frame_by_frame
from listener_reward.media.images import ImageLike
from listener_reward.media.storyboards import as_picture, as_pictures, read_clips, storyboard, to_still
from listener_reward.media.videos import FRAMES, check_frames, read_clip
from listener_reward.pairs import PromptLike
from listener_reward.ranking import Ranking
from listener_reward.reward import PAPER_CHECKPOINT, ListenerReward
from listener_reward.verdict import PairJudge, Verdict

__all__ = [
    "ClipJudge",
    "ClipView",
    "VideoReward",
    "as_picture",
    "as_pictures",
    "rank_videos",
    "read_clip",
    "read_clips",
    "storyboard",
]


def rank_videos(
    judge: Any,
    prompt: PromptLike,
    videos: Any,
    *,
    sources: Sequence[ImageLike] | ImageLike = (),
    criterion: str | None = None,
    strategy: ClipView = "storyboard",
    frames: int = FRAMES,
    fps: float | None = None,
    rate: float | None = None,
    budget: int | None = None,
) -> Ranking:
    """Orders videos of one prompt by comparing every pair of them, or `budget` pairs chosen as it goes.

    Args:
        judge: a judge's name or folder, or a loaded judge.
        prompt: what the videos were made from.
        videos: n videos, each as `read_clip` takes it: the `.frames` of a diffusers pipeline in any of its three output
            types, or files.
        sources: images that the prompt speaks of, such as the first frame that the videos were made from.
        criterion: see `Judge.compare`.
        strategy: how the judge looks at a clip; see `clips.ClipView`.
        frames, fps, rate: see `read_clip`.
        budget: see `Judge.rank`.

    Returns:
        Log-odds with mean zero and their standard errors, in the order of `videos`; see `Ranking`.

    Raises:
        InputError: a video or a source that cannot be read, or no video.
        JudgeError: the judge broke.
        MissingExtraError: a video file, and PyAV is not installed.
    """
    reward = VideoReward(judge, strategy=strategy, frames=frames, fps=fps, rate=rate)  # before the slow reading
    return reward.rank(prompt, videos, sources=sources, criterion=criterion, budget=budget)


class VideoReward:
    """`ListenerReward` for videos: `reward(videos, prompts, metadata) -> (scores, info)`, with the same contract."""

    __name__ = "listener_video_reward"

    def __init__(
        self,
        judge: Any = PAPER_CHECKPOINT,
        *,
        strategy: ClipView = "storyboard",
        frames: int = FRAMES,
        fps: float | None = None,
        rate: float | None = None,
        **options: Any,
    ):
        """`options` are those of `ListenerReward`; the others those of `rank_videos`."""
        check_frames(frames)
        check_choice("strategy", strategy, get_args(ClipView))
        if strategy == "video" and frames < 2:
            raise InputError(f"frames is {frames}; strategy='video' needs at least 2, a video of one frame is an image")
        if isinstance(judge, (str, os.PathLike)):
            self.reward = ListenerReward(judge, clips=strategy, **options)
        else:
            self.reward = ListenerReward(with_clips(judge, strategy), **options)
        self.reading: dict[str, Any] = {"frames": frames, "fps": fps, "rate": rate}

    def __call__(
        self, videos: Any, prompts: Sequence[PromptLike], metadata: Any = None, *, sources: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores B videos: an array or tensor `(B, F, C, H, W)` or `(B, F, H, W, C)`, or a sequence of videos.

        `sources` are images, such as the first frame of each; see `ListenerReward`.
        """
        return self.reward(read_clips(videos, **self.reading), prompts, metadata, sources=sources)

    def rank(
        self,
        prompt: PromptLike,
        videos: Any,
        *,
        sources: Sequence[ImageLike] | ImageLike = (),
        criterion: str | None = None,
        budget: int | None = None,
    ) -> Ranking:
        """Orders videos of one prompt; see `rank_videos`."""
        clips = read_clips(videos, **self.reading)
        return self.reward.rank(prompt, clips, sources=sources, criterion=criterion, budget=budget)

    @property
    def scheme(self) -> str:
        """See `ListenerReward`."""
        return self.reward.scheme

    @property
    def on_failure(self) -> str:
        """See `ListenerReward`."""
        return self.reward.on_failure

    def prefer_device(self, device: Any) -> None:
        """See `ListenerReward.prefer_device`."""
        self.reward.prefer_device(device)

    def state_dict(self) -> dict[str, Any]:
        """The clips kept as references; see `ListenerReward.state_dict`."""
        return self.reward.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reward.load_state_dict(state)


def with_clips(judge: Any, strategy: ClipView) -> PairJudge:
    """A loaded judge that looks at clips by `strategy`.

    Raises:
        InputError: it is no judge, or it knows only pictures, and the strategy is "clip" or "video".
    """
    if not isinstance(judge, PairJudge):
        raise InputError(f"judge is a {type(judge).__name__}; give a checkpoint's name, its folder, or a Judge")
    from listener_reward.judge import Judge  # imports torch, as whoever loaded a judge has

    return judge.with_clips(strategy) if isinstance(judge, Judge) else ClipJudge(judge, strategy)


class ClipJudge:
    """A judge that knows only pictures, asked about clips: by their storyboards, or frame by frame.

    Like any judge it is symmetric: swapping the clips gives exactly `1 - p_first`. A `Judge` needs none of this:
    `Judge.with_clips`.
    """

    def __init__(self, judge: PairJudge, strategy: ClipView = "storyboard"):
        """
        Args:
            judge: a peer, or a class of your own.
            strategy: "storyboard" or "frames".

        Raises:
            InputError: another strategy.
        """
        if strategy not in ("storyboard", "frames"):
            raise InputError(
                f"strategy is {strategy!r}, and judge a {type(judge).__name__}; it writes the chat itself, which needs "
                "a listener_reward.Judge: load one, or choose 'storyboard' or 'frames'"
            )
        self.judge = judge
        self.strategy: ClipView = strategy
        self.name, self.identity = judge.name, f"{identity_of(judge)} {strategy}"

    def compare_many(
        self, prompts: Sequence[PromptLike], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        """One verdict for each pair of clips. By "frames" it is the mean of the frames' verdicts."""
        ones, others = read_clips(firsts, field="firsts"), read_clips(seconds, field="seconds")
        if self.strategy == "storyboard":
            return self.judge.compare_many(prompts, [*map(to_still, ones)], [*map(to_still, others)], think=think)
        places = [
            frame_by_frame(one, other, (f"firsts[{number}]", f"seconds[{number}]"))
            for number, (one, other) in enumerate(zip(ones, others, strict=True))
        ]
        verdicts = iter(
            self.judge.compare_many(
                [prompt for prompt, frames in zip(prompts, places, strict=True) for _ in frames],
                [first for frames in places for first, _ in frames],
                [second for frames in places for _, second in frames],
                think=think,
            )
        )
        return [mean_verdict([next(verdicts) for _ in frames]) for frames in places]
