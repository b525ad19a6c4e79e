"""A completion becomes a trace: its thought and its answer, or the fact that it is malformed. Nothing is guessed."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Literal

from listener_reward.chat import ChatFormat

Masking = Literal["answer", "verdict"]
"""What is removed before the listener reads: the answer tag (the paper's reading), or also sentences that name it."""

_SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]?")
# No two open-ended repeats stand side by side here, so that a megabyte of anything is read in linear time.
# Capital A and B only: "in this image a dog" names no image.
_NAMES_IMAGE = re.compile(
    r"\b(?:(?:image|picture|photo|option|candidate)[ ]?#?[ ]?(?:1|2|one|two|(?-i:[AB]))"
    r"|(?<!at )first|second|former|latter"
    r"|(?:left|right)(?:most)?\s+(?:image|picture|photo|option|one)|on\s+the\s+(?:left|right)"
    r"|[12]\s+(?:is|was|looks|seems|wins|beats|over|outperforms))\b",
    re.I,
)
_JUDGES = re.compile(
    r"\b(?:better|best|prefer\w*|superior|inferior|worse|worst|win(?:s|ner|ning)?|beats?|stronger|weaker|choose|chosen"
    r"|choice|answer|pick|verdict|decision|favou?r\w*|outperforms?|ahead|go\s+(?:with|for))\b",
    re.I,
)
# "The answer is 2", "I would go with B".
_PICKS_LABEL = re.compile(
    r"\b(?:answer|choice|choose|pick|verdict|decision|winner|prefer|preference|go\s+(?:with|for))\b"
    r"(?:\W|is|would|be|must|should){0,12}\b(?:[12]|(?-i:[AB]))\b(?!\s+(?!because|since|as|over|for|due|here)[a-z])",
    re.I,
)


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
    return "".join(sentence for sentence in _SENTENCE.findall(thought) if not _is_verdict(sentence)).strip()


def _is_verdict(sentence: str) -> bool:
    sentence = "".join(char for char in sentence if unicodedata.category(char) != "Cf")  # joiners hide no word
    judges = _NAMES_IMAGE.search(sentence) and _JUDGES.search(sentence)
    return bool(judges or _PICKS_LABEL.search(sentence))


@cache
def _pattern(chat_format: ChatFormat) -> re.Pattern[str]:
    think, answer = map(re.escape, chat_format.think), map(re.escape, chat_format.answer)
    (think_open, think_close), (answer_open, answer_close) = tuple(think), tuple(answer)
    labels = "|".join(map(re.escape, chat_format.labels))
    return re.compile(
        rf"\s*{think_open}(?P<thought>.*?){think_close}\s*{answer_open}\s*(?P<label>{labels})\s*{answer_close}\s*", re.S
    )


def _bare(completion: str, chat_format: ChatFormat) -> str:
    """What a malformed completion thought: its text before its last answer, without tags and without earlier answers.

    Cut at the first answer, a thought that quotes one ("</think><answer>1") would lose all that follows.
    """
    before, tag, after = completion.rpartition(chat_format.answer[0])
    text = _answers(chat_format).sub(" ", before if tag else after)
    for tag in (*chat_format.think, *chat_format.answer):
        text = text.replace(tag, " ")
    return text.strip()


@cache
def _answers(chat_format: ChatFormat) -> re.Pattern[str]:
    labels = "|".join(map(re.escape, chat_format.labels))
    return re.compile(rf"{re.escape(chat_format.answer[0])}(?:\s*(?:{labels})(?!\w))?")
