"""miles_diffusion: a function for `--custom-rm-path`.

    # my_rewards.py, and then --custom-rm-path my_rewards.rm
    rm = listener_rm("http://127.0.0.1:8300")

The host scores each microgroup as soon as it is generated, which may be part of a group, so the scheme is `reference`.
Where microgroups are smaller than groups and the comparison within the group is wanted, give `group_size`: calls then
wait for one another until the images of a prompt are all there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch

from listener_reward.errors import InputError
from listener_reward.reward import PAPER_CHECKPOINT

from .collector import GroupCollector
from .contract import as_reward, score
from .video import as_picture


def listener_rm(
    reward: Any = PAPER_CHECKPOINT, *, group_size: int | None = None, timeout: float = 600.0, **options: Any
) -> Callable[..., Awaitable[list[float]]]:
    """`async rm(args, samples) -> list[float]`, one score for each sample.

    Args:
        reward, options: see `contract.as_reward`.
        group_size: samples of one prompt that are compared with one another; None compares with a reference.
        timeout: seconds that a call waits for the rest of its group.

    Raises:
        InputError, JudgeError: when awaited; the host has no word for a missing score, so the rollout stops.
    """
    scorer = as_reward(reward, options, scheme="group" if group_size else "reference")
    if group_size:
        scorer = GroupCollector(scorer, group_size, timeout=timeout)

    async def rm(args: Any, samples: Sequence[Any], **_: Any) -> list[float]:
        pictures = [_picture(sample, position) for position, sample in enumerate(samples)]
        prompts = [sample.prompt for sample in samples]
        scores, _info = await asyncio.to_thread(score, scorer, pictures, prompts)
        return scores.tolist()

    return rm


def _picture(sample: Any, position: int) -> Any:
    """`sample.generated_output`: (C, H, W), (T, H, W, C), (C, T, H, W), (T, C, H, W) or (1, T, H, W, C).

    uint8, or floats in [0, 1] or in [0, 255]: like the host, whose layouts these are, floats above 1 are taken for the
    latter. One frame is a picture, more are a storyboard.
    """
    field = f"samples[{position}].generated_output"
    pixels = getattr(sample, "generated_output", None)
    if not isinstance(pixels, torch.Tensor):
        raise InputError(f"{field} is a {type(pixels).__name__}; it has to be a tensor: was the sample generated?")
    pixels = pixels.detach().cpu()
    if pixels.ndim == 5 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 4 and pixels.shape[-1] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(0, 1)
    if pixels.is_floating_point() and pixels.numel() and pixels.min() >= 0 and 1 + 1e-3 < pixels.max() <= 255:
        pixels = pixels / 255
    return as_picture(pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels, field=field)
