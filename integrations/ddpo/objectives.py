"""The arithmetic of reinforcement learning on diffusion models: a prompt's rewards remembered, outputs to losses.

Pure functions, and one class that remembers rewards by prompt. A missing reward is NaN. A missing reward is left out of
every mean and standard deviation, and its advantage is 0.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from listener_reward.advantages import TINY


class PromptStatistics:
    """Advantages by each prompt's own running mean and standard deviation, as ddpo-pytorch has it.

    Args:
        size: how many of a prompt's latest rewards are kept.
        min_count: a prompt with fewer takes the mean and standard deviation of the rewards at hand.
    """

    def __init__(self, size: int = 32, min_count: int = 16):
        self.size, self.min_count = size, min_count
        self.rewards: dict[int, deque[float]] = {}

    def advantages(self, rewards: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """Remembers rewards (N,), NaN where missing, of prompts by number (N,), and gives advantages float64 (N,)."""
        advantages, known = np.zeros(len(rewards)), ~np.isnan(rewards)
        if not known.any():
            return advantages
        everyone = rewards[known].astype(np.float64)
        for prompt in np.unique(prompts):
            members = known & (prompts == prompt)
            values = rewards[members].astype(np.float64)
            kept = self.rewards.setdefault(int(prompt), deque(maxlen=self.size))
            kept.extend(values.tolist())
            basis = everyone if len(kept) < self.min_count else np.array(kept)
            advantages[members] = (values - basis.mean()) / (basis.std() + TINY)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": {prompt: list(kept) for prompt, kept in self.rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards = {prompt: deque(kept, maxlen=self.size) for prompt, kept in state["rewards"].items()}


def ppo_loss(
    log_prob: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, scored: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """PPO's clipped surrogate, a scalar: the mean over the samples that have a reward.

    Args:
        log_prob: (B,) under the model as it is.
        old: (B,) under the model that drew the samples.
        advantages: (B,).
        scored: (B,) bool, false where the reward is missing.
        clip_range: how far from 1 a ratio may go before it gains nothing more.
    """
    ratio = torch.exp(log_prob - old)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return mean_of(torch.maximum(-advantages * ratio, -advantages * clipped), scored)


def nft_loss(
    x0: torch.Tensor,
    predicted: torch.Tensor,
    old: torch.Tensor,
    goodness: torch.Tensor,
    scored: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """DiffusionNFT's loss (arXiv 2509.16117, equation 5), a scalar, on clean latents, with its self-normalised weights.

    A sample pulls the model by its goodness and pushes it away by 1 - goodness. Interpolations are between clean
    latents, not model outputs: at a given noisy latent the two are affine in each other.

    Args:
        x0: (B, ...) the sampled clean latents.
        predicted: (B, ...) the clean latents that the model predicts from a noisy version of `x0`.
        old: (B, ...) the clean latents that the sampling model predicts from the same noisy version.
        goodness: (B,) in [0, 1], 1/2 for an average sample.
        scored: (B,) bool, false where the reward is missing.
        beta: how far the implicit positive and negative models stand from the old one.
    """
    x0, old = x0.float(), old.float()

    def distance(guess: torch.Tensor) -> torch.Tensor:
        error = (guess - x0).flatten(1)
        return (error**2).mean(1) / error.abs().mean(1).clamp_min(1e-5).detach()

    positive = beta * predicted + (1 - beta) * old
    negative = (1 + beta) * old - beta * predicted
    return mean_of(goodness * distance(positive) + (1 - goodness) * distance(negative), scored) / beta


def goodness(advantages: np.ndarray, clip: float) -> np.ndarray:
    """Advantages as DiffusionNFT's goodness in [0, 1]: -clip gives 0, 0 gives 1/2, clip gives 1."""
    return np.clip(advantages / (2 * clip) + 0.5, 0.0, 1.0)


def mean_of(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The mean of the chosen values, 0 if there are none. Other values have no effect, even NaN."""
    return torch.where(chosen, values, torch.zeros_like(values)).sum() / chosen.sum().clamp_min(1)


def diversity(groups: Iterable[torch.Tensor]) -> float:
    """How unlike the images of a prompt are: the mean over groups of the mean distance of two of its images.

    The distance is the root mean square over the pixels of 32-pixel thumbnails, in [0, 1]: layout and colour, blind to
    fine detail. `groups` are (G, C, H, W) or (G, F, C, H, W) in [0, 1]; NaN without two images of one prompt.
    """
    distances = []
    for images in groups:
        flat = images.float().flatten(0, -4)  # frames count as pixels of their video
        thumbnails = torch.nn.functional.adaptive_avg_pool2d(flat, 32).reshape(len(images), -1)
        if len(images) > 1:
            distances.append(float(torch.pdist(thumbnails).mean()) / math.sqrt(thumbnails.shape[1]))
    return sum(distances) / len(distances) if distances else math.nan


def nan_mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else math.nan
