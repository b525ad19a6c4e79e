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

`RemotePointwiseRewardModel` takes `.../reference`. Condition images are an `InputError`: edits are not judged yet.
"""

from __future__ import annotations

from typing import Any

from listener_reward.errors import InputError, MissingExtraError
from listener_reward.media.storyboards import as_pictures
from listener_reward.reward import PAPER_CHECKPOINT, Scheme

from .checks import check_no_source
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


KEYS = ("judge", "judge_options", "video")
"""What an entry of the YAML may have beside the host's own keys."""


class ListenerPointwise(PointwiseRewardModel):
    """Each sample against the reference image of its prompt."""

    required_fields = ("prompt", "image")
    scheme: Scheme = "reference"

    def __init__(self, config: Any, accelerator: Any):
        super().__init__(config, accelerator)
        self.reward = _reward(config, self.scheme, self.device)
        self.required_fields = _fields(config)

    # By name, and not **: of what is named here alone does the host move and convert the fields.
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        sources = {"condition_images": condition_images, "condition_videos": condition_videos}
        return _compute(self.reward, prompt, image, video, **sources)


class ListenerGroupwise(GroupwiseRewardModel):
    """The samples of a group against one another."""

    required_fields = ("prompt", "image")
    scheme: Scheme = "group"

    def __init__(self, config: Any, accelerator: Any):
        super().__init__(config, accelerator)
        self.reward = _reward(config, self.scheme, self.device)
        self.required_fields = _fields(config)

    # By name, and not **: of what is named here alone does the host move and convert the fields.
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        sources = {"condition_images": condition_images, "condition_videos": condition_videos}
        return _compute(self.reward, prompt, image, video, **sources)


def _fields(config: Any) -> tuple[str, str]:
    return ("prompt", "video" if getattr(config, "video", False) else "image")


def _reward(config: Any, scheme: Scheme, device: Any) -> Any:
    """From the entry's extra keys: `judge`, and `judge_options` for `ListenerReward`; on the entry's `device`."""
    given = getattr(config, "extra_kwargs", None) or {}  # where the host keeps the keys that it does not know
    if unknown := [key for key in given if key not in KEYS]:
        raise InputError(f"{', '.join(unknown)}: no key of this reward, which has {', '.join(KEYS)}")
    judge = getattr(config, "judge", None) or PAPER_CHECKPOINT
    return as_reward(judge, getattr(config, "judge_options", None) or {}, scheme=scheme, device=device)


def _compute(reward: Any, prompt: list[str], image: Any, video: Any, **sources: Any) -> RewardModelOutput:
    """Scores float32 `(B,)`. `image` is a list of PIL images, `video` of lists of PIL frames; one of the two."""
    check_no_source(**sources)
    if (image is None) == (video is None):
        raise InputError("give image or video, one of the two; for videos set video: true")
    scores, info = score(reward, as_pictures(video) if image is None else image, prompt)
    return RewardModelOutput(rewards=scores, extra_info=info)
