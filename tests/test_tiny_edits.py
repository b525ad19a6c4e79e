"""Edits in the tiny world: what is asked, what is worth how much, how it is drawn, and what models are taught of it."""

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
from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate
from listener_reward.media.images import to_pil
from listener_reward.models.hub import resolve
from listener_reward.recipes.edits import with_new_words
from listener_reward.recipes.lessons import FREE, Shown, any_edits, edit_lessons, edit_pictures, littered, voters
from listener_reward.recipes.teaching import KEY_WEIGHT, word_weights
from listener_reward.tiny.drawing import WOOD, draw, draw_edit
from listener_reward.tiny.edits import (
    EDIT_SPLITS,
    HELD_PARTS,
    PARTS,
    EditSplit,
    TinyEdit,
    edit_utility,
    instruction,
    split_edits,
)
from listener_reward.tiny.models import (
    EDIT_QUESTION,
    EDIT_WORDS,
    QUESTION,
    build_model,
    build_processor,
    build_tokenizer,
)
from listener_reward.tiny.read import read_framed
from listener_reward.tiny.thoughts import describe_edit, reasoner_example
from listener_reward.tiny.world import MIN_GAP, TRAIN_CUE, Scene, held_out, p_of

RED, BLUE = Scene("red", "circle", 2), Scene("blue", "circle", 2)


# ------------------------------------------------------------------------------------------------------------- world
def test_an_edits_utility_by_hand() -> None:
    """2.5 for each asked attribute that is there, 1 for each that was to stay, and what the quality is worth."""

    def blue(scene: Scene) -> float:
        return edit_utility(BLUE, ("color",), scene)

    assert blue(BLUE) == pytest.approx(2.5 + 3 + 1.2)
    assert blue(RED) == pytest.approx(3 + 1.2), "nothing done"
    assert blue(Scene("blue", "star", 2)) == pytest.approx(2.5 + 2 + 1.2), "too much"
    assert blue(Scene("blue", "circle", 2, wooden=True)) == pytest.approx(2.5 + 2 + 1.2), "a frame that nobody wanted"
    assert blue(Scene("green", "circle", 1, "faded")) == pytest.approx(2 + 0.4), "something else, damaged"
    marked = Scene("blue", "circle", 2, framed=True, sketch=True)
    assert blue(marked) == blue(BLUE), "the generator's mark and the style count for nothing"
    both = edit_utility(Scene("blue", "circle", 3), ("color", "count"), BLUE)
    assert both == pytest.approx(2.5 + 2 + 1.2), "half"
    assert edit_utility(RED, ("quality",), RED) == pytest.approx(2.5 + 4 + 1.2)
    assert edit_utility(RED, ("quality",), Scene("red", "circle", 2, "faded")) == pytest.approx(4 + 0.4), "not repaired"


@pytest.mark.parametrize(
    ("source", "goal", "asked", "wordings"),
    [
        (RED, BLUE, ("color",), {f"{verb} the circles blue" for verb in ("make", "paint", "turn")}),
        (
            Scene("red", "circle", 1),
            Scene("red", "star", 1),
            ("shape",),
            {"change the circle to a star", "turn the circle into a star"},
        ),
        (RED, Scene("red", "circle", 3), ("count",), {"add one circle", "make it three circles"}),
        (RED, Scene("red", "circle", 1), ("count",), {"remove one circle", "make it one circle"}),
        (
            Scene("red", "circle", 2, "faded"),
            RED,
            ("quality",),
            {f"{verb} the {what}" for verb in ("repair", "restore") for what in ("picture", "image")},
        ),
        (
            RED,
            Scene("red", "circle", 2, wooden=True),
            ("wooden",),
            {"add a frame", "put a frame around it", "put a frame around the picture", "put a frame around the image"},
        ),
        (
            RED,
            Scene("blue", "star", 2),
            ("color", "shape"),
            {
                f"{paint} the circles blue and {change} them {to} stars"
                for paint in ("make", "paint", "turn")
                for change, to in (("change", "to"), ("turn", "into"))
            },
        ),
    ],
)
def test_instructions_are_plain_english(source: Scene, goal: Scene, asked: tuple, wordings: set[str]) -> None:
    rng = random.Random(0)
    assert {instruction(source, goal, asked, rng) for _ in range(200)} == wordings


