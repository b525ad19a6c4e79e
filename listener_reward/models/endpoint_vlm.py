"""The backend of `VLM` for weights that another process serves: vLLM, SGLang, or any OpenAI-compatible server.

Only pictures and text travel. The checkpoint's tokenizer, template and card are read here, and a probe at the start
finds whether the server asks the same tokens and gives what a judge needs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, cast

from listener_reward.errors import missing

if fault := missing("judge", "a judge in this process"):
    raise fault

import torch
from PIL import Image
from torch import Tensor

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import InputError, JudgeError
from listener_reward.models.adapters import base_of, options_of_base
from listener_reward.models.hub import hub_options
from listener_reward.models.openai_client import BadRequest, ContentRefused, OpenAIClient
from listener_reward.models.options import split_address
from listener_reward.models.placement import limit_pixels
from listener_reward.models.processing import decoded, load_processor
from listener_reward.models.resizing import resized_for_good
from listener_reward.models.turns import Turns
from listener_reward.models.vlm import LEAST_LOGPROB
from listener_reward.trace import parse

_CHAT = "/chat/completions"
_TOP = 20
"""Log-probabilities asked for at an answer where a server cannot be asked for the labels' own; vLLM's usual bound."""

_WIDER = (1000, 200, 100, 50, 20)
"""What is asked for where a label is not among those."""

_REMEMBERED = 4096
"""Completions whose written answers are kept, with a server that gives no log-probabilities."""

_SURE = 1e-6
"""The probability of the label that was not written, with such a server."""


class _Place(NamedTuple):
    """Where an answer stands in the assistant's turn."""

    before: str
    """What the assistant has written up to there."""
    tokens: list[int]
    """The tokens of `before` that the thought and its tags have."""
    ids: list[int]
    """The labels' tokens there."""
    answered: list[str]
    """`before` with each label behind it."""


