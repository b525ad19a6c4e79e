"""Requests that come while the judge is busy are judged together afterwards.

Hosts such as verl-omni send every image as a request of its own. One by one, each pays for a call of the models.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.reward import ListenerReward


class Batching:
    """A `ListenerReward` of the scheme `reference`, which scores an image alike in every call, for many threads.

    Under the other schemes a merged call would compare the images of different requests with one another.
    """

    def __init__(self, reward: ListenerReward, *, limit: int = 64):
        """
        Args:
            reward: what scores.
            limit: images of one call, unless a request has more. It bounds how long the first of them waits.
        """
        if reward.scheme != "reference":
            raise InputError(f"scheme is {reward.scheme!r}; only requests by scheme 'reference' may be judged together")
        self.reward, self.judge, self.scheme, self.limit = reward, reward.judge, reward.scheme, limit
        self._queue: list[tuple[list[Any], list[str], Future]] = []
        self._lock = threading.Lock()
        self._judging = threading.Lock()

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], metadata: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Contract and errors as in `ListenerReward`; `metadata` is not read."""
        done: Future = Future()
        with self._lock:
            self._queue.append((list(images), list(prompts), done))
        while not done.done():
            with self._judging:  # whoever comes first works for all who wait
                if not done.done():
                    self._work()
        return done.result()

    def _work(self) -> None:
        """Scores the longest-waiting requests, in one call if that succeeds."""
        with self._lock:
            count, size = 0, 0
            while count < len(self._queue) and (not count or size + len(self._queue[count][0]) <= self.limit):
                size += len(self._queue[count][0])
                count += 1
            jobs, self._queue = self._queue[:count], self._queue[count:]
        if len(jobs) > 1:
            try:
                images = [*chain.from_iterable(job[0] for job in jobs)]
                scores, info = self.reward(images, [*chain.from_iterable(job[1] for job in jobs)])
            except Exception:  # whose fault it is shows one by one
                pass
            else:
                start = 0
                for images, _, done in jobs:
                    part = slice(start, start := start + len(images))
                    done.set_result((scores[part], {name: values[part] for name, values in info.items()}))
                return
        for images, prompts, done in jobs:
            try:
                done.set_result(self.reward(images, prompts))
            except BaseException as error:
                done.set_exception(error)
