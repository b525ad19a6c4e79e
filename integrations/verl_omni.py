"""verl-omni: `compute_score`, which the host calls by keyword for one sample at a time.

    +reward.reward_functions.listener.path=pkg://listener_reward.integrations.verl_omni
    +reward.reward_functions.listener.name=compute_score
    +reward.reward_functions.listener.required=true
    +reward.reward_functions.listener.judge=http://127.0.0.1:8300

`required=true` matters: without it the host turns an exception into a score of 0. Every other key of the entry arrives
here as a keyword.

One sample is no group, so the scheme is `reference`. With `group_size` the call waits, without blocking the host's
event loop, until that many samples of the prompt are there, and they are compared with one another. That needs all of a
group in one process (`reward.num_workers=1`), or one `listener-reward serve --group-size`, which sees them all. It
needs validation to draw as many images a prompt, too: the host calls the same function there and does not say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.media.storyboards import as_picture
from listener_reward.reward import PAPER_CHECKPOINT

from .contract import Reward, as_reward, check_prompts, score_in_thread
from .serving.collector import GroupCollector


async def compute_score(
    *,
    solution_image: Any,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    data_source: str = "",
    judge: Any = PAPER_CHECKPOINT,
    scheme: str | None = None,
    group_size: int = 0,
    timeout: float = 600.0,
    **_: Any,
) -> dict[str, float]:
    """The score of one image, or of one video as a storyboard.

    Args:
        solution_image: uint8 `(C, H, W)`, or `(T, C, H, W)` for a video.
        ground_truth, extra_info: the prompt is `extra_info["prompt"]`, or its `"raw_prompt"`, or `ground_truth`: text,
            or a chat as the host's Parquet files give it (list or array of turns), whose last user turn is meant.
        judge: a judge's name, the URL of a server, or a callable; see `contract.as_reward`.
        group_size: samples of one prompt that wait for one another; 0 compares with a reference image.
        timeout: seconds that a sample waits for its group.

    Returns:
        `score`, and beside it what `ListenerReward` says of the image. Plain floats, the same keys for every sample.

    Raises:
        InputError, JudgeError: the host stops, given `required=true`.
    """
    prompt = _prompt(ground_truth, extra_info or {})
    picture = as_picture(solution_image, field="solution_image")
    reward = _reward(judge, scheme or ("group" if group_size else "reference"), group_size, timeout)
    if isinstance(reward, GroupCollector):
        value, info = await asyncio.wrap_future(reward.submit(picture, prompt))
    else:
        scores, arrays = await score_in_thread(reward, [picture], [prompt])
        value, info = float(scores[0]), {name: float(array[0]) for name, array in arrays.items()}
    return {"score": value, **info}


@lru_cache
def _reward(judge: Any, scheme: Any, group_size: int, timeout: float) -> Reward:
    """One reward for each configuration, as the host knows only functions."""
    reward = as_reward(judge, {}, scheme=scheme)
    return GroupCollector(reward, group_size, timeout=timeout) if group_size else reward


def _prompt(ground_truth: Any, extra_info: Mapping[str, Any]) -> str:
    for given in (extra_info.get("prompt"), extra_info.get("raw_prompt"), ground_truth):
        given = _text(given)
        if given is not None:
            check_prompts([given], 1)
            return given
    raise InputError(
        "there is no prompt: extra_info has neither 'prompt' nor 'raw_prompt', and ground_truth is None; add one of "
        "them to the data"
    )


def _text(given: Any) -> Any:
    """A chat's last user turn, and of several parts its text; anything else as it is."""
    if isinstance(given, np.ndarray):  # what Parquet's lists become
        given = given.tolist()
    if not isinstance(given, (list, tuple)):
        return given
    turns = [turn for turn in given if isinstance(turn, Mapping)]
    content = next((turn.get("content") for turn in reversed(turns) if turn.get("role") == "user"), None)
    if isinstance(content, np.ndarray):
        content = content.tolist()
    if not isinstance(content, (list, tuple)):
        return content
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "\n".join(part for part in parts if isinstance(part, str) and part.strip())
