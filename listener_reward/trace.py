"""A completion becomes a trace: its thought and its answer, or the fact that it is malformed. Nothing is guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from listener_reward.chat import ChatFormat

Masking = Literal["answer", "verdict"]
"""What is removed before the listener reads: the answer tag (the paper's reading), or also sentences that name it."""

_SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]?")
_NAMES_IMAGE = r"(?:image|picture|photo|option|candidate)\s*(?:#\s*)?(?:1|2|one|two|a|b)|(?:first|second|former|latter)"
_JUDGES = (
    r"better|best|prefer\w*|superior|inferior|worse|worst|win(?:s|ner)?|wins|beats|stronger|weaker|choose|chosen|choice|"
    r"answer|pick|verdict|favou?r\w*|outperforms?"
)
_VERDICT = re.compile(rf"(?=.*\b(?:{_NAMES_IMAGE})\b)(?=.*\b(?:{_JUDGES})\b)", re.I | re.S)


@dataclass(frozen=True, slots=True)
class Trace:
    """A parsed completion. A malformed one keeps whatever text it had as its thought and has no answer."""

    thought: str
    answer: Literal[1, 2] | None

    @property
    def well_formed(self) -> bool:
        return self.answer is not None

    def for_listener(self, masking: Masking = "answer") -> str:
        """The thought with the verdict removed; it never held the answer tag."""
        return self.thought if masking == "answer" else mask_verdict(self.thought)


def parse(completion: str, chat_format: ChatFormat) -> Trace:
    """Reads `<think>thought</think><answer>label</answer>`, with white space allowed around each part.

    Anything else (a tag missing, doubled or out of place, text outside the tags, an unknown label) is malformed.
    """
    match = _pattern(chat_format).fullmatch(completion)
    if match is None or any(tag in match["thought"] for tag in (*chat_format.think, *chat_format.answer)):
        return Trace(_bare(completion, chat_format), None)
    return Trace(match["thought"].strip(), 1 if match["label"] == chat_format.labels[0] else 2)


def mask_verdict(thought: str) -> str:
    """`thought` without the sentences that both name an image and judge it ("so image 1 is better")."""
    kept = [sentence for sentence in _SENTENCE.findall(thought) if not _VERDICT.search(sentence)]
    return "".join(kept).strip()


@cache
def _pattern(chat_format: ChatFormat) -> re.Pattern[str]:
    think, answer = map(re.escape, chat_format.think), map(re.escape, chat_format.answer)
    (think_open, think_close), (answer_open, answer_close) = tuple(think), tuple(answer)
    labels = "|".join(map(re.escape, chat_format.labels))
    return re.compile(
        rf"\s*{think_open}(?P<thought>.*?){think_close}\s*{answer_open}\s*(?P<label>{labels})\s*{answer_close}\s*", re.S
    )


def _bare(completion: str, chat_format: ChatFormat) -> str:
    """What a malformed completion thought: its text before any answer, without tags."""
    text = completion.split(chat_format.answer[0])[0]
    for tag in (*chat_format.think, *chat_format.answer):
        text = text.replace(tag, " ")
    return text.strip()
