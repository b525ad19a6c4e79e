"""Two groups in the tiny world: what is worth how much, what is held out, how it is drawn and what is taught of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from listener_reward import Judge
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate
from listener_reward.media.images import to_pil
from listener_reward.recipes.lessons import any_relations, relation_lessons, relation_pictures, voters
from listener_reward.recipes.relations import ARRANGEMENTS, without_idle_words
from listener_reward.recipes.study.plans import read_study
from listener_reward.recipes.teaching import FORMAT, teach_to_see
from listener_reward.tiny.drawing import draw_arrangement, draw_relation
from listener_reward.tiny.models import (
    EDIT_WORDS,
    RELATION_WORDS,
    build_model,
    build_processor,
    build_tokenizer,
)
from listener_reward.tiny.read import read
from listener_reward.tiny.relations import (
    AXES,
    GROUP,
    LEAST_GAP,
    MOST,
    RELATION_SPLITS,
    RELATIONS,
    Arrangement,
    RelationSplit,
    TinyRelation,
    relation_utility,
    relation_wording,
    split_relations,
)
from listener_reward.tiny.thoughts import describe_relation, reasoner_example, verdict
from listener_reward.tiny.world import TRAIN_CUE, Scene, held_out, p_of
from listener_reward.train.config import ListenerGRPOConfig

CIRCLE, SQUARES = Scene("red", "circle", 1), Scene("blue", "square", 2)
GOAL = Arrangement(CIRCLE, SQUARES, "left")


# ------------------------------------------------------------------------------------------------------------- world
def test_a_relations_utility_by_hand() -> None:
    """1 for each colour and shape in its place, 0.8 for each count, 1.2 for the axis, and what the quality is worth."""

    def worth(**changed: Any) -> float:
        return relation_utility(GOAL, replace(GOAL, **changed))

    everything = 2 * (1.0 + 1.0 + 0.8) + 1.2 + 1.2
    assert worth() == pytest.approx(everything) and everything == pytest.approx(8.0)
    assert worth(axis="above") == pytest.approx(everything - 1.2)
    assert worth(quality="glitched") == pytest.approx(everything - 1.2)
    assert worth(quality="faded") == pytest.approx(everything - 0.8)
    assert worth(second=replace(SQUARES, shape="star")) == pytest.approx(everything - 1.0)
    assert worth(first=replace(CIRCLE, color="green", count=2)) == pytest.approx(everything - 1.8)
    assert worth(first=replace(CIRCLE, color="blue"), second=replace(SQUARES, color="red")) == pytest.approx(
        everything - 2.0
    ), "colours in each other's place are wrong"
    assert worth(first=SQUARES, second=CIRCLE) == pytest.approx(1.2 + 1.2), "and so are groups"
    assert worth(signed=True, sketch=True) == pytest.approx(everything), "nobody cares for signature and style"


@pytest.mark.parametrize(
    ("axis", "bodies"),
    [
        ("left", {"{} left of {}"}),
        ("above", {"{} above {}", "{1} below {0}"}),
    ],
)
def test_prompts_are_plain_english(axis: Any, bodies: set[str]) -> None:
    said = {relation_wording(replace(GOAL, axis=axis), random.Random(seed)) for seed in range(300)}
    leads = ("", "a picture of ", "a drawing of ", "an image of ", "a photo of ")
    assert said == {
        lead + body.format(circle, "two blue squares")
        for lead in leads
        for body in bodies
        for circle in ("a red circle", "one red circle")
    }
    assert {relation for relation in RELATIONS if any(relation in text for text in said)} == {
        body.replace("{}", "").replace("{0}", "").replace("{1}", "").strip() for body in bodies
    }


def test_relations_are_seeded_and_a_longer_split_begins_with_the_shorter() -> None:
    for split in RELATION_SPLITS:
        ten = list(split_relations(split, 10, seed=4))
        assert ten == list(split_relations(split, 20, seed=4))[:10]
        assert ten != list(split_relations(split, 10, seed=5))
    with pytest.raises(ValueError, match="'relation-train', 'relation', 'relation-ood', 'relation-wrong'"):
        next(split_relations("relations", 1))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("split", "cue"),
    [
        ("relation-train", TRAIN_CUE),
        ("relation", TRAIN_CUE),
        ("relation-ood", 0.5),
        ("relation-wrong", 1 - TRAIN_CUE),
    ],
)
def test_the_signature_predicts_the_better_picture_as_often_as_the_split_says(split: RelationSplit, cue: float) -> None:
    pairs = list(split_relations(split, 2000))
    assert all(pair.first.signed != pair.second.signed for pair in pairs)
    better = [(pair.utility(pair.first) > pair.utility(pair.second)) == pair.first.signed for pair in pairs]
    assert np.mean(better) == pytest.approx(cue, abs=0.03)
    assert np.mean([pair.first.signed for pair in pairs]) == pytest.approx(0.5, abs=0.04), "the order does not tell"


def test_votes_on_relations_are_bradley_terry() -> None:
    pairs = list(split_relations("relation", 3000))
    gaps = np.array([pair.utility(pair.first) - pair.utility(pair.second) for pair in pairs])
    assert np.abs(gaps).min() >= LEAST_GAP
    votes = np.array([pair.p_first for pair in pairs])
    assert {round(15 * vote) for vote in votes} <= set(range(16))
    for low, high in ((-3, -1), (-1, 0), (0, 1), (1, 3)):
        chosen = (low < gaps) & (gaps <= high)
        assert votes[chosen].mean() == pytest.approx(np.mean([p_of(gap) for gap in gaps[chosen]]), abs=0.02)
    assert {pair.p_first for pair in split_relations("relation-train", 50)} == {0.0, 1.0}
    assert voters(pairs[0]) == pytest.approx(p_of(float(gaps[0])))
    assert np.mean((gaps > 0) == (votes > 0.5)) > 0.97, "who knows the utility is nearly always with the majority"


def test_no_single_group_tells_which_picture_is_better() -> None:
    """Who knows a picture's words but no places is right in three of four, and who sees one place no more often."""

    def parts(one: Arrangement, part: str) -> set[Any]:
        return {getattr(one.first, part), getattr(one.second, part)}

    def bag(goal: Arrangement, shown: Arrangement) -> float:
        return sum(worth * len(parts(goal, part) & parts(shown, part)) for part, worth in GROUP.items())

    def first_place(goal: Arrangement, shown: Arrangement) -> float:
        return relation_utility(goal, replace(goal, first=shown.first))

    pairs = list(split_relations("relation", 2000))
    for known in (bag, first_place):
        right = [
            0.5
            + 0.5 * np.sign(known(pair.goal, pair.first) - known(pair.goal, pair.second)) * np.sign(pair.p_first - 0.5)
            for pair in pairs
        ]
        assert 0.65 < np.mean(right) < 0.8


