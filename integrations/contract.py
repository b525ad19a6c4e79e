"""The call that diffusion trainers share, and what an adapter never lets pass as a number.

`reward(images, prompts, metadata) -> (scores, info)` is ddpo-pytorch's; most hosts call something close to it. The
adapters beside this file turn each host's call into it and back, through `score`, which checks both directions: a
prompt that got lost, a count that does not fit or a score that is missing is an error, and never a zero.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.reward import ListenerReward, Scheme
from listener_reward.verdict import PairJudge

Reward = Callable[[Any, Sequence[str], Any], tuple[Any, Mapping[str, Any]]]
"""B images, B prompts and B metadata to B scores and a dict of arrays; `ListenerReward` is one."""


def as_reward(reward: Any, options: Mapping[str, Any], *, scheme: Scheme, device: Any = None) -> Any:
    """What an adapter was given, as a callable of the contract.

    Args:
        reward: a judge's name or folder, a loaded judge, the URL of a `listener-reward serve` (for hosts whose
            dependencies this package cannot share), or any callable of the contract, which is returned as it is.
        options: passed on to `ListenerReward`, or to `RemoteReward` for a URL.
        scheme: the one that suits the host, for a `ListenerReward` made here whose options name none. `reference`
            says that the host scatters a prompt's images over calls.
        device: the host's, where the judge is loaded unless its options say otherwise; None for a host that names none.

    Raises:
        InputError: none of these, options for a reward that is already made, or `on_failure="group-mean"` in a host
            that scatters groups, unless the scheme is `group`.
    """
    if isinstance(reward, str) and "://" in reward:
        from .serving.client import RemoteReward

        return RemoteReward(reward, **options)
    made = reward
    if isinstance(reward, (str, os.PathLike, PairJudge)):
        chosen: dict[str, Any] = {"scheme": scheme, **options}
        made = ListenerReward(reward, **chosen)
    elif not callable(reward):
        raise InputError(f"reward is a {type(reward).__name__}; give a judge's name, a URL, or a callable")
    elif options:
        raise InputError(f"{', '.join(options)} would have no effect on a reward already made; give it a judge's name")
    if isinstance(made, ListenerReward):
        if scheme == "reference" and made.on_failure == "group-mean" and made.scheme != "group":
            # Of a few images of a group the mean may be anything: a broken image would get the advantage of its call.
            raise InputError(
                f"on_failure is 'group-mean' with scheme={made.scheme!r}, and this host scatters a group over calls, "
                "whose means differ; leave on_failure out, or give scheme='group', where the mean of every call is 0"
            )
        if device is not None:
            made.prefer_device(device)
    return made


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
        InputError: unusable images or prompts, lengths that differ, or a prompt that stands alone where the scheme is
            `group`: there is nothing to compare its image with, and 0 would pass for a score.
        JudgeError: the reward gave something else than B finite scores.
    """
    check_prompts(prompts, len(images))
    if isinstance(reward, ListenerReward) and reward.scheme == "group":
        _check_company(prompts)
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


def _check_company(prompts: Sequence[str]) -> None:
    alone = [prompt for prompt, times in Counter(map(str, prompts)).items() if times == 1]
    if alone:
        raise InputError(
            f"{len(alone)} of the prompts have one image in this call, such as {alone[0][:80]!r}, and scheme='group' "
            "compares the images of a prompt with one another; hand over whole groups, or take scheme='reference'"
        )


async def score_in_thread(reward: Reward, images: Any, prompts: Sequence[str]) -> tuple[np.ndarray, dict]:
    """`score` for a host that runs an event loop, in a thread of the call's own.

    Not in the loop's default executor, as `asyncio.to_thread` does: it has few threads, which the host needs too, and
    calls may have to wait for one another, where a server collects their group.
    """
    done: Future = Future()
    done.set_running_or_notify_cancel()  # a host that cancels its task cannot cancel a thread

    def work() -> None:
        try:
            done.set_result(score(reward, images, prompts))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="listener-reward", daemon=True).start()
    return await asyncio.wrap_future(done)


def _numbers(values: Any) -> np.ndarray | None:
    """`values` as float32 of rank 1, None where they are not that."""
    if hasattr(values, "detach"):  # a tensor, perhaps in bfloat16, which numpy does not have
        values = values.detach().float().cpu()
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        return None
    return array if array.ndim == 1 else None
