"""A judge in several processes of Ray Serve's, on this machine or on many: `--replicas` of the server.

What has state stays with the server: references, groups, limits, keys. A replica loads the judge, judges what it is
sent, and keeps nothing, so that any of them may die.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

from listener_reward.batching import BatchingJudge
from listener_reward.clusters import connected, last_line
from listener_reward.errors import InputError, JudgeError, MissingExtraError, missing
from listener_reward.media.storyboards import to_visuals
from listener_reward.pairs import PromptLike, check_questions
from listener_reward.ranking import Ranking, RankingJudge, rank_by
from listener_reward.verdict import PairJudge, Verdict

from .uploads import bare

logger = logging.getLogger(__name__)

APPLICATION, DEPLOYMENT = "listener-reward", "Judge"
TRIES = 5
"""How often pairs are sent to a replica before the judge counts as broken."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas there are, and what each of them has."""

    least: int = 1
    most: int = 1
    """More than `least` lets Ray Serve add replicas while pairs wait, and take them away when none do."""
    gpus: float = 0.0
    """GPUs of each replica, fractions allowed. 0 runs the judge on the CPU."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most or self.gpus < 0:
            raise InputError(
                f"replicas are {self.least} to {self.most} with {self.gpus:g} GPUs each; give 1 or more, the larger "
                "number last, and 0 GPUs or more"
            )

    @classmethod
    def read(cls, text: str, gpus: float = 0.0) -> Scale:
        """`4`, or `1-8` for as many as the load wants.

        Raises:
            InputError: it is something else.
        """
        if not (found := re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text.strip())):
            raise InputError(f"replicas are {text!r}; give a number such as 4, or bounds such as 1-8")
        return cls(int(found[1]), int(found[2] or found[1]), gpus)


class Replica:
    """The judge in one process of Ray's; what it is asked at once, it judges together."""

    def __init__(self, load: Callable[[], PairJudge]):
        # What no other try could mend is told to whoever asks. Another error ends the process, and Ray tries again.
        self._fault: Exception | None = None
        self._judge: BatchingJudge | None = None
        try:
            self._judge = BatchingJudge(load(), wait=0)
        except (InputError, MissingExtraError) as error:
            self._fault = bare(error)

    async def describe(self) -> Any:
        """Name, identity, and whether the judge thinks and ranks; or why there is none."""
        if self._judge is None:
            return self._fault
        judge = self._judge.judge
        return {
            "name": judge.name,
            "identity": self._judge.identity,
            "think": getattr(judge, "think", None),
            "ranks": isinstance(judge, RankingJudge),
        }

    async def compare_many(self, *pairs: Any, think: bool | None) -> Any:
        """Verdicts, or the error, which does not travel as Ray's."""
        return await self._run("compare_many", *pairs, think=think)

    async def rank(self, prompt: PromptLike, images: Sequence[Any], budget: int | None) -> Any:
        """A ranking, or the error."""
        return await self._run("rank", prompt, images, budget=budget)

    async def _run(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self._judge is None:
            return self._fault
        try:
            return await asyncio.to_thread(getattr(self._judge, method), *arguments, **options)
        except (InputError, JudgeError) as error:
            return bare(error)


def deployment(load: Callable[[], PairJudge], scale: Scale | None = None) -> Any:
    """The judge as an application of Ray Serve's. Without a `scale`, that of the configuration file.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    serve = _serve()
    options: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": 1 if scale and scale.least == scale.most else 8,
        "graceful_shutdown_timeout_s": 600.0,  # whoever is judging when replicas become fewer ends that first
        "max_constructor_retry_count": 3,
    }
    if scale is not None:
        options["ray_actor_options"] = {"num_cpus": 1, "num_gpus": scale.gpus}
        if scale.least == scale.most:
            options["num_replicas"] = scale.least
        else:
            options["autoscaling_config"] = {
                "min_replicas": scale.least,
                "max_replicas": scale.most,
                "target_ongoing_requests": 1,
            }
    return serve.deployment(Replica, **options).bind(load)


def application(options: Mapping[str, Any]) -> Any:
    """For `serve deploy`, as `import_path`: `args` are those of `Judge.from_pretrained`, its first as `judge`."""
    return deployment(partial(_load, dict(options)))


def _load(options: dict[str, Any]) -> PairJudge:
    from listener_reward.judge import Judge

    return Judge.from_pretrained(options.pop("judge", "tiny"), **options)


class ReplicatedJudge:
    """A judge whose pairs are judged by replicas, and sent to another one where a replica dies.

    A context: at its end, the replicas that it started end too.
    """

    def __init__(self, handle: Any, *, most: int, tries: int = TRIES, timeout: float = 1800.0):
        """
        Args:
            handle: of the deployment, from Ray Serve.
            most: how many replicas there are at the most; one call's pairs are shared out among those that are free.
            tries: how often pairs are sent before the judge counts as broken.
            timeout: seconds for a replica's answer, the wait for a free replica included.

        Raises:
            InputError, MissingExtraError: the replicas have no judge, and why.
        """
        self._handle, self.most, self.tries, self.timeout = handle, most, tries, timeout
        self._lock, self._busy = threading.Lock(), 0
        self.resent = 0
        """How often pairs were sent to a replica once more."""
        self.ends: list[Callable[[], object]] = []
        """What ends that was started with it, the first last."""
        described = self._ask("describe")
        self.name: str = described["name"]
        self.identity: str = described["identity"]
        self.think: bool | None = described["think"]
        self._ranks: bool = described["ranks"]

    def compare_many(
        self, prompts: Sequence[PromptLike], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        """As of the judge, by as many replicas as are free.

        Raises:
            InputError, JudgeError: as of the judge; or no replica answered.
        """
        check_questions(prompts, firsts, seconds)
        if not prompts:
            return []
        firsts, seconds = to_visuals(firsts), to_visuals(seconds)  # here: a file's name is of this machine
        with self._lock:
            shares = min(len(prompts), max(1, self.most - self._busy))
            self._busy += shares
        try:
            bounds = [len(prompts) * k // shares for k in range(shares + 1)]
            parts = [(prompts[start:end], firsts[start:end], seconds[start:end]) for start, end in pairwise(bounds)]
            sent = [self._send("compare_many", *part, think=think) for part in parts]
            verdicts: list[Verdict] = []
            for part, response in zip(parts, sent, strict=True):
                verdicts += self._answer(response, "compare_many", *part, think=think)
            return verdicts
        finally:
            with self._lock:
                self._busy -= shares

    def rank(self, prompt: PromptLike, images: Sequence[Any], *, budget: int | None = None) -> Ranking:
        """As of the judge: by one replica, where the judge ranks by itself."""
        if not self._ranks:
            return rank_by(self, prompt, to_visuals(images), budget=budget)
        return self._ask("rank", prompt, to_visuals(images), budget=budget)

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._answer(self._send(method, *arguments, **options), method, *arguments, **options)

    def _send(self, method: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self._handle, method).remote(*arguments, **options)

    def _answer(self, response: Any, method: str, *arguments: Any, **options: Any) -> Any:
        """What the replica says. The question is asked again of another replica where that one died."""
        broken, absent = import_module("ray").exceptions, import_module("ray.serve.exceptions")
        for tried in range(1, self.tries + 1):
            try:
                given = response.result(timeout_s=self.timeout)
            except broken.RayTaskError as error:  # another replica would fail as well
                raise JudgeError(f"a replica of the judge failed: {last_line(error)}") from None
            except TimeoutError:
                response.cancel()
                raise JudgeError(f"no replica of the judge answered within {self.timeout:g} s") from None
            except (broken.RayError, absent.RayServeException) as error:  # it died, or its machine
                if tried == self.tries:
                    died = f"{self.tries} replicas of the judge died one after another"
                    raise JudgeError(f"{died}, the last with: {last_line(error)}") from None
                with self._lock:
                    self.resent += 1
                time.sleep(0.1 * tried)
                response = self._send(method, *arguments, **options)
            else:
                if isinstance(given, Exception):
                    raise given
                return given
        raise AssertionError("tries is at least 1")

    def close(self) -> None:
        """Ends what was started with it."""
        _end(self.ends)

    def __enter__(self) -> ReplicatedJudge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def start(
    load: Callable[[], PairJudge], scale: Scale, *, address: str | None = None, name: str = APPLICATION
) -> ReplicatedJudge:
    """Starts replicas, and returns when the least number of them is there. They end with the judge that is returned.

    Args:
        load: makes the judge, in each replica. It is pickled.
        scale: how many.
        address: of a cluster, such as "auto" or "ray://head:10001"; None starts Ray on this machine.
        name: what Ray Serve calls it.

    Raises:
        InputError, MissingExtraError: Ray or the judge cannot be had.
        JudgeError: no judge could be loaded.
    """
    serve, ends = _connected(address, scale)
    try:
        if name in serve.status().applications:
            raise InputError(f"Ray Serve has judges {name!r} already; ask them by --deployed {name}, or end them")
        if not ends or address:  # a Ray of our own ends with all that is in it
            ends.append(partial(serve.delete, name))
        late = threading.Timer(60, logger.warning, ["replicas still load, or wait for room: `ray status` says which"])
        late.daemon = True
        late.start()
        try:
            handle = serve.run(deployment(load, scale), name=name, route_prefix=None, logging_config=_QUIET)
        except RuntimeError as error:
            raise JudgeError(f"no replica of the judge could be started: {last_line(error)}") from None
        finally:
            late.cancel()
        judge = ReplicatedJudge(handle, most=scale.most)
    except BaseException:
        _end(ends)
        raise
    judge.ends = ends
    return judge


def attach(name: str = APPLICATION, *, address: str | None = None, most: int | None = None) -> ReplicatedJudge:
    """The judge of replicas that `serve deploy` started, which stay when it ends.

    Args:
        name: of the application.
        address: of the cluster; None takes the one of this machine.
        most: how many replicas there are at the most; None for as many as run now.

    Raises:
        InputError, MissingExtraError: there is no such application, or its judge cannot be had.
    """
    serve, ends = _connected(address or "auto", Scale())
    try:
        running = serve.status().applications.get(name)
        if running is None or DEPLOYMENT not in running.deployments:
            raise InputError(f"Ray Serve has no judge {name!r}; start it with `serve deploy`")
        now = sum(running.deployments[DEPLOYMENT].replica_states.values())
        judge = ReplicatedJudge(serve.get_app_handle(name), most=most or max(now, 1))
    except BaseException:
        _end(ends)
        raise
    judge.ends = ends
    return judge


_WHAT = "replicas of a judge"
_QUIET = {"log_level": "ERROR", "enable_access_log": False}
_LOOP = "RAY_SERVE_CONTROL_LOOP_INTERVAL_S"


def _connected(address: str | None, scale: Scale) -> tuple[Any, list[Callable[[], object]]]:
    """Ray Serve without a proxy of its own, and what ends it."""
    # Ray Serve looks at its replicas ten times a second, which takes 7 % of a core for as long as the server runs. What
    # there is to be seen changes in seconds. Its controller reads this when it starts, and so a Ray of our own does.
    os.environ.setdefault(_LOOP, "0.5")
    own = {"num_cpus": (os.cpu_count() or 1) + scale.most, "include_dashboard": False}  # room for all, and for more
    found = connected(address, _WHAT, **own)
    serve = _serve()
    ends: list[Callable[[], object]] = []
    if found.begun:
        ends.append(found.ray.shutdown)
        has, wanted = found.ray.cluster_resources().get("GPU", 0), scale.least * scale.gpus
        if found.own and has < wanted:
            found.ray.shutdown()
            raise InputError(f"{scale.least} replicas want {wanted:g} GPUs, and this machine has {has:g}")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config=_QUIET)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return serve, ends


def _end(ends: list[Callable[[], object]]) -> None:
    while ends:
        ends.pop()()


def _serve() -> Any:
    """`ray.serve`, by name, so that its types are not asked for where it is not installed."""
    if fault := missing("ray", _WHAT):
        raise fault
    return import_module("ray.serve")
