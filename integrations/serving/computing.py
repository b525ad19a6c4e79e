"""`POST /compute`: Flow-Factory's remote rewards, and `RemoteReward`. A request's body to its answer, without HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.pairs import PromptLike, check_prompts

from ..contract import Reward, score
from .asked import Asked, echo, prompts_of, read_asked, sources_of
from .collector import GroupCollector
from .limits import Intake, TooMuch
from .schemes import OtherScheme, check_scheme
from .uploads import Upload, largest, readable, tried, upload


def compute(
    reward: Reward,
    body: Any,
    *,
    request: str | None = None,
    scheme: str | None = None,
    gone: Callable[[], bool] | None = None,
    intake: Intake | None = None,
) -> dict[str, Any]:
    """The response to `POST /compute`: `{"prompt": [...], "image": [base64]}`, or `"video": [[base64 of a frame]]`.

    What prompts may have beside their texts is `asked.read_asked`'s. The answer says what was read of it.

    `rewards` has one number for each prompt. Where one is missing (`null`, for the judge broke on it), or all are,
    there is an `error` too, on which Flow-Factory's client stops; `kind` says whose fault it was. `request` names the
    request for a collector, in which one that comes again takes no second place. `gone` says whether its client has
    hung up. `intake` is the server's, whose requests share its memory.

    Raises:
        OtherScheme: the reward answers by another scheme than the client wants.
        TooMuch: the request is past a limit.
    """
    intake = intake or Intake()
    try:
        if not isinstance(body, Mapping) or not isinstance(body.get("prompt"), list):
            raise InputError("prompt is no list; send one prompt for each image")
        images, videos = body.get("image"), body.get("video")
        media = images if images is not None else videos
        if not isinstance(media, list) or (images is not None and videos is not None):
            raise InputError("image or video has to be a list, one of the two")
        asked = read_asked(body, body["prompt"])
        check_scheme(reward, scheme, [one.key for one in asked])
        kind = "image" if images is not None else "video"
        uploads = [tried(partial(upload, item, f"{kind}[{i}]")) for i, item in enumerate(media)]
        intake.check(asked, readable(uploads))
        if isinstance(reward, GroupCollector):
            scores, info = _collect(reward, uploads, asked, request, gone, intake)
        else:
            scores, info = _score(reward, uploads, asked, gone, intake)
    except (OtherScheme, TooMuch):
        raise
    except (InputError, JudgeError) as error:
        return {"rewards": None, "error": str(error), "kind": "input" if isinstance(error, InputError) else "judge"}
    reply: dict[str, Any] = {
        "rewards": without_nan(scores.tolist()),
        "info": {name: without_nan(values.tolist()) for name, values in info.items()},
        **echo(asked),
    }
    if missing := int(np.isnan(scores).sum()):
        reply |= {"error": f"the judge broke on {missing} of {len(scores)} images", "kind": "judge"}
    return reply


def _score(
    reward: Reward,
    uploads: Sequence[Upload | InputError],
    asked: Sequence[Asked],
    gone: Callable[[], bool] | None,
    intake: Intake,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    with intake.room([*sources_of(asked), *readable(uploads)], gone):
        pictures = []
        for one in uploads:
            if isinstance(one, InputError):
                raise one
            pictures.append(one.picture())
        return score(reward, pictures, prompts_of(asked), missing=True)


def _collect(
    collector: GroupCollector,
    uploads: Sequence[Upload | InputError],
    asked: Sequence[Asked],
    request: str | None,
    gone: Callable[[], bool] | None,
    intake: Intake,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All images take their places before the first is waited for, unreadable ones, too."""
    with intake.room([*sources_of(asked), *largest(uploads)], gone):
        futures = _submit(collector, uploads, prompts_of(asked), request)
    for one in uploads:
        if isinstance(one, InputError):
            raise one
    return collector.wait(futures, gone)


def _submit(
    collector: GroupCollector,
    uploads: Sequence[Upload | InputError],
    prompts: Sequence[PromptLike],
    request: str | None,
) -> list[Future[tuple[float, dict[str, float]]]]:
    check_prompts(prompts, len(uploads))
    names = [None if request is None else f"{request}/{position}" for position in range(len(uploads))]
    return [
        collector.submit(kept(one), prompt, name=name)
        for one, prompt, name in zip(uploads, prompts, names, strict=True)
    ]


def kept(one: Upload | InputError) -> Any:
    """What a collector keeps of it, or the `InputError` that it cannot be read."""
    return one if isinstance(one, InputError) else tried(one.kept)


def without_nan(value: Any) -> Any:
    """NaN as null: JSON has no word for it."""
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