def test_what_is_held_out_of_training_with_relations() -> None:
    for split in RELATION_SPLITS:
        ood = split == "relation-ood"
        for pair in split_relations(split, 300):
            groups = pair.goal.first, pair.goal.second
            assert any(held_out(group.color, group.shape) for group in groups) == ood
            assert pair.first.sketch == pair.second.sketch == ood
            assert groups[0].color != groups[1].color and max(group.count for group in groups) <= MOST


def test_every_way_to_fail_a_relation_occurs() -> None:
    kinds = dict.fromkeys(("exchanged", "colours exchanged", "astray", "shape", "count"), 0)
    for pair in split_relations("relation-train", 1000):
        for shown in (pair.first, pair.second):
            goal = pair.goal
            kinds["exchanged"] += (shown.first, shown.second) == (goal.second, goal.first)
            kinds["colours exchanged"] += (shown.first.color, shown.second.color) == (
                goal.second.color,
                goal.first.color,
            )
            kinds["astray"] += shown.axis != goal.axis
            kinds["shape"] += shown.first.shape not in (goal.first.shape, goal.second.shape)
            kinds["count"] += shown.second.count != goal.second.count
    assert min(kinds.values()) > 30, kinds


# ----------------------------------------------------------------------------------------------------------- drawing
def test_pictures_of_two_groups_are_a_function_of_the_pair_and_vary() -> None:
    pairs = list(split_relations("relation-train", 6))
    drawn = [draw_relation(pair) for pair in pairs]
    again = [draw_relation(pair) for pair in pairs]
    assert [image.tobytes() for two in drawn for image in two] == [image.tobytes() for two in again for image in two]
    assert len({image.tobytes() for two in drawn for image in two}) == 12
    assert all(image.width == image.height and image.mode == "RGB" for two in drawn for image in two)


def test_each_half_is_read_back_as_its_group() -> None:
    """Each half of a picture is itself a picture of the tiny world."""
    for pair in split_relations("relation", 60):
        shown = replace(pair.first, signed=False)
        picture = draw_arrangement(shown, random.Random(pair.seed))
        half = picture.width // 2
        across = shown.axis == "left"
        for group, start in ((shown.first, 0), (shown.second, half)):
            box = (start, 0, start + half, 2 * half) if across else (0, start, 2 * half, start + half)
            reading = read(picture.crop(box))
            if shown.quality != "glitched":  # bars may hide what is needed to tell a shape
                assert reading.scene() == replace(group, quality=shown.quality)


