"""Any vision-language model behind an OpenAI-compatible endpoint as a judge of pairs: both orders, one request each.

The question is the one that our own judges are asked, with the images as base64 PNG. An answer that cannot be read is
data: it counts as malformed, and its order as undecided. A server that fails is tried again and then ends the run.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, Literal, NamedTuple, cast

from PIL.Image import Image

from listener_reward.chat import FOREIGN_RESERVED, ChatFormat
from listener_reward.conclude import Evidence, make_verdict
from listener_reward.errors import InputError, JudgeError
from listener_reward.media.images import ImageLike
from listener_reward.media.storyboards import to_still, to_visual
from listener_reward.pairs import check_questions
from listener_reward.verdict import Thought, Verdict

OPENAI = "https://api.openai.com/v1"

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_PAUSE = 60.0
_LONGEST_REPLY = 2**24
_ANSWER = re.compile(r"<answer>\s*([12])\s*</answer>")
_TAGS = re.compile(r"</?(?:think|answer)>")
_OPTIONAL = {"temperature": 0, "max_completion_tokens": 2048, "logprobs": True, "top_logprobs": 5}
"""Asked for and given up one by one where an endpoint knows them not."""


class EndpointJudge:
    """A model at an OpenAI-compatible address, asked about each pair in both orders.

    p(first) of an order is read from the log-probabilities at the answer where the endpoint gives them, else it is 1 or
    0 for an answer and 1/2 for one that is malformed or refused. A verdict is the mean of the two orders.
    """

    def __init__(
        self,
        model: str,
        base_url: str = OPENAI,
        *,
        api_key: str | None = None,
        workers: int = 8,
        tries: int = 6,
        timeout: float = 120.0,
        pause: float = 1.0,
        max_side: int = 1024,
    ):
        """
        Args:
            model: the name that the endpoint knows it by.
            base_url: http or https, up to and without `/chat/completions`.
            api_key: sent as a bearer token; None takes the variable OPENAI_API_KEY. None is sent where that is empty.
            workers: requests under way at a time.
            tries: how often a request is sent before its failure ends the run.
            timeout: seconds to wait for each answer.
            pause: seconds before the second try; doubled before every other. A server's Retry-After is kept, up to 60.
            max_side: larger images are sent reduced to this.

        Raises:
            InputError: the address is none of the web's, or a number is out of range.
        """
        if not re.match(r"https?://[^/\s]+", base_url):
            raise InputError(f"base_url is {base_url!r}; give an address such as http://localhost:8000/v1")
        if not model:
            raise InputError("model is empty; name one as openai:MODEL@BASE_URL")
        if workers < 1 or tries < 1 or max_side < 1:
            raise InputError(f"workers, tries and max_side are {workers}, {tries}, {max_side}; each is at least 1")
        self.name = f"openai:{model}" if base_url == OPENAI else f"openai:{model}@{base_url}"
        self._model, self._url = model, base_url.rstrip("/") + "/chat/completions"
        self._key = os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key
        self._workers, self._tries, self._timeout, self._pause = workers, tries, timeout, pause
        self._max_side = max_side
        self._format = ChatFormat()
        self._options = dict(_OPTIONAL)

    def compare_many(
        self,
        prompts: Sequence[str],
        firsts: Sequence[ImageLike],
        seconds: Sequence[ImageLike],
        *,
        think: bool | None = None,
    ) -> list[Verdict]:
        """One verdict for each pair, from two requests; `think` changes nothing.

        Raises:
            InputError: unequal lengths, an image that cannot be read, or an endpoint that does not know the model, the
                key or the request.
            JudgeError: the endpoint kept failing.
        """
        check_questions(prompts, firsts, seconds)

        urls: dict[bytes, str] = {}  # a picture is in many pairs, and is encoded once

        def url_of(image: Any, field: str) -> str:
            picture = to_still(to_visual(image, field=field))
            if picture.digest not in urls:
                urls[picture.digest] = _data_url(picture.image, self._max_side)
            return urls[picture.digest]

        def both(number: int) -> Verdict:
            prompt = prompts[number]
            first, second = url_of(firsts[number], f"firsts[{number}]"), url_of(seconds[number], f"seconds[{number}]")
            return _verdict(self._ask(prompt, first, second), self._ask(prompt, second, first))

        pool = ThreadPoolExecutor(self._workers)
        try:
            return list(pool.map(both, range(len(prompts))))
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, prompt: str, first: str, second: str) -> _Reply:
        images = iter((first, second))
        messages = self._format.messages(prompt, FOREIGN_RESERVED)
        for message in messages:
            message["content"] = [
                {"type": "image_url", "image_url": {"url": next(images)}} if block["type"] == "image" else block
                for block in message["content"]
            ]
        response = self._post({"model": self._model, "messages": messages})
        if response is None:
            return _Reply("", None, 0.5)
        try:
            choice = response["choices"][0]
            text: Any = choice["message"].get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise JudgeError(f"{self.name} answered without choices: {str(response)[:200]}") from error
        if isinstance(text, list):
            parts = cast("list[Any]", text)
            text = "".join(
                str(cast("dict[str, Any]", part).get("text", "")) for part in parts if isinstance(part, dict)
            )
        return _read(str(text), choice.get("logprobs"))

    def _post(self, body: dict[str, Any]) -> Any:
        """The endpoint's answer as JSON; None where it refuses this content."""
        failure = ""
        for number in range(self._tries):
            options = dict(self._options)
            try:
                return self._send(body | options)
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode("utf-8", "replace")
                failure = f"HTTP {error.code}: {said[:300].strip()}"
                if error.code in (400, 422):
                    if _refuses_content(said):
                        return None
                    if unknown := [name for name in options if name in said]:
                        # Named in a complaint: other workers may have given it up already.
                        for name in unknown + ["top_logprobs"] * ("logprobs" in unknown):
                            self._options.pop(name, None)
                        continue
                if error.code in (401, 403):
                    raise InputError(f"{self.name} refuses the key ({failure}); set OPENAI_API_KEY") from error
                if error.code not in _AGAIN:
                    raise InputError(f"{self.name} refuses the request ({failure}); check model and address") from error
                wait = error.headers.get("Retry-After", "")
            except (OSError, HTTPException, ValueError) as error:  # no connection, a broken one, too slow, or no JSON
                failure, wait = f"{type(error).__name__}: {error}", ""
            if number + 1 < self._tries:
                time.sleep(self._wait(number, wait))
        raise JudgeError(f"{self.name} gave no response in {self._tries} tries; the last time, {failure}")

    def _send(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # The scheme was checked: nothing but http and https comes here.
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            return json.loads(response.read(_LONGEST_REPLY))

    def _wait(self, number: int, retry_after: str) -> float:
        """Seconds before the next try, spread so that the workers do not all come back at once."""
        if re.fullmatch(r"\d+(\.\d+)?", retry_after):
            return min(float(retry_after), _LONGEST_PAUSE)
        return min(self._pause * 2**number, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)


class _Reply(NamedTuple):
    """What was said of one order."""

    thought: str
    answer: Literal[1, 2] | None
    """Whether the image shown first or the one shown second is better; None for a malformed reply."""
    p: float
    """The probability of the image shown first."""


def endpoint_judge(name: str) -> EndpointJudge:
    """`MODEL`, at OpenAI, or `MODEL@BASE_URL`.

    Raises:
        InputError: as `EndpointJudge`.
    """
    model, at, address = name.rpartition("@http")
    return EndpointJudge(model, "http" + address) if at else EndpointJudge(name)


def _read(text: str, logprobs: Any) -> _Reply:
    """The one answer of a reply. One that gives none, or both, is malformed; nothing is guessed."""
    labels = set(_ANSWER.findall(text)) or ({text.strip()} & {"1", "2"})
    thought = _TAGS.sub("", _ANSWER.sub("", text)).strip()
    if len(labels) != 1:
        return _Reply(thought, None, 0.5)
    first = labels == {"1"}
    p = _probability(logprobs, "1" if first else "2")
    return _Reply("" if thought in labels else thought, 1 if first else 2, float(first) if p is None else p)


def _probability(logprobs: Any, answer: str) -> float | None:
    """The softmax over "1" and "2" at the last token that is the answer; None where the endpoint does not say."""
    try:
        at = next(token for token in reversed(logprobs["content"]) if token["token"].strip() == answer)
        alternatives = {"1": -math.inf, "2": -math.inf}
        for token in (*at["top_logprobs"], at):
            label = token["token"].strip()
            if label in alternatives:
                alternatives[label] = max(alternatives[label], float(token["logprob"]))
    except (KeyError, TypeError, StopIteration, AttributeError, ValueError):
        return None
    one, two = (math.exp(min(value, 0.0)) for value in alternatives.values())
    return one / (one + two) if one + two > 0 else None


def _refuses_content(said: str) -> bool:
    return re.search(r"content[_ ]?(policy|filter|management)|responsible\s?ai|safety system", said, re.I) is not None


def _data_url(image: Image, max_side: int) -> str:
    if max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _verdict(straight: _Reply, swapped: _Reply) -> Verdict:
    high = 0.5 + abs(straight.p - swapped.p) / 2  # each is about the image shown first
    flipped: dict[Any, Literal[1, 2] | None] = {1: 2, 2: 1, None: None}
    said = Evidence(
        p_first=high if straight.p >= swapped.p else 1 - high,  # exact, so that swapping gives exactly 1 - p_first
        by_order=(straight.p, 1 - swapped.p),
        position_gap=straight.p + swapped.p - 1,
        thoughts=(
            Thought(straight.thought, "as given", straight.answer, straight.p, None, None),
            Thought(swapped.thought, "swapped", flipped[swapped.answer], 1 - swapped.p, None, None),
        ),
        malformed=(straight.answer is None) + (swapped.answer is None),
    )
    return make_verdict([said])
