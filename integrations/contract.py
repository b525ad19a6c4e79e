"""The call that diffusion trainers share, and what an adapter never lets pass as a number. See docs/contract.md.

`reward(images, prompts, metadata) -> (scores, info)` is ddpo-pytorch's; most hosts call something close to it. The
adapters beside this file turn each host's call into it and back, through `score`, which checks both directions: a
prompt that got lost, a count that does not fit or a score that is missing is an error, and never a zero.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.mixture import Mixture
from listener_reward.pairs import PromptLike, as_prompt, check_company, prompt_with, with_sources
from listener_reward.reward import ListenerReward, Reward, Scheme, read_scores
from listener_reward.verdict import PairJudge

from .video import VideoReward

CLIENT_OPTIONS = ("scheme", "timeout", "retries", "api_key")
"""What an adapter that is given a URL takes beside it; see `RemoteReward`."""

ALWAYS_FINITE = ("standard_error", "comparisons", "failed")
"""Entries of `ListenerReward`'s info that are a number for every scored image. The others are NaN where nothing was
compared, as for the image that becomes its prompt's reference, and NaN would be the mean in a host that takes one."""


def as_reward(reward: Any, options: Mapping[str, Any], *, scheme: Scheme, device: Any = None) -> Any:
    """What an adapter was given, as a callable of the contract.

    Args:
        reward: a judge's name or folder, a loaded judge, the URL of a `listener-reward serve` (for hosts whose
            dependencies this package cannot share), or any callable of the contract, which is returned as it is.
        options: passed on to `ListenerReward`, or for a URL those of `CLIENT_OPTIONS` to `RemoteReward`.
        scheme: the one that suits the host, for a `ListenerReward` made here whose options name none. A server is told
            with every request, and refuses one that it would answer by another. `reference` says that the host
            scatters a prompt's images over calls.
        device: the host's, where the judge is loaded unless its options say otherwise; None for a host that names none.

    Raises:
        InputError: none of these, options that are unknown or belong to the server, options for a reward that is
            already made, or in a host that scatters groups `on_failure="group-mean"`, unless the scheme is `group`,
            alone or in a `Mixture`, and a `Mixture` with `on_failure="drop-component"`.
    """
    if isinstance(reward, str) and "://" in reward:
        from listener_reward.remote import RemoteReward

        if others := [name for name in options if name not in CLIENT_OPTIONS]:
            raise InputError(
                f"{', '.join(others)}: no option for a URL, which takes {', '.join(CLIENT_OPTIONS)}; what concerns the "
                "judge is an option of the server: listener-reward serve -h"
            )
        return RemoteReward(reward, **{"scheme": scheme, **options})
    made = reward
    if isinstance(reward, (str, os.PathLike, PairJudge)):
        chosen: dict[str, Any] = {"scheme": scheme, **options}
        made = ListenerReward(reward, **chosen)
    elif not callable(reward):
        raise InputError(f"reward is a {type(reward).__name__}; give a judge's name, a URL, or a callable")
    elif options:
        raise InputError(f"{', '.join(options)} would have no effect on a reward already made; give it a judge's name")
    for part in made.rewards.values() if isinstance(made, Mixture) else (made,):
        if scheme == "reference" and isinstance(part, (ListenerReward, VideoReward)):
            _check_policy(part)
    if isinstance(made, Mixture) and scheme == "reference" and made.on_failure == "drop-component":
        raise InputError(
            "on_failure is 'drop-component', and this host scatters a group over calls: the images of one prompt would "
            "be scored by different components; take on_failure='nan'"
        )
    if device is not None and isinstance(made, (ListenerReward, Mixture, VideoReward)):
        made.prefer_device(device)
    return made


