"""What the embedded judge is taught with, and the loss that it learns by."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from listener_reward.recipes.lessons import DISTURBED, LITTERED, Mixed, litter
from listener_reward.tiny.generated import Sample
from listener_reward.tiny.read import read
from listener_reward.tiny.world import Scene


@pytest.fixture
def mixed() -> Mixed:
    from listener_reward.tiny.drawing import draw

    rng = random.Random(0)
    scenes = [Scene("red", "circle", 1), Scene("blue", "square", 2)]
    pictures = [draw(scene, rng) for scene in scenes]
    group = [Sample(scenes[0], "littlest words", picture, read(picture)) for picture in pictures]
    return Mixed([group], random.Random(1))


def test_half_of_the_lessons_are_drawn_and_some_prompts_are_littered(mixed: Mixed) -> None:
    lessons = mixed.lessons(400)
    generated = [pair.wording for pair, _ in lessons if "littlest words" in pair.wording]
    assert len(lessons) == 400 and len(generated) == 200
    assert abs(sum(wording != "littlest words" for wording in generated) / 200 - LITTERED) < 0.1
    assert all(len(pictures) == 2 for _, pictures in lessons)


def test_thoughts_are_disturbed_in_the_shares_that_are_named(mixed: Mixed) -> None:
    found = [mixed.disturb("image 1 : fine .") for _ in range(2000)]
    shares = {
        "silent": sum(thought == "" for thought in found),
        "misled": sum(bool(thought) and str(thought).endswith("is better .") for thought in found),
    }
    assert abs(sum(thought is not None for thought in found) / 2000 - sum(DISTURBED.values())) < 0.05
    assert all(abs(count / 2000 - DISTURBED[kind]) < 0.04 for kind, count in shares.items())
    assert any("so image 1" in str(thought) for thought in found) and any("so image 2" in str(t) for t in found)


def test_litter_leaves_the_text_whole_and_comes_before_or_after_it() -> None:
    rng = random.Random(0)
    seen = {"before": 0, "after": 0, "one word": 0, "of a chat": 0}
    for _ in range(400):
        littered = litter("the fox", rng)
        before, after = littered.split("the fox")
        words = [*before.split(), *after.split()]
        assert 1 <= len(words) <= 40
        seen["before"] += bool(before)
        seen["after"] += bool(after)
        seen["one word"] += len(words) > 3 and len(set(words)) == 1
        seen["of a chat"] += "which is better ?" in littered
    assert min(seen.values()) > 5, seen


def test_an_answer_learnt_from_voters_is_the_mean_of_both_answers() -> None:
    """With shares the loss is that of either label, weighted, and does not depend on the label that stands there."""
    from listener_reward.recipes.teaching import FORMAT, _speech_loss, _turns
    from listener_reward.tiny.drawing import draw
    from listener_reward.tiny.models import build_model, build_processor

    torch.manual_seed(0)
    processor: Any = build_processor()
    model = build_model(processor.tokenizer).eval()
    picture = draw(Scene("red", "circle", 1), random.Random(0))

    def loss(answer: int, shares: list[float] | None = None) -> float:
        text = _turns(processor, FORMAT.messages("a red circle"), "image 1 : fine .", answer)
        inputs = processor(images=[picture, picture], text=[text], padding=True, return_tensors="pt")
        with torch.no_grad():
            return float(_speech_loss(model, processor, inputs, p_firsts=shares))

    first, second = loss(1), loss(2)
    assert first != pytest.approx(second, abs=1e-4)
    # What follows the answer is predicted from the label that stands there, so each is compared with its own text.
    assert loss(1, [1.0]) == pytest.approx(first, abs=1e-5) and loss(2, [0.0]) == pytest.approx(second, abs=1e-5)
    between = loss(1, [0.25])
    assert between == pytest.approx(0.25 * loss(1, [1.0]) + 0.75 * loss(1, [0.0]), abs=1e-5)
    assert loss(1, [0.0]) != pytest.approx(first, abs=1e-4)
