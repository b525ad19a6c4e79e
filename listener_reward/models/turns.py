"""Turns of a conversation as a checkpoint's own template and tokenizer write them, whatever runs its weights.

Two backends give one verdict only where both ask the same tokens. What decides about tokens is here: how a chat is
rendered, how an assistant's turn is continued, and at which token an answer is read.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from torch import Tensor

from listener_reward.chat import Chat, reserved_tokens
from listener_reward.errors import InputError, UnknownWordsWarning
from listener_reward.models.processing import opened_thought

_PUNCTUATION = frozenset(string.punctuation)


class Turns:
    """Renders chats, continues them, and finds the places where answers are read."""

    def __init__(self, processor: Any, *, think_tag: str | None):
        """
        Args:
            processor: the checkpoint's, as `load_processor` gives it.
            think_tag: the tag that opens a thought; None where thoughts have no tag.

        Raises:
            InputError: the checkpoint has no chat template.
        """
        if processor.chat_template is None:
            raise InputError("the checkpoint has no chat template; add its chat_template.jinja to the folder")
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.think_tag = think_tag
        self.reserved = reserved_tokens(self.tokenizer)
        self._told_of_unknown_words = False

    def texts(self, chats: Sequence[Chat]) -> list[str]:
        """Each chat up to where the assistant begins to write."""
        template = self.processor.apply_chat_template
        texts = [template(chat.messages, tokenize=False, add_generation_prompt=True) for chat in chats]
        for chat, text in zip(chats, texts, strict=True):
            if chat.videos and text.count(self.processor.video_token) != len(chat.videos):
                raise InputError(
                    f"the checkpoint's chat template leaves {{'type': 'video'}} blocks out, of which a chat has "
                    f"{len(chat.videos)}; add them to its chat_template.jinja, or show the frames as images"
                )
        return texts

    def opened(self, text: str) -> str:
        """What a rendered chat itself writes of the thought, "" for nothing: completions begin with it all the same."""
        return opened_thought(text, self.think_tag)

    def continued(self, text: str, prefix: str) -> tuple[str, str]:
        """A rendered chat and a beginning of the assistant's turn, without a thought's tag that both would open.

        A turn that begins otherwise is written as it is given, in place of the thought that the template opens.
        """
        opened = self.opened(text)
        if not opened:
            return text, prefix
        tag = opened.rstrip()
        if not prefix.startswith(tag):
            return text.removesuffix(opened), prefix
        after = prefix.removeprefix(tag)
        return text, after.removeprefix(opened.removeprefix(tag))

    def vision_tokens(self) -> list[int]:
        """Tokens of a Qwen-VL that must not be sampled: without an image behind them they crash the next pass."""
        ids = map(self.tokenizer.get_added_vocab().get, ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>"))
        return [token for token in ids if token is not None]

    def at_slots(self, prefixes: Sequence[str], labels: Sequence[str]) -> tuple[list[list[int]], Tensor]:
        """The tokens that each prefix begins an answer with, and the answers' ids (B, A) after them.

        They are the tokens of prefix and answer together: a prefix's end may merge with a label, as `<answer>A` ends in
        one token `>A`, and then the model stands one token before the prefix's end when it chooses.

        Raises:
            InputError: an answer that is not one token there, or two that are the same.
        """
        slots: list[list[int]] = []
        chosen = torch.empty(len(prefixes), len(labels), dtype=torch.long)
        if not prefixes:
            return slots, chosen
        whole = [
            self.tokenizer([prefix + label for prefix in prefixes], add_special_tokens=False)["input_ids"]
            for label in labels
        ]
        for row, written in enumerate(zip(*whole, strict=True)):
            slot = written[0][:-1]
            ids = [tokens[-1] for tokens in written if tokens[:-1] == slot]
            if len(ids) < len(labels):
                self._refuse_labels(prefixes[row], labels)
            if len(set(ids)) < len(ids):
                raise InputError(
                    f"labels {tuple(labels)} are one token to this tokenizer; choose labels that it can tell"
                )
            slots.append(slot)
            chosen[row] = torch.tensor(ids)
        return slots, chosen

    def before(self, slot: Sequence[int], answered: str) -> str:
        """The text whose tokens are those of a slot, for whoever is asked by text and not by tokens.

        Args:
            slot: the tokens, as `at_slots` gives them.
            answered: a prefix of which the slot is, with one of the labels behind it.

        Raises:
            InputError: the tokenizer makes other tokens of it.
        """
        encoded = self.tokenizer(answered, add_special_tokens=False, return_offsets_mapping=True)
        text = answered[: encoded["offset_mapping"][-1][0]]
        for written in (text, text.rstrip(" ")):
            if self.tokenizer(written, add_special_tokens=False)["input_ids"] == slot:
                return written
        raise InputError(
            f"no text has the tokens that stand before an answer in {answered[-20:]!r}; choose other labels or tags"
        )

    def _refuse_labels(self, prefix: str, labels: Sequence[str]) -> NoReturn:
        """Names the label of several tokens where there is one, and what the tokenizer makes of each."""
        before = self.tokenizer.encode(prefix, add_special_tokens=False)
        told: list[str] = []
        where = f"after {prefix[-20:]!r}"
        for label in labels:
            tokens = self.tokenizer.encode(prefix + label, add_special_tokens=False)
            pieces: list[str] = self.tokenizer.convert_ids_to_tokens(tokens[_shared(before, tokens) :])
            if len(pieces) != 1:
                raise InputError(
                    f"label {label!r} is {len(pieces)} tokens of this tokenizer {where}, {pieces}; choose labels of one"
                )
            told.append(f"{label!r} ends in {pieces[0]!r}")
        raise InputError(
            f"labels {tuple(labels)} do not follow the same tokens {where}: {', '.join(told)}; choose labels that the "
            "tokenizer treats alike there"
        )

    def warn_of_unknown_words(self, prompts: Iterable[str]) -> None:
        """Warns at the first batch that has such words. A listener with the reasoner's words says the same of it, which
        Python's default filter shows once."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or self._told_of_unknown_words or not self.tokenizer.is_fast:
            return
        found: dict[str, None] = {}
        for prompt in dict.fromkeys(prompts):
            encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                word = prompt[start:end]
                if token == unknown and not (word.isascii() and set(word) <= _PUNCTUATION):
                    found.setdefault(word)
        if found:
            self._told_of_unknown_words = True
            words = ", ".join(repr(word[:40]) for word in list(found)[:5]) + (", ..." if len(found) > 5 else "")
            warnings.warn(
                f"the judge's tokenizer does not know {words} and reads {self.tokenizer.unk_token} instead. The tiny "
                "judge knows only its world of coloured shapes; load a large judge for other prompts. Said once",
                UnknownWordsWarning,
                stacklevel=2,
            )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, yours) in pairs if mine != yours), min(len(one), len(other)))
