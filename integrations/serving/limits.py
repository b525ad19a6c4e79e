"""What one request may ask for, and how much is under way at once. Past a limit a client gets a 4xx, or a 503."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from listener_reward.errors import InputError
from listener_reward.pairs import check_text

from .asked import Asked, sources_of
from .uploads import Upload


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on. The defaults suit one judge and the batches of the hosts that are known."""

    body: int = 2**28
    """Bytes of a request's body: 256 pictures of a megabyte."""
    images: int = 512
    """Pictures of a request, each frame of a video counted, and each source image that differs from the others."""
    pixels: int = 2**28
    """Pixels of a request's pictures, as the files claim them: 256 pictures of 1024 x 1024. A pixel takes 4 bytes."""
    prompt: int = 20_000
    """Characters of a prompt."""
    sources: int = 16
    """Source images of a prompt."""
    waiting: int = 512
    """Requests under way at once; each has a thread. The next is told to come again."""
    held: int = 2**31
    """Bytes of the bodies of all requests under way."""
    decoded: int = 2**29
    """Pixels of all pictures that are decoded at once; requests wait for one another here."""
    connections: int = 768
    """Open connections, idle ones too."""
    head_seconds: float = 30.0
    """For the head of a request, from its first byte, or from the connection."""
    body_seconds: float = 30.0
    """For the body of a request, beside what it takes at `rate`."""
    rate: int = 2**16
    """Bytes a second that a client has to send after `body_seconds`."""
    idle_seconds: int = 60
    """That a connection stays open between two requests: clients of the field pool theirs."""
    drain_seconds: float = 60.0
    """From the signal to end until what waits is given up. What is being judged is answered all the same."""


VALUES = 2**20
"""Values in the JSON of a body, about. Three bytes of JSON can be fifty of memory; pictures are long texts, and few."""


class TooMuch(InputError):
    """A request past a limit; the server answers 413."""


def check_values(body: bytes) -> None:
    """Before a body is read as JSON.

    Raises:
        TooMuch: it would become far more objects than pictures and prompts are.
    """
    if sum(body.count(sign) for sign in b"[{,") > VALUES:
        raise TooMuch(f"the body has more than {VALUES:,} values; send pictures as one text of base64 each")


class Busy(Exception):
    """No room for a request now; the server answers 503 and says when to come again."""

    def __init__(self, message: str, seconds: int):
        super().__init__(message)
        self.seconds = seconds


class Gate:
    """Counts the requests under way and the bytes of their bodies."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.closing = False
        """Whether the server is to end: what is under way is answered, and nothing begins."""
        self._came: dict[object, float] = {}  # the longest-waiting first
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._came)

    @contextmanager
    def entered(self) -> Generator[Callable[[int], None]]:
        """A place, and what is called with each number of bytes that arrived.

        Raises:
            Busy: no place is free, or no room for the bytes.
        """
        place, taken = object(), 0
        with self._lock:
            if self.closing:
                raise Busy("the server is about to end", 5)
            if len(self._came) >= self.limits.waiting:
                raise Busy(f"{len(self._came)} requests are under way, as many as this server takes", self._patience())
            self._came[place] = time.monotonic()

        def arrived(count: int) -> None:
            nonlocal taken
            with self._lock:
                if self._bytes + count > self.limits.held:
                    raise Busy("the bodies of the requests under way fill the memory meant for them", self._patience())
                self._bytes += count
            taken += count

        try:
            yield arrived
        finally:
            with self._lock:
                del self._came[place]
                self._bytes -= taken

    def _patience(self) -> int:
        """Seconds: who comes now waits about as long as the longest-waiting has by now."""
        oldest = next(iter(self._came.values()), time.monotonic())
        return min(max(round(time.monotonic() - oldest), 1), 60)


class Intake:
    """The limits of a request's contents, and room for the pixels of those that are decoded."""

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()
        self._free = max(self.limits.decoded, self.limits.pixels)
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def check(self, asked: Iterable[Asked], uploads: Sequence[Upload]) -> None:
        """Before anything is decoded.

        Args:
            asked: the request's prompts.
            uploads: its pictures beside the prompts' sources.

        Raises:
            TooMuch: more than a request may have.
            InputError: a prompt or a criterion that is no text that can be encoded.
        """
        asked = [*asked]
        for position, one in enumerate(asked):
            if isinstance(one.text, str):
                if len(one.text) > self.limits.prompt:
                    raise TooMuch(
                        f"prompts[{position}] has {len(one.text):,} characters, more than {self.limits.prompt:,}; "
                        "shorten it, or start the server with a larger --max-prompt"
                    )
                check_text(one.text, field=f"prompts[{position}]")
            if one.criterion is not None:
                check_text(one.criterion, field=f"criterion[{position}]")
            if len(one.sources) > self.limits.sources:
                raise TooMuch(
                    f"prompts[{position}] has {len(one.sources):,} source images, more than {self.limits.sources}; "
                    "send those that its text speaks of"
                )
        uploads = [*uploads, *sources_of(asked)]
        self._at_most(self.limits.images, sum(one.count for one in uploads), "pictures", "--max-images")
        self._at_most(self.limits.pixels, sum(one.pixels for one in uploads), "pixels", "--request-pixels")

    @staticmethod
    def _at_most(most: int, number: int, what: str, option: str) -> None:
        if number > most:
            raise TooMuch(
                f"the request has {number:,} {what}, more than {most:,}; send fewer at once, or start the server with "
                f"a larger {option}"
            )

    @contextmanager
    def room(self, uploads: Sequence[Upload], gone: Callable[[], bool] | None = None) -> Generator[None]:
        """Waits until the pixels of these find room beside what others have decoded, first come, first served.

        `gone` is asked every second, and raises where nobody waits any more.
        """
        pixels, ticket = sum(one.pixels for one in uploads), object()
        with self._changed:
            self._line.append(ticket)
            try:
                while self._line[0] is not ticket or self._free < pixels:
                    self._changed.wait(1.0)
                    if gone is not None:
                        gone()
                self._free -= pixels
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
