"""`RemoteReward`: a reward that lives in another process or on another machine, behind `listener-reward serve`.

Judges need versions of transformers that trainers often cannot have. This side needs no more than `pip install
listener-reward` without an extra. Pictures travel as PNG in JSON: nothing that is received can run.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, get_args
from urllib import error, request
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from listener_reward.addresses import is_here
from listener_reward.errors import InputError, JudgeError, check_choice
from listener_reward.media.images import png_of, to_pil_batch
from listener_reward.pairs import PromptLike, as_prompt, with_sources
from listener_reward.reward import Scheme

API_KEY_VARIABLE = "LISTENER_REWARD_API_KEY"
"""The environment variable with the token of a server, for its clients and for `listener-reward serve` itself."""

TIMEOUT_HEADER = "X-Request-Timeout"
"""Seconds, from the arrival of a request, that its client waits: the server begins nothing for it afterwards."""

TRANSIENT = (429, 502, 503, 504)
"""Answers of a server, or of a proxy before it, that may be another one soon."""

CALLERS = (400, 401, 403, 409, 413, 415, 421)
"""Refusals that are the caller's to mend."""

LONGEST_PAUSE = 60.0
"""Seconds: a `Retry-After` beyond is cut, so that the client keeps its own bound."""

logger = logging.getLogger(__name__)


