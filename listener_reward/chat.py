"""A pair becomes a chat: the question both reasoner and listener are asked, with untrusted text made harmless.

The wording of the question, the answer labels and the tags are data (`ChatFormat`): they travel with a checkpoint in
its `listener_reward.json`, so that a checkpoint with another format is a file and not code.
"""

# What a caller or a file gives need not be what is annotated, and is checked all the same.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, TypeAlias, cast

from listener_reward.errors import InputError
from listener_reward.media.clips import Clip, Visual
from listener_reward.media.images import ImageLike, Picture, to_picture
from listener_reward.pairs import PromptLike, as_prompt

_SLOT = re.compile(r"\{(source|first|second|prompt|criterion)\}")

QWEN_RESERVED = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
)
"""Tokens that no user's text may contain, beside those of the tokenizer in use."""

FOREIGN_RESERVED = tuple(
    (
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|image|> "  # Llama
        "<start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token> "  # Gemma
        "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [IMG] [IMG_BREAK] [IMG_END] "  # Mistral
        "<|user|> <|assistant|> <|system|> <|end|> <|image_1|> <|image_2|> "  # Phi
        "<image> </image> <img> </img> <IMG_CONTEXT> "  # LLaVA, InternVL
        "<|start|> <|message|> <|channel|> <|return|> <|endofprompt|> "  # OpenAI
        "<s> </s> <bos> <eos> <pad> <unk> <tool_call> </tool_call> <tool_response> </tool_response>"
    ).split()
)
"""Tokens of other families, for a model behind an address, whose tokenizer is not here to be asked."""


Side: TypeAlias = "Visual | tuple[Picture, ...] | ImageLike"
"""What stands on one side of a question: a picture, a clip as a video, or a clip's frames as so many pictures."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages in transformers' conversational form, and the pictures that fill their `{"type": "image"}` blocks."""

    messages: list[dict[str, Any]]
    images: tuple[Picture, ...]
    prompt: str = ""
    """The caller's text as it stands in the messages; the words around it are the format's."""
    videos: tuple[Clip, ...] = ()
    """What fills the `{"type": "video"}` blocks."""

    @property
    def visuals(self) -> tuple[Visual, ...]:
        """Pictures first, then clips."""
        return self.images + self.videos


_IMAGE = ({"type": "image"},)
_IMAGE_SLOTS = ("source", "first", "second")

