"""UniRL: the JSON of its reward service's `POST /score`, answered by `listener-reward serve`.

    listener-reward serve --judge tiny            # on the UniRL side: RemoteRewardSpec(base_url="http://127.0.0.1:8300",
                                                  #                                     required_rewards=("listener",))

A request holds one process's share of a batch, so the server compares with a reference image of each prompt, the same
for all processes. With `--group-size` it collects the group from all of them first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np

from listener_reward.errors import InputError, JudgeError

from .contract import Reward, check_prompts, score
from .video import as_picture

_IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key")


def answer(reward: Reward, body: Any, *, name: str = "listener") -> dict[str, Any]:
    """The response to one `ScoreRequest`.

    An item that cannot be scored has no entry in `results`, and its reason in `errors`: the host's notion of a failed
    sample. The one sub-metric is `score`, since the host may take a mean of several.

    Raises:
        InputError: the request as a whole is malformed or asks for another reward; the server answers it with 400.
    """
    items = body.get("requests") if isinstance(body, Mapping) else None
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise InputError("requests is no list of objects; see UniRL's reward_service/schemas.py")
    if (version := body.get("protocol_version", "1")) != "1":
        raise InputError(f"protocol_version is {version!r}; this server speaks '1'")
    for position, item in enumerate(items):
        if item.get("required_rewards") != [name]:
            raise InputError(
                f"requests[{position}].required_rewards is {item.get('required_rewards')!r}; this server has [{name!r}]"
            )
    results: list[dict] = [{} for _ in items]
    errors: list[dict] = [{} for _ in items]
    readable: dict[int, tuple[Any, str]] = {}
    for position, item in enumerate(items):
        try:
            readable[position] = _read(item.get("history"), f"requests[{position}]")
        except InputError as error:
            errors[position][name] = str(error)
    if readable:
        pictures, prompts = zip(*readable.values(), strict=True)
        try:
            scores, _ = score(reward, list(pictures), list(prompts), missing=True)
        except (InputError, JudgeError) as error:
            errors = [errors[position] or {name: str(error)} for position in range(len(items))]
        else:
            for position, value in zip(readable, scores.tolist(), strict=True):
                if np.isnan(value):
                    errors[position][name] = "the judge broke on every comparison of this image"
                else:
                    results[position][name] = {"score": value}
    identities = [{key: item.get(key) for key in _IDENTITY} | {"scorer_version": None} for item in items]
    return {"protocol_version": "1", "results": results, "errors": errors, "identities": identities}


def _read(history: Any, field: str) -> tuple[Any, str]:
    """Picture and prompt of the last turn, which is the generated one; before it may stand a condition."""
    if not isinstance(history, list) or not history or not isinstance(history[-1], Mapping):
        raise InputError(f"{field}.history is empty; its last turn is the generated image with its prompt")
    turn = history[-1]
    check_prompts([turn.get("text")], 1)  # pyright: ignore[reportArgumentType]
    for key in ("image_b64", "video_b64"):
        if turn.get(key) is not None:
            return as_picture(decode(turn[key], f"{field}.{key}"), field=f"{field}.{key}"), turn["text"]
    raise InputError(f"{field} has neither image_b64 nor video_b64; files and memory of another process are not read")


def decode(text: Any, field: str) -> bytes:
    """The bytes that `text` holds in base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InputError(f"{field} is not base64; encode the bytes of an image file") from error
