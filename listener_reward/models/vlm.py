"""The interface to a vision-language model, whatever runs it.

A judge needs two things of a model: completions of a chat, and log-probabilities of given labels after a given start of
the assistant's turn. Everything above this module uses the protocol only, so tests can run on a fake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from torch import Tensor

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import JudgeError
from listener_reward.models.turns import Turns


class VLM(Protocol):
    """What a judge needs of a model."""

    reserved: frozenset[str]
    """Tokens that the tokenizer reads as one piece wherever they stand; no untrusted text may hold one."""

    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        """One completion per chat, special tokens left out: the assistant's turn, with what the prompt began of it.

        The completion is a function of its chat and its seed, not of what else is in the batch (up to rounding).
        `temperature` 0 is greedy.
        """
        ...

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> Tensor:
        """Log-probabilities (B, labels) float32 of each label as the token after `prefixes` in the assistant's turn."""
        ...

    def read(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`label_logprobs`, and how likely the model finds each prefix, from one pass.

        The second is the mean log-probability (B,) float32 of each prefix's tokens, none counted below `LEAST_LOGPROB`.
        """
        ...


class LoadedVLM(VLM, Protocol):
    """A checkpoint in one of the backends."""

    turns: Turns
    checkpoint: str | None
    """Where it was loaded from; None for a model that was given."""
    base: str | None
    """The checkpoint under the adapter, where `checkpoint` is one."""
    revision: str | None
    """That of the weights on the Hub, the base's under an adapter; None for the newest, and for a folder."""
    backend: str
    """Who runs it, as `backends.load_vlm` takes it."""
    limits: tuple[str, ...]
    """What it cannot give of what a judge needs, a sentence each, where that was accepted."""

    def without_adapters(self, chat_format: ChatFormat) -> LoadedVLM:
        """The base of an adapter as a model of its own, on the same weights."""
        ...

    def can_ground(self, grounding: float) -> float:
        """`grounding`, or 0 where `read` cannot be had and that was accepted.

        Raises:
            InputError: it cannot read answers, or not thoughts, and that was not accepted.
        """
        ...


LEAST_LOGPROB = -5.0
"""The lowest log-probability that a token counts with: one odd word must not outweigh a whole thought."""

BROKEN = "{} gave {}; the checkpoint is damaged or its dtype overflows: load it with dtype='float32' to find out"


def check_finite(values: Tensor, who: str) -> Tensor:
    """`values`, unless one is NaN or infinite: then the model is broken and no score may come of it."""
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).any(-1).sum())
        raise JudgeError(BROKEN.format(who, f"NaN or infinite probabilities for {bad} of {len(values)} inputs"))
    return values
