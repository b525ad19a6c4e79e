"""One request from its body to its answer: limits, a thread, whoever waits, and what each failure is to a client."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from listener_reward import __version__
from listener_reward.batching import BatchingJudge, while_wanted
from listener_reward.errors import InputError, JudgeError, missing
from listener_reward.reward import ListenerReward

if fault := missing("serve", "a server"):
    raise fault

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from .. import unirl
from ..contract import Reward
from .asked import Asked
from .callers import Caller, ClientGone, DeadlineOver, Ending, Retries
from .collector import GroupCollector
from .computing import compute, without_nan
from .limits import Busy, Gate, Intake, Limits, TooMuch, check_values
from .metrics import Metrics
from .replicas import ReplicatedJudge
from .replies import Reply, refusal
from .schemas import CompareRequest, RankRequest
from .schemes import OtherScheme, scheme_of
from .uploads import upload

logger = logging.getLogger(__name__)

Work = Callable[[bytes, Caller], Any]
"""The body of a request to what is answered, as JSON."""


class Service:
    """A reward, and all that its requests share."""

    def __init__(self, reward: Reward, *, name: str, limits: Limits, metrics: Metrics):
        self.reward, self.name, self.limits, self.metrics = reward, name, limits, metrics
        self.scorer = reward.reward if isinstance(reward, GroupCollector) else reward
        self.version = version_of(self.scorer)
        self.gate, self.intake, self.retries = Gate(limits), Intake(limits), Retries()
        self._callers: set[Caller] = set()
        self._told_of_deadlock = False
        self._pool = ThreadPoolExecutor(limits.waiting, thread_name_prefix="listener-reward-request")
        metrics.gauge("requests_under_way", "Requests that came and were not answered yet.", lambda: len(self.gate))
        judge = getattr(self.scorer, "judge", None)
        if isinstance(judge, BatchingJudge):
            judge.observe = metrics.judged
            metrics.gauge("queue_pairs", "Pairs that wait for the judge.", lambda: judge.waiting)
            if isinstance(replicated := judge.judge, ReplicatedJudge):
                what = "How often pairs were sent to another replica, since one had died."
                metrics.gauge("resent", what, lambda: replicated.resent)
        if isinstance(reward, GroupCollector):
            metrics.gauge("group_images", "Images that wait for the rest of their group.", lambda: reward.waiting)

    def health(self, authorized: bool) -> dict[str, Any]:
        if not authorized:
            return {"status": "ok"}
        return {
            "status": "ok",
            "rewards": {self.name: ["score"]},
            "scorer_version": self.version,
            "scheme": scheme_of(self.reward),
        }

    def compute(self, scheme: str | None) -> Work:
        """`POST /compute`."""
        return self._scored(compute, scheme)

    def score(self, scheme: str | None) -> Work:
        """`POST /score`."""
        return self._scored(unirl.answer, scheme, name=self.name, version=self.version)

    def _scored(self, ask: Callable[..., Any], scheme: str | None, **known: str) -> Work:
        """What a host's route does: the request gets a name, by which one that comes again is known."""

        def work(raw: bytes, caller: Caller) -> Any:
            request = self._name(raw, caller)
            body = read_json(raw)
            del raw
            try:
                return ask(
                    self.reward,
                    body,
                    request=request,
                    scheme=scheme,
                    gone=caller.checked,
                    intake=self.intake,
                    **known,
                )
            finally:
                self._answered(request, caller)

        return work

    def compare(self, raw: bytes, caller: Caller) -> Any:
        """`POST /v1/compare`."""
        asked = CompareRequest.model_validate_json(raw)
        judge, prompt = self._judge(), _asked(asked)
        sides = [upload(asked.first, "first"), upload(asked.second, "second")]
        self.intake.check([prompt], sides)
        with self.intake.room([*prompt.sources, *sides], caller.checked):
            verdict = judge.compare(prompt.prompt({}), *(side.visual() for side in sides), think=asked.think)
        return without_nan(verdict.to_dict())

    def rank(self, raw: bytes, caller: Caller) -> Any:
        """`POST /v1/rank`."""
        asked = RankRequest.model_validate_json(raw)
        judge, prompt = self._judge(), _asked(asked)
        images = [upload(image, f"images[{k}]") for k, image in enumerate(asked.images)]
        self.intake.check([prompt], images)
        with self.intake.room([*prompt.sources, *images], caller.checked):
            ranking = judge.rank(prompt.prompt({}), [image.visual() for image in images], budget=asked.budget)
        return ranking.to_dict()

    async def answer(self, request: Request, work: Work) -> Reply:
        """What `work` makes of the request's body, in a thread, or why there is nothing."""
        try:
            caller = Caller(request.headers.get("x-request-timeout"))
            with self.gate.entered() as arrived:
                body = [await self._body(request, arrived)]  # in a list, which the thread empties
                watching = asyncio.create_task(_watch(request, caller))
                self._callers.add(caller)
                try:
                    return await asyncio.get_running_loop().run_in_executor(self._pool, _reply, work, body, caller)
                finally:
                    self._callers.discard(caller)
                    watching.cancel()
        except Busy as busy:
            return refusal(503, f"{busy}{self._deadlock()}", {"Retry-After": str(busy.seconds)})
        except TooMuch as error:
            return refusal(413, str(error))
        except InputError as error:
            return refusal(400, str(error))
        except ClientDisconnect:
            logger.info("%s hung up in the middle of its request", request.client)
            return refusal(400, "the body ends too soon")  # nobody reads it

    async def drained(self) -> None:
        """Refuses what comes from now on, and returns when the rest is answered.

        Groups that are not full will not be: their clients are told to ask again. After `drain_seconds` so is whoever
        waits for the judge; what is being judged is answered.
        """
        self.gate.closing = True
        if isinstance(self.reward, GroupCollector):
            self.reward.stop()
        end = time.monotonic() + self.limits.drain_seconds
        while len(self.gate):
            if time.monotonic() > end:
                for caller in self._callers:
                    caller.give_up()
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _body(self, request: Request, arrived: Callable[[int], None]) -> bytes:
        """Raises `TooMuch` or `Busy` as soon as it shows; the rest is not kept."""
        most = self.limits.body
        too_much = TooMuch(f"the body has more than {most:,} bytes; send fewer pictures at once, or smaller ones")
        if int(request.headers.get("content-length", "0")) > most:
            raise too_much
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise too_much
            arrived(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)

    def _deadlock(self) -> str:
        """What to add to a refusal where every request that was let in waits for one that is not."""
        if not isinstance(self.reward, GroupCollector) or self.reward.held < self.limits.waiting:
            return ""
        said = (
            "; each of them waits for the rest of its group, which cannot be let in: raise --max-waiting to the "
            "requests that are sent at once, or send a whole group in one"
        )
        if not self._told_of_deadlock:
            self._told_of_deadlock = True
            logger.warning("%d requests are under way%s", len(self.gate), said)
        return said

    def _judge(self) -> ListenerReward:
        if not isinstance(self.scorer, ListenerReward):
            raise NotOffered("this server scores by a function without a judge; ask /compute")
        return self.scorer

    def _name(self, raw: bytes, caller: Caller) -> str | None:
        """Of the request, for a collector."""
        return self.retries.name(raw, caller) if isinstance(self.reward, GroupCollector) else None

    def _answered(self, request: str | None, caller: Caller) -> None:
        if request is not None:
            self.retries.answered(request, caller)


