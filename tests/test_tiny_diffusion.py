"""The tiny diffusion model draws its world, and the reader says truly what it drew."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw

from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.tiny.diffusion import (
    CALL,
    WEIGHTS,
    build_pipeline,
    draw_pictures,
    evaluate_samples,
    load_pipeline,
    main,
    set_encoder,
)
from listener_reward.tiny.drawing import draw
from listener_reward.tiny.generated import sample_pairs, samples
from listener_reward.tiny.read import Reading, asked, read
from listener_reward.tiny.world import COLORS, SHAPES, Scene, held_out, utility, wording


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline()


def picture(pipeline, prompt: str, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(prompt, generator=generator, **CALL).images[0])


# -------------------------------------------------------------------------------------------------------- the reader


def drawn(quality: str, n: int, side: int | None) -> list[tuple[Scene, Reading]]:
    """`n` scenes, drawn at the size they come in or shrunk to `side`, and what is read in them."""
    rows = []
    for k in range(n):
        rng = random.Random(f"reader/{k}")
        scene = Scene(rng.choice(COLORS), rng.choice(SHAPES), rng.randint(1, 3), quality)
        image = draw(scene, rng)
        if side:
            image = image.resize((side * image.width // min(image.size), side * image.height // min(image.size)))
        rows.append((scene, read(image)))
    return rows


@pytest.mark.parametrize("side", [None, 48])
@pytest.mark.parametrize(("quality", "least"), [("clean", 0.98), ("faded", 0.98), ("glitched", 0.65)])
def test_the_reader_reads_what_was_drawn(quality: str, least: float, side: int | None):
    """Bars hide what they cover, and two objects that one of them joins: damaged pictures cannot all be read."""
    rows = drawn(quality, 120, side)
    assert np.mean([reading.scene() == scene for scene, reading in rows]) >= least
    assert np.mean([reading.quality == quality for _, reading in rows]) >= 0.98
    assert np.mean([reading.fits(scene)["color"] for scene, reading in rows]) >= 0.95


def test_the_readers_utility_is_the_worlds():
    asked_for = Scene("red", "circle", 2)
    for scene, reading in drawn("clean", 40, None):
        if reading.scene() == scene:
            assert reading.utility(asked_for) == pytest.approx(utility(asked_for, scene))


def test_objects_that_differ_count_by_their_share():
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((10, 30, 40, 60), fill=(220, 30, 30))
    ImageDraw.Draw(image).ellipse((56, 30, 86, 60), fill=(30, 60, 230))
    reading = read(image)
    assert {blot.color for blot in reading.blots} == {"red", "blue"}
    assert reading.scene() is None
    assert reading.utility(Scene("red", "circle", 2)) == pytest.approx(1.0 + 2.0 + 1.5 + 1.2)
    assert reading.fits(Scene("red", "circle", 2)) == {"color": False, "shape": True, "count": True}


def test_pictures_of_nothing_are_worth_nothing():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    for image in (Image.new("RGB", (48, 48), "white"), Image.new("RGB", (1, 1)), Image.new("L", (500, 30), 9)):
        assert read(image).utility(Scene("red", "circle", 1)) == 0
    assert read(noise).scene() is None


def test_prompts_are_understood_in_every_wording():
    rng = random.Random(0)
    for _ in range(200):
        scene = Scene(rng.choice(COLORS), rng.choice(SHAPES), rng.randint(1, 3))
        assert asked(wording(scene, rng)) == scene
    with pytest.raises(InputError, match="a red fox"):
        asked("a red fox")


# --------------------------------------------------------------------------------------------------------- the model


def test_it_loads_as_any_pipeline_does_and_draws_the_same(pipeline):
    stock = DiffusionPipeline.from_pretrained(WEIGHTS)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is StableDiffusionPipeline
    same = picture(pipeline, "two red circles", 3)
    assert same.shape == (64, 64, 3)
    assert (picture(stock, "two red circles", 3) == same).all()
    assert (picture(pipeline, "two red circles", 4) != same).any()
    assert (picture(pipeline, "three blue stars", 3) != same).any()


def test_it_is_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 5e6


def test_it_draws_recognisably_and_often_wrongly(pipeline):
    """Room for a reward: far above chance (one in 72 for all three, one in 6 for the colour), far below the prompts."""
    found = evaluate_samples(pipeline, 100, seed=1)
    assert found["a scene"] > 0.65
    assert 0.25 < found["all three"] < 0.6
    assert min(found["color"], found["shape"], found["count"]) > 0.5
    assert utility(Scene("red", "circle", 1), Scene("red", "circle", 1)) > found["utility"] + 0.8


def test_the_encoder_keeps_what_it_must(pipeline):
    _, pictures = draw_pictures(60, seed=5)
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures / 127.5 - 1).latents
        shown = pipeline.vae.decode(latents).sample
    latents *= pipeline.vae.config.scaling_factor
    assert latents.mean().abs() < 0.1
    assert 0.8 < latents.std() < 1.2, "the denoiser learns latents of unit variance"
    pairs = [
        [read(pipeline.image_processor.postprocess(x[None])[0]).scene() for x in batch]
        for batch in (shown, pictures / 127.5 - 1)
    ]
    assert np.mean([a == b for a, b in zip(*pairs, strict=True)]) > 0.75


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test choose how many threads torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_script_runs_resumes_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def arguments(out: str) -> list[str]:
        folders = ["--out", str(tmp_path / out), "--scratch", str(tmp_path / "kept")]
        return ["--steps", "2", "--pictures", "40", "--samples", "4", *folders]

    monkeypatch.setattr(sys, "argv", ["diffusion.py", *arguments("once")])
    main()
    assert "| utility |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["diffusion.py", *arguments("again")])
    main()  # both stages are done: it only saves and measures
    before, after = (
        (tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for folder in ("once", "again")
    )
    assert before == after
    assert "| all three |" in (tmp_path / "once" / "README.md").read_text()


def test_the_encoder_computes_principal_components():
    pipeline = build_pipeline()
    _, pictures = draw_pictures(30, seed=6)
    latents = set_encoder(pipeline.vae, pictures)
    with torch.no_grad():
        encoded = pipeline.vae.encode(pictures / 127.5 - 1).latents * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(encoded, latents, atol=1e-4, rtol=1e-4)
    covariance = torch.cov(latents.transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance, covariance.diag().diag(), atol=1e-3, rtol=0)
    assert covariance.diag().mean() == pytest.approx(1, abs=1e-3)
    kept = covariance.diag().flip(0)
    assert (kept[:-1] >= kept[1:] - 1e-4).all(), "the largest components"


def test_random_weights_are_seeded():
    assert torch.equal(build_pipeline(1).unet.conv_in.weight, build_pipeline(1).unet.conv_in.weight)
    assert not torch.equal(build_pipeline(1).unet.conv_in.weight, build_pipeline(2).unet.conv_in.weight)


# -------------------------------------------------------------------------------------------------- generated pairs


def test_generated_pairs_are_labelled_by_what_is_read_in_them():
    for _, (first, second, share) in zip(range(30), sample_pairs(seed=5, votes=401), strict=False):
        assert first.prompt == second.prompt == asked(first.wording)
        assert first.picture.tobytes() != second.picture.tobytes()
        gap = read(first.picture).utility(first.prompt) - read(second.picture).utility(first.prompt)
        assert share == pytest.approx(1 / (1 + np.exp(-gap)), abs=0.1)


def test_the_generated_split_is_seeded_and_its_prompts_are_those_of_training():
    rows = load_pairs("tiny:generated", limit=8).to_list()
    again, others = (load_pairs("tiny:generated", limit=8, seed=seed).to_list() for seed in (0, 1))
    assert rows == again != others
    assert {row["dataset"] for row in rows} == {"tiny:generated"}
    groups = [group for _, group in zip(range(40), samples(seed=3, each=2), strict=False)]
    assert not any(held_out(group[0].prompt.color, group[0].prompt.shape) for group in groups)