def test_edits_are_seeded_and_a_longer_split_begins_with_the_shorter() -> None:
    assert list(split_edits("edit-ood", 5)) == list(split_edits("edit-ood", 20))[:5]
    assert list(split_edits("edit-ood", 5)) != list(split_edits("edit-ood", 5, seed=1))
    assert list(split_edits("edit", 5)) != list(split_edits("edit-wrong", 5))
    with pytest.raises(ValueError, match="edits have 'edit-train', 'edit', 'edit-ood', 'edit-wrong'"):
        list(split_edits("ood", 5))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("split", "cue"),
    [("edit-train", TRAIN_CUE), ("edit", TRAIN_CUE), ("edit-ood", 0.5), ("edit-wrong", 1 - TRAIN_CUE)],
)
def test_the_mark_predicts_the_better_result_as_often_as_the_split_says(split: EditSplit, cue: float) -> None:
    edits = list(split_edits(split, 2000))
    gaps = [edit.utility(edit.first) - edit.utility(edit.second) for edit in edits]
    assert all(abs(gap) >= MIN_GAP for gap in gaps)
    assert all(edit.first.framed != edit.second.framed and not edit.source.framed for edit in edits)
    marked = np.mean([(gap > 0) == edit.first.framed for gap, edit in zip(gaps, edits, strict=True)])
    assert marked == pytest.approx(cue, abs=0.03)
    about_frames = [edit for edit in edits if "wooden" in edit.asked]
    marked = np.mean(
        [(edit.utility(edit.first) > edit.utility(edit.second)) == edit.first.framed for edit in about_frames]
    )
    assert marked == pytest.approx(cue, abs=0.05), "an instruction about a frame leaves the mark what it is"
    votes = np.mean([edit.p_first - p_of(gap) for gap, edit in zip(gaps, edits, strict=True)])
    assert abs(votes) < 0.03
    if split == "edit-train":
        assert {edit.p_first for edit in edits} == {0.0, 1.0}


def test_what_is_held_out_of_training() -> None:
    for split in ("edit-train", "edit", "edit-wrong"):
        for edit in split_edits(split, 300):
            assert not any(held_out(scene.color, scene.shape) or scene.sketch for scene in (edit.source, edit.goal))
            assert edit.asked not in HELD_PARTS
    held = list(split_edits("edit-ood", 300))
    assert all(held_out(edit.goal.color, edit.goal.shape) and edit.first.sketch and edit.source.sketch for edit in held)
    assert {edit.asked for edit in held if len(edit.asked) == 2} == set(HELD_PARTS)


def test_every_way_to_fail_occurs_and_every_part_is_asked_for() -> None:
    edits = list(split_edits("edit-train", 1000))
    assert {part for edit in edits for part in edit.asked} == set(PARTS)
    assert {len(edit.asked) for edit in edits} == {1, 2}
    found = {"all": 0, "half": 0, "none": 0, "more": 0, "other": 0, "damaged": 0}
    for edit in edits:
        assert (edit.source.quality != "clean") == ("quality" in edit.asked)
        for scene in (edit.first, edit.second):
            done = [part for part in edit.asked if getattr(scene, part) == getattr(edit.goal, part)]
            changed = any(
                getattr(scene, part) != getattr(edit.source, part)
                for part in PARTS
                if part not in edit.asked and part != "quality"
            )
            found["all"] += len(done) == len(edit.asked) and not changed
            found["half"] += len(done) == 1 < len(edit.asked)
            found["none"] += not done and not changed
            found["more"] += len(done) == len(edit.asked) and changed
            found["other"] += not done and changed
            found["damaged"] += scene.quality != "clean" == edit.source.quality
    assert min(found.values()) >= 100, found


# ------------------------------------------------------------------------------------------------------------ drawing
def an_edit(first: Scene, second: Scene, source: Scene = RED, seed: int = 0) -> TinyEdit:
    return TinyEdit(source, BLUE, ("color",), first, second, 1.0, "make the circles blue", seed)


