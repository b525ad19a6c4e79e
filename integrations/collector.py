"""Waits for the images of a group that arrive one at a time, and scores them together.

Some hosts hand over one sample, or one process's share of a group. Compared with a reference each of them can be scored
alone; compared with one another they tell more, but only once all are there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.images import ImageLike, to_pil

from .contract import Reward, check_prompts, score

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Group:
    members: list[tuple[Any, str, Future]] = field(default_factory=list)
    timer: threading.Timer | None = None


class GroupCollector:
    """Makes of a reward one whose images may come in any pieces, from any threads.

    `submit` gives a future for one image and returns at once; a call, with the contract of the reward itself, waits for
    all of its images. A group that does not fill in time fails whole: what came could be scored among itself, but on
    another scale than full groups.
    """

    def __init__(self, reward: Reward, group_size: int, *, timeout: float = 600.0):
        """
        Args:
            reward: what scores a full group, with the scheme `group`.
            group_size: how many images of a prompt make a group.
            timeout: seconds from a group's first image until it must be full; generating the rest takes time too.
        """
        if group_size < 2:
            raise InputError(f"group_size is {group_size}; a group has at least 2 images to compare")
        self.reward, self.group_size, self.timeout = reward, group_size, timeout
        self._waiting: dict[str, _Group] = {}
        self._lock = threading.Lock()
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="listener-reward")

    def submit(
        self, image: ImageLike, prompt: str, *, group: str | None = None
    ) -> Future[tuple[float, dict[str, float]]]:
        """A future of the image's score and info.

        `group` tells groups of one prompt apart; left out, the prompt names the group. An image that cannot be read
        fails alone: it takes its place in the group, so that the others need not wait for it, and they are scored
        without it.
        """
        check_prompts([prompt], 1)
        future: Future = Future()
        try:
            picture = to_pil(image)
        except InputError as error:
            future.set_exception(error)
            picture = None
        key = prompt if group is None else group
        with self._lock:
            waiting = self._waiting.setdefault(key, _Group())
            waiting.members.append((picture, prompt, future))
            if len(waiting.members) == 1:
                waiting.timer = threading.Timer(self.timeout, self._give_up, (key, waiting))
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
        futures = [self.submit(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
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
            scores, info = score(self.reward, pictures, prompts, missing=True)
        except Exception as error:  # whatever it is, those who wait must hear of it
            for _, _, future in readable:
                future.set_exception(error)
            return
        for place, future in enumerate(futures):
            if np.isnan(scores[place]):
                future.set_exception(JudgeError("the judge broke on every comparison of this image"))
            else:
                future.set_result((float(scores[place]), {name: float(values[place]) for name, values in info.items()}))

    def _give_up(self, key: str, group: _Group) -> None:
        with self._lock:
            if self._waiting.get(key) is not group:
                return
            del self._waiting[key]
        message = (
            f"{len(group.members)} of {self.group_size} images of {key[:80]!r} came within {self.timeout:g} s; "
            "group_size has to be the host's own, and every image of a group has to come to this process"
        )
        logger.warning("%s", message)
        for _, _, future in group.members:
            if not future.done():
                future.set_exception(JudgeError(message))
