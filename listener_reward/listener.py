"""The listener: a frozen VLM that reads the same images and the reasoner's thought, and gives its own probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from listener_reward.errors import InputError, missing

if fault := missing("judge", "a listener in this process"):
    raise fault

import torch
from torch import Tensor

from listener_reward.card import Card, CardLike
from listener_reward.chat import Chat, ChatFormat, neutralise
from listener_reward.misfits import Misfits
from listener_reward.models.backends import load_vlm
from listener_reward.models.hub import resolve, same_checkpoint
from listener_reward.models.options import is_address
from listener_reward.models.vlm import VLM, LoadedVLM, check_finite
from listener_reward.trace import Masking, Trace

NO_LISTENER = "none"
"""The name, in code, on the command line and in a configuration, by which nobody listens."""

T = TypeVar("T")


class Listener:
    """Calibrated probability that the first image is preferred, given the thought without its verdict.

    The listener is another model, or the policy's own base with its adapters off (`TransformersVLM(...,
    adapters_off=True)`, which costs no memory).
    """

    def __init__(
        self,
        vlm: VLM,
        chat_format: ChatFormat,
        *,
        temperature: float = 1.0,
        masking: Masking = "answer",
        grounding: float = 0.0,
    ):
        self.vlm = vlm
        self.chat_format = chat_format
        self.temperature = temperature
        """Divides the log-odds; 1 is the raw model. See `Card.listener_temperature`."""
        self.masking: Masking = masking
        self.misfits = Misfits("the listener")
        self.grounding = grounding
        """How strongly an unlikely thought is discounted: one that the listener, seeing the images, would not write
        itself.

        A listener that believes words over pixels rewards false but persuasive descriptions. With grounding g, p = 1/2
        + (p_raw - 1/2) exp(g l). Here l <= 0 is the listener's mean log-probability per token of the thought. 0 is the
        paper's listener."""

    def p_first(self, chats: Sequence[Chat], traces: Sequence[Trace]) -> Tensor:
        """The probability (B,) float32 in (0, 1) that the image in first place is preferred.

        The probability is a softmax over the two labels at the answer slot after the thought, shrunk towards 1/2 by
        `grounding`.

        Raises:
            JudgeError: the model gave NaN or infinite probabilities.
        """
        thoughts = [trace.for_listener(self.masking) for trace in traces]
        if self.grounding == 0:
            read = p_first_at_slot(
                self.vlm, self.chat_format, chats, thoughts, temperature=self.temperature, who="the listener"
            )
            self.misfits.see(cast("Any", read.label_mass).tolist())
            return read.p_first
        prefixes = _prefixes(self.vlm, self.chat_format, thoughts)
        log_probs, likelihood = self.vlm.read(chats, prefixes, self.chat_format.labels)
        check_finite(torch.cat([log_probs, likelihood[:, None]], dim=-1), "the listener")
        self.misfits.see(cast("Any", _mass(log_probs)).tolist())
        raw = torch.softmax(log_probs / self.temperature, dim=-1)[:, 0]
        return 0.5 + (raw - 0.5) * torch.exp(self.grounding * likelihood)


class ReadAnswers(NamedTuple):
    """What a model says at its answer slots."""

    p_first: Tensor
    """(B,) float32 in [0, 1]: the first label's fraction of both labels' probability."""
    label_mass: Tensor
    """(B,) float32 in [0, 1]: both labels' probability, among all that could stand there."""


def p_first_at_slot(
    vlm: VLM,
    chat_format: ChatFormat,
    chats: Sequence[Chat],
    thoughts: Sequence[str],
    *,
    who: str,
    temperature: float = 1.0,
    own: Sequence[str | None] | None = None,
) -> ReadAnswers:
    """What `vlm` says at the answer slot after each thought.

    `own` are the slots as the model wrote them itself (`Trace.slot`): read there, a probability is the one that it
    answered with. Where a thought has to be made harmless, or has no such slot, it is written anew.
    """
    prefixes = _prefixes(vlm, chat_format, thoughts)
    if own is not None:
        prefixes = [
            slot if slot is not None and prefix == chat_format.answer_slot(thought) else prefix
            for slot, thought, prefix in zip(own, thoughts, prefixes, strict=True)
        ]
    log_probs = check_finite(vlm.label_logprobs(chats, prefixes, chat_format.labels), who)
    return ReadAnswers(torch.softmax(log_probs / temperature, dim=-1)[:, 0], _mass(log_probs))


def _mass(log_probs: Tensor) -> Tensor:
    return log_probs.exp().sum(-1).clamp(0, 1)


def _prefixes(vlm: VLM, chat_format: ChatFormat, thoughts: Sequence[str]) -> list[str]:
    reserved = chat_format.reserved(vlm.reserved)
    before, after = chat_format.think
    return [chat_format.answer_slot(neutralise(thought, reserved, before=before, after=after)) for thought in thoughts]


def choose_listener(given: T | None, own: str | None) -> T | str | None:
    """Who listens: what is `given`, a name or a listener, or where nothing is the checkpoint's own; None for nobody."""
    chosen = own if given is None else given
    return None if chosen == NO_LISTENER else chosen


OWN_BASE = "base"
"""The listener that is the reasoner's own base with its adapters off: no extra memory, and adapters only."""


def load_listener(
    name: str | Path,
    card: Card,
    *,
    own: CardLike | None = None,
    reasoner: LoadedVLM | None = None,
    shared: bool = True,
    **options: Any,
) -> Listener:
    """Loads a judge's listener. A listener with a card is asked in its own format, any other in the judge's.

    One whose card has no criteria is asked by those of the judge's card, within its own question.

    Args:
        name: its checkpoint, or "base" for the reasoner's base.
        card: the judge's.
        own: the listener's card in place of its checkpoint's own, as `Card.read` takes one.
        reasoner: the judge's model. A listener that is the same checkpoint, or the base under its adapters, runs on its
            weights.
        shared: False gives the listener weights of its own, for other options than the reasoner's.
        options: those of `load_vlm`. The reasoner's own checkpoint, or its base, has the reasoner's revision by
            default.

    Raises:
        InputError: a checkpoint that cannot be had, "base" for a reasoner without adapters, or a server that cannot
            give what a listener needs.
    """
    base = None if reasoner is None else reasoner.base
    if name == OWN_BASE:
        if base is None:
            raise InputError(
                "listener is 'base', the reasoner with its adapters off, and the reasoner has no adapters; name a "
                "checkpoint as the listener"
            )
        name = base
    folder = resolve(name)
    if reasoner is not None and _is_reasoner(reasoner, folder):
        options = {"revision": reasoner.revision} | options
    asked = Card.load(folder, own, revision=options.get("revision"))
    chat_format = card.format if asked == Card() else _with_criteria(asked.format, card.format)
    vlm = _of_reasoner(reasoner, folder, chat_format) if reasoner is not None and shared else None
    if vlm is None:
        vlm = load_vlm(folder, chat_format, **options)
    grounding = vlm.can_ground(card.listener_grounding)
    return make_listener(vlm, chat_format, replace(card, listener_grounding=grounding))


def _is_reasoner(reasoner: LoadedVLM, folder: str) -> bool:
    """Whether the checkpoint in `folder` is the one whose weights the reasoner has, those under its adapter."""
    own = reasoner.checkpoint if reasoner.base is None else reasoner.base
    return own is not None and same_checkpoint(folder, own)


def _with_criteria(own: ChatFormat, judges: ChatFormat) -> ChatFormat:
    return own if own.known_criteria or not judges.known_criteria else replace(own, criteria=judges.known_criteria)


def _of_reasoner(reasoner: LoadedVLM, folder: str, chat_format: ChatFormat) -> LoadedVLM | None:
    """The reasoner's weights as those of the listener in `folder`; None where they are others."""
    if reasoner.base is not None and same_checkpoint(folder, reasoner.base):
        return reasoner.without_adapters(chat_format)
    same = reasoner.checkpoint is not None and same_checkpoint(folder, reasoner.checkpoint)
    return reasoner if same and reasoner.turns.think_tag == chat_format.think[0] else None


def options_of_listener(options: Mapping[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `ModelOptions` of a listener: its `own`, and else the reasoner's, but for what belongs to one of the two.

    A revision and an address are of the reasoner's checkpoint, and a place of either kind replaces the other kind. None
    is as the reasoner has it, but for `max_pixels`: there it is the listener's own limit, which it may not be without.
    """
    left_out = {"revision", *({"max_pixels"} & (own or {}).keys())}
    own = {name: value for name, value in (own or {}).items() if value is not None}
    places = {"device", "device_map"}
    left_out |= places if places & own.keys() else set()
    if is_address(options.get("backend")):
        left_out.add("backend")
    return {name: value for name, value in options.items() if name not in left_out} | own


def make_listener(vlm: VLM, chat_format: ChatFormat, card: Card) -> Listener:
    """A listener with the settings of the judge's card."""
    return Listener(
        vlm,
        chat_format,
        temperature=card.listener_temperature,
        masking=card.masking,
        grounding=card.listener_grounding,
    )
