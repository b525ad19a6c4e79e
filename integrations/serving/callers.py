"""Who waits for an answer, and until when: work for nobody is not begun."""

from __future__ import annotations

import hashlib
import math
import threading
import time
import uuid
from collections import OrderedDict

from listener_reward.batching import Unwanted
from listener_reward.errors import InputError
from listener_reward.remote import TIMEOUT_HEADER


class ClientGone(Unwanted):
    """Nobody waits for the answer any more."""


class DeadlineOver(Unwanted):
    """The time that the client gave is over."""


class Ending(Unwanted):
    """The server ends before the answer can be had."""


class Caller:
    """The client of one request."""

    def __init__(self, timeout: str | None = None):
        """
        Args:
            timeout: what the client sent as `TIMEOUT_HEADER`.

        Raises:
            InputError: it is no number of seconds above 0.
        """
        self.deadline = math.inf
        if timeout is not None:
            try:
                seconds = float(timeout)
            except ValueError:
                seconds = math.nan
            if not seconds > 0:
                raise InputError(f"{TIMEOUT_HEADER} is {timeout[:40]!r}; give seconds above 0, or leave it out")
            self.deadline = time.monotonic() + seconds
        self._gone = threading.Event()
        self._given_up = threading.Event()

    def leave(self) -> None:
        """It has hung up."""
        self._gone.set()

    def give_up(self) -> None:
        """The server ends: nothing more is begun for it."""
        self._given_up.set()

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def check(self) -> None:
        """Raises `Unwanted` where nothing is to be begun for it any more."""
        if self.gone:
            raise ClientGone("the client has hung up")
        if time.monotonic() > self.deadline:
            raise DeadlineOver(f"the time that the client gave by {TIMEOUT_HEADER} is over")
        if self._given_up.is_set():
            raise Ending("the server ends, and did not come to this request")

    def checked(self) -> bool:
        """As `check`; what does not raise is still there: not gone."""
        self.check()
        return False


class Retries:
    """Tells a request that a client sends again from an equal one of another client.

    Flow-Factory's client waits 60 s and then sends the same body again, without a word that it is the same: counted
    twice, its images would fill a group. Two clients may have equal images, too, black ones for instance. The
    difference is that who sends again has hung up before.
    """

    def __init__(self) -> None:
        self._asked: OrderedDict[bytes, list[tuple[str, Caller]]] = OrderedDict()  # by body: names and callers
        self._lock = threading.Lock()

    def name(self, body: bytes, caller: Caller) -> str:
        """The request's name: that of an equal one whose client has hung up unanswered, or a new one."""
        key = hashlib.sha256(body).digest()
        with self._lock:
            asked = self._asked.setdefault(key, [])
            self._asked.move_to_end(key)
            again = next((k for k, (_, earlier) in enumerate(asked) if earlier.gone), None)
            name = f"{key.hex()}/{uuid.uuid4().hex}" if again is None else asked.pop(again)[0]
            asked.append((name, caller))
            while len(self._asked) > 4096:  # of those that nobody sent again
                self._asked.popitem(last=False)
        return name

    def answered(self, name: str, caller: Caller) -> None:
        """Forgets a request, unless its client has hung up, and may ask again."""
        key = bytes.fromhex(name.partition("/")[0])
        with self._lock:
            if not caller.gone:
                left = [one for one in self._asked.get(key, []) if one[0] != name]
                if left:
                    self._asked[key] = left
                else:
                    self._asked.pop(key, None)
