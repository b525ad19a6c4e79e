"""miles_diffusion: a function for `--custom-rm-path`.

    # my_rewards.py, and then --custom-rm-path my_rewards.rm
    from listener_reward.integrations.miles_diffusion import listener_rm
    rm = listener_rm("http://127.0.0.1:8300")         # listener-reward serve

The host scores each microgroup as soon as it is generated, which may be part of a group, so the scheme is `reference`.
To compare within the group, start the host with `--group-rm`, so that it hands over whole groups, and give
`scheme="group"`, to the server too. Or give `group_size`: calls then wait for one another until the images of a group
are all there, and go to a `listener-reward serve --scheme group` as a whole.

Evaluation calls the same function, with one sample at a time: `group_size` would wait for the others in vain, and the
host itself refuses to evaluate with `--group-rm`. Evaluate with the reference scheme, in a run of its own.

The host has no word for source images. Those of edits are `sample.metadata["sources"]`, which come from the data's
metadata: paths, one or a list. With `edits=True` a sample without one is an `InputError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from listener_reward.errors import InputError
from listener_reward.media.storyboards import as_picture
from listener_reward.pairs import check_prompts, prompt_with
from listener_reward.reward import PAPER_CHECKPOINT

from .contract import as_reward, check_edits, score_in_thread
from .serving.collector import GroupCollector


def listener_rm(
    reward: Any = PAPER_CHECKPOINT,
    *,
    group_size: int | None = None,
    timeout: float = 600.0,
    edits: bool = False,
    **options: Any,
) -> Callable[..., Awaitable[list[float]]]:
    """`async rm(args, samples) -> list[float]`, one score for each sample.

    Args:
        reward, options: see `contract.as_reward`.
        group_size: samples of one group (the host's `group_index`, or else the prompt) that wait for one another; None
            scores each call for itself.
        timeout: seconds that a call waits for the rest of its group.
        edits: whether each sample has to have a source image.

    Raises:
        InputError, JudgeError: when awaited; the host has no word for a missing score, so the rollout stops. Parts of a
            group with `scheme="group"` are an `InputError`: each would be centred for itself.
    """
    scorer = as_reward(reward, options, scheme="group" if group_size else "reference")
    of_groups = getattr(scorer, "scheme", None) == "group"  # here, or on a server
    collector = GroupCollector(scorer, group_size, timeout=timeout) if group_size else None

    async def rm(args: Any, samples: Sequence[Any], **_: Any) -> list[float]:
        if collector:
            # All before the first wait: an image that cannot be read must not keep its neighbours from the group.
            futures = [_submit(collector, sample, position, edits) for position, sample in enumerate(samples)]
            results = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            return [value for value, _info in results]  # pyright: ignore[reportGeneralTypeIssues]
        expected = getattr(args, "n_samples_per_prompt", None)
        if of_groups and expected and len(samples) < expected:
            raise InputError(
                f"{len(samples)} of the {expected} samples of a group came, and scheme='group' compares whole groups; "
                "start the host with --group-rm, give group_size, or take scheme='reference'"
            )
        pictures = [_picture(sample, position) for position, sample in enumerate(samples)]
        prompts, sources = [sample.prompt for sample in samples], [_sources(sample) for sample in samples]
        scores, _info = await score_in_thread(scorer, pictures, prompts, sources=sources, edits=edits)
        return scores.tolist()

    return rm


def _sources(sample: Any) -> Any:
    metadata = getattr(sample, "metadata", None)
    return metadata.get("sources") if isinstance(metadata, Mapping) else None


def _submit(collector: GroupCollector, sample: Any, position: int, edits: bool) -> Future:
    check_prompts([sample.prompt], 1)
    prompt = prompt_with(str(sample.prompt), _sources(sample))
    if edits:
        check_edits([prompt])
    try:
        picture: Any = _picture(sample, position)
    except InputError as error:
        picture = error
    index = getattr(sample, "group_index", None)
    return collector.submit(picture, prompt, group=None if index is None else str(index))


def _picture(sample: Any, position: int) -> Any:
    """`sample.generated_output`: (C, H, W), (T, H, W, C), (C, T, H, W), (T, C, H, W) or (1, T, H, W, C).

    uint8, or floats in [0, 1] or in [0, 255]: like the host, whose layouts these are, floats above 1 are taken for the
    latter. One frame is a picture, more are a storyboard.
    """
    field = f"samples[{position}].generated_output"
    pixels = getattr(sample, "generated_output", None)
    import torch  # the host's

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
