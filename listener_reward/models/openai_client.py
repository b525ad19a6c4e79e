"""The one client of OpenAI-compatible servers: for weights that are served, and for the peer `openai:`.

Connections are pooled and requests under way are bounded. A server that fails is asked again with growing pauses, until
the tries or the deadline end. A picture is encoded once, however many requests show it.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from listener_reward.addresses import is_here
from listener_reward.errors import InputError, JudgeError, UnreachableError, missing

if fault := missing("openai", "a model behind an address"):
    raise fault

import httpx
from PIL.Image import Image

from listener_reward.media.images import Picture, png_of

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_PAUSE = 60.0
_LONGEST_REPLY = 2**26
_KEPT_PICTURES = 2**28
"""Bytes of encoded pictures that are kept."""

T = TypeVar("T")
R = TypeVar("R")


class ContentRefused(Exception):
    """The server's content filter will not have this request; the message has the server's words."""


class BadRequest(InputError):
    """The server does not take this request as it is: HTTP 400 or 422."""

    def __init__(self, message: str, said: str):
        super().__init__(message)
        self.said = said
        """The beginning of the server's answer."""


class OpenAIClient:
    """Requests to one server. Threads may share it."""

    def __init__(
        self,
        base_url: str,
        *,
        name: str | None = None,
        api_key: str | None = None,
        workers: int = 32,
        tries: int = 6,
        timeout: float = 120.0,
        deadline: float = 900.0,
        pause: float = 1.0,
        prepare: Callable[[Image], Image] | None = None,
    ):
        """
        Args:
            base_url: http or https, up to and without `/chat/completions`.
            name: how messages name the server; None for its address.
            api_key: sent as a bearer token; None takes the variable OPENAI_API_KEY. None is sent where that is empty.
            workers: requests under way at a time.
            tries: how often a request is sent before it counts as failed.
            timeout: seconds that one try may take, from connecting to the last byte.
            deadline: seconds that a request may take with all its tries and pauses.
            pause: seconds before the second try; doubled before every other. A server's Retry-After is kept, up to 60.
            prepare: what is done to a picture before it is encoded; None sends it as it is.

        Raises:
            InputError: the address is none of the web's, or a number is out of range.
        """
        if not re.match(r"https?://[^/\s]+", base_url):
            raise InputError(f"base_url is {base_url!r}; give an address such as http://localhost:8000/v1")
        if workers < 1 or tries < 1:
            raise InputError(f"workers and tries are {workers} and {tries}; each is at least 1")
        if timeout <= 0 or deadline <= 0:
            raise InputError(f"timeout and deadline are {timeout} and {deadline}; each is above 0")
        self.base_url = base_url.rstrip("/")
        self.name = name or self.base_url
        self.workers = workers
        self._tries, self._timeout, self._deadline, self._pause = tries, timeout, deadline, pause
        self._prepare = prepare
        key = os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=workers, max_keepalive_connections=workers),
            timeout=timeout,
            trust_env=not is_here(self.base_url),  # a proxy cannot reach this machine
        )
        weakref.finalize(self, self._http.close)
        self._turn = threading.BoundedSemaphore(workers)
        self._pictures: OrderedDict[bytes, str] = OrderedDict()
        self._kept = 0
        self._lock = threading.Lock()

    def get(self, path: str) -> Any:
        """What the server says at `path`, as JSON. Raises as `post`."""
        return self._answer("GET", path, None)

    def post(self, path: str, body: dict[str, Any], optional: dict[str, Any] | None = None) -> Any:
        """The server's answer to `body`, as JSON.

        `optional` holds fields to send along that a server may not know. A field that the server names in a complaint
        is taken out of `optional` for good, and the request is sent again without it.

        Raises:
            ContentRefused: a content filter refused it.
            BadRequest: the server complains of anything else in the request.
            InputError: the server does not know the path, the model or the key.
            JudgeError: the server kept failing; `UnreachableError` where there was none the last time.
        """
        while True:
            given = dict(optional or {})
            try:
                return self._answer("POST", path, body | given)
            except BadRequest as error:
                unknown = [field for field in given if field in error.said]
                # Named in a complaint: other threads may have given it up already.
                for field in unknown + ["top_logprobs"] * ("logprobs" in unknown):
                    (optional or {}).pop(field, None)
                if not unknown:
                    raise

    def choice(self, answer: Any) -> Any:
        """The first choice of a server's answer.

        Raises:
            JudgeError: it has none.
        """
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise self.without_choices(answer) from error

    def without_choices(self, answer: Any) -> JudgeError:
        """The error of an answer that has no choice, or one that cannot be read."""
        return JudgeError(f"{self.name} answered without choices: {str(answer)[:200]}")

    def map(self, ask: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`ask` of each item, several at a time, in order. After a failure nothing more is begun."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            return list(pool.map(ask, items))
        finally:
            pool.shutdown(cancel_futures=True)

    def picture_url(self, picture: Picture) -> str:
        """`picture` as a `data:` URL of a PNG."""
        with self._lock:
            if url := self._pictures.get(picture.digest):
                self._pictures.move_to_end(picture.digest)
                return url
        url = _data_url(picture.image if self._prepare is None else self._prepare(picture.image))
        with self._lock:
            if picture.digest not in self._pictures:
                self._pictures[picture.digest] = url
                self._kept += len(url)
            while self._kept > _KEPT_PICTURES and len(self._pictures) > 1:
                self._kept -= len(self._pictures.popitem(last=False)[1])
        return url

    def messages(self, messages: list[dict[str, Any]], pictures: Iterable[Picture]) -> list[dict[str, Any]]:
        """A chat's messages with `pictures` in its image blocks, as the protocol has them."""
        left = iter(pictures)
        return [
            message
            | {
                "content": [
                    {"type": "image_url", "image_url": {"url": self.picture_url(next(left))}}
                    if block["type"] == "image"
                    else block
                    for block in message["content"]
                ]
            }
            for message in messages
        ]

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        failure, kind, until = "", JudgeError, time.monotonic() + self._deadline
        number = 0
        for number in range(1, self._tries + 1):
            retry_after = ""
            try:
                with self._turn:
                    status, headers, said = self._send(method, path, body, until)
                kind = JudgeError
                if status == 200:
                    return json.loads(said)
                text = said[:2000].decode("utf-8", "replace")
                failure, retry_after = f"HTTP {status}: {text[:300].strip()}", headers.get("Retry-After", "")
                if status not in _AGAIN:
                    raise self._refusal(status, text, failure)
            except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                failure = f"{type(error).__name__}: {error}"  # no connection, a broken one, too slow, or no JSON
                kind = UnreachableError if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else JudgeError
            wait = self._wait(number - 1, retry_after)
            if number == self._tries or time.monotonic() + wait >= until:
                break
            time.sleep(wait)
        raise kind(f"{self.name} gave no response in {number} tries; the last time, {failure}")

    def _refusal(self, status: int, text: str, failure: str) -> Exception:
        if status in (400, 422):
            if re.search(r"content[_ ]?(policy|filter|management)|responsible\s?ai|safety system", text, re.I):
                return ContentRefused(f"{self.name} refuses the content ({failure})")
            return BadRequest(f"{self.name} refuses the request ({failure}); check model and address", text)
        if status in (401, 403):
            return InputError(f"{self.name} refuses the key ({failure}); set OPENAI_API_KEY")
        return InputError(f"{self.name} refuses the request ({failure}); check model and address")

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None, until: float
    ) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and content of one try, within its time and within `until`."""
        end = min(time.monotonic() + self._timeout, until)
        left = max(end - time.monotonic(), 0.001)
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        parts: list[bytes] = []
        length = 0
        with self._http.stream(
            method, self.base_url + path, content=content, headers=headers, timeout=left
        ) as response:
            for part in response.iter_bytes():
                parts.append(part)
                length += len(part)
                if length > _LONGEST_REPLY:
                    raise ValueError(f"an answer of more than {_LONGEST_REPLY:,} bytes")
                if time.monotonic() > end:  # httpx counts the seconds of each read anew
                    raise httpx.ReadTimeout("timed out")
        return response.status_code, response.headers, b"".join(parts)

    def _wait(self, number: int, retry_after: str) -> float:
        """Seconds before the next try, spread so that the workers do not all come back at once."""
        if re.fullmatch(r"\d+(\.\d+)?", retry_after):
            return min(float(retry_after), _LONGEST_PAUSE)
        return min(self._pause * 2**number, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def _data_url(image: Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png_of(image)).decode("ascii")