class EndpointVLM:
    """A checkpoint's weights behind an OpenAI-compatible address."""

    def __init__(
        self,
        client: OpenAIClient,
        served: str | None,
        processor: Any,
        chat_format: ChatFormat,
        *,
        accept_less: bool = False,
    ):
        """
        Args:
            client: asks the server.
            served: the name that the server knows the weights by; None where it serves one model.
            processor: the checkpoint's, as `load_processor` gives it.
            chat_format: how the model is asked, which the probe does too.
            accept_less: take a server that cannot give all that a judge needs. `limits` then says what is missing.

        Raises:
            InputError: the server knows no such model, reads a question as other tokens than the checkpoint, or gives
                less than is needed.
            JudgeError: the server does not answer.
        """
        self.client = client
        self.processor = processor
        self.chat_format = chat_format
        self.accept_less = accept_less
        self.tokenizer = processor.tokenizer
        self.turns = Turns(processor, think_tag=chat_format.think[0])
        self.reserved = self.turns.reserved
        self.checkpoint: str | None = None
        """The checkpoint whose files are read here; None for a processor that was given."""
        self.base: str | None = None
        """The checkpoint under the adapter, where `checkpoint` is one."""
        self.revision: str | None = None
        """The weights' revision on the Hub; None for the newest."""
        self.served, self._parent = self._model(served)
        self.backend = f"{self.served}@{client.base_url}"
        self._optional: dict[str, Any] = {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logit_bias": {str(token): -100 for token in self.turns.vision_tokens()},
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        """Fields that not every server knows: they undo a checkpoint's own habits, and ask for token ids."""
        self._reading: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        self._by_id = False
        """Whether the server can be asked for the log-probabilities of given tokens."""
        self.reads_answers = True
        """Whether it gives log-probabilities at a continued answer."""
        self.reads_thoughts = True
        """Whether it gives log-probabilities of a prompt."""
        self._written: OrderedDict[Any, tuple[str, int] | None] = OrderedDict()
        self._lock = Lock()
        self.limits: tuple[str, ...] = ()
        """What the server cannot give, a sentence each, where that was accepted."""
        self._probe()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        address: str,
        chat_format: ChatFormat,
        *,
        accept_less: bool = False,
        revision: str | None = None,
        max_pixels: int | None = None,
        **client: Any,
    ) -> EndpointVLM:
        """The checkpoint `name`, whose weights are served at `address`: `http://host:port/v1` or `MODEL@http://...`.

        `revision` and `max_pixels` are those of `ModelOptions`. The other arguments are those of `OpenAIClient` and of
        the class.
        """
        served, url = split_address(address)
        given = hub_options(name, revision)
        processor = load_processor(name, **given)
        limit_pixels(processor, max_pixels)
        prepare = partial(resized_for_good, image_processor=processor.image_processor)
        server = OpenAIClient(url, prepare=prepare, **client)
        vlm = cls(server, served, processor, chat_format, accept_less=accept_less)
        vlm.checkpoint, vlm.base = str(name), base_of(name, **given)
        whole = given if vlm.base is None else options_of_base(vlm.base, given, name)
        vlm.revision = whole.get("revision")
        return vlm

    def without_adapters(self, chat_format: ChatFormat) -> EndpointVLM:
        """The base of a served adapter: the same server by its base's name.

        Raises:
            InputError: the server does not say what the adapter lies on.
        """
        if self._parent is None:
            raise InputError(
                f"{self.client.name} does not name the base of {self.served!r}; give the base's own name by "
                "listener_options={'backend': 'BASE@http://...'}"
            )
        base = EndpointVLM(self.client, self._parent, self.processor, chat_format, accept_less=self.accept_less)
        base.checkpoint, base.revision = self.base, self.revision
        return base

    def can_ground(self, grounding: float) -> float:
        if not self.reads_answers:
            raise InputError(f"{self.limits[0]}, and a listener writes none; name another listener, or 'none'")
        if grounding == 0 or self.reads_thoughts:
            return grounding
        said = f"{self.served!r} at {self.client.name} gives no log-probabilities of a prompt"
        if not self.accept_less:
            raise InputError(
                f"{said}, which the listener's grounding of {grounding:g} is made of; accept_less=True (--accept-less) "
                "listens without it"
            )
        self.limits = (*self.limits, f"{said}: the listener's grounding of {grounding:g} is 0")
        return 0.0

    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        texts = self._texts(chats)

        def ask(row: int) -> str:
            body = self._body(chats[row]) | {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}
            try:
                choice = self.client.choice(self._post(body | {"seed": seeds[row] % 2**63}, self._optional))
            except ContentRefused:
                return ""  # malformed, as a refusal in words is
            return self.turns.opened(texts[row]) + self._said(choice)

        completions = self.client.map(ask, range(len(chats)))
        if not self.reads_answers:
            self._remember(chats, completions)
        return completions

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> Tensor:
        if not self.reads_answers:
            return self._written_answers(chats, prefixes)
        return self._read(chats, prefixes, labels, likelihood=False)[0]

    def read(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self._read(chats, prefixes, labels, likelihood=True)

    def _read(
        self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str], *, likelihood: bool
    ) -> tuple[Tensor, Tensor]:
        texts = self._texts(chats)

        def read_one(row: int) -> tuple[list[float], float]:
            return self._read_one(chats[row], self._place(texts[row], prefixes[row], labels), likelihood)

        read = self.client.map(read_one, range(len(chats)))
        log_probs = torch.tensor([values for values, _ in read], dtype=torch.float32).view(len(chats), len(labels))
        return log_probs, torch.tensor([mean for _, mean in read], dtype=torch.float32)

    def _read_one(self, chat: Chat, place: _Place, likelihood: bool) -> tuple[list[float], float]:
        ids = place.ids
        asked: dict[str, Any] = {"logprob_token_ids": ids} if self._by_id else {"top_logprobs": _TOP}
        if likelihood:
            asked["prompt_logprobs"] = 0
        try:
            answer = self._post(self._body(chat, place.before) | {"logprobs": True} | asked, self._reading)
        except ContentRefused as error:
            raise JudgeError(str(error)) from error
        found = self._found(answer, ids)
        if len(found) < len(ids):
            found |= self._asked_again(chat, place, [each for each in ids if each not in found])
        mean = self._mean(answer, place.tokens) if likelihood else 0.0
        return [found[each] for each in ids], mean

    def _found(self, answer: Any, ids: Sequence[int]) -> dict[int, float]:
        """Log-probabilities of those of the tokens `ids` that a server's answer lists at its first token."""
        try:
            first = self.client.choice(answer)["logprobs"]["content"][0]
            listed = [*first["top_logprobs"], first]
        except (KeyError, IndexError, TypeError) as error:
            raise JudgeError(f"{self.client.name} gave no log-probabilities: {str(answer)[:200]}") from error
        names = {name: token for token in ids for name in (f"token_id:{token}", self.tokenizer.decode([token]))}
        found: dict[int, float] = {}
        for each in listed:
            if (token := names.get(each["token"])) is not None and token not in found:
                found[token] = _number(each["logprob"])
        return found

    def _asked_again(self, chat: Chat, place: _Place, absent: Sequence[int]) -> dict[int, float]:
        """Log-probabilities of tokens that are not among the likeliest.

        A token that is part of a prompt is listed whatever its rank; else longer lists are tried.
        """
        if self.reads_thoughts:
            found: dict[int, float] = {}
            for token in absent:  # one at a time: a label that no list has is rare
                answered = place.answered[place.ids.index(token)]
                answer = self._post(self._body(chat, answered) | {"prompt_logprobs": 0}, self._reading)
                found[token] = self._prompt_logprobs(answer, [*place.tokens, token])[-1]
            return found
        for top in _WIDER:
            try:
                body = self._body(chat, place.before) | {"logprobs": True, "top_logprobs": top}
                found = self._found(self._post(body, self._reading), absent)
            except BadRequest:
                continue
            if len(found) == len(absent):
                return found
            break
        missed = " and ".join(repr(self.tokenizer.decode([token])) for token in absent)
        raise JudgeError(
            f"{self.client.name} does not list {missed} "
            "among the likeliest tokens at an answer, and gives no longer list; start the server with a higher bound "
            "(vLLM: --max-logprobs)"
        )

    def _mean(self, answer: Any, tokens: Sequence[int]) -> float:
        values = [
            max(value, LEAST_LOGPROB) if value == value else value for value in self._prompt_logprobs(answer, tokens)
        ]
        return math.fsum(values) / len(values) if values else 0.0

    def _prompt_logprobs(self, answer: Any, tokens: Sequence[int]) -> list[float]:
        """The log-probabilities of the prompt's last tokens, which have to be `tokens`."""
        listed = cast("list[Any]", answer.get("prompt_logprobs") or [])
        tail = listed[len(listed) - len(tokens) :]
        try:
            return [_number(entry[str(token)]["logprob"]) for entry, token in zip(tail, tokens, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise JudgeError(
                f"{self.client.name} reads a thought as other tokens than the checkpoint's tokenizer: {str(tail)[:200]}"
            ) from error

    # ------------------------------------------------------------------------------------------------ requests
    def _texts(self, chats: Sequence[Chat]) -> list[str]:
        if any(chat.videos for chat in chats):
            raise InputError(
                "clips='video' needs the model in this process; behind an address choose 'storyboard', 'frames' or "
                "'clip'"
            )
        self.turns.warn_of_unknown_words(chat.prompt for chat in chats)
        return self.turns.texts(chats)

    def _body(self, chat: Chat, content: str | None = None) -> dict[str, Any]:
        """A request about `chat`; with `content`, for one more token after it in the assistant's turn."""
        messages = self.client.messages(chat.messages, chat.images)
        if content is None:
            return {"model": self.served, "messages": messages}
        return {
            "model": self.served,
            "messages": [*messages, {"role": "assistant", "content": content}],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "max_tokens": 1,
            "temperature": 0.0,
        }

    def _post(self, body: dict[str, Any], optional: dict[str, Any]) -> Any:
        return self.client.post(_CHAT, body, optional)

    def _said(self, choice: Any) -> str:
        message: dict[str, Any] = choice.get("message") or {}
        ids: Any = choice.get("token_ids")
        if not ids:
            text = str(message.get("content") or message.get("refusal") or "")
            if thought := message.get("reasoning_content") or message.get("reasoning"):
                text = f"{thought}{self.chat_format.think[1]}{text}"
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return decoded(self.tokenizer, [ids])[0]

    def _place(self, text: str, prefix: str, labels: Sequence[str]) -> _Place:
        """Where the answer stands in the rendered chat `text` once `prefix` is written."""
        text, rest = self.turns.continued(text, prefix)
        (slot,), ids = self.turns.at_slots([rest], labels)
        opened = self.turns.opened(text)
        return _Place(
            opened + self.turns.before(slot, rest + labels[0]),
            slot,
            cast("Any", ids)[0].tolist(),
            [opened + rest + label for label in labels],
        )

    # ------------------------------------------------------------------------------------------------ the start
    def _model(self, served: str | None) -> tuple[str, str | None]:
        """The model's name at the server, and its base's where it is an adapter there."""
        try:
            listed: dict[str, Any] = {str(card["id"]): card for card in self.client.get("/models")["data"]}
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.client.name} lists no models; is it an OpenAI-compatible server?") from error
        if served is None:
            whole = [name for name, card in listed.items() if card.get("parent") is None]
            if len(whole) != 1:
                names = ", ".join(f"{name}@{self.client.base_url}" for name in listed)
                raise InputError(f"{self.client.name} serves {len(whole)} models; choose one of: {names}")
            served = whole[0]
        if served not in listed:
            raise InputError(f"{self.client.name} does not serve {served!r}; it serves {', '.join(map(repr, listed))}")
        return served, listed[served].get("parent")

    def _probe(self) -> None:
        """Asks one question, and finds whether the server reads it as the checkpoint does and what it can give."""
        pictures = [Image.new("RGB", (64, 64), shade) for shade in ("red", "blue")]
        chat = self.chat_format.chat("a red circle", pictures[0], pictures[1], self.reserved)
        (text,) = self.turns.texts([chat])
        place = self._place(text, self.chat_format.answer_slot("one circle"), self.chat_format.labels)
        content, ids = place.before, place.ids
        self._check_template(chat, text, content)
        body = self._body(chat, content) | {"logprobs": True}
        faults: list[str] = []
        try:
            answer, self._by_id = self._first(body, ids)
        except (BadRequest, ContentRefused) as error:
            faults.append(f"continues no message ({error})")
            answer = None
        if answer is not None:
            faults += self._misread(chat, content, answer)
            if not self._gives(lambda: self._found(answer, ids)):
                faults.append("gives no log-probabilities")
        self.reads_answers = not faults
        if self.reads_answers:
            self.reads_thoughts = self._gives(
                lambda: self._prompt_logprobs(self._post(body | {"prompt_logprobs": 0}, self._reading), place.tokens)
            )
        else:
            self.reads_thoughts = False
            said = f"{self.served!r} at {self.client.name} {' and '.join(faults)}"
            if not self.accept_less:
                raise InputError(
                    f"{said}, which a judge needs at its answers; accept_less=True (--accept-less) judges by the "
                    "answers as they are written, openai:MODEL@URL asks it as a peer"
                )
            self.limits = (f"{said}: judged by written answers alone",)

    def _first(self, body: dict[str, Any], ids: Sequence[int]) -> tuple[Any, bool]:
        """The answer to the probe, and whether the server was asked for the log-probabilities of `ids` by name."""
        try:
            answer = self._post(body | {"logprob_token_ids": list(ids)}, self._reading)
            if self._gives(lambda: self._found(answer, ids)) and len(self._found(answer, ids)) == len(ids):
                return answer, True
        except BadRequest:
            pass
        return self._post(body | {"top_logprobs": _TOP}, self._reading), False

    def _gives(self, ask: Callable[[], Any]) -> bool:
        try:
            ask()
        except (BadRequest, ContentRefused, JudgeError):
            return False
        return True

    def _check_template(self, chat: Chat, text: str, content: str) -> None:
        """Raises `InputError` where the checkpoint's template does not write `content` behind `text` as it is given."""
        try:
            rendered = self._rendered(chat, content, ends=False)
        except ValueError:  # transformers' own complaint, of a text that it does not find again
            rendered = None
        if rendered != text.removesuffix(self.turns.opened(text)) + content:
            raise InputError(
                "the checkpoint's chat template rewrites what the assistant has written, so that no server can be "
                "asked to continue it; load the weights here: backend='transformers'"
            )

    def _rendered(self, chat: Chat, content: str, *, ends: bool) -> str:
        blocks = [{"type": "text", "text": content}]
        messages = [*chat.messages, {"role": "assistant", "content": blocks}]
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ends, continue_final_message=not ends
        )

    def _misread(self, chat: Chat, content: str, answer: Any) -> list[str]:
        """What is wrong with how the server read the probe's tokens; empty where it read those of the checkpoint."""

        def tokens(ends: bool) -> list[int]:
            pictures = [picture.image for picture in chat.images]
            encoded = self.processor(images=pictures, text=[self._rendered(chat, content, ends=ends)])
            return [int(token) for token in encoded["input_ids"][0]]

        right = tokens(ends=False)
        given: list[int] | None = answer.get("prompt_token_ids") or None
        usage: dict[str, Any] = answer.get("usage") or {}
        counted = len(given) if given else usage.get("prompt_tokens")
        if given == right or (given is None and counted == len(right)):
            return []
        if counted == len(tokens(ends=True)):
            return ["does not continue a message that is begun"]
        return [
            f"reads a question as {counted} tokens and the checkpoint as {len(right)}, or as other ones (another "
            "checkpoint, chat template or size of pictures?)"
        ]

    # ------------------------------------------------------------------------------------------------ written answers
    def _remember(self, chats: Sequence[Chat], completions: Sequence[str]) -> None:
        with self._lock:
            for chat, completion in zip(chats, completions, strict=True):
                trace = parse(completion, self.chat_format)
                slot = None if trace.slot is None or trace.answer is None else (trace.slot, trace.answer - 1)
                self._written[_key(chat, None if slot is None else slot[0])] = slot
                self._written[_key(chat, None)] = None
            while len(self._written) > _REMEMBERED:
                self._written.popitem(last=False)

    def _written_answers(self, chats: Sequence[Chat], prefixes: Sequence[str]) -> Tensor:
        """Next to certain for the label that the completion before has, and even odds after a malformed one."""
        log_probs = torch.full((len(chats), 2), math.log(0.5))
        for row, (chat, prefix) in enumerate(zip(chats, prefixes, strict=True)):
            written = self._written.get(_key(chat, prefix))
            if written is not None:
                log_probs[row] = math.log(_SURE)
                log_probs[row, written[1]] = math.log1p(-_SURE)
            elif _key(chat, None) not in self._written:
                raise InputError(
                    f"{self.limits[0]}; it has to write one first: judge with thoughts, and without a listener there "
                    "(listener='none')"
                )
        return log_probs


def _number(value: Any) -> float:
    """A log-probability; NaN for anything that is none, which ends in a `JudgeError`."""
    return float(value) if isinstance(value, int | float) else math.nan


def _key(chat: Chat, slot: str | None) -> Any:
    return str(chat.messages), tuple(picture.digest for picture in chat.images), slot
