"""Waits for the images of a group that arrive one at a time, and scores them together.

Some hosts hand over one sample, or one process's part of a group. Compared with a reference each of them can be scored
alone; compared with one another they tell more, but only once all are there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from listener_reward.batching import Unwanted
from listener_reward.errors import InputError, JudgeError
from listener_reward.forks import renew
from listener_reward.media.images import ImageLike, png_of, to_pil
from listener_reward.pairs import Prompt, PromptLike, as_prompt, check_prompts, key_of, prompt_with, with_sources

from ..contract import Reward, score
from .callers import ClientGone, Ending
from .uploads import bare

logger = logging.getLogger(__name__)


PATIENCE = 60.0
"""Seconds that a client waits for its group before the log says what may be wrong."""

STUCK = 3
"""Seconds that as many requests wait as clients send at once, before they fail: one that has hung up, and asks for
other images now, is there twice until its first request is seen to be over."""


ADVICE = (
    "group_size has to be the host's own, every image of a group has to come to this process, and a client that sends "
    "the parts of a group one after another waits for itself: let it send a whole group in one request "
    "(Flow-Factory's batch_size, UniRL's request_batch_size), or several requests at once"
)


@dataclass(slots=True, eq=False)
class _Member:
    picture: Any
    """A PIL image, or the bytes of an image file, which are a tenth of that; None where it cannot be read."""
    asked: str
    """The prompt's key, of `_Group.prompts`."""
    future: Future
    name: str | None
    waiting: int = 1
    """Requests that wait for it: two for a moment where a client hangs up and asks again, before it is seen that the
    first one is over."""

    @property
    def gone(self) -> bool:
        """Whether its client hung up. It counts for nothing, unless the client comes again under the same name."""
        return self.waiting == 0


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt while its group fills, its sources as files."""

    text: str
    sources: tuple[bytes, ...]
    criterion: str | None

    @classmethod
    def of(cls, prompt: PromptLike) -> _Prompt:
        asked = as_prompt(prompt)
        return cls(asked.text, tuple(png_of(source.image) for source in asked.sources), asked.criterion)

    def decoded(self) -> PromptLike:
        return prompt_with(self.text, self.sources, self.criterion)


@dataclass(slots=True)
class _Group:
    members: list[_Member] = field(default_factory=list)
    prompts: dict[str, _Prompt] = field(default_factory=dict)
    """Each prompt of the members once: one, unless clients mix groups up."""
    timer: threading.Timer | None = None

    def present(self) -> list[_Member]:
        return [member for member in self.members if not member.gone]


class GroupCollector:
    """Makes of a reward one whose images may come in any pieces, from any threads.

    `submit` gives a future for one image and returns at once; a call, with the contract of the reward itself, waits for
    all of its images. A group that does not fill in time fails whole: what came could be scored among itself, but on
    another scale than full groups.
    """

    def __init__(
        self,
        reward: Reward,
        group_size: int,
        *,
        timeout: float = 600.0,
        clients: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[..., threading.Timer] = threading.Timer,
        workers: int = 1,
    ):
        """
        Args:
            reward: what scores a full group, with the scheme `group`.
            group_size: how many images of a prompt make a group.
            timeout: seconds from a group's first image until it must be full; generating the rest takes time too.
            clients: how many requests can come before one of them is answered, over all processes of the host. Where
                so many wait for groups that are not full, nobody is left who could fill them, and they fail within
                seconds with an `InputError`. None where it is not known: a client that waits for itself then looks
                like one whose other processes still draw their images, and waits until `timeout`.
            clock: gives seconds that never go back.
            timer: `timer(seconds, function, arguments)` calls the function once it was started and the seconds are
                over, unless it is cancelled before.
            workers: how many full groups are scored at once: more than one are judged together, if the judge batches.
        """
        if group_size < 2:
            raise InputError(f"group_size is {group_size}; a group has at least 2 images to compare")
        if clients is not None and clients < 1:
            raise InputError(f"clients is {clients}; give how many requests come at once, 1 or more, or None")
        self.reward, self.group_size, self.timeout, self.clients = reward, group_size, timeout, clients
        self._clock, self._timer, self._workers = clock, timer, workers
        self._begin()
        renew(self)

    def _begin(self) -> None:
        """As nobody had come."""
        self._waiting: dict[tuple[str, str], _Group] = {}
        self._named: dict[str, tuple[tuple[str, str], _Member]] = {}  # the group and the place that a name has
        self._settling: list[Sequence[Future]] = []  # of each call that waits for all of them
        self._closed: deque[tuple[float, list[str]]] = deque()  # when a group was answered, and the names in it
        self._lock = threading.Lock()
        self._scoring = ThreadPoolExecutor(self._workers, thread_name_prefix="listener-reward")

    def after_fork(self) -> None:
        """For the child of a fork: threads that score and time were not copied to it."""
        self._begin()

    def submit(
        self,
        image: ImageLike | InputError,
        prompt: PromptLike | None,
        *,
        group: str | None = None,
        name: str | None = None,
    ) -> Future[tuple[float, dict[str, float]]]:
        """A future of the image's score and info.

        An image that cannot be read fails alone: it takes its place in the group, so that the others need not wait for
        it, and they are scored without it.

        Args:
            image: any that `to_pil` reads, or the `InputError` that came of reading it. The bytes of a file are kept as
                they are while the group fills.
            prompt: the image's. It may be None with an `InputError` that says so, if `group` is given.
            group: tells groups of one prompt apart; left out, the prompt, with its sources, names the group.
            name: tells requests apart. What is submitted again under a name, as clients do whose patience is shorter
                than the wait for a group, takes no second place: it has the future of the first time. Names are
                forgotten `timeout` seconds after their group was answered.
        """
        future: Future = Future()
        future.set_running_or_notify_cancel()  # a host that gives up on one image must not take the others' answer
        try:
            if isinstance(image, InputError):
                raise image
            check_prompts([prompt], 1)
            decoded = to_pil(image)
            picture = image if isinstance(image, bytes) else decoded
        except InputError as error:
            text = prompt.text if isinstance(prompt, Prompt) else prompt
            if group is None and not (isinstance(text, str) and text.strip()):
                raise  # nobody can say whose place it is
            future.set_exception(bare(error))  # without the picture that its traceback holds
            picture = None
        asked = prompt if isinstance(prompt, Prompt) else str(prompt)
        key = ("prompt", key_of(asked)) if group is None else ("group", group)
        with self._lock:
            self._forget()
            earlier = None if name is None else self._named.get(name)
            if earlier and not earlier[1].gone:
                earlier[1].waiting += 1
                return earlier[1].future
            key, member = earlier or (key, _Member(picture, key_of(asked), future, name))
            waiting = self._waiting.setdefault(key, _Group())
            if member.asked not in waiting.prompts:
                waiting.prompts[member.asked] = _Prompt.of(asked)
            if earlier:
                member.waiting = 1
            else:
                waiting.members.append(member)
            if name is not None:
                self._named[name] = key, member
            present = waiting.present()
            if len(present) == 1:  # the first, or the first after all others had gone
                if waiting.timer is not None:
                    waiting.timer.cancel()
                waiting.timer = self._timer(self.timeout, self._give_up, (key, waiting, f" in {self.timeout:g} s"))
                waiting.timer.daemon = True
                waiting.timer.start()
            full = len(present) == self.group_size
            if full:
                del self._waiting[key]
                for gone in waiting.members:
                    if gone.gone and gone.name is not None:
                        del self._named[gone.name]
                waiting.members = present
        if full:
            assert waiting.timer is not None
            waiting.timer.cancel()
            self._scoring.submit(self._score, waiting)
        return member.future

    @property
    def waiting(self) -> int:
        """Images that came and whose groups are not full."""
        with self._lock:
            return sum(len(group.present()) for group in self._waiting.values())

    @property
    def held(self) -> int:
        """Calls of `settle` that go on until a group is full that is not."""
        return len(self._held())

    def _held(self) -> list[tuple[int, ...]]:
        """Each such call, by what it waits for: one that comes again waits for the same."""
        with self._lock:
            lacking = {id(one.future) for group in self._waiting.values() for one in group.present()}
            calls = [tuple(map(id, futures)) for futures in self._settling]
        return [call for call in calls if not lacking.isdisjoint(call)]

    def stop(self) -> None:
        """Groups that are not full by now fail with `Ending`: whoever waits for them is to ask again elsewhere."""
        with self._lock:
            groups, self._waiting = [*self._waiting.values()], {}
        for group in groups:
            if group.timer is not None:
                group.timer.cancel()
            for member in group.members:
                if not member.future.done():
                    member.future.set_exception(Ending("the server ends, and the group is not full"))
            self._close(group)

    def leave(self, futures: Sequence[Future]) -> None:
        """Takes back what was submitted by a client that has gone, from groups that are not full yet.

        Its images were else compared with those of whoever comes next, such as the same run started anew.
        """
        with self._lock:
            for group in self._waiting.values():
                for member in group.members:
                    member.waiting -= member.future in futures

    def __call__(
        self, images: Any, prompts: Sequence[PromptLike], metadata: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Waits until the groups of all the images are full. Contract and errors as in `contract.score`."""
        asked = with_sources(prompts, len(images), metadata)
        return self.wait([self.submit(image, prompt) for image, prompt in zip(images, asked, strict=True)])

    def settle(self, futures: Sequence[Future], gone: Callable[[], bool] | None = None) -> None:
        """Waits until all of these are done.

        Args:
            futures: what `submit` gave.
            gone: asked every second whether the client has hung up. It may raise `Unwanted` itself.

        Raises:
            Unwanted: nobody waits any more, `ClientGone` for one; the images are taken back (`leave`).
        """
        with self._lock:
            self._settling.append(futures)
        try:
            self._settle(futures, gone)
        finally:
            with self._lock:
                self._settling = [others for others in self._settling if others is not futures]

    def _settle(self, futures: Sequence[Future], gone: Callable[[], bool] | None) -> None:
        start, warned, stuck = time.monotonic(), False, 0
        watched = gone is not None or self.clients is not None
        while wait(futures, timeout=1.0 if watched else None).not_done:
            try:
                if gone is not None and gone():
                    raise ClientGone("the client has hung up")
            except Unwanted:
                self.leave(futures)
                raise
            stuck = stuck + 1 if self._deadlocked() else 0
            if stuck >= STUCK:
                self._end_deadlock()
            if not warned and time.monotonic() - start > PATIENCE:
                warned = True
                logger.warning("a client has waited %.0f s for its group; %s", PATIENCE, ADVICE)

    def wait(
        self, futures: Sequence[Future], gone: Callable[[], bool] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The scores and info of these, as a call gives them, once all are there. Raises what any of them raises."""
        self.settle(futures, gone)
        results = [future.result() for future in futures]
        infos = [info for _, info in results]
        names = infos[0] if infos else {}
        return (
            np.array([value for value, _ in results], dtype=np.float32),
            {name: np.array([info[name] for info in infos], dtype=np.float32) for name in names},
        )

    def _score(self, group: _Group) -> None:
        readable = [member for member in group.members if member.picture is not None]
        futures = [member.future for member in readable]
        try:
            if len(readable) < 2:
                raise JudgeError(f"only {len(readable)} of {self.group_size} images of the group can be read")
            pictures = [to_pil(one.picture) for one in readable]
            if len(several := sorted({one.asked for one in readable})) > 1:
                some = ", ".join(repr(group.prompts[key].text[:40]) for key in several[:3])
                raise InputError(
                    f"the group has {len(several)} different prompts, {some}; images of one prompt, with the same "
                    "source images, are compared, so each needs a group id of its own"
                )
            prompt = group.prompts[several[0]].decoded()
            scores, info = score(self.reward, pictures, [prompt] * len(pictures), missing=True)
        except Exception as error:  # whatever it is, those who wait must hear of it
            for future in futures:
                future.set_exception(error)
            return self._close(group)
        for place, future in enumerate(futures):
            if np.isnan(scores[place]):
                future.set_exception(JudgeError("the judge broke on every comparison of this image"))
            else:
                future.set_result((float(scores[place]), {name: float(values[place]) for name, values in info.items()}))
        self._close(group)

    def _close(self, group: _Group) -> None:
        if names := [member.name for member in group.members if member.name is not None]:
            with self._lock:
                self._closed.append((self._clock(), names))

    def _forget(self) -> None:
        """Names of groups that were answered long ago, whole groups at a time. With the lock held."""
        while self._closed and self._closed[0][0] < self._clock() - self.timeout:
            for name in self._closed.popleft()[1]:
                del self._named[name]

    def _deadlocked(self) -> bool:
        if self.clients is None or len(self._settling) < self.clients:  # the cheap half first: every waiter asks
            return False
        return len(set(self._held())) >= self.clients

    def _end_deadlock(self) -> None:
        """Every client waits, so that nobody is left who could fill a group: they all fail."""
        with self._lock:
            groups = [*self._waiting.items()]
        why = (
            f", and all {self.clients} requests that clients send at once wait (clients, --group-clients; raise it if "
            "more can come)"
        )
        for key, group in groups:
            assert group.timer is not None
            group.timer.cancel()
            self._give_up(key, group, why, InputError)

    def _give_up(self, key: tuple[str, str], group: _Group, why: str, kind: type[Exception] = JudgeError) -> None:
        with self._lock:
            if self._waiting.get(key) is not group:
                return
            del self._waiting[key]
        message = f"{len(group.present())} of {self.group_size} images of {key[0]} {_shown(key)!r} came{why}; {ADVICE}"
        if group.present():
            logger.warning("%s", message)
        for member in group.members:
            if not member.future.done():
                member.future.set_exception(kind(message))
        self._close(group)


def _shown(key: tuple[str, str]) -> str:
    """Of a prompt the text, of a group the id."""
    return key[1].partition("\x1f")[0][:80]
