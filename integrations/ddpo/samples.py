"""Images of fixed prompts and seeds along a run, and how often the reward prefers them to the base's images.

A reward that compares within groups is zero on average, however good the images get, so its mean over an epoch cannot
rise. The same reward can show progress by comparing the trained model's image with the base's image from the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from listener_reward.mixture import remembers

from ..contract import Reward, score


class FixedSamples:
    """Compares later images of a run with its first.

    Args:
        prompts: the N prompts with their metadata.
        reward: the reward that compares. Both images of a prompt come in one call, so that a group is a pair.
    """

    def __init__(self, prompts: Sequence[tuple[str, dict[str, Any]]], reward: Reward):
        self.prompts, self.reward = prompts, reward
        self.base: torch.Tensor | None = None
        """The base's images (N, C, H, W), or videos; kept because full fine-tuning leaves no base to draw them anew."""

    def against_base(self, images: torch.Tensor) -> dict[str, float]:
        """`win_rate`, `reward_over_base` and its standard error of `images` (N, ...); NaN without a scored pair.

        The reward's state is restored afterwards: watching a run must not change what the run learns.
        """
        assert self.base is not None
        pairs = torch.stack([self.base, images], dim=1).flatten(0, 1)
        texts, metadata = zip(*(entry for entry in self.prompts for _ in range(2)), strict=True)
        memory: Any = self.reward
        remembered = memory.state_dict() if remembers(memory) else None
        with ThreadPoolExecutor(1, "reward") as pool, torch.no_grad():  # rewards are called in no thread but such a one
            scores, _ = pool.submit(
                score, self.reward, pairs, texts, [dict(m) for m in metadata], missing=True
            ).result()
        if remembered is not None:
            memory.load_state_dict(remembered)
        return win_rate(scores[0::2], scores[1::2])


def win_rate(base: np.ndarray, trained: np.ndarray) -> dict[str, float]:
    """`win_rate`: the fraction of N pairs of scores that the trained model wins, a tie counting half; and the mean
    difference.

    Pairs with a missing score are left out. The standard error is NaN with fewer than two.
    """
    difference = (trained - base).astype(np.float64)
    difference = difference[~np.isnan(difference)]
    n = len(difference)
    return {
        "win_rate": float((np.sign(difference).mean() + 1) / 2) if n else math.nan,
        "reward_over_base": float(difference.mean()) if n else math.nan,
        "reward_over_base_se": float(difference.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
    }
