"""Flow-Factory: two classes for its YAML. Needs Flow-Factory, whose own classes they have to extend.

    rewards:
      - name: listener
        reward_model: listener_reward.integrations.flow_factory.ListenerGroupwise
        judge: tiny               # or a folder, a Hub name, the URL of a `listener-reward serve --scheme group`
        video: false              # true for a model of videos, each judged as a storyboard
        weight: 1.0
    eval_rewards:                 # the host evaluates with pointwise rewards only; without this it logs nothing
      - name: listener
        reward_model: listener_reward.integrations.flow_factory.ListenerPointwise
        judge: tiny

`ListenerGroupwise` is given whole groups and compares their members: take it where you can. `ListenerPointwise` is
given batches cut without regard to groups, so it compares with a reference image of each prompt.

Where the two packages cannot share an environment, the host's own remote classes do. The scheme is part of the URL:

      - name: listener
        reward_model: flow_factory.rewards.my_reward_remote.RemoteGroupwiseRewardModel
        server_url: http://127.0.0.1:8300/group       # listener-reward serve --scheme group
        timeout: 600

`RemotePointwiseRewardModel` takes `.../reference`.

Condition images and videos are the sources of an edit; a video becomes a storyboard, as the results do. Say so in the
entry: `edits: true`, or `edits: condition_videos`. A sample without its source is then an `InputError`, and with the
sampler `distributed_k_repeat` the host gathers what a reward asks for, and nothing else. Its own remote classes ask for
no condition images and lose them with that sampler: for edits take the class above, with the server's URL as its
`judge`.
"""

from __future__ import annotations

from typing import Any

from listener_reward.errors import InputError, MissingExtraError
from listener_reward.media.storyboards import as_pictures
from listener_reward.reward import PAPER_CHECKPOINT, Scheme

from .contract import as_reward, score

try:
    from flow_factory.rewards.abc import (  # pyright: ignore[reportMissingImports]
        GroupwiseRewardModel,
        PointwiseRewardModel,
        RewardModelOutput,
    )
except ImportError as error:
    raise MissingExtraError(
        "this adapter extends Flow-Factory's classes: pip install git+https://github.com/X-GenGroup/Flow-Factory"
    ) from error


KEYS = ("judge", "judge_options", "video", "edits")
"""What an entry of the YAML may have beside the host's own keys."""


class ListenerPointwise(PointwiseRewardModel):
    """Each sample against the reference image of its prompt."""

    required_fields = ("prompt", "image")
    scheme: Scheme = "reference"

    def __init__(self, config: Any, accelerator: Any):
        super().__init__(config, accelerator)
        self.reward = _reward(config, self.scheme, self.device)
        self.required_fields = _fields(config)
        self.edits = bool(getattr(config, "edits", False))

    # By name, and not **: of what is named here alone does the host move and convert the fields.
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        return _compute(self.reward, prompt, image, video, _sources(condition_images, condition_videos), self.edits)


class ListenerGroupwise(GroupwiseRewardModel):
    """The samples of a group against one another."""

    required_fields = ("prompt", "image")
    scheme: Scheme = "group"

    def __init__(self, config: Any, accelerator: Any):
        super().__init__(config, accelerator)
        self.reward = _reward(config, self.scheme, self.device)
        self.required_fields = _fields(config)
        self.edits = bool(getattr(config, "edits", False))

    # By name, and not **: of what is named here alone does the host move and convert the fields.
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        return _compute(self.reward, prompt, image, video, _sources(condition_images, condition_videos), self.edits)


def _fields(config: Any) -> tuple[str, ...]:
    edits = getattr(config, "edits", False)
    if edits not in (False, True, "condition_images", "condition_videos"):
        raise InputError(f"edits is {edits!r}; choose true, which is condition_images, or condition_videos")
    sources = () if not edits else ("condition_images",) if edits is True else (edits,)
    return ("prompt", "video" if getattr(config, "video", False) else "image", *sources)


def _reward(config: Any, scheme: Scheme, device: Any) -> Any:
    """From the entry's extra keys: `judge`, and `judge_options` for `ListenerReward`; on the entry's `device`."""
    given = getattr(config, "extra_kwargs", None) or {}  # where the host keeps the keys that it does not know
    if unknown := [key for key in given if key not in KEYS]:
        raise InputError(f"{', '.join(unknown)}: no key of this reward, which has {', '.join(KEYS)}")
    judge = getattr(config, "judge", None) or PAPER_CHECKPOINT
    return as_reward(judge, getattr(config, "judge_options", None) or {}, scheme=scheme, device=device)


def _sources(images: Any, videos: Any) -> list[list[Any]] | None:
    """The condition images of each sample, and after them its condition videos as storyboards; None without any."""
    given = [entries for entries in (images, videos and [as_pictures(each) for each in videos]) if entries is not None]
    return [[source for entry in each for source in entry] for each in zip(*given, strict=True)] if given else None


def _compute(reward: Any, prompt: list[str], image: Any, video: Any, sources: Any, edits: bool) -> RewardModelOutput:
    """Scores float32 `(B,)`. `image` is a list of PIL images, `video` of lists of PIL frames; one of the two."""
    if (image is None) == (video is None):
        raise InputError("give image or video, one of the two; for videos set video: true")
    media = as_pictures(video) if image is None else image
    scores, info = score(reward, media, prompt, sources=sources, edits=edits)
    return RewardModelOutput(rewards=scores, extra_info=info)
