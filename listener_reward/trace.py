"""Parses a completion into a trace: thought and answer, or malformed. Nothing is guessed."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from listener_reward.chat import ChatFormat

Masking = Literal["answer", "verdict"]
"""What the listener does not see: "answer" removes the answer tag (as in the paper), "verdict" also sentences that name
the better image."""

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


@cache
def _picks_label(labels: tuple[str, ...]) -> re.Pattern[str]:
    """ "The answer is 2", "I would go with B", or with one of `labels`."""
    return re.compile(
        r"\b(?:answer|choice|choose|pick|verdict|decision|winner|prefer|preference|go\s+(?:with|for))\b"
        rf"(?:\W|is|would|be|must|should){{0,12}}(?<!\w){_any_label(labels)}(?!\w)"
        r"(?!\s+(?!because|since|as|over|for|due|here)[a-z])",
        re.I,
    )


def _any_label(labels: tuple[str, ...]) -> str:
    """A pattern for the labels that any judge may have written, and for those of its format."""
    own = "".join(f"|(?-i:{re.escape(label)})" for label in labels)
    return rf"(?:[12]|(?-i:[AB]){own})"


@dataclass(frozen=True, slots=True)
class Trace:
    """A parsed completion. A malformed completion keeps its text as the thought and has no answer."""

    thought: str
    answer: Literal[1, 2] | None
    slot: str | None = field(default=None, compare=False, repr=False)
    """The completion's own text up to the label; None for a malformed one."""
    labels: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """The format's labels, by which a thought may say its verdict."""

    @property
    def well_formed(self) -> bool:
        return self.answer is not None

    def for_listener(self, masking: Masking = "answer") -> str:
        """The thought as the listener reads it, without what `masking` removes.

        A malformed completion may say its verdict anywhere, so there sentences that tell it go too.
        """
        if self.well_formed:
            return self.thought if masking == "answer" else mask_verdict(self.thought, self.labels)
        kept = (sentence for sentence in _SENTENCE.findall(self.thought) if not _is_verdict(sentence, self.labels))
        return "".join(_bare_answer(self.labels).sub(" ", sentence) for sentence in kept).strip()


def parse(completion: str, chat_format: ChatFormat, *, lenient: bool = False) -> Trace:
    """Reads `<think>thought</think><answer>label</answer>`, with white space allowed around each part.

    Anything else (a tag missing, doubled or out of place, text outside the tags, an unknown label) is malformed. In a
    format without thoughts' tags, what stands before the answer is the thought.

    With `lenient`, a completion whose last line says one label and little else is well-formed too: `**1**`, `"1"`,
    `1.`, `Image 1`, `Image 1 is better`, `Answer: 1`, `\\boxed{1}`. A judge that is trained must not be read so: it
    would learn that any form will do.
    """
    match = _pattern(chat_format).fullmatch(completion)
    if match is not None and not any(tag.strip() in match["thought"] for tag in chat_format.tags):
        thought = match["thought"]
    elif lenient and (match := _last_line(completion, chat_format)):
        thought = _untagged(completion[: match.start("line")], chat_format)
    else:
        return Trace(_bare(completion, chat_format), None, labels=chat_format.labels)
    answer = 1 if match["label"] == chat_format.labels[0] else 2
    return Trace(thought.strip(), answer, completion[: match.start("label")], chat_format.labels)


def mask_verdict(thought: str, labels: tuple[str, ...] = ()) -> str:
    """`thought` without the sentences that name an image and judge it ("so image 1 is better"), or answer by a label.

    `labels` are the format's own; 1, 2, A and B are known.
    """
    return "".join(sentence for sentence in _SENTENCE.findall(thought) if not _is_verdict(sentence, labels)).strip()


def _is_verdict(sentence: str, labels: tuple[str, ...] = ()) -> bool:
    sentence = "".join(char for char in sentence if unicodedata.category(char) != "Cf")  # joiners hide no word
    judges = _NAMES_IMAGE.search(sentence) and _JUDGES.search(sentence)
    return bool(judges or _picks_label(labels).search(sentence))


