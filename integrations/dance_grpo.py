"""DanceGRPO, whose scripts score one PIL image at a time inside the sampling loop.

    scorer = ListenerScorer("tiny")                          # beside the other reward models

    scorer.add(decoded_image[0], batch_caption[0])           # in the loop, where all_rewards.append(...) stood
    all_rewards = scorer.collect(device)                     # after it, where torch.cat(all_rewards, dim=0) stood

The images of a group follow one another on one process, so the whole group can be compared: `add` keeps them and
`collect` judges them. The host's line can also stay as it is, `all_rewards.append(scorer(image, caption))`; each image
is then compared with the first one of its caption, which tells less.
"""

from __future__ import annotations

from typing import Any

import torch

from listener_reward.errors import InputError
from listener_reward.media.images import to_pil
from listener_reward.media.storyboards import as_picture
from listener_reward.reward import PAPER_CHECKPOINT

from .contract import as_reward, check_prompts, score


class ListenerScorer:
    """A reward model for DanceGRPO's loop. Not thread-safe between `add` and `collect`; neither is the loop."""

    def __init__(self, reward: Any = PAPER_CHECKPOINT, **options: Any):
        """`reward` and `options` as in `contract.as_reward`; the scheme is `auto`: groups, and else the reference."""
        self._scorer = as_reward(reward, options, scheme="auto")
        self._added: list[tuple[Any, str]] = []

    def add(self, image: Any, caption: str) -> None:
        """Keeps one image until `collect`. Raises `InputError` at once where it or its caption is of no use."""
        check_prompts([caption], 1)
        self._added.append((to_pil(image), caption))

    def collect(self, device: str | int | torch.device = "cpu") -> torch.Tensor:
        """The scores of all images added since the last call, in their order: float32 `(B,)`.

        Raises:
            InputError: nothing was added.
            JudgeError: the judge broke. What was added is forgotten either way, so the next group starts afresh.
        """
        added, self._added = self._added, []
        if not added:
            raise InputError("nothing was added; call add(image, caption) for each image of the group")
        images, captions = zip(*added, strict=True)
        return torch.as_tensor(score(self._scorer, images, captions)[0], device=device)

    def __call__(self, image: Any, caption: str, device: str | int | torch.device = "cpu") -> torch.Tensor:
        """The score of one image against the first one of its caption: float32 `(1,)`, 0 for that first one."""
        return torch.as_tensor(score(self._scorer, [image], [caption])[0], device=device)

    def reward(self, paths: list[str], prompts: list[str], use_norm: bool = True) -> list[dict[str, float]]:
        """The call that the host makes of `VideoVLMRewardInference`, for video files, judged as storyboards.

        The judge has one verdict and not three, so `VQ`, `MQ`, `TA` and `Overall` are all of them its score: set the
        host's weights of all but one to 0. The host turns an exception of this call into -1 for the sample.
        """
        check_prompts(prompts, len(paths))
        scores, _ = score(
            self._scorer, [as_picture(path, field=f"paths[{i}]") for i, path in enumerate(paths)], prompts
        )
        return [dict.fromkeys(("VQ", "MQ", "TA", "Overall"), value) for value in scores.tolist()]
