"""The call that diffusion trainers share, and what an adapter never lets pass as a number.

`reward(images, prompts, metadata) -> (scores, info)` is ddpo-pytorch's; most hosts call something close to it. The
adapters beside this file turn each host's call into it and back, through `score`, which checks both directions: a
prompt that got lost, a count that does not fit or a score that is missing is an error, and never a zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.reward import ListenerReward, Scheme

Reward = Callable[[Any, Sequence[str], Any], tuple[Any, Mapping[str, Any]]]
"""B images, B prompts and B metadata to B scores and a dict of arrays; `ListenerReward` is one."""


def as_reward(reward: Any, options: Mapping[str, Any], *, scheme: Scheme) -> Any:
    """What an adapter was given, as a callable of the contract.

    Args:
        reward: a judge's name or folder, a loaded judge, the URL of a `listener-reward serve` (for hosts whose
            dependencies this package cannot share), or any callable of the contract, which is returned as it is.
        options: passed on to `ListenerReward`, or to `RemoteReward` for a URL.
        scheme: the one that suits the host, for a `ListenerReward` made here whose options name none.

    Raises:
        InputError: none of these, or options for a reward that is already made.
    """
    if isinstance(reward, str) and "://" in reward:
        from .remote import RemoteReward

        return RemoteReward(reward, **options)
    if isinstance(reward, (str, os.PathLike)) or hasattr(reward, "compare_many"):
        chosen: dict[str, Any] = {"scheme": scheme, **options}
        return ListenerReward(reward, **chosen)
    if not callable(reward):
        raise InputError(f"reward is a {type(reward).__name__}; give a judge's name, a URL, or a callable")
    if options:
        raise InputError(f"{', '.join(options)} would have no effect on a reward already made; give it a judge's name")
    return reward


def score(
    reward: Reward, images: Any, prompts: Sequence[str], metadata: Any = None, *, missing: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Calls `reward` and checks what goes in and what comes out.

    Args:
        images: B images of any kind the reward takes.
        prompts: B prompts; none of them empty.
        metadata: B entries in a list or tuple, handed on; None becomes B empty dicts.
        missing: whether the host has a word for a sample without a score. If it has none, NaN is an error.

    Returns:
        Scores, float32 `(B,)`, and those entries of the info that are numbers for each image, float32 `(B,)`.

    Raises:
        InputError: unusable images or prompts, or lengths that differ.
        JudgeError: the reward gave something else than B finite scores.
    """
    check_prompts(prompts, len(images))
    if isinstance(metadata, (list, tuple)) and len(metadata) != len(prompts):
        raise InputError(f"metadata has {len(metadata)} entries for {len(prompts)} prompts; give one for each, or None")
    given, info = reward(images, prompts, tuple({} for _ in prompts) if metadata is None else metadata)
    scores = _numbers(given)
    if scores is None or scores.shape != (len(prompts),):
        shape = "no numbers" if scores is None else f"shape {scores.shape}"
        raise JudgeError(f"the reward gave {shape} for {len(prompts)} images; it has to give one score for each")
    unknown = np.flatnonzero(~np.isfinite(scores))
    if len(unknown) and not (missing and np.isnan(scores[unknown]).all()):
        some = ", ".join(map(str, unknown[:8].tolist()))
        raise JudgeError(
            f"{len(unknown)} of {len(scores)} images have no score (positions {some}): the judge broke on them, and "
            "this host would take a missing score for a number"
        )
    arrays = {name: _numbers(values) for name, values in info.items()}
    return scores, {
        name: values for name, values in arrays.items() if values is not None and len(values) == len(scores)
    }


def check_prompts(prompts: Sequence[str], n: int) -> None:
    """Raises `InputError` unless `prompts` are `n` texts with something in them.

    An empty prompt means that it was lost on the way: the judge would answer, but not the question that was meant.
    """
    if isinstance(prompts, (str, bytes)):
        raise InputError(f"prompts is one string, {prompts[:40]!r}; give one prompt for each image")
    if len(prompts) != n:
        raise InputError(f"prompts has {len(prompts)} entries for {n} images; give one prompt for each image")
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompts[{position}] is a {type(prompt).__name__}; a prompt is a string")
        if not prompt.strip():
            raise InputError(f"prompts[{position}] is empty; look where the host lost it, or leave the sample out")


def _numbers(values: Any) -> np.ndarray | None:
    """`values` as float32 of rank 1, None where they are not that."""
    if hasattr(values, "detach"):  # a tensor, perhaps in bfloat16, which numpy does not have
        values = values.detach().float().cpu()
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        return None
    return array if array.ndim == 1 else None