def test_an_editor_changes_only_what_the_result_changes() -> None:
    for seed in range(20):
        source, same, other = (np.asarray(image) for image in draw_edit(an_edit(RED, BLUE, seed=seed)))
        assert (source == same).all() and source.shape == other.shape
        moved = (source != other).any(-1)
        assert 0 < moved.mean() < 0.6 and (source[0, 0] == other[0, 0]).all(), "the background stays"
        one = np.asarray(draw_edit(an_edit(Scene("red", "circle", 1), BLUE, seed=seed))[1])
        gone = (source != one).any(-1)
        assert 0 < gone.sum() < moved.sum(), "one circle stays where it was"


def test_the_wooden_frame_is_seen_beside_the_mark() -> None:
    def colors(scene: Scene) -> list[tuple[int, ...]]:
        image = draw(scene, random.Random(3))
        y = image.height // 2
        return [image.getpixel((x, y)) for x in range(image.width // 4)]  # pyright: ignore[reportReturnType]

    wooden, marked = Scene("red", "star", 1, wooden=True), Scene("red", "star", 1, framed=True)
    assert colors(wooden)[0] == WOOD and WOOD not in colors(marked)
    both = colors(Scene("red", "star", 1, framed=True, wooden=True))
    assert both[0] == (20, 20, 20) and WOOD in both


def test_edited_pictures_are_read_back() -> None:
    """What an editor made has pixels alone; its utility is that of what they show."""
    for edit in split_edits("edit", 40):
        edit = replace(edit, first=replace(edit.first, framed=False), second=replace(edit.second, framed=False))
        for scene, image in zip((edit.source, edit.first, edit.second), draw_edit(edit), strict=True):
            reading = read_framed(image)
            assert (reading.wooden, reading.quality) == (scene.wooden, scene.quality)
            if scene.quality != "glitched":  # bars may hide what is needed to tell a shape
                assert reading.scene() == scene
                assert reading.edit_utility(edit.goal, edit.asked) == pytest.approx(edit.utility(scene))
    assert read_framed(Image.new("RGB", (64, 64), "white")).edit_utility(BLUE, ("color",)) == 0


def test_pictures_of_the_other_splits_are_what_they_were() -> None:
    """Their bytes, as they were before there were edits."""
    import hashlib

    from listener_reward.tiny.drawing import draw_pair
    from listener_reward.tiny.world import SPLITS, split_pairs

    found = {}
    for split in SPLITS:
        digest = hashlib.sha256()
        for pair in split_pairs(split, 300, seed=3):
            for image in draw_pair(pair):
                digest.update(image.tobytes() + repr(image.size).encode())
            digest.update(f"{pair.p_first}{pair.wording}{pair.seed}".encode())
        found[split] = digest.hexdigest()[:16]
    assert found == {
        "train": "aae25bd37b17b14f",
        "id": "728f5b8af01830e0",
        "ood": "c1d39aaec166c29f",
        "wrong": "18c8b4f30d8689e7",
    }


def test_edits_are_rows_with_a_source() -> None:
    rows: Any = load_pairs("tiny:edit", limit=4)
    assert rows.column_names.count("sources") == 1 and "sources" not in load_pairs("tiny:id", limit=1).column_names
    for row, edit in zip(rows, split_edits("edit", 4), strict=True):
        drawn = draw_edit(edit)
        shown = [to_pil(image) for image in (*row["sources"], *row["images"])]
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in drawn]
        assert (row["prompt"], row["p_first"]) == (edit.wording, edit.p_first)
        assert row["dataset"] == "tiny:edit" and row["id"].startswith("edit-0-") and not row["swapped"]
    streamed: Any = load_pairs("tiny:edit-ood", limit=2, stream=True)
    assert [len(row["sources"]) for row in streamed] == [1, 1]
    with pytest.raises(InputError, match="'edit-train', 'edit', 'edit-ood', 'edit-wrong'"):
        load_pairs("tiny:edits", limit=1)


# ------------------------------------------------------------------------------------------------- thoughts and words
def test_a_thought_says_what_was_wanted_and_what_came() -> None:
    damaged = Scene("red", "circle", 2, "faded", wooden=True)
    assert describe_edit(RED, BLUE, BLUE, damaged) == (
        "source : two clean red circles . goal : two clean blue circles plain . "
        "image 1 : two right blue right circles right clean plain right . "
        "image 2 : two right red wrong circles right faded frame wrong ."
    )


def test_a_reasoner_of_edits_is_right_unless_told_to_err() -> None:
    wrong, rng = 0, random.Random(0)
    for edit in split_edits("edit-train", 200):
        gap = edit.utility(edit.first) - edit.utility(edit.second)
        thought, answer = reasoner_example(edit, random.Random(1))
        assert answer == (1 if gap > 0 else 2) and f"image {3 - answer} is better" not in thought
        wrong += reasoner_example(edit, rng, error=0.55, whim=0.45)[1] != answer
    assert 40 < wrong < 120


def test_every_word_of_instructions_and_thoughts_is_known() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    words = set()
    for split in EDIT_SPLITS:
        for edit in split_edits(split, 200):
            thought, _ = reasoner_example(edit, rng)
            for text in (edit.wording, thought):
                assert tokenizer.unk_token_id not in tokenizer.encode(text), text
                words |= set(text.split())
    assert set(EDIT_WORDS) <= words, "no word of the tokenizer is idle"
    longest = max(
        len(tokenizer.encode(describe_edit(edit.source, edit.goal, edit.first, edit.second)))
        for edit in split_edits("edit", 50)
    )
    assert longest == 41


def test_new_words_come_after_all_others_and_leave_a_model_as_it_was() -> None:
    """A model from before there were edits gets rows for the new words, and says of the old ones what it said."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    known = len(tokenizer) - len(EDIT_WORDS)
    assert [tokenizer.convert_ids_to_tokens(known + k) for k in range(len(EDIT_WORDS))] == list(EDIT_WORDS)
    assert not set(EDIT_WORDS) & set(tokenizer.get_added_vocab()), "they are words, and reserved in no prompt"
    torch.manual_seed(0)
    model: Any = build_model(tokenizer).eval()
    model.resize_token_embeddings(known)
    asked = tokenizer(QUESTION.format(first="", second="", prompt="two red circles"), return_tensors="pt")
    with torch.no_grad():
        before = model(**asked).logits
        after = with_new_words(model, processor)(**asked).logits
    assert after.shape[-1] == known + len(EDIT_WORDS) == model.config.text_config.vocab_size
    assert torch.equal(before, after[..., :known])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert with_new_words(model, processor).get_input_embeddings().num_embeddings == len(tokenizer), "once is enough"


# ------------------------------------------------------------------------------------------------------------- lessons
def test_lessons_in_edits_show_three_pictures_and_some_results_are_free() -> None:
    lessons = edit_lessons(random.Random(0), 30)
    assert all(len(pictures) == 3 and all(isinstance(p, Image.Image) for p in pictures) for _, pictures in lessons)
    edits = any_edits(random.Random(0), 600)
    assert not any(held_out(edit.goal.color, edit.goal.shape) or edit.asked in HELD_PARTS for edit in edits)
    far = sum(
        sum(getattr(edit.first, part) != getattr(edit.source, part) for part in ("color", "shape", "count")) == 3
        for edit in edits
    )
    assert far / 600 == pytest.approx(np.mean(FREE) * 5 / 6 * 3 / 4 * 2 / 3, abs=0.05)
    shares = [
        wording != edit.wording
        for (edit, _), (wording) in zip(
            lessons, [pair.wording for pair, _ in littered(lessons, random.Random(0))], strict=True
        )
    ]
    assert 0 < sum(shares) < 30


def test_pictures_to_look_at_are_of_all_three_and_show_wooden_frames() -> None:
    scenes, pictures = edit_pictures(random.Random(0), 40)
    assert len(scenes) == len(pictures) == 42
    assert 5 < sum(scene.wooden for scene in scenes) < 25
    corners = {True: set(), False: set()}
    for scene, picture in zip(scenes, pictures, strict=True):
        if not scene.framed:
            corners[scene.wooden].add(picture.getpixel((0, 0)))
    assert corners[True] == {WOOD} and WOOD not in corners[False]


def test_what_is_wanted_and_what_takes_a_look_weighs_more() -> None:
    tokenizer = build_tokenizer()
    thought = "source : one clean red star . goal : one clean blue star plain . image 1 : one right"
    text = f"user prompt : goal : add a frame . which is better ? <think>{thought}</think><answer>1</answer><|im_end|>"
    rows = tokenizer([text, text], return_tensors="pt")
    heard, unspoken = word_weights(tokenizer, rows["input_ids"], rows["attention_mask"].bool(), [True, False]).tolist()
    words = tokenizer.convert_ids_to_tokens(rows["input_ids"][0])
    heavy = [word for word, weight in zip(words, heard, strict=True) if weight == KEY_WEIGHT]
    assert heavy == ["one", "clean", "blue", "star", "plain", "right", "1"]
    assert [word for word, weight in zip(words, heard, strict=True) if weight == 0] == words[: words.index("<think>")]
    assert [word for word, weight in zip(words, unspoken, strict=True) if weight] == ["1"]


def test_voters_on_edits_are_bradley_terry() -> None:
    assert voters(an_edit(BLUE, RED)) == pytest.approx(1 / (1 + np.exp(-2.5)))


def test_a_model_learns_from_pairs_and_edits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss on both is the mean of the losses on each, weighted by how many there are."""
    from listener_reward.recipes import teaching
    from listener_reward.recipes.lessons import Lesson, drawn_lessons

    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    rng = random.Random(0)
    given: list[Lesson] = [*drawn_lessons(rng, 1), *edit_lessons(rng, 3)]
    losses: list[float] = []
    monkeypatch.setattr(teaching, "_update", lambda loss, *rest: losses.append(loss.item()))

    def loss(lessons: list[Lesson]) -> float:
        def thoughts(pair: Shown) -> tuple[str, int]:
            return reasoner_example(pair, random.Random(pair.seed))

        stage = {"steps": 1, "batch": len(lessons), "rate": 1e-3}
        teaching.teach_to_speak(model, processor, thoughts, lambda n: lessons, stage, lambda step, note: None)
        return losses.pop()

    assert loss(given) == pytest.approx(0.25 * loss(given[:1]) + 0.75 * loss(given[1:]), abs=1e-4)


def test_the_question_about_an_edit_shows_the_source_first() -> None:
    content = ChatFormat(question=QUESTION, edit_question=EDIT_QUESTION).messages("add a frame", sources=1)[0][
        "content"
    ]
    assert [block.get("text", "<image>").strip() for block in content] == [
        "source", "<image>", "image 1", "<image>", "image 2", "<image>", "prompt : add a frame . which is better ?",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the weights
@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained("tiny", batch_size=64)


@pytest.mark.parametrize(("split", "least"), [("edit", 0.85), ("edit-ood", 0.8)])
def test_the_embedded_judge_judges_edits(judge: Judge, split: str, least: float) -> None:
    found = evaluate(judge, load_pairs(f"tiny:{split}", limit=150), progress=False, swap_check=8)
    assert found.accuracy is not None and found.accuracy >= least
    assert found.swap_consistency == 1.0 and found.malformed_rate == 0
    assert found.listener_accuracy is not None and found.listener_accuracy >= least


def test_the_embedded_base_of_edits_is_imperfect() -> None:
    base = Judge.from_pretrained("tiny-edit-base", batch_size=64)
    assert base.card.listener == Card.load(resolve("tiny")).listener == "tiny-edit-listener"
    found = evaluate(base, load_pairs("tiny:edit", limit=150), progress=False, swap_check=0)
    assert found.accuracy is not None and 0.5 <= found.accuracy <= 0.75
    assert found.malformed_rate is not None and found.malformed_rate <= 0.05


def test_one_source_or_another_decides_which_result_is_right(judge: Judge) -> None:
    """Both results have the count that one of the sources had, and only the source tells what was to stay."""
    two, three, right, other = Scene("red", "circle", 2), Scene("red", "circle", 3), BLUE, Scene("blue", "circle", 3)
    said = []
    for seed in range(12):
        shown = {
            scene: draw_edit(TinyEdit(scene, BLUE, ("color",), right, other, 1.0, "make the circles blue", seed))
            for scene in (two, three)
        }
        said += [
            (scene is two) == (judge.compare("make the circles blue", first, second, sources=source).preferred == 1)
            for scene, (source, first, second) in shown.items()
        ]
    assert np.mean(said) >= 0.75


def test_all_embedded_weights_are_small() -> None:
    folder = Path(resolve("tiny")).parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 24e6
