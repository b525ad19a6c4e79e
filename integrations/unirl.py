"""UniRL: the JSON of its reward service's `POST /score`, answered by `listener-reward serve`.

    listener-reward serve                          # on the UniRL side:
    RemoteRewardSpec(base_url="http://127.0.0.1:8300/reference", required_rewards=("listener",))

A request holds one process's part of a batch, so the server compares with a reference image of each prompt, the same
for all processes. With `serve --group-size` and `/group` in the URL it collects the group, by the `group_id` that the
host sends, from all of them first. A request that the host repeats because that took longer than its timeout is known
by its `idempotency_key`. Keep `request_batch_size` unset or at a whole number of groups: the host sends the parts of a
batch one after another, so a group in two of them would wait for itself.

Of an edit the host sends two turns, the source image and the result, both with the instruction. Whatever turns come
before the last are sources. One whose text is another than the last one's fails: what it asked for would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.media.images import Picture
from listener_reward.pairs import check_prompts

from .contract import Reward, score
from .serving.asked import Asked, Uploads, sources_of
from .serving.collector import GroupCollector
from .serving.computing import kept
from .serving.limits import Intake
from .serving.schemes import check_scheme
from .serving.uploads import Upload, bare, largest, readable, tried, upload

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
    uploads = Uploads()
    read = [_read(item.get("history"), f"requests[{position}]", uploads) for position, item in enumerate(items)]
    check_scheme(reward, scheme, [asked.key for _, asked in read])
    intake.check([asked for _, asked in read], readable([one for one, _ in read]))
    if isinstance(reward, GroupCollector):
        outcomes = _collect(reward, items, read, request, gone, intake)
    else:
        outcomes = _score(reward, read, gone, intake)
    results = [{} if isinstance(outcome, Exception) else {name: {"score": outcome}} for outcome in outcomes]
    errors = [{name: str(outcome)} if isinstance(outcome, Exception) else {} for outcome in outcomes]
    identities = [{key: item.get(key) for key in _IDENTITY} | {"scorer_version": version} for item in items]
    return {"protocol_version": "1", "results": results, "errors": errors, "identities": identities}


def _score(
    reward: Reward, read: list[_Read], gone: Callable[[], bool] | None, intake: Intake
) -> list[float | Exception]:
    """Each item's score, or why it has none."""
    outcomes: list[Any] = [None] * len(read)
    with intake.room(_all(read), gone):
        decoded: dict[int, Picture] = {}
        pictures, prompts, places = [], [], []
        for place, (one, asked) in enumerate(read):
            picture = one if isinstance(one, InputError) else tried(one.picture)
            prompt = tried(partial(asked.prompt, decoded))
            if isinstance(picture, InputError) or isinstance(prompt, InputError):
                outcomes[place] = picture if isinstance(picture, InputError) else prompt
            else:
                pictures.append(picture)
                prompts.append(prompt)
                places.append(place)
        results: list[Any] = []
        if places:
            try:
                scores, _ = score(reward, pictures, prompts, missing=True)
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
    read: list[_Read],
    request: str | None,
    gone: Callable[[], bool] | None,
    intake: Intake,
) -> list[float | Exception]:
    """As `_score`. All items take their places before the first is waited for, unreadable ones, too."""
    with intake.room(_all(read, largest([one for one, _ in read])), gone):
        futures = _submit(collector, items, read, request)
    collector.settle([future for future in futures if not isinstance(future, InputError)], gone)
    outcomes: list[float | Exception] = []
    for future in futures:
        try:
            outcomes.append(future if isinstance(future, InputError) else future.result()[0])
        except (InputError, JudgeError) as error:
            outcomes.append(bare(error))
    return outcomes


def _submit(collector: GroupCollector, items: list[Mapping], read: list[_Read], request: str | None) -> list[Any]:
    """For each item its future, or the `InputError` that there is no place for it."""
    decoded: dict[int, Picture] = {}
    futures: list[Any] = []
    for position, (item, (one, asked)) in enumerate(zip(items, read, strict=True)):
        group, key = item.get("group_id"), item.get("idempotency_key")
        if key is None and request is not None:
            key = f"{request}/{position}"
        group, key = (None if value is None else str(value) for value in (group, key))
        picture, prompt = kept(one), tried(partial(asked.prompt, decoded))
        if isinstance(prompt, InputError):  # with unreadable sources, nobody knows which prompt it is
            picture, prompt = prompt, None
        try:
            futures.append(collector.submit(picture, prompt, group=group, name=key))
        except InputError as error:  # without a prompt and a group there is no place to take
            futures.append(bare(error))
    return futures


_Read = tuple[Upload | InputError, Asked]
"""Of an item the picture, or the `InputError` that it is none, and the prompt, whose text is None where it is lost."""


def _all(read: Sequence[_Read], pictures: Sequence[Upload] | None = None) -> list[Upload]:
    """The pictures of all items, or those given, and the items' sources."""
    given = readable([one for one, _ in read]) if pictures is None else pictures
    return [*sources_of([asked for _, asked in read]), *given]


def _read(history: Any, field: str, uploads: Uploads) -> _Read:
    turn = _last(history)
    text = turn.get("text")
    lost = Asked(text if isinstance(text, str) and text.strip() else None)
    try:
        if not turn:
            raise InputError(f"{field}.history is empty; its last turn is the generated image with its prompt")
        check_prompts([text], 1)
        earlier = [
            _source(one, str(text), f"{field}.history[{position}]", uploads)
            for position, one in enumerate(history[:-1])
        ]
    except InputError as error:
        return bare(error), Asked(None) if isinstance(history, list) and history[:-1] else lost
    try:
        return _media(turn, field, upload), Asked(text, tuple(earlier))
    except InputError as error:
        return bare(error), Asked(text, tuple(earlier))


def _source(turn: Any, text: str, field: str, uploads: Uploads) -> Upload:
    """The picture of a turn before the last."""
    if not isinstance(turn, Mapping):
        raise InputError(f"{field} is a {type(turn).__name__}; a turn is an object")
    if turn.get("text") not in (None, "", text):
        raise InputError(f"{field} has another text than the last turn; a source image comes with the instruction")
    return _media(turn, field, uploads.get)


def _last(history: Any) -> Mapping:
    """The last turn; an empty one where there is none."""
    return history[-1] if isinstance(history, list) and history and isinstance(history[-1], Mapping) else {}


def _media(turn: Mapping, field: str, read: Callable[[Any, str], Upload]) -> Upload:
    for key in ("image_b64", "video_b64"):
        if turn.get(key) is not None:
            return read(turn[key], f"{field}.{key}")
    raise InputError(f"{field} has neither image_b64 nor video_b64; files and memory of another process are not read")
