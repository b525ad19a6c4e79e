"""Images of fixed prompts and seeds along a run, and how often the reward prefers them to the base's images.

A reward that compares within groups is zero on average, however good the images get, so its mean over an epoch cannot
rise. The same reward can show progress by comparing the trained model's image with the base's image from the same seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from listener_reward.mixture import remembers

from ..contract import Reward, score
from .prompts import TrainingPrompt


class FixedSamples:
    """Compares later images of a run with its first.

    Args:
        prompts: the N prompts.
        reward: the reward that compares. Both images of a prompt come in one call, so that a group is a pair.
    """

    def __init__(self, prompts: Sequence[TrainingPrompt], reward: Reward):
        self.prompts, self.reward = prompts, reward
        self.base: list[torch.Tensor] | None = None
        """The base's N images (C, H, W), or videos; kept because full fine-tuning leaves no base to draw them anew."""

    def sources(self) -> list[Image.Image | None]:
        """The first source image of each prompt, None for a prompt without one."""
        found = [prompt.opened().metadata.get("sources") for prompt in self.prompts]
        return [several[0] if several else None for several in found]

    def against_base(self, images: Sequence[torch.Tensor]) -> dict[str, float]:
        """`win_rate`, `reward_over_base` and its standard error of N `images`; NaN without a scored pair.

        The reward's state is restored afterwards: watching a run must not change what the run learns.
        """
        assert self.base is not None
        pairs = [image for both in zip(self.base, images, strict=True) for image in both]
        opened = [both for prompt in self.prompts for both in [prompt.opened()] * 2]
        memory: Any = self.reward
        remembered = memory.state_dict() if remembers(memory) else None
        with ThreadPoolExecutor(1, "reward") as pool, torch.no_grad():  # rewards are called in no thread but such a one
            scores = pool.submit(self._score, pairs, opened).result()
        if remembered is not None:
            memory.load_state_dict(remembered)
        return win_rate(scores[0::2], scores[1::2])

    def _score(self, images: list[torch.Tensor], prompts: Sequence[TrainingPrompt]) -> np.ndarray:
        scores = []
        for run in in_runs(images):
            part = prompts[len(scores) :][: len(run)]
            metadata = [dict(prompt.metadata) for prompt in part]
            scores += [*score(self.reward, run, [prompt.prompt for prompt in part], metadata, missing=True)[0]]
        return np.array(scores)


def in_runs(images: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The images in order, those of one shape that follow one another as one batch; one prompt's are of one shape."""
    for _, run in itertools.groupby(images, key=lambda image: image.shape):
        yield torch.stack([*run])


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