CRITERIA = ("alignment", "quality", "text", "consistency", "motion")
"""The criteria that large models are asked by without a card of their own."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a checkpoint is asked and how it answers."""

    question: str = field(default_factory=lambda: default_question())
    """The user's turn, with `{first}` and `{second}` where the images stand and `{prompt}` for the prompt. Images come
    in this order. `{criterion}` is for the criterion's text; without it the text stands at the end, after the images,
    so that all criteria of a pair have their beginning in common."""

    edit_question: str | None = None
    """The user's turn where there are source images, which stand at `{source}`, before `{first}`. None is the question
    of `prompts/edit.txt` beside the default `question`, and beside another one that this checkpoint knows no edits."""

    criteria: Mapping[str, str] | None = field(default=None, hash=False)
    """Name of a criterion to the text that asks for it. None is `default_criteria()` beside the default `question`, and
    no criterion beside another one."""

    system: str | None = None
    """The system turn; None leaves it to the chat template."""

    labels: tuple[str, str] = ("1", "2")
    """The answers that mean "the first" and "the second". Each must be one token after `answer[0]`, or one with
    its last characters."""

    think: tuple[str, str] = ("<think>", "</think>")
    """What opens and closes a thought; two empty strings, or None, where a completion may open with the answer.

    Tags may hold white space, as JSON does, and words, as `("<answer>Image ", " is better</answer>")`. White space
    inside a tag stands for any white space; at a tag's ends none is needed."""
    answer: tuple[str, str] = ("<answer>", "</answer>")

    max_prompt_chars: int = 4000
    """Longer prompts are cut here, with a warning: no generator reads more, and one row must not fill the memory."""

    def __post_init__(self) -> None:
        if self.think in (None, "", ("", "")):
            object.__setattr__(self, "think", ("", ""))
        elif not _are_two(self.think, _is_tag):
            raise InputError(f"think is {self.think!r}; give two tags that are not blank, or null for no thoughts")
        if not _are_two(self.answer, _is_tag):
            raise InputError(f"answer is {self.answer!r}; give two tags that are not blank")
        if not _are_two(self.labels, _is_word):
            raise InputError(f"labels is {self.labels!r}; give two strings that hold no white space")
        if len({tag.strip() for tag in self.tags}) != len(self.tags):
            raise InputError(f"think is {self.think!r} and answer {self.answer!r}; all the tags must differ")
        if not isinstance(self.question, str):
            raise InputError(f"question is a {type(self.question).__name__}; give the text of the question")
        if not isinstance(self.max_prompt_chars, int) or self.max_prompt_chars < 1:
            raise InputError(f"max_prompt_chars is {self.max_prompt_chars!r}; give a number of at least 1")
        _check_slots("question", self.question, ("first", "second"))
        if self.edit_question is not None:
            if not isinstance(self.edit_question, str):
                raise InputError(
                    f"edit_question is a {type(self.edit_question).__name__}; give the text of it, or null"
                )
            _check_slots("edit_question", self.edit_question, ("source", "first", "second"))
        if self.criteria is not None:
            if not isinstance(self.criteria, Mapping) or not all(
                isinstance(text, str) and text.strip() for pair in self.criteria.items() for text in pair
            ):
                raise InputError(f"criteria is {self.criteria!r:.80}; give {{name: what is asked}}, both not empty")
            if slotted := [name for name, text in self.criteria.items() if _SLOT.search(text)]:
                raise InputError(f"criteria has {slotted[0]!r} with a slot in its text; the question has the slots")
            object.__setattr__(self, "criteria", dict(self.criteria))
        if len(set(self.labels)) != 2:
            raise InputError(f"labels are {self.labels!r}; two different answers are needed, such as ('1', '2')")

    def messages(
        self, prompt: str, reserved: Collection[str] = (), *, sources: int = 0, criterion: str | None = None
    ) -> list[dict[str, Any]]:
        """The question about `prompt` as chat messages, with an empty image block for each source and each of the two.

        Args:
            prompt: the text.
            reserved: the tokenizer's own special tokens (`reserved_tokens`); none survives in the prompt.
            sources: how many source images the prompt has.
            criterion: see `Prompt.criterion`.

        Raises:
            InputError: this format has no question about sources, or no such criterion.
        """
        question = self._question(sources, criterion)
        blocks = {"source": _IMAGE * sources, "first": _IMAGE, "second": _IMAGE}
        return self._messages(question, self._safe(prompt, question, reserved), blocks)

    def chat(self, prompt: PromptLike, first: Side, second: Side, reserved: Collection[str] = ()) -> Chat:
        """The question about two images or clips, in the order in which they are to be shown.

        Raises:
            InputError: the prompt has sources or a criterion, and this format has no question about them.
        """
        asked = as_prompt(prompt)
        question = self._question(len(asked.sources), asked.criterion)
        safe = self._safe(asked.text, question, reserved)
        sides = [_blocks(side) for side in (asked.sources, first, second)]
        visuals = [visual for _, some in sides for visual in some]
        return Chat(
            self._messages(
                question, safe, {name: blocks for name, (blocks, _) in zip(_IMAGE_SLOTS, sides, strict=True)}
            ),
            tuple(visual for visual in visuals if isinstance(visual, Picture)),
            safe,
            tuple(visual for visual in visuals if isinstance(visual, Clip)),
        )

    @property
    def known_criteria(self) -> Mapping[str, str]:
        """`criteria`, and where they are None those that go with the question."""
        if self.criteria is not None:
            return self.criteria
        return default_criteria() if self.question == default_question() else {}

    @property
    def known_edit_question(self) -> str | None:
        """`edit_question`, and where it is None the one that goes with the question; None where there is none."""
        if self.edit_question is not None:
            return self.edit_question
        return default_edit_question() if self.question == default_question() else None

    def _question(self, sources: int, criterion: str | None) -> str:
        """The user's turn for so many sources, with the criterion's text in it."""
        question = self.question
        if sources:
            given = self.known_edit_question
            if given is None:
                raise InputError(
                    f"the prompt has {sources} source images, and the format of this checkpoint has no edit_question; "
                    "give it one by a card, or take a judge of edits"
                )
            question = given
        text = ""
        if criterion is not None:
            known = self.known_criteria
            if criterion not in known:
                names = ", ".join(map(repr, known)) or "none"
                raise InputError(f"criterion is {criterion!r}, and this checkpoint has {names}; give it more by a card")
            text = known[criterion]
            if "{criterion}" not in question:
                question += "\n{criterion}"
        return _SLOT.sub(lambda slot: text if slot[1] == "criterion" else slot[0], question)

    def _safe(self, prompt: str, question: str, reserved: Collection[str]) -> str:
        if len(prompt) > self.max_prompt_chars:
            warnings.warn(
                f"a prompt of {len(prompt)} characters is cut to max_prompt_chars={self.max_prompt_chars}", stacklevel=3
            )
            prompt = prompt[: self.max_prompt_chars]
        before, after = question.split("{prompt}")
        return neutralise(prompt, self.reserved(reserved), before=before, after=after)

    def _messages(
        self, question: str, safe: str, images: Mapping[str, Sequence[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The turns of `question`, with the blocks `images` in the slots of that name."""
        blocks: list[dict[str, Any]] = []
        for index, part in enumerate(_SLOT.split(question)):
            if index % 2 and part != "prompt":
                blocks += [dict(block) for block in images[part]]
            elif text := safe if index % 2 else part:
                blocks.append({"type": "text", "text": text})
        turns = [{"role": "user", "content": _merge_text(blocks)}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        return turns

    def answer_slot(self, thought: str) -> str:
        """The assistant's turn up to the place where the answer's label stands."""
        if thought and not any(self.think):
            return f"{thought}\n{self.answer[0]}"
        return f"{self.think[0]}{thought}{self.think[1]}{self.answer[0]}"

    @property
    def tags(self) -> tuple[str, ...]:
        """Both pairs of tags, or the answer's alone."""
        return (*self.think, *self.answer) if any(self.think) else self.answer

    def reserved(self, more: Collection[str] = ()) -> frozenset[str]:
        markup = [part for tag in self.tags for part in _MARKUP.findall(tag)]
        return frozenset((*QWEN_RESERVED, *self.tags, *markup, *more))

    def to_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "edit_question": self.edit_question,
            "criteria": None if self.criteria is None else dict(self.criteria),
            "system": self.system,
            "labels": list(self.labels),
            "think": list(self.think),
            "answer": list(self.answer),
            "max_prompt_chars": self.max_prompt_chars,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ChatFormat:
        if not isinstance(saved, Mapping):
            raise InputError(f"format is a {type(saved).__name__}; it has to be an object with the format's fields")
        unknown = set(saved) - set(cls.__slots__)
        if unknown:
            raise InputError(f"format has unknown fields {sorted(unknown)}; it may have {sorted(cls.__slots__)}")
        values: dict[str, Any] = {key: _tupled(value) for key, value in saved.items()}
        return cls(**values)


def _check_slots(field: str, question: str, images: Sequence[str]) -> None:
    slots = _SLOT.findall(question)
    given = [slot for slot in slots if slot in _IMAGE_SLOTS]
    if given != list(images) or slots.count("prompt") != 1 or slots.count("criterion") > 1:
        needed = ", ".join(f"{{{name}}}" for name in images)
        raise InputError(
            f"{field} has the slots {slots}; it needs {needed}, in this order, and {{prompt}}, once each: {question!r}"
        )


def _tupled(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


@cache
def default_question() -> str:
    """The question that large models are asked (`prompts/question.txt`)."""
    return prompt_text("question")


@cache
def default_edit_question() -> str:
    """The question that large models are asked about an edit (`prompts/edit.txt`)."""
    return prompt_text("edit")


@cache
def default_criteria() -> dict[str, str]:
    """What large models are asked by criterion: name to text (`prompts/criterion_*.txt`)."""
    return {name: prompt_text(f"criterion_{name}") for name in CRITERIA}


def prompt_text(name: str) -> str:
    """The text `name` of the folder `prompts`."""
    return resources.files("listener_reward").joinpath(f"prompts/{name}.txt").read_text(encoding="utf-8").strip()


def reserved_tokens(tokenizer: Any) -> frozenset[str]:
    """Every token that `tokenizer` would read as one piece wherever it stands in a text."""
    return frozenset(tokenizer.get_added_vocab()) | frozenset(tokenizer.all_special_tokens)


MOST_REPEATS = 8

_FLOOD = re.compile(rf"(.{{2,64}}?)\1{{{MOST_REPEATS},}}", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def neutralise(text: str, reserved: Collection[str], *, before: str = "", after: str = "") -> str:
    """`text` with every reserved token broken by a space after its first character, without unpaired surrogates.

    Control characters but tabs and line breaks become spaces: nobody reads them, and a model should not either. A piece
    of 2 to 64 characters that comes more than `MOST_REPEATS` times in a row comes that often: a flood says no more, and
    would drown the question. The words stay readable; the tokenizer no longer sees a turn, an image or a tag in them. A
    token of one character cannot be broken, and stays: some tokenizers keep letters and line breaks as such tokens.
    `before` and `after` are what the text will stand between: where it would make a token together with them, or change
    them, a space parts it.
    """
    # NFC first, because tokenizers do it: U+212A becomes a K there, and with it a tag that was none before.
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))
    text = _CONTROL.sub(" ", text)
    pattern = _any_of(frozenset(reserved))
    while True:
        # Every copy has the same neighbours as before, so that nothing new meets where some are left out. Once more
        # where floods were pieces of floods; eight copies of those are soon longer than a piece can be.
        while (folded := _FLOOD.sub(lambda match: match[1] * MOST_REPEATS, text)) != text:
            text = folded
        # Once more where two tokens overlapped; every break widens a gap, so that it ends after a few rounds.
        while pattern.search(text):
            text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if text and unicodedata.combining(text[0]):  # by NFC it would take the last character of what stands before it
            text = f" {text}"
        seams = len(before), len(before) + len(text)
        found = pattern.finditer(before + text + after)
        if any(match.start() < seam < match.end() for match in found for seam in seams):
            text = f" {text} "
        if text == folded:  # else the spaces may have made a flood: "<s>< s>" is twice the same once it is broken
            return text


@cache
def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted({token.strip() for token in tokens}, key=lambda token: (-len(token), token))
    return re.compile("|".join(re.escape(token) for token in longest_first if len(token) > 1) or r"(?!)")


def _blocks(side: Side) -> tuple[tuple[dict[str, Any], ...], tuple[Visual, ...]]:
    """The chat's blocks for one side of a question, and what fills them."""
    if isinstance(side, Clip):
        return ({"type": "video"},), (side,)
    if isinstance(side, tuple):
        return _IMAGE * len(side), side
    return _IMAGE, (to_picture(side),)


_MARKUP = re.compile(r"<[^<>\s]+>")
"""The part of a tag that no text may hold where the tag has words beside it."""


def _are_two(values: Any, fits: Callable[[Any], bool]) -> bool:
    if not isinstance(values, tuple):
        return False
    several = cast("tuple[Any, ...]", values)
    return len(several) == 2 and all(map(fits, several))


def _is_tag(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not re.search(r"\s", value)


def _merge_text(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for block in blocks:
        if merged and merged[-1]["type"] == block["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + block["text"]}
        else:
            merged.append(block)
    return merged