class RemoteReward:
    """`reward(images, prompts, metadata) -> (scores, info)`, asked of a server. Threads may share it; it pickles."""

    __name__ = "listener_reward"

    def __init__(
        self,
        url: str,
        *,
        scheme: Scheme | None = None,
        timeout: float = 600.0,
        retries: int = 6,
        api_key: str | None = None,
    ):
        """
        Args:
            url: where the server listens, such as "http://127.0.0.1:8300". An address of this machine is asked
                directly, whatever proxy the environment names.
            scheme: what the scores must be: "reference", "anchors", "group" or "auto". It goes with each request, and a
                server that would answer by another refuses. None takes the server's.
            timeout: seconds to wait for an answer. A server that collects groups answers when the group is full.
            retries: how often to ask again where the server may answer the next time: a connection refused or reset,
                or one of `TRANSIENT`. Pauses double from a second, unless the server says how long (`Retry-After`).
            api_key: the server's token. Left out, it is read from the environment variable LISTENER_REWARD_API_KEY with
                each request, and is in no pickle.

        Raises:
            InputError: an unusable url or option.
        """
        if not isinstance(url, str) or not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
            raise InputError(f"url is {url!r}; it begins with http:// or https://, and a host follows")
        if urlsplit(url).username is not None:
            raise InputError(
                f"url has a name or a key before its host; give the key as api_key, or by {API_KEY_VARIABLE}"
            )
        if scheme is not None:
            check_choice("scheme", scheme, get_args(Scheme))
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InputError("api_key has characters that a header cannot have; give printable ASCII")
        if timeout <= 0 or retries < 0:
            raise InputError(f"timeout is {timeout} and retries {retries}; give seconds above 0, and 0 or more")
        self.url = url.rstrip("/")
        self.scheme = scheme
        self.timeout = timeout
        self.retries = retries
        self.api_key = api_key

    def __call__(
        self, images: Any, prompts: Sequence[PromptLike], metadata: Any = None, *, sources: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Contract as in `ListenerReward`, sources included; NaN for an image on which the judge broke.

        Of the metadata only the sources are sent. A source of several prompts is sent once.

        Raises:
            InputError: unusable images, sources or prompts, found here or there, or a server that answers by another
                scheme, or that has not read the sources or criteria of the prompts.
            JudgeError: the judge broke, or no server answered.
        """
        pictures = to_pil_batch(images)
        asked = [as_prompt(prompt) for prompt in with_sources(prompts, len(pictures), metadata, sources)]
        body: dict[str, Any] = {
            "prompt": [prompt.text for prompt in asked],
            "image": [_base64(picture) for picture in pictures],
        }
        read: dict[str, list[Any]] = {}  # what the answer has to say of what was sent
        if any(prompt.sources for prompt in asked):
            distinct = list(dict.fromkeys(source for prompt in asked for source in prompt.sources))
            number = {source: k for k, source in enumerate(distinct)}
            body["pictures"] = [_base64(source.image) for source in distinct]
            body["condition_images"] = [[number[source] for source in prompt.sources] for prompt in asked]
            read["sources"] = [len(prompt.sources) for prompt in asked]
        if any(prompt.criterion is not None for prompt in asked):
            body["criterion"] = read["criterion"] = [prompt.criterion for prompt in asked]
        answer = self._post(json.dumps(body).encode())
        if answer.get("error") and answer.get("rewards") is None:
            raise (InputError if answer.get("kind") == "input" else JudgeError)(f"{self.url}: {answer['error']}")
        for name, sent in read.items():
            if answer.get(name) != sent:
                what = "source images" if name == "sources" else "criteria"
                raise InputError(f"{self.url} has not read the {what} of the prompts; it needs a newer listener-reward")
        try:
            scores = np.array(answer["rewards"], dtype=np.float32)
            info = {name: np.array(values, dtype=np.float32) for name, values in answer.get("info", {}).items()}
        except (KeyError, TypeError, ValueError) as wrong:
            raise JudgeError(f"{self.url} gave an answer of another form; is it a `listener-reward serve`?") from wrong
        return scores, info

    def _post(self, body: bytes) -> dict[str, Any]:
        path = "/compute" if self.scheme is None else f"/{self.scheme}/compute"
        headers = {"Content-Type": "application/json", TIMEOUT_HEADER: f"{self.timeout:g}"}
        if token := self.api_key or os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {token}"
        asked = request.Request(self.url + path, body, headers)
        opener = _opener(self.url)
        for attempt in range(self.retries + 1):
            try:
                with opener.open(asked, timeout=self.timeout) as reply:
                    answer = json.load(reply)
            except (OSError, http.client.HTTPException, ValueError) as failed:
                pause = _pause(failed, attempt)
                if pause is None or attempt == self.retries:
                    raise self._failure(failed, attempt + 1) from failed
                logger.warning("%s: %s; asked again in %.0f s", self.url, failed, pause)
                time.sleep(pause)
            else:
                if not isinstance(answer, dict):
                    raise JudgeError(f"{self.url} gave an answer of another form; is it a `listener-reward serve`?")
                return answer
        raise AssertionError("the last attempt answers or raises")

    def _failure(self, failed: Exception, times: int) -> Exception:
        if isinstance(failed, error.HTTPError):
            detail = failed.read(2000).decode("utf-8", "replace")
            with suppress(ValueError, KeyError, TypeError):
                detail = json.loads(detail)["detail"]
            kind = InputError if failed.code in CALLERS else JudgeError
            return kind(f"{self.url} refused: {failed.code} {detail}")
        proxy = "" if is_here(self.url) else request.getproxies().get(urlsplit(self.url).scheme, "")
        through = f" through the proxy {urlsplit(proxy).hostname}" if proxy else ""
        often = f" in {times} attempts" if times > 1 else ""
        return JudgeError(
            f"{self.url} did not answer{through}{often} ({failed}); is `listener-reward serve` running there?"
        )


def _base64(picture: Image.Image) -> str:
    return base64.b64encode(png_of(picture)).decode("ascii")


def _opener(url: str) -> request.OpenerDirector:
    """What opens `url`: addresses of this machine without the environment's proxies, which cannot reach it."""
    return request.build_opener(_NoRedirect, *([request.ProxyHandler({})] if is_here(url) else []))


class _NoRedirect(request.HTTPRedirectHandler):
    """A redirect is a refusal: what follows it would get the token, and of a request no more than its address."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _pause(failed: Exception, attempt: int) -> float | None:
    """Seconds before the request is sent again; None where it would fail again."""
    doubling = min(2.0**attempt, LONGEST_PAUSE)
    if isinstance(failed, error.HTTPError):
        if failed.code not in TRANSIENT:
            return None
        try:
            return min(max(float(failed.headers.get("Retry-After", "")), 0), LONGEST_PAUSE)
        except ValueError:  # left out, or a date
            return doubling
    reason = getattr(failed, "reason", failed)
    broken = (ConnectionError, http.client.RemoteDisconnected, http.client.IncompleteRead)
    return doubling if isinstance(reason, broken) else None