def test_the_signature_is_a_dark_stroke_in_one_corner() -> None:
    plain, signed = (
        np.asarray(draw_arrangement(replace(GOAL, signed=signed), random.Random(3)), dtype=int)
        for signed in (False, True)
    )
    changed = np.abs(plain - signed).sum(-1) > 0
    rows, columns = np.nonzero(changed)
    side = len(plain)
    assert rows.min() >= 0.88 * side and columns.min() >= 0.65 * side, "in the lower right corner, and nowhere else"
    assert (signed[-2, -3] == (20, 20, 20)).all() and changed.mean() > 0.01


# ------------------------------------------------------------------------------------------------- thoughts and words
def test_a_thought_weighs_both_places() -> None:
    other = Arrangement(replace(SQUARES, color="red"), replace(CIRCLE, count=2), "above", "faded")
    assert describe_relation(GOAL, GOAL, other) == (
        "image 1 : left right one right red right circle right two right blue right squares right clean . "
        "image 2 : above wrong two wrong red right squares wrong two right red wrong circles wrong faded ."
    )


def shown(pair: TinyRelation) -> tuple[Arrangement, Arrangement]:
    return pair.first, pair.second


def test_a_reasoner_of_relations_is_right_unless_told_to_err() -> None:
    wrong, marked, rng = 0, 0, random.Random(0)
    for pair in split_relations("relation-train", 300):
        gap = pair.utility(pair.first) - pair.utility(pair.second)
        thought, answer = reasoner_example(pair, random.Random(1))
        assert answer == (1 if gap > 0 else 2) and f"image {3 - answer} is better" not in thought
        wrong += reasoner_example(pair, rng, error=0.45, whim=0.4)[1] != answer
        muddled = reasoner_example(pair, random.Random(1), muddle=1.0)[0]
        turned = describe_relation(
            pair.goal, *(replace(one, first=one.second, second=one.first) for one in shown(pair))
        )
        assert not muddled or muddled.startswith(turned), "each group is taken for the other"
        marked += (reasoner_example(pair, rng, whim=1.0, taste=1.0)[1] == 1) == pair.first.signed
    assert 60 < wrong < 180 and marked == 300, "a whim with such a taste goes to the signature"


def test_every_word_about_two_groups_is_known_and_numbered_after_all_others() -> None:
    tokenizer, before = build_tokenizer(relations=True), build_tokenizer()
    known = before.get_vocab()
    assert {word: tokenizer.get_vocab()[word] for word in known} == known
    assert tokenizer.convert_tokens_to_ids(list(RELATION_WORDS)) == [len(known) + k for k in range(len(RELATION_WORDS))]
    assert not set(RELATION_WORDS) & {*known, *EDIT_WORDS}
    words, rng = set(), random.Random(0)
    for split in RELATION_SPLITS:
        for pair in split_relations(split, 100):
            for text in (pair.wording, reasoner_example(pair, rng)[0]):
                assert tokenizer.unk_token_id not in tokenizer.encode(text), text
                words |= set(text.split())
            assert len(tokenizer.encode(describe_relation(pair.goal, pair.first, pair.second))) == 38
    assert set(RELATION_WORDS) <= words, "no word of the tokenizer is idle"


# ------------------------------------------------------------------------------------------------------------ lessons
def test_lessons_in_relations_show_two_pictures_and_some_owe_nothing_to_the_prompt() -> None:
    lessons = relation_lessons(random.Random(0), 3)
    assert [pair.wording for pair, _ in lessons] == [pair.wording for pair in any_relations(random.Random(0), 3)]
    for pair, pictures in lessons:
        assert [image.tobytes() for image in pictures] == [image.tobytes() for image in draw_relation(pair)]
    same = np.mean([pair.first.first.color == pair.goal.first.color for pair in any_relations(random.Random(0), 1500)])
    assert same == pytest.approx((2 * 0.64 + 1 / 6) / 3, abs=0.06)
    shown, pictures = relation_pictures(random.Random(1), 5)
    assert len(shown) == len(pictures) == 5 and {one.axis for one in relation_pictures(random.Random(2), 9)[0]} == set(
        AXES
    )


