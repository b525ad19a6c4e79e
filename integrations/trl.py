"""trl's `DDPOTrainer`, which trl had up to 0.23.1.

    trainer = DDPOTrainer(config, ddpo_reward("tiny"), prompt_fn, pipeline)

The trainer calls `reward_fn(images, prompts, metadata)` and takes two things back. With
`async_reward_computation=True` it then calls `.result()` on each of the two, as if they were futures, which breaks with
every plain function; what comes back from here has that method, so both paths work.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from listener_reward.reward import PAPER_CHECKPOINT

from .contract import Reward, as_reward, score


def ddpo_reward(reward: Any = PAPER_CHECKPOINT, *, edits: bool = False, **options: Any) -> Reward:
    """A reward function for `DDPOTrainer`; its scores are float32 `(B,)`.

    The scheme is `reference` unless `options` say otherwise: the trainer normalises over all prompts of a batch, or
    over the steps of a prompt, so scores of different calls must be on one scale. Source images of edits are
    `metadata[i]["sources"]`, which `prompt_fn` may give; with `edits` a prompt without one is an `InputError`.

    Raises:
        InputError, JudgeError: when called; the trainer has no word for a missing score, so the step stops.
    """
    scorer = as_reward(reward, options, scheme="reference")

    def reward_fn(images: Any, prompts: Any, metadata: Any) -> tuple[_Scores, _Info]:
        scores, info = score(scorer, images, prompts, metadata, edits=edits)
        return scores.view(_Scores), _Info(info)

    return reward_fn


class _Scores(np.ndarray):
    """An array that is its own future. Not a tensor: `torch.as_tensor` makes a plain one of it."""

    def result(self) -> np.ndarray:
        return self.view(np.ndarray)


class _Info(dict):
    """A dict that is its own future."""

    def result(self) -> dict[str, np.ndarray]:
        return dict(self)
