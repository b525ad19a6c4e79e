"""UniRL: the JSON of its reward service's `POST /score`, answered by `listener-reward serve`.

    listener-reward serve                          # on the UniRL side:
    RemoteRewardSpec(base_url="http://127.0.0.1:8300/reference", required_rewards=("listener",))

A request holds one process's part of a batch, so the server compares with a reference image of each prompt, the same
for all processes. With `serve --group-size` and `/group` in the URL it collects the group, by the `group_id` that the
host sends, from all of them first. A request that the host repeats because that took longer than its timeout is known
by its `idempotency_key`. Keep `request_batch_size` unset or at a whole number of groups: the host sends the parts of a
batch one after another, so a group in two of them would wait for itself.

The host puts a source image into the history as a turn of its own. Edits are not judged yet, so such an item fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.pairs import check_prompts

from .checks import check_no_source
from .contract import Reward, score
from .serving.collector import GroupCollector
from .serving.computing import kept
from .serving.limits import Intake
from .serving.schemes import check_scheme
from .serving.uploads import Upload, bare, readable, tried, upload

_IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key")


def answer(
    reward: Reward,
    body: Any,
    *,
    name: str = "listener",
    request: str | None = None,
    version: str | None = None,
    scheme: str | None = None,
    gone: Callable[[], bool] | None = None,
    intake: Intake | None = None,
) -> dict[str, Any]:
    """The response to one `ScoreRequest`.

    `request` names it for a collector, where items have no `idempotency_key`; `version` is echoed as `scorer_version`;
    `scheme` is the one that the client wants; `gone` says whether it has hung up; `intake` is the server's, whose
    requests share its memory.

    An item that cannot be scored has no entry in `results`, and its reason in `errors`: the host's notion of a failed
    sample. The one sub-metric is `score`, since the host may take a mean of several.

    Raises:
        InputError: the request as a whole is malformed or asks for another reward; the server answers it with 400.
        OtherScheme: the reward answers by another scheme than the client wants.
        TooMuch: the request is past a limit.
    """
    intake = intake or Intake()
    items = body.get("requests") if isinstance(body, Mapping) else None
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise InputError("requests is no list of objects; see UniRL's reward_service/schemas.py")
    if (protocol := body.get("protocol_version", "1")) != "1":
        raise InputError(f"protocol_version is {protocol!r}; this server speaks '1'")
    for position, item in enumerate(items):
        if item.get("required_rewards") != [name]:
            raise InputError(
                f"requests[{position}].required_rewards is {item.get('required_rewards')!r}; this server has [{name!r}]"
            )
    check_scheme(reward, scheme, [str(_last(item.get("history")).get("text")) for item in items])
    read = [_read(item.get("history"), f"requests[{position}]") for position, item in enumerate(items)]
    intake.check([prompt for _, prompt in read], readable([one for one, _ in read]))
    if isinstance(reward, GroupCollector):
        outcomes = _collect(reward, items, read, request, gone, intake)
    else:
        outcomes = _score(reward, read, gone, intake)
    results = [{} if isinstance(outcome, Exception) else {name: {"score": outcome}} for outcome in outcomes]
    errors = [{name: str(outcome)} if isinstance(outcome, Exception) else {} for outcome in outcomes]
    identities = [{key: item.get(key) for key in _IDENTITY} | {"scorer_version": version} for item in items]
    return {"protocol_version": "1", "results": results, "errors": errors, "identities": identities}


def _score(
    reward: Reward, read: list[tuple[Any, Any]], gone: Callable[[], bool] | None, intake: Intake
) -> list[float | Exception]:
    """Each item's score, or why it has none."""
    outcomes: list[Any] = [None] * len(read)
    with intake.room(readable([one for one, _ in read]), gone):
        pictures, places = [], []
        for place, (one, _) in enumerate(read):
            picture = one if isinstance(one, InputError) else tried(one.picture)
            if isinstance(picture, InputError):
                outcomes[place] = picture
            else:
                pictures.append(picture)
                places.append(place)
        results: list[Any] = []
        if places:
            try:
                scores, _ = score(reward, pictures, [read[k][1] for k in places], missing=True)
            except (InputError, JudgeError) as error:
                results = [bare(error)] * len(places)
            else:
                broke = JudgeError("the judge broke on every comparison of this image")
                results = [broke if np.isnan(value) else value for value in scores.tolist()]
    for place, given in zip(places, results, strict=True):
        outcomes[place] = given
    return outcomes


def _collect(
    collector: GroupCollector,
    items: list[Mapping],
    read: list[tuple[Any, Any]],
    request: str | None,
    gone: Callable[[], bool] | None,
    intake: Intake,
) -> list[float | Exception]:
    """As `_score`. All items take their places before the first is waited for, unreadable ones, too."""
    futures: list[Any] = []
    for position, (item, (one, prompt)) in enumerate(zip(items, read, strict=True)):
        group, key = item.get("group_id"), item.get("idempotency_key")
        if key is None and request is not None:
            key = f"{request}/{position}"
        try:
            group, key = (None if value is None else str(value) for value in (group, key))
            with intake.room(readable([one]), gone):
                futures.append(collector.submit(kept(one), prompt, group=group, name=key))
        except InputError as error:  # without a prompt and a group there is no place to take
            futures.append(bare(error))
    collector.settle([future for future in futures if not isinstance(future, InputError)], gone)
    outcomes: list[float | Exception] = []
    for future in futures:
        try:
            outcomes.append(future if isinstance(future, InputError) else future.result()[0])
        except (InputError, JudgeError) as error:
            outcomes.append(bare(error))
    return outcomes


def _read(history: Any, field: str) -> tuple[Any, Any]:
    """What was sent as picture, or the `InputError` that it is none, and prompt of the last turn, or None."""
    text = _last(history).get("text")
    try:
        return _upload(history, field), text
    except InputError as error:
        return bare(error), text if isinstance(text, str) and text.strip() else None


def _last(history: Any) -> Mapping:
    """The last turn; an empty one where there is none."""
    return history[-1] if isinstance(history, list) and history and isinstance(history[-1], Mapping) else {}


def _upload(history: Any, field: str) -> Upload:
    """The picture of the only turn, which is the generated one."""
    turn = _last(history)
    if not turn:
        raise InputError(f"{field}.history is empty; its last turn is the generated image with its prompt")
    check_no_source(**{f"{field}.history[0]": history[:-1]})
    check_prompts([turn.get("text")], 1)
    for key in ("image_b64", "video_b64"):
        if turn.get(key) is not None:
            return upload(turn[key], f"{field}.{key}")
    raise InputError(f"{field} has neither image_b64 nor video_b64; files and memory of another process are not read")
