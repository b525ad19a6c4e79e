"""Which format a checkpoint answers in, found by trying the known ones on a few pairs.

A format has two halves: the wording of the question, and the tags and labels by which the answer is read. The model is
asked in each wording once, and what it wrote is read in every form. Nothing is learnt and no label is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from listener_reward.errors import InputError, missing

if fault := missing("judge", "a model in this process"):
    raise fault

from listener_reward.chat import (
    Chat,
    ChatFormat,
    default_criteria,
    default_edit_question,
    default_question,
    prompt_text,
)
from listener_reward.listener import p_first_at_slot
from listener_reward.misfits import fits
from listener_reward.models.processing import opened_by_template
from listener_reward.models.vlm import VLM
from listener_reward.pairs import PreferencePair
from listener_reward.trace import parse

_THOUGHT = ("<think>", "</think>")

FORMS: dict[str, ChatFormat] = {
    "tags": ChatFormat(),
    "letters in tags": ChatFormat(labels=("A", "B")),
    "a phrase in tags": ChatFormat(answer=("<answer>Image ", " is better</answer>")),
    "JSON": ChatFormat(think=('{"reasoning": "', '", '), answer=('"preferred": "', '"}')),
    "JSON, fenced": ChatFormat(think=('```json\n{"reasoning": "', '", '), answer=('"preferred": "', '"}\n```')),
    "JSON after a thought in tags": ChatFormat(think=_THOUGHT, answer=('{"preferred": "', '"}')),
    "an answer tag alone": ChatFormat(think=("", "")),
    "JSON without a thought": ChatFormat(think=("", ""), answer=('{"preferred": "', '"}')),
}
"""The forms that are tried, the plainest first: of two that fit as well, the earlier one is taken."""

OWN = "its card's own"
"""The form of a checkpoint that has a card."""

AS_WELL = 0.05
"""Formats whose scores differ by no more than this fit as well as each other, on a few pairs."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One format, and how it fits what a model writes."""

    form: str
    """How the answer is read: a name of `FORMS`, or `OWN`."""
    asked: str
    """The wording of the question, by the form that it asks for."""
    chat_format: ChatFormat
    lenient: bool
    """Whether completions were read leniently; see `trace.parse`."""
    malformed: float
    """Fraction of the completions that are malformed."""
    label_mass: float | None
    """The labels' total probability at the answer slot, in [0, 1], the mean over the pairs; None where it was not read,
    as where most completions are malformed, and where the labels have no slot in common (`problem`)."""
    cut: float
    """Fraction of the completions that ended only at the limit of new tokens."""
    example: str
    """A completion: a malformed one if there is one and the format does not fit."""
    problem: str | None = None

    @property
    def fits(self) -> bool:
        """Whether a judge with this format would not warn of it; see `misfits`."""
        return self.label_mass is not None and fits(self.malformed, self.label_mass)

    @property
    def score(self) -> float:
        """The probability, in [0, 1], of a well-formed completion times that of either label in it."""
        return (1 - self.malformed) * (self.label_mass or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        names = ("form", "asked", "lenient", "malformed", "label_mass", "cut", "example", "problem", "fits")
        return {name: getattr(self, name) for name in names} | {"format": self.chat_format.to_dict()}


def questions(own: ChatFormat | None = None, more: str | None = None) -> dict[str, str]:
    """The wordings to ask in, by the form that each asks for.

    Args:
        own: the checkpoint's own format.
        more: the text of one more question, with the slots of `ChatFormat.question`.
    """
    known = {"tags": default_question()} | {
        form: _ending(default_question(), f"form_{text}") for form, text in _TEXTS.items()
    }
    first = ({} if own is None else {OWN: own.question}) | ({} if more is None else {"the question given": more})
    return first | {name: text for name, text in known.items() if text not in first.values()}


_TEXTS = {"a phrase in tags": "phrase", "JSON": "json", "an answer tag alone": "answer"}
"""The wordings of ours that end otherwise than the default question, and the names of their texts in `prompts`."""


def _ending(question: str, text: str) -> str:
    """`question` with its last paragraph, which says how to answer, replaced by the text `text` of `prompts`."""
    return question[: question.rindex("\n\n") + 2] + prompt_text(text)


def _beside(asked: str, own: ChatFormat | None) -> dict[str, Any]:
    """What goes with the question of a wording: the question about edits, the criteria and the system turn.

    Criteria of the checkpoint's own are kept. A question that is given knows no edits, and the default question has a
    question about edits and criteria of its own.
    """
    if own is not None and asked == OWN:
        return {"edit_question": own.edit_question, "criteria": own.criteria, "system": own.system}
    known = None if own is None else own.criteria  # a criterion's text says nothing of how to answer
    if asked not in _TEXTS:
        return {"edit_question": None, "criteria": known, "system": None}
    edits = _ending(default_edit_question(), f"form_{_TEXTS[asked]}_edit")
    return {"edit_question": edits, "criteria": known or default_criteria(), "system": None}


def try_formats(
    vlm: VLM,
    pairs: Sequence[PreferencePair],
    *,
    own: ChatFormat | None = None,
    question: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    step: Callable[[str], Any] = lambda wording: None,
) -> list[Fit]:
    """Tries every wording with every form. Returns each form with the wording that it fits best, the best form first.

    Args:
        vlm: the model; what its chat template opens is taken account of.
        pairs: their images and prompts; people's votes are not looked at.
        own: the format of the checkpoint's card, which is tried first.
        question: one more wording.
        max_new_tokens: the longest completion; reasoners may need thousands.
        temperature: of the sampling.
        seed: of the sampling.
        step: called with the name of each wording that is done.

    Raises:
        InputError: no pairs, or a question without its slots.
        JudgeError: the model gave NaN or infinite probabilities.
    """
    if not pairs:
        raise InputError("pairs is empty; give at least one pair")
    forms = ({} if own is None else {OWN: own}) | FORMS
    found: list[Fit] = []
    for asked, text in questions(own, question).items():
        fields = {"question": text} | _beside(asked, own)
        wordings = {name: replace(form, **fields) for name, form in forms.items()}
        home = asked if asked in wordings else "tags"
        chats = _chats(wordings[home], vlm, pairs)
        said = _opening(vlm, None).generate(
            chats,
            seeds=[seed + number for number in range(len(chats))],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        cut = _cut(vlm, said, max_new_tokens)
        read = [_read(vlm, pairs, said, name, asked, wording, cut) for name, wording in wordings.items()]
        if home != "JSON" and not any(fit.fits for fit in read):
            read.append(_read(vlm, pairs, said, home, asked, wordings[home], cut, lenient=True))
        found += read
        step(asked)
    return _in_order(found)


def best_of(fits: Sequence[Fit]) -> Fit | None:
    """The format to take, of those of `try_formats`: None where none fits."""
    return fits[0] if fits and fits[0].fits else None


def _in_order(found: Sequence[Fit]) -> list[Fit]:
    """Each form once, as well as it fits; the best first, and strict readings that fit before lenient ones."""

    def first_as_good(some: Sequence[Fit]) -> Fit:
        best = max(fit.score for fit in some)
        asked_for = [fit for fit in some if fit.asked == fit.form and best == 0]
        return next(fit for fit in asked_for or some if fit.score >= best - AS_WELL)

    forms = dict.fromkeys((fit.form, fit.lenient) for fit in found)
    each = [first_as_good([fit for fit in found if (fit.form, fit.lenient) == form]) for form in forms]
    each = [fit for fit in each if fit.fits or not fit.lenient]
    ordered: list[Fit] = []
    while each:
        some = [fit for fit in each if fit.fits and not fit.lenient] or [fit for fit in each if fit.fits] or each
        ordered.append(first_as_good(some))
        each.remove(ordered[-1])
    return ordered


def _read(
    vlm: VLM,
    pairs: Sequence[PreferencePair],
    said: Sequence[str],
    form: str,
    asked: str,
    chat_format: ChatFormat,
    cut: float,
    *,
    lenient: bool = False,
) -> Fit:
    """How the completions `said`, without what the chat template opened of them, fit one format."""
    chats, tag = _chats(chat_format, vlm, pairs), chat_format.think[0] or None
    whole = [_opened(vlm, chat_format) + text for text in said]
    traces = [parse(text, chat_format, lenient=lenient) for text in whole]
    malformed = fmean(not trace.well_formed for trace in traces)
    mass, problem = None, None
    if fits(malformed, 1.0) or form == asked:
        try:
            thoughts, own = [trace.thought for trace in traces], [trace.slot for trace in traces]
            read = p_first_at_slot(_opening(vlm, tag), chat_format, chats, thoughts, who="the model", own=own)
            mass = float(read.label_mass.mean())
        except InputError as error:
            problem = str(error)
    bad = [text for text, trace in zip(whole, traces, strict=True) if not trace.well_formed]
    example = (
        bad[0] if bad and not fits(malformed, 1.0) else next(t for t in whole if t not in bad or len(bad) == len(whole))
    )
    return Fit(form, asked, chat_format, lenient, malformed, mass, cut, example, problem)


def _chats(chat_format: ChatFormat, vlm: VLM, pairs: Sequence[PreferencePair]) -> list[Chat]:
    return [chat_format.chat(pair.prompt, pair.first, pair.second, vlm.reserved) for pair in pairs]


def _opening(vlm: VLM, tag: str | None) -> VLM:
    """The same model, which takes `tag` for what opens a thought."""
    if not hasattr(vlm, "turns"):
        return vlm
    other: Any = copy.copy(vlm)
    other.turns = copy.copy(other.turns)
    other.turns.think_tag = tag
    return other


def _opened(vlm: Any, chat_format: ChatFormat) -> str:
    """What the model's chat template itself writes of a thought."""
    processor = getattr(vlm, "processor", None)
    return "" if processor is None else opened_by_template(processor, chat_format)


def _cut(vlm: Any, said: Sequence[str], limit: int) -> float:
    """Fraction of the completions that are as long as they may be."""
    tokenizer = getattr(vlm, "tokenizer", None)
    if tokenizer is None:
        return 0.0
    return fmean(len(tokenizer.encode(text, add_special_tokens=False)) >= limit for text in said)