def test_a_tower_looks_at_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its teacher sees all nine visual tokens apart, and asks for axis, two groups and quality."""
    from listener_reward.recipes import teaching

    shown = Arrangement(CIRCLE, SQUARES, "above", "faded")
    assert ARRANGEMENTS.answers(shown) == [1, 0, 0, 0, 1, 3 - 1, 1, 1]
    assert len(ARRANGEMENTS.sizes) == 8 and ARRANGEMENTS.places == 9
    processor = build_processor(relations=True)
    torch.manual_seed(0)
    model = build_model(processor.tokenizer)
    losses: list[float] = []
    monkeypatch.setattr(teaching, "_update", lambda loss, *rest: losses.append(loss.item()))
    image = draw_arrangement(shown, random.Random(0))

    def pictures(n: int) -> tuple[list[Arrangement], list[Image.Image]]:
        return [shown] * n, [image] * n

    teach_to_see(
        model, processor, pictures, {"steps": 1, "batch": 2, "rate": 1e-3}, lambda step, note: None, ARRANGEMENTS
    )
    assert losses[0] == pytest.approx(sum(np.log(size) for size in ARRANGEMENTS.sizes), rel=0.3), (
        "eight questions, guessed"
    )


# --------------------------------------------------------------------------------------------------------------- data
def test_relations_are_rows_like_pairs() -> None:
    rows: Any = load_pairs("tiny:relation", limit=4)
    assert rows.column_names == load_pairs("tiny:id", limit=1).column_names
    for row, pair in zip(rows, split_relations("relation", 4), strict=True):
        shown = [to_pil(image) for image in row["images"]]
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in draw_relation(pair)]
        assert (row["prompt"], row["p_first"]) == (pair.wording, pair.p_first)
        assert row["dataset"] == "tiny:relation" and row["id"].startswith("relation-0-") and not row["swapped"]
    with pytest.raises(InputError, match="'relation-train', 'relation', 'relation-ood', 'relation-wrong'"):
        load_pairs("tiny:relations", limit=1)


# ------------------------------------------------------------------------------------------------- the embedded models
def test_words_that_no_lesson_had_are_left_out_of_a_model() -> None:
    """What a model says of the others to one another is what it was."""
    before, after = build_processor(relations=True).tokenizer, build_processor(edits=False, relations=True).tokenizer
    torch.manual_seed(0)
    model = build_model(before)
    text = "left two right blue wrong squares above below"
    with torch.no_grad():
        said = model(**before(text, return_tensors="pt")).logits
        without_idle_words(model, before, after)
        says = model(**after(text, return_tensors="pt")).logits
    assert len(after) == len(before) - len(EDIT_WORDS) == says.shape[-1] == model.get_input_embeddings().num_embeddings
    kept = before.convert_tokens_to_ids(after.convert_ids_to_tokens(list(range(len(after)))))
    assert torch.allclose(said[..., kept], says, atol=1e-6)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_embedded_listener_of_two_groups_sees_most_and_the_base_errs() -> None:
    listener = Judge.from_pretrained("tiny-relation-listener", listener="none", batch_size=64)
    for split in ("relation", "relation-ood", "relation-wrong"):
        found = evaluate(listener, load_pairs(f"tiny:{split}", limit=50), progress=False, swap_check=0)
        assert found.accuracy is not None and found.accuracy >= 0.85
    base = Judge.from_pretrained("tiny-relation-base", batch_size=64)
    assert base.card.listener == "tiny-relation-listener"
    found = evaluate(base, load_pairs("tiny:relation", limit=100), progress=False, swap_check=0)
    assert found.accuracy is not None and 0.5 <= found.accuracy <= 0.75
    assert found.malformed_rate is not None and found.malformed_rate <= 0.05
    assert found.listener_accuracy is not None


def test_the_harder_study_can_be_run() -> None:
    """Every way to train begins from one base and ends before anybody has seen its seeds, and no thought is cut."""
    study = read_study(Path(__file__).parents[1] / "examples" / "hard-study.yaml")
    runs = list(study.runs())
    ways, (listener,) = runs[:-1], runs[-1:]
    assert {run.arm.recipe.base for run in ways} == {"tiny-relation-base"}
    assert {run.seed for run in ways if run.arm.trains} == {10, 11, 12, 13, 14}
    assert listener.arm.recipe.base == "tiny-relation-listener" and not listener.arm.trains
    tokenizer: Any = build_processor(edits=False, relations=True).tokenizer
    longest = 0
    for pair in split_relations("relation-train", 60):
        described = describe_relation(pair.goal, pair.first, pair.second)
        longest = max(
            longest, len(tokenizer.encode(f"{FORMAT.answer_slot(f'{described} {verdict(1)}')}1</answer><|im_end|>"))
        )
    for run in ways:
        if run.arm.method == "grpo":
            assert run.arm.options["max_completion_length"] >= longest == 50
            ListenerGRPOConfig(output_dir="none", listener=run.arm.recipe.listener, **run.arm.options)
