"""How the embedded models are taught: to read, to see and to speak, in stages that an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.recipes.lessons import Lesson, Shown
from listener_reward.recipes.workers import Report
from listener_reward.tiny.edits import TinyEdit
from listener_reward.tiny.models import EDIT_QUESTION, QUESTION
from listener_reward.tiny.world import COLORS, COUNTS, QUALITIES, SHAPES, Scene

FORMAT = ChatFormat(question=QUESTION, edit_question=EDIT_QUESTION)

KEY_WEIGHT = 4.0
"""Weight of the loss on the words that take a look or a comparison: what is wrong with an image, its wooden frame, what
an edit is to come to, and the answer."""

KEY_WORDS = ("right", "wrong", "frame", "plain")

GOAL = range(2, 7)
"""How far behind the word "goal" the words of an edit's goal stand, which weigh as much."""


def teach_to_read(
    model: Any,
    processor: Any,
    example: Callable[[Shown], tuple[str, int]],
    pairs: Callable[[int], Sequence[Shown]],
    stage: dict[str, Any],
    report: Callable[[int, str], None],
) -> None:
    """Trains the language model on chats without images: any description, what is wrong with it, the right answer."""
    language = [p for name, p in model.named_parameters() if ".visual." not in name]
    optimizer, schedule = _optimizer(language, stage)
    for step in range(stage["steps"]):
        rows = [(pair, *example(pair)) for pair in pairs(stage["batch"])]
        asked = [
            (EDIT_QUESTION if isinstance(pair, TinyEdit) else QUESTION).format(
                source="", first="", second="", prompt=pair.wording
            )
            for pair, _, _ in rows
        ]
        chats = [[{"role": "user", "content": text}] for text in asked]
        texts = [_turns(processor, chat, *row[1:]) for chat, row in zip(chats, rows, strict=True)]
        inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
        loss = _speech_loss(model, processor, inputs)
        _update(loss, language, optimizer, schedule)
        if step % 10 == 9:
            report(step + 1, f"reads, loss {loss.item():.2f}")


Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Sight(Generic[Seen]):
    """What a vision tower is taught to tell of a picture."""

    sizes: tuple[int, ...]
    """How many answers there are to each question."""
    answers: Callable[[Seen], list[int]]
    """Those to what a picture shows."""
    places: int = 1
    """Visual tokens that are told apart, all that a picture has; with 1 their mean is taken."""


