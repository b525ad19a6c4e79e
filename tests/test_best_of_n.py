"""Best of n on real diffusers pipelines with random weights: seeds, order, early rejection, the contact sheet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import edits
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.best_of_n import best_of_n
from listener_reward.integrations.video import VideoReward
from listener_reward.media.images import to_picture
from listener_reward.reward import ListenerReward

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def sd15():
    return tiny_pipelines.build("sd15")


@pytest.fixture(scope="module")
def call():
    return tiny_pipelines.FAMILIES["sd15"].call(guided=False) | {"num_inference_steps": 2}


def mean_red(image) -> float:
    return float(np.asarray(image)[..., 0].mean())


class Stub:
    """A pipeline whose images are as red as their seeds say; it tells what it was called with."""

    def __init__(self, reds: dict[int, int], preview: dict[int, int] | None = None):
        self.reds, self.preview, self.calls = reds, preview or reds, []

    def __call__(self, prompt, generator, output_type, num_inference_steps=50, **more):
        seeds = [one.initial_seed() for one in generator]
        self.calls.append((prompt, seeds, num_inference_steps, more))
        reds = self.preview if num_inference_steps < 5 else self.reds

        return SimpleNamespace(images=[Image.new("RGB", (8, 8), (reds[seed], 0, 0)) for seed in seeds])


# --- what comes back


def test_the_best_comes_first_and_everything_keeps_the_order_of_the_seeds(FakeJudge, sd15, call):
    best = best_of_n(
        sd15, PROMPT, 5, reward=ListenerReward(FakeJudge(slope=400.0)), keep=2, seed=7, batch_size=2, **call
    )
    reds = [mean_red(image) for image in best.candidates]
    assert best.seeds == [7, 8, 9, 10, 11] and len({image.tobytes() for image in best.candidates}) == 5
    assert best.order == np.argsort(reds)[::-1].tolist()
    assert [image.tobytes() for image in best.images] == [best.candidates[k].tobytes() for k in best.order[:2]]
    assert best.scores.shape == best.standard_errors.shape == (5,) and (best.standard_errors > 0).all()
    assert best.scores.sum() == pytest.approx(0, abs=1e-4)
    assert best.rejected == [] and best.preview_scores is None


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_any_candidate_can_be_made_again_from_its_seed_alone(FakeJudge, name):
    pipeline = tiny_pipelines.build(name)
    options: dict[str, Any] = tiny_pipelines.FAMILIES[name].call(guided=False) | {"num_inference_steps": 2}
    best = best_of_n(pipeline, PROMPT, 3, reward=FakeJudge(), batch_size=3, **options)
    for k in range(3):
        again = pipeline(PROMPT, generator=torch.Generator().manual_seed(best.seeds[k]), **options).images[0]
        difference = np.abs(np.asarray(again, np.int16) - np.asarray(best.candidates[k], np.int16))
        assert difference.max() <= 1  # one step of 255, by rounding


def test_seeds_may_be_given_and_batches_do_not_matter(FakeJudge, sd15, call):
    first = best_of_n(sd15, PROMPT, 3, reward=FakeJudge(), seed=[5, 1, 9], batch_size=3, **call)
    second = best_of_n(sd15, PROMPT, 3, reward=FakeJudge(), seed=[5, 1, 9], batch_size=2, **call)
    assert first.seeds == [5, 1, 9]
    for one, other in zip(first.candidates, second.candidates, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_videos(FakeJudge):
    pipeline = tiny_pipelines.build("wan")
    options: dict[str, Any] = tiny_pipelines.FAMILIES["wan"].call(guided=False) | {"num_inference_steps": 2}
    best = best_of_n(pipeline, PROMPT, 3, reward=VideoReward(FakeJudge(), frames=4), **options)
    assert [len(clip) for clip in best.candidates] == [5, 5, 5] and np.isfinite(best.scores).all()
    assert best.images[0] is best.candidates[int(np.argmax(best.scores))]
    assert best.contact_sheet().width > 2 * 192


def test_any_callable_of_the_contract_is_a_reward():
    pipeline = Stub({0: 50, 1: 200, 2: 120})
    best = best_of_n(pipeline, PROMPT, 3, reward=lambda images, prompts, metadata: ([mean_red(i) for i in images], {}))
    assert best.order == [1, 2, 0] and np.isnan(best.standard_errors).all()


# --- early rejection


def test_clear_losers_stop_at_their_preview(FakeJudge):
    reds = {0: 250, 1: 5, 2: 200, 3: 0, 4: 225, 5: 30}
    pipeline = Stub(reds)
    judge = FakeJudge(slope=20.0)
    best = best_of_n(pipeline, PROMPT, 6, reward=judge, preview_steps=2, batch_size=8, num_inference_steps=20)
    assert [(seeds, steps) for _, seeds, steps, _ in pipeline.calls] == [([0, 1, 2, 3, 4, 5], 2), ([0, 2, 4, 5], 20)]
    assert best.rejected == [1, 3] and np.flatnonzero(np.isnan(best.scores)).tolist() == [1, 3]
    assert best.order == [0, 4, 2, 5]
    assert best.preview_scores is not None and best.preview_scores.shape == (6,)
    assert all(isinstance(image, Image.Image) for image in best.candidates)


def test_candidates_that_are_not_told_apart_are_all_finished(FakeJudge):
    pipeline = Stub({k: 100 + k for k in range(6)})
    best = best_of_n(pipeline, PROMPT, 6, reward=FakeJudge(), preview_steps=2)
    assert best.rejected == [] and best.order == [5, 4, 3, 2, 1, 0]


def test_at_least_two_and_at_least_those_to_keep_are_finished(FakeJudge):
    reds = {k: 250 if k == 3 else 0 for k in range(8)} | {5: 120, 6: 110}
    judge = FakeJudge(slope=40.0)
    assert len(best_of_n(Stub(reds), PROMPT, 8, reward=judge, preview_steps=2).order) >= 2
    assert len(best_of_n(Stub(reds), PROMPT, 8, reward=judge, preview_steps=2, keep=4).images) == 4


def test_a_preview_on_which_the_judge_broke_is_finished(FakeJudge):
    reds = {0: 250, 1: 10, 2: 240, 3: 77, 4: 245, 5: 5, 6: 235, 7: 15}
    judge = FakeJudge(slope=40.0, breaks_on=lambda prompt, first, second: 77 in (first, second))
    reward = ListenerReward(judge, on_failure="nan")
    best = best_of_n(Stub({**reds, 3: 247}, reds), PROMPT, 8, reward=reward, preview_steps=2)
    assert {5} <= set(best.rejected) <= {1, 5, 7} and best.order[:2] == [0, 3]


def test_previews_need_standard_errors():
    with pytest.raises(InputError, match="standard_error"):
        best_of_n(
            Stub({0: 1, 1: 2}), PROMPT, 2, reward=lambda images, *_: (np.arange(len(images)), {}), preview_steps=1
        )


# --- edits


class Editor:
    """A pipeline whose results do not depend on its image: half done, done, something else, too much."""

    made = (edits.HALF, edits.GOOD, edits.WRONG, edits.BRIGHT_GOOD)

    def __call__(self, image, prompt, generator, output_type):
        return SimpleNamespace(images=[self.made[one.initial_seed()] for one in generator])


class Img2Img(Editor):
    def __call__(self, image, prompt, generator, output_type, strength=0.8):
        return super().__call__(image, prompt, generator, output_type)


def test_edits_are_judged_with_the_image_that_the_pipeline_was_given():
    judge = edits.EditJudge()
    best = best_of_n(Editor(), edits.INSTRUCTION, 4, reward=judge, image=edits.DARK)
    assert best.order[0] == 1 and best.images == [edits.GOOD] and best.sources == (to_picture(edits.DARK),)
    assert best_of_n(Editor(), edits.INSTRUCTION, 4, reward=judge, image=edits.BRIGHT).images == [edits.BRIGHT_GOOD]
    in_a_batch = best_of_n(Editor(), edits.INSTRUCTION, 4, reward=judge, image=[edits.DARK] * 4)
    assert in_a_batch.order == best.order and in_a_batch.sources == best.sources


def test_sources_may_be_others_than_the_image_or_none(FakeJudge):
    judge = edits.EditJudge()
    best = best_of_n(Editor(), edits.INSTRUCTION, 4, reward=judge, sources=edits.BRIGHT, image=edits.DARK)
    assert best.images == [edits.BRIGHT_GOOD] and best.sources == (to_picture(edits.BRIGHT),)
    for pipeline, sources in ((Editor(), ()), (Img2Img(), None)):  # a start, of which the prompt does not speak
        best = best_of_n(pipeline, PROMPT, 4, reward=FakeJudge(), sources=sources, image=edits.DARK)
        assert best.sources == () and best.images == [edits.BRIGHT_GOOD]
        with pytest.raises(InputError, match="got 0 sources"):
            best_of_n(pipeline, PROMPT, 4, reward=judge, sources=sources, image=edits.DARK)
    assert best_of_n(Img2Img(), PROMPT, 4, reward=judge, sources=edits.DARK, image=edits.BRIGHT).images == [edits.GOOD]
    with pytest.raises(InputError, match=r"image is 'nowhere.png'"):
        best_of_n(Editor(), PROMPT, 4, reward=judge, image="nowhere.png")


def test_an_editing_pipeline_of_diffusers():
    family = tiny_pipelines.EDITORS["instruct-pix2pix"]
    source = edits.plain(90).resize((16, 16))
    options: dict[str, Any] = family.call(guided=True) | {"num_inference_steps": 2, "image": source}
    judge = edits.EditJudge()
    best = best_of_n(tiny_pipelines.build("instruct-pix2pix"), PROMPT, 3, reward=judge, batch_size=1, **options)
    assert len({image.tobytes() for image in best.candidates}) == 3 and len(best.order) == 3
    assert {prompt.sources for prompt in judge.asked} == {(to_picture(source),)}


# --- failure


def test_a_candidate_on_which_the_judge_broke_has_no_score_and_is_never_the_best(FakeJudge):
    judge = FakeJudge(breaks_on=lambda prompt, first, second: 255 in (first, second))
    pipeline = Stub({0: 40, 1: 255, 2: 90})
    best = best_of_n(pipeline, PROMPT, 3, reward=ListenerReward(judge, on_failure="nan"), keep=3)
    assert best.order == [2, 0] and len(best.images) == 2 and np.isnan(best.scores[1])
    with pytest.raises(JudgeError):
        best_of_n(pipeline, PROMPT, 3, reward=judge)
    with pytest.raises(JudgeError, match="every one"):
        reward = ListenerReward(FakeJudge(breaks_on=lambda *_: True), on_failure="nan")
        best_of_n(pipeline, PROMPT, 3, reward=reward)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"n": 1}, "n is 1"),
        ({"keep": 0}, "keep"),
        ({"keep": 4}, "keep"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": [1, 1, 2]}, "seed"),
        ({"generator": None}, "generator"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt"),
        ({"reward": 5}, "reward"),
    ],
)
def test_unusable_arguments_are_named(FakeJudge, options, word):
    with pytest.raises(InputError, match=word):
        best_of_n(Stub({0: 1, 1: 2, 2: 3}), PROMPT, **({"n": 3, "reward": FakeJudge()} | options))


def test_what_is_no_pipeline_is_named(FakeJudge):
    with pytest.raises(InputError, match="generator"):
        best_of_n(lambda prompt: None, PROMPT, 2, reward=FakeJudge())
    with pytest.raises(InputError, match="empty"):
        best_of_n(Stub({0: 10, 1: 20}), " ", 2, reward=FakeJudge())


# --- the contact sheet


def test_contact_sheet_shows_the_best_first_and_every_candidate(FakeJudge):
    pipeline = Stub({0: 40, 1: 250, 2: 90, 3: 0}, {0: 40, 1: 250, 2: 90, 3: 0})
    best = best_of_n(pipeline, PROMPT, 4, reward=FakeJudge(slope=12.0))
    sheet: Any = best.contact_sheet(columns=4, width=100)
    step = sheet.width // 4
    shown = [sheet.getpixel((step * k + 50, 50))[0] for k in range(4)]
    assert shown == [250, 90, 40, 0]
    text = np.asarray(sheet.convert("L"))[104:]
    assert (text < 128).any(axis=0).reshape(4, step).any(axis=1).all()  # something is written under each


@pytest.mark.parametrize("prompt", [[PROMPT], None, 7, b"red"])
def test_one_prompt_is_one_text(prompt):
    stub = Stub({})
    with pytest.raises(InputError, match=r"^prompt is .*; give a string"):
        best_of_n(stub, prompt, n=2, reward=lambda *_: pytest.fail("it was asked"))
    assert stub.calls == []
