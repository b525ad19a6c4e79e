"""Waits for the images of a group that arrive one at a time, and scores them together.

Some hosts hand over one sample, or one process's share of a group. Compared with a reference each of them can be scored
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

from listener_reward.errors import InputError, JudgeError
from listener_reward.media.images import ImageLike, to_pil

from ..contract import Reward, check_prompts, score

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Group:
    members: list[tuple[Any, str | None, Future]] = field(default_factory=list)
    """Picture, prompt and future of each; the picture is None where it cannot be read."""
    names: list[str] = field(default_factory=list)
    timer: threading.Timer | None = None


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
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[..., threading.Timer] = threading.Timer,
    ):
        """
        Args:
            reward: what scores a full group, with the scheme `group`.
            group_size: how many images of a prompt make a group.
            timeout: seconds from a group's first image until it must be full; generating the rest takes time too.
            clock: gives seconds that never go back.
            timer: `timer(seconds, function, arguments)` calls the function once it was started and the seconds are
                over, unless it is cancelled before.
        """
        if group_size < 2:
            raise InputError(f"group_size is {group_size}; a group has at least 2 images to compare")
        self.reward, self.group_size, self.timeout = reward, group_size, timeout
        self._clock, self._timer = clock, timer
        self._waiting: dict[tuple[str, str], _Group] = {}
        self._named: dict[str, Future] = {}
        self._closed: deque[tuple[float, list[str]]] = deque()  # when a group was answered, and the names in it
        self._lock = threading.Lock()
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="listener-reward")

    def submit(
        self, image: ImageLike | InputError, prompt: str | None, *, group: str | None = None, name: str | None = None
    ) -> Future[tuple[float, dict[str, float]]]:
        """A future of the image's score and info.

        An image that cannot be read fails alone: it takes its place in the group, so that the others need not wait for
        it, and they are scored without it.

        Args:
            image: any that `to_pil` reads, or the `InputError` that came of reading it.
            prompt: the image's. It may be None with an `InputError` that says so, if `group` is given.
            group: tells groups of one prompt apart; left out, the prompt names the group.
            name: tells requests apart. What is submitted again under a name, as clients do whose patience is shorter
                than the wait for a group, takes no second place: it has the future of the first time. Names are
                forgotten `timeout` seconds after their group was answered.
        """
        future: Future = Future()
        future.set_running_or_notify_cancel()  # a host that gives up on one image must not take the others' answer
        try:
            if isinstance(image, InputError):
                raise image
            check_prompts([prompt], 1)  # pyright: ignore[reportArgumentType]
            picture = to_pil(image)
        except InputError as error:
            if group is None and not (isinstance(prompt, str) and prompt.strip()):
                raise  # nobody can say whose place it is
            future.set_exception(error)
            picture = None
        key = ("prompt", str(prompt)) if group is None else ("group", group)
        with self._lock:
            self._forget()
            if name is not None and (earlier := self._named.get(name)):
                return earlier
            waiting = self._waiting.setdefault(key, _Group())
            waiting.members.append((picture, prompt, future))
            if name is not None:
                self._named[name] = future
                waiting.names.append(name)
            if len(waiting.members) == 1:
                waiting.timer = self._timer(self.timeout, self._give_up, (key, waiting))
                waiting.timer.daemon = True
                waiting.timer.start()
            full = len(waiting.members) == self.group_size
            if full:
                del self._waiting[key]
        if full:
            assert waiting.timer is not None
            waiting.timer.cancel()
            self._scoring.submit(self._score, waiting)
        return future

    def __call__(
        self, images: Any, prompts: Sequence[str], metadata: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Waits until the groups of all the images are full. Contract and errors as in `contract.score`."""
        check_prompts(prompts, len(images))
        return self.wait([self.submit(image, prompt) for image, prompt in zip(images, prompts, strict=True)])

    @staticmethod
    def wait(futures: Sequence[Future]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The scores and info of these, as a call gives them, once all are there. Raises what any of them raises."""
        wait(futures)
        results = [future.result() for future in futures]
        infos = [info for _, info in results]
        names = infos[0] if infos else {}
        return (
            np.array([value for value, _ in results], dtype=np.float32),
            {name: np.array([info[name] for info in infos], dtype=np.float32) for name in names},
        )

    def _score(self, group: _Group) -> None:
        readable = [member for member in group.members if member[0] is not None]
        try:
            if len(readable) < 2:
                raise JudgeError(f"only {len(readable)} of {self.group_size} images of the group can be read")
            pictures, prompts, futures = zip(*readable, strict=True)
            if len(several := sorted(set(prompts))) > 1:
                some = ", ".join(repr(prompt[:40]) for prompt in several[:3])
                raise InputError(
                    f"the group has {len(several)} different prompts, {some}; images of one prompt are compared, so "
                    "each needs a group id of its own"
                )
            scores, info = score(self.reward, pictures, prompts, missing=True)
        except Exception as error:  # whatever it is, those who wait must hear of it
            for _, _, future in readable:
                future.set_exception(error)
            return self._close(group)
        for place, future in enumerate(futures):
            if np.isnan(scores[place]):
                future.set_exception(JudgeError("the judge broke on every comparison of this image"))
            else:
                future.set_result((float(scores[place]), {name: float(values[place]) for name, values in info.items()}))

        self._close(group)

    def _close(self, group: _Group) -> None:
        if group.names:
            with self._lock:
                self._closed.append((self._clock(), group.names))

    def _forget(self) -> None:
        """Names of groups that were answered long ago, whole groups at a time. With the lock held."""
        while self._closed and self._closed[0][0] < self._clock() - self.timeout:
            for name in self._closed.popleft()[1]:
                del self._named[name]

    def _give_up(self, key: tuple[str, str], group: _Group) -> None:
        with self._lock:
            if self._waiting.get(key) is not group:
                return
            del self._waiting[key]
        message = (
            f"{len(group.members)} of {self.group_size} images of {key[0]} {key[1][:80]!r} came in {self.timeout:g} s; "
            "group_size has to be the host's own, and every image of a group has to come to this process"
        )
        logger.warning("%s", message)
        for _, _, future in group.members:
            if not future.done():
                future.set_exception(JudgeError(message))
        self._close(group)