def _asked(request: CompareRequest | RankRequest) -> Asked:
    sources = [upload(source, f"sources[{k}]") for k, source in enumerate(request.sources)]
    return Asked(request.prompt, tuple(sources), request.criterion)


class NotOffered(Exception):
    """A route that this server's reward has no answer to."""


def version_of(scorer: Any) -> str:
    """What UniRL may pin as `expected_scorer_version`: the version of this package, and the judge's name."""
    judge = getattr(scorer, "judge", scorer)
    name = judge if isinstance(judge, str) else getattr(judge, "name", type(judge).__name__)
    return f"listener-reward {__version__} {name}"


def read_json(raw: bytes) -> Any:
    """
    Raises:
        InputError: it is no JSON, or has numbers that JSON has no word for.
    """
    try:
        return json.loads(raw, parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _NoNumber) else "the body is not JSON"
        raise InputError(reason) from None


class _NoNumber(ValueError):
    pass


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NoNumber(f"the body has the number {text[:40]}; JSON has finite numbers only")
    return number


def _reply(work: Work, body: list[bytes], caller: Caller) -> Reply:
    """What `work` gives; in a thread of its own, and no exception leaves it."""
    try:
        caller.check()
        with while_wanted(caller.check):
            check_values(body[0])
            return Reply(200, work(body.pop(), caller))
    except OtherScheme as error:
        logger.warning("refused a request: %s", str(error))
        return refusal(409, str(error))
    except TooMuch as error:
        return refusal(413, str(error))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        said = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in faults[:8])
        return refusal(422, said)
    except InputError as error:
        return refusal(400, str(error))
    except RecursionError:
        return refusal(400, "the body is nested too deeply")
    except NotOffered as error:
        return refusal(501, str(error))
    except DeadlineOver as error:
        return refusal(504, str(error))
    except Ending as error:
        return refusal(503, str(error), {"Retry-After": "5"})
    except ClientGone as error:
        logger.info("%s", str(error))
        return refusal(408, str(error))  # nobody reads it
    except JudgeError as error:
        logger.warning("the judge broke: %s", str(error))  # a log may keep the error, and its traceback the pictures
        return refusal(500, f"the judge broke: {error}")
    except Exception as error:  # a fault of ours: the client hears of it, and the service goes on
        logger.exception("a request failed")
        return refusal(500, f"{type(error).__name__}: {error}")


async def _watch(request: Request, caller: Caller) -> None:
    """Says to `caller` when its client hangs up; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    caller.leave()
