"""Any vision-language model behind an OpenAI-compatible endpoint as a judge of pairs: both orders, one request each.

The question is the one that our own judges are asked, with the images as base64 PNG. An answer that cannot be read is
data: it counts as malformed, and its order as undecided. A server that fails is tried again and then ends the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

from PIL.Image import Image

from listener_reward.chat import FOREIGN_RESERVED, ChatFormat
from listener_reward.conclude import Evidence, make_verdict
from listener_reward.errors import InputError
from listener_reward.media.images import ImageLike, Picture
from listener_reward.media.storyboards import to_still, to_visual
from listener_reward.models.openai_client import ContentRefused, OpenAIClient
from listener_reward.models.options import split_address
from listener_reward.pairs import PromptLike, check_questions
from listener_reward.verdict import Thought, Verdict

OPENAI = "https://api.openai.com/v1"

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
        if not model:
            raise InputError("model is empty; name one as openai:MODEL@BASE_URL")
        if max_side < 1:
            raise InputError(f"max_side is {max_side}; it is at least 1")
        self.name = f"openai:{model}" if base_url == OPENAI else f"openai:{model}@{base_url}"
        self._model = model
        self._client = OpenAIClient(
            base_url,
            name=self.name,
            api_key=api_key,
            workers=workers,
            tries=tries,
            timeout=timeout,
            pause=pause,
            prepare=partial(_reduced, max_side=max_side),
        )
        self._format = ChatFormat()
        self._options = dict(_OPTIONAL)

    def compare_many(
        self,
        prompts: Sequence[PromptLike],
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

        def both(number: int) -> Verdict:
            prompt = prompts[number]
            first, second = (
                to_still(to_visual(image, field=f"{field}[{number}]"))
                for image, field in ((firsts[number], "firsts"), (seconds[number], "seconds"))
            )
            return _verdict(self._ask(prompt, first, second), self._ask(prompt, second, first))

        return self._client.map(both, range(len(prompts)))

    def check_question(self, *, sources: int = 0, criterion: str | None = None) -> None:
        """Whether a prompt with so many source images and this criterion can be asked about. Nothing is sent.

        Raises:
            InputError: there is no such criterion.
        """
        self._format.messages("", sources=sources, criterion=criterion)

    def _ask(self, prompt: PromptLike, first: Picture, second: Picture) -> _Reply:
        chat = self._format.chat(prompt, first, second, FOREIGN_RESERVED)
        messages = self._client.messages(chat.messages, chat.images)
        body = {"model": self._model, "messages": messages}
        try:
            response = self._client.post("/chat/completions", body, self._options)
        except ContentRefused:
            return _Reply("", None, 0.5)
        choice = self._client.choice(response)
        try:
            text: Any = choice["message"].get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._client.without_choices(response) from error
        if isinstance(text, list):
            parts = cast("list[Any]", text)
            text = "".join(
                str(cast("dict[str, Any]", part).get("text", "")) for part in parts if isinstance(part, dict)
            )
        return _read(str(text), choice.get("logprobs"))


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
    model, address = split_address(name)
    return EndpointJudge(name) if model is None else EndpointJudge(model, address)


def _reduced(image: Image, max_side: int) -> Image:
    if max(image.size) <= max_side:
        return image
    image = image.copy()
    image.thumbnail((max_side, max_side))
    return image


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
