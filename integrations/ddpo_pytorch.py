"""ddpo-pytorch: a factory beside the others in `ddpo_pytorch/rewards.py`, chosen by `config.reward_fn`.

def listener():
    from listener_reward.integrations.ddpo_pytorch import listener_reward
    return listener_reward("tiny")
"""

from __future__ import annotations

from typing import Any

import numpy as np

from listener_reward.reward import PAPER_CHECKPOINT

from .contract import Reward, as_reward, score


def listener_reward(reward: Any = PAPER_CHECKPOINT, *, edits: bool = False, **options: Any) -> Reward:
    """`_fn(images, prompts, metadata) -> (scores, info)`, for the host's two reward threads.

    Images are NCHW floats in [0, 1] of any float type, or NHWC uint8. Scores are float32 `(B,)`, and so is every entry
    of the info. The scheme is `reference` unless `options` say otherwise: the host keeps the scores of a prompt over
    steps and processes and normalises within them, so they must be on one scale. Source images of edits are
    `metadata[i]["sources"]`, which a prompt function may give; with `edits` a prompt without one is an `InputError`.

    Raises:
        InputError, JudgeError: when called, so at `.result()` in the host: it has no word for a missing score.
    """
    scorer = as_reward(reward, options, scheme="reference")

    def _fn(images: Any, prompts: Any, metadata: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return score(scorer, images, prompts, metadata, edits=edits)

    return _fn