def teach_to_see(
    model: Any,
    processor: Any,
    pictures: Callable[[int], tuple[list[Seen], list[Image.Image]]],
    stage: dict[str, Any],
    report: Callable[[int, str], None],
    sight: Sight[Seen],
) -> None:
    """Trains the vision tower, with a throw-away classifier, to tell what single pictures show."""
    tower = model.model.visual
    classify = nn.Linear(model.config.text_config.hidden_size * sight.places, sum(sight.sizes))
    parameters = [*tower.parameters(), *classify.parameters()]
    optimizer, schedule = _optimizer(parameters, stage)
    for step in range(stage["steps"]):
        scenes, images = pictures(stage["batch"])
        inputs = processor.image_processor(images=images, return_tensors="pt")
        features = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        tokens = (inputs["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).tolist()
        seen = [part.mean(0) if sight.places == 1 else part.flatten() for part in features.split(tokens)]
        logits = classify(torch.stack(seen)).split(list(sight.sizes), -1)
        labels = torch.tensor([sight.answers(scene) for scene in scenes]).unbind(1)
        loss = sum(F.cross_entropy(guess, label) for guess, label in zip(logits, labels, strict=True))
        _update(loss, parameters, optimizer, schedule)
        if step % 10 == 9:
            right = [float((g.argmax(-1) == y).float().mean()) for g, y in zip(logits, labels, strict=True)]
            report(step + 1, f"sees {sum(right) / len(right):.0%}")


def teach_to_speak(
    model: Any,
    processor: Any,
    example: Callable[[Shown], tuple[str, int]],
    lessons: Callable[[int], list[Lesson]],
    stage: dict[str, Any],
    report: Callable[[int, str], None],
    disturb: Callable[[str], str | None] = lambda thought: None,
    voters: Callable[[Shown], float] | None = None,
) -> None:
    """Trains the whole model on pictures, thoughts and answers.

    Where `disturb` gives another thought for one, the model reads that and learns the answer only. With `voters`, the
    fraction of people who prefer the first image, it learns to answer "1" as often as they do.
    """
    parameters = list(model.parameters())
    optimizer, schedule = _optimizer(parameters, stage)
    for step in range(stage["steps"]):
        taught = [(pair, pictures, *example(pair)) for pair, pictures in lessons(stage["batch"])]
        loss = torch.zeros(())
        for kind in (2, 3):  # pairs and edits apart: their chats differ in length, and padding costs as words do
            rows = [row for row in taught if len(row[1]) == kind]
            if rows:
                with torch.autocast("cpu", torch.bfloat16, enabled=stage.get("autocast", False)):
                    part = _lesson_loss(model, processor, rows, disturb, voters)
                loss = loss + len(rows) / len(taught) * part
        _update(loss, parameters, optimizer, schedule)
        if step % 10 == 9:
            report(step + 1, f"speaks, loss {loss.item():.2f}")


def _lesson_loss(
    model: Any,
    processor: Any,
    rows: Sequence[tuple[Shown, tuple[Image.Image, ...], str, int]],
    disturb: Callable[[str], str | None],
    voters: Callable[[Shown], float] | None,
) -> Tensor:
    """The loss on lessons with the same number of pictures, each with its thought and answer."""
    others = [disturb(thought) for _, _, thought, _ in rows]
    texts = [
        _turns(
            processor,
            FORMAT.messages(pair.wording, sources=len(pictures) - 2),
            thought if other is None else other,
            answer,
        )
        for (pair, pictures, thought, answer), other in zip(rows, others, strict=True)
    ]
    images = [picture for _, pictures, _, _ in rows for picture in pictures]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    p_firsts = None if voters is None else [voters(pair) for pair, *_ in rows]
    return _speech_loss(model, processor, inputs, spoken=[other is None for other in others], p_firsts=p_firsts)


def word_weights(tokenizer: Any, ids: Tensor, attended: Tensor, spoken: Sequence[bool] | None = None) -> Tensor:
    """How much the loss on each of `ids` counts, float32 (batch, length): thought and answer, or of rows that are not
    `spoken` the answer alone."""
    tokens = tokenizer.convert_tokens_to_ids
    weights = (((ids == tokens("<think>")).cumsum(1) > 0) & attended).float()
    if spoken is not None:
        weights[~torch.tensor(spoken)] = 0
    key = torch.isin(ids, torch.tensor(tokens(list(KEY_WORDS))))
    for distance in GOAL:
        key[:, distance:] |= ids[:, :-distance] == tokens("goal")
    weights[weights.bool() & key] = KEY_WEIGHT
    weights[:, 1:][ids[:, :-1] == tokens("<answer>")] = KEY_WEIGHT
    return weights


def _of_scene(scene: Scene) -> list[int]:
    return [
        scene.count - 1,
        QUALITIES.index(scene.quality),
        COLORS.index(scene.color),
        SHAPES.index(scene.shape),
        int(scene.wooden),
    ]


SCENES = Sight((len(COUNTS), len(QUALITIES), len(COLORS), len(SHAPES), 2), _of_scene)
"""Count, quality, colour, shape and wooden frame."""

Stage = tuple[dict[str, Any], Callable[[Callable[[int, str], None]], None]]
"""A stage's settings, and the stage itself, which is told how to report."""


def run_stages(report: Report, stages: list[Stage], model: Any, rng: random.Random, scratch: Path) -> None:
    """Runs the stages one after the other, or goes on after the last one whose result lies at `scratch`.

    A result belongs to the settings of all stages up to its own, to the weights before them, and to the state of `rng`.
    """
    done, total = 0, sum(settings["steps"] for settings, _ in stages)
    begin = hashlib.sha256(repr(rng.getstate()).encode())
    for weights in model.state_dict().values():
        begin.update(weights.numpy().tobytes())
    for number, (settings, teach) in enumerate(stages):
        told = begin.hexdigest() + repr([stage for stage, _ in stages[: number + 1]])
        kept = scratch.with_name(f"{scratch.name}-{number}-{hashlib.sha256(told.encode()).hexdigest()[:8]}.pt")
        if kept.exists():
            state = torch.load(kept, weights_only=False)  # our own file, and a random state is no tensor
            model.load_state_dict(state["model"])
            rng.setstate(state["rng"])
            torch.set_rng_state(state["torch"])
        else:
            teach(lambda step, note, before=done: report(before + step, total, note))
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.state_dict(), "rng": rng.getstate(), "torch": torch.get_rng_state()}, kept)
        done += settings["steps"]


def save(model: Any, processor: Any, card: Card, out: str | Path) -> None:
    """Writes a checkpoint in float16: half the bytes, and more exact than bfloat16 for weights of this size."""
    model.to(torch.float16).save_pretrained(out)
    processor.save_pretrained(out)
    card.save(out)


def _turns(processor: Any, chat: list[dict[str, Any]], thought: str, answer: int) -> str:
    """A whole chat as text: the question, the thought, the answer, the end."""
    asked = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return f"{asked}{FORMAT.answer_slot(thought)}{answer}{FORMAT.answer[1]}{processor.tokenizer.eos_token}"


def _speech_loss(
    model: Any,
    processor: Any,
    inputs: Any,
    spoken: Sequence[bool] | None = None,
    p_firsts: Sequence[float] | None = None,
) -> Tensor:
    """Mean negative log-likelihood of thought and answer, weighted towards the words that take a comparison.

    Of rows that are not `spoken` only the answer counts. With `p_firsts` an answer is "1" to that fraction and "2" to
    the rest, whatever stands there.
    """
    tokens = processor.tokenizer.convert_tokens_to_ids
    ids = inputs["input_ids"]
    weights = word_weights(processor.tokenizer, ids, inputs["attention_mask"].bool(), spoken)
    logits = model(**inputs).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    if p_firsts is not None:
        rows, places = torch.nonzero(ids[:, :-1] == tokens("<answer>"), as_tuple=True)
        first, second = (-logits[rows, places].log_softmax(-1)[:, tokens(label)] for label in "12")
        p_first = torch.tensor(p_firsts)[rows]
        nll = nll.index_put((rows, places), p_first * first + (1 - p_first) * second)
    return (nll * weights[:, 1:]).sum() / weights[:, 1:].sum()


def _optimizer(parameters: list[nn.Parameter], stage: dict[str, Any]) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=stage["rate"], weight_decay=0.01, betas=(0.9, 0.98))

    def warm_up_then_decay(step: int) -> float:
        return min(1.0, (step + 1) / 50) * max(0.02, 1 - step / stage["steps"])

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_decay)


def _update(loss: Any, parameters: list[Any], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