def score(
    reward: Reward,
    images: Any,
    prompts: Sequence[PromptLike],
    metadata: Any = None,
    *,
    sources: Any = None,
    edits: bool = False,
    missing: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Calls `reward` and checks what goes in and what comes out.

    Wherever source images come from, the reward gets them as `metadata[i]["sources"]`, lists of PIL images.

    Args:
        images: B images of any kind the reward takes.
        prompts: B prompts; none of them empty.
        metadata: B entries in a list or tuple, handed on; None becomes B empty dicts. Images that a prompt speaks of
            are `metadata[i]["sources"]`.
        sources: for a host that has them elsewhere: B entries of one image, several, or None.
        edits: whether each prompt has to have a source. A host that is to edit, and hands over texts alone, would else
            be judged by another question.
        missing: whether the host has a word for a sample without a score. If it has none, NaN is an error.

    Returns:
        Scores, float32 `(B,)`, and those entries of the info that are numbers for each image, float32 `(B,)`.

    Raises:
        InputError: unusable images, sources or prompts, lengths that differ, `edits` without sources, or a prompt that
            stands alone where the scheme is `group`: there is nothing to compare its image with, and 0 would pass for a
            score.
        JudgeError: the reward gave something else than B finite scores.
    """
    asked = with_sources(prompts, len(images), metadata, sources)
    if edits:
        check_edits(asked)
    if isinstance(reward, (ListenerReward, Mixture, VideoReward)) and reward.scheme == "group":
        check_company(asked)
    if isinstance(metadata, (list, tuple)) and len(metadata) != len(prompts):
        raise InputError(f"metadata has {len(metadata)} entries for {len(prompts)} prompts; give one for each, or None")
    entries: Any = tuple({} for _ in prompts) if metadata is None else metadata
    if any(as_prompt(prompt).sources for prompt in asked):
        prompts, entries = _apart(asked, entries)
    given, info = reward(images, prompts, entries)
    scores, arrays = read_scores(given, info, len(prompts))
    unknown = np.flatnonzero(~np.isfinite(scores))
    if len(unknown) and not (missing and np.isnan(scores[unknown]).all()):
        some = ", ".join(map(str, unknown[:8].tolist()))
        raise JudgeError(
            f"{len(unknown)} of {len(scores)} images have no score (positions {some}): the judge broke on them, and "
            "this host would take a missing score for a number"
        )
    return scores, arrays


def _apart(asked: Sequence[PromptLike], metadata: Any) -> tuple[list[PromptLike], tuple[dict[str, Any], ...]]:
    """Prompts without their sources, and the metadata with them: lists of PIL images, as any reward may read them."""
    if others := [type(entry).__name__ for entry in metadata if not isinstance(entry, Mapping | None)]:
        raise InputError(f"metadata has a {others[0]}; with source images each entry has to be a dict, or None")
    pictures = {prompt: [source.image for source in as_prompt(prompt).sources] for prompt in asked}
    return (
        [prompt_with(as_prompt(prompt).text, (), as_prompt(prompt).criterion) for prompt in asked],
        tuple(
            {**(entry or {}), **({"sources": pictures[prompt]} if pictures[prompt] else {})}
            for entry, prompt in zip(metadata, asked, strict=True)
        ),
    )


def check_edits(prompts: Sequence[PromptLike]) -> None:
    """Raises `InputError` for a prompt without a source."""
    for position, prompt in enumerate(prompts):
        if not as_prompt(prompt).sources:
            raise InputError(
                f"prompts[{position}], {as_prompt(prompt).text[:80]!r}, has no source image, and this reward is for "
                "edits; hand the source over as the adapter's recipe says"
            )


def _check_policy(reward: ListenerReward | VideoReward) -> None:
    """Raises `InputError` for a reward that a host which scatters groups must not have."""
    if reward.on_failure == "group-mean" and reward.scheme != "group":
        # Of a few images of a group the mean may be anything: a broken image would get the advantage of its call.
        raise InputError(
            f"on_failure is 'group-mean' with scheme={reward.scheme!r}, and this host scatters a group over calls, "
            "whose means differ; leave on_failure out, or give scheme='group', where the mean of every call is 0"
        )


def logged(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a host that logs means gets of an info: those of `ALWAYS_FINITE`, and each component or criterion.

    In a score that is a number, a component is NaN only where a `Mixture` with `on_failure="drop-component"` left it
    out.
    """
    return {name: values for name, values in info.items() if name in ALWAYS_FINITE or name.endswith("/score")}


async def score_in_thread(
    reward: Reward, images: Any, prompts: Sequence[PromptLike], **options: Any
) -> tuple[np.ndarray, dict]:
    """`score`, with its options, for a host that runs an event loop, in a thread of the call's own.

    Not in the loop's default executor, as `asyncio.to_thread` does: it has few threads, which the host needs too, and
    calls may have to wait for one another, where a server collects their group.
    """
    done: Future = Future()
    done.set_running_or_notify_cancel()  # a host that cancels its task cannot cancel a thread

    def work() -> None:
        try:
            done.set_result(score(reward, images, prompts, **options))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="listener-reward", daemon=True).start()
    return await asyncio.wrap_future(done)