_NAME = r"(?:(?:image|picture|photo|option|candidate)[\s#:]{0,3})?"


@cache
def _bare_answer(labels: tuple[str, ...]) -> re.Pattern[str]:
    """A label that stands for an answer by its dress alone: boxed, bold, a field of JSON, or a sentence of its own."""
    label = _any_label(labels)
    return re.compile(
        rf"\\boxed\s?\{{[^{{}}\n]{{0,40}}\}}?|\*\*\s?{_NAME}{label}[\s.]?\*\*"
        rf"|\b(?:preferred|better|best|winner)[\W_]{{1,6}}{_NAME}{label}(?!\w)"
        rf"|^[^\w\n]{{0,6}}{_NAME}{label}[^\w\n]{{0,6}}$",
        re.I | re.M,
    )


def _last_line(completion: str, chat_format: ChatFormat) -> re.Match[str] | None:
    """The last line that is no closing tag or fence, where it says one label and little else."""
    ends = r"(?:\s|```|" + "|".join(map(_spaced, chat_format.tags)) + ")"
    text = re.sub(rf"{ends}+\Z", "", completion[-4 * LONGEST_LINE :])
    start = len(completion[: -4 * LONGEST_LINE]) + text.rfind("\n") + 1
    end = len(completion[: -4 * LONGEST_LINE]) + len(text)
    return _lenient(chat_format).match(completion, start, end) if end - start <= LONGEST_LINE else None


LONGEST_LINE = 120
"""Characters of a line that may be an answer by itself."""


@cache
def _lenient(chat_format: ChatFormat) -> re.Pattern[str]:
    labels = "|".join(map(re.escape, sorted(chat_format.labels, key=len, reverse=True)))
    tags = "|".join(map(_spaced, chat_format.tags))
    return re.compile(
        rf"(?P<before>.*(?:{tags}))?(?P<line>)[^\w\n]*(?:(?:the\s)?(?:final\s)?(?:answer|choice)(?:\sis)?[^\w\n]+)?"
        rf"(?:(?:boxed|text)[^\w\n]+)*{_NAME}[^\w\n]*(?P<label>(?-i:{labels}))(?!\w)"
        r"(?:\s(?:is|looks)\s(?:the\s)?(?:better|best|preferred)(?:\s(?:one|image|picture))?)?[^\w\n]*\Z",
        re.I,
    )


def _spaced(tag: str) -> str:
    """A pattern for a tag, in which any white space stands for white space; its ends are the caller's."""
    return r"\s+".join(map(re.escape, tag.split()))


@cache
def _pattern(chat_format: ChatFormat) -> re.Pattern[str]:
    think, answer = map(_spaced, chat_format.think), map(_spaced, chat_format.answer)
    (think_open, think_close), (answer_open, answer_close) = tuple(think), tuple(answer)
    labels = "|".join(map(re.escape, chat_format.labels))
    if not think_open:
        return re.compile(rf"(?P<thought>.*?){answer_open}\s*(?P<label>{labels})\s*{answer_close}\s*", re.S)
    return re.compile(
        rf"\s*{think_open}(?P<thought>.*?){think_close}\s*{answer_open}\s*(?P<label>{labels})\s*{answer_close}\s*", re.S
    )


def _bare(completion: str, chat_format: ChatFormat) -> str:
    """A malformed completion's thought: the text before its last answer, without tags and earlier answers.

    The last answer and not the first: a thought that quotes an answer ("</think><answer>1") would lose all that
    follows.
    """
    last = max((match.start() for match in _answer_tags(chat_format).finditer(completion)), default=len(completion))
    return _untagged(_answer_tags(chat_format).sub(" ", completion[:last]), chat_format)


def _untagged(text: str, chat_format: ChatFormat) -> str:
    for tag in chat_format.tags:
        text = re.sub(_spaced(tag), " ", text)
    return text.strip()


@cache
def _answer_tags(chat_format: ChatFormat) -> re.Pattern[str]:
    labels = "|".join(map(re.escape, chat_format.labels))
    return re.compile(rf"{_spaced(chat_format.answer[0])}(?:\s*(?:{labels})(?!\w))?")
