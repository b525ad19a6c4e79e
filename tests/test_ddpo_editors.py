"""DDPO on pipelines that are given an image: editors, and image to video, with tiny random weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from conftest import FakeJudge
from PIL import Image
from test_ddpo import changed, weights

from listener_reward import ListenerReward, Prompt
from listener_reward.errors import InputError
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer
from listener_reward.integrations.ddpo.log import read_metrics
from listener_reward.integrations.ddpo.prompts import ALONE, ONE_FOR_EACH, joint_arguments, read_prompts
from listener_reward.integrations.ddpo.rollout import Step, record, replay, replayed_log_prob
from listener_reward.integrations.ddpo.schedulers import log_prob_scheduler
from listener_reward.integrations.video import VideoReward

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STEPS = 3
TEXT = "a red circle"


def source(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SOURCES = source(0), source(1)
EDITS = [{"prompt": TEXT, "image": image} for image in SOURCES]
"""One instruction on two sources."""


def stock_of(released: Any) -> Any:
    """The first-order scheduler of the same schedule, written by hand, for a released one of another kind."""
    name = type(released).__name__
    if name == "EulerAncestralDiscreteScheduler":
        kind: Any = diffusers.DDIMScheduler
        return kind(**tiny.SCALED_LINEAR, timestep_spacing="trailing", clip_sample=False)
    if name == "UniPCMultistepScheduler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return released


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=tiny.EDITORS)
def family(request: pytest.FixtureRequest, dtype: torch.dtype) -> tuple[str, Any, Any]:
    """A family's name, a pipeline that takes gradients in its denoisers only, and its released scheduler."""
    pipeline = tiny.build(request.param, dtype)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(name in ("unet", "transformer", "transformer_2"))
    return request.param, pipeline, pipeline.scheduler


def options_of(name: str, pipeline: Any, edits: Sequence[Any], guided: bool = True) -> dict[str, Any]:
    """Of a call; an edit that comes twice is one prompt."""
    opened = {id(edit): read_prompts([edit], pipeline)[0].opened() for edit in edits}
    joint = joint_arguments([opened[id(edit)] for edit in edits], pipeline)
    return {"num_inference_steps": STEPS, **tiny.EDITORS[name].call(guided)} | joint


@pytest.mark.parametrize("guided", [True, False])
def test_without_noise_the_results_are_the_stock_samplers(family: tuple[str, Any, Any], guided: bool):
    name, pipeline, released = family
    pipeline.scheduler = log_prob_scheduler(released, noise_level=0.0)
    rollout = record(pipeline, [TEXT], options_of(name, pipeline, EDITS[:1], guided), seeded(0))
    pipeline.scheduler = stock_of(released)
    call = {"num_inference_steps": STEPS, "output_type": "pt", **tiny.EDITORS[name].call(guided)}

    def stock(image: Image.Image) -> torch.Tensor:
        return pipeline(prompt=TEXT, image=image, generator=seeded(0), **call)[0]

    assert torch.equal(rollout.images, stock(SOURCES[0])) and rollout.images.isfinite().all()
    assert not torch.equal(rollout.images, stock(SOURCES[1]))


@pytest.mark.parametrize("guided", [True, False])
def test_replayed_log_probabilities_are_the_recorded_ones(family: tuple[str, Any, Any], guided: bool):
    name, pipeline, released = family
    pipeline.scheduler = log_prob_scheduler(released, generator=seeded(3))
    edits = EDITS[:1] * tiny.EDITORS[name].batch
    rollout = record(pipeline, [TEXT] * len(edits), options_of(name, pipeline, edits, guided), seeded(0))
    assert [step.index for step in rollout.steps] == list(range(STEPS - 1))
    replayed, gradients = [], []

    def on_step(step: Step, output: Any) -> None:
        value, _, _ = replayed_log_prob(pipeline.scheduler, step, output)
        value.sum().backward()
        assert step.log_prob is not None and value.shape == (len(edits),)
        replayed.append(float((value.detach() - step.log_prob).abs().max()))
        parameters = [
            p for each in pipeline.components.values() if isinstance(each, torch.nn.Module) for p in each.parameters()
        ]
        gradients.append(sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None))
        for parameter in parameters:
            parameter.grad = None

    for steps in (rollout.steps, rollout.steps[1:]):  # the second begins in the middle
        replay(pipeline, rollout, steps, on_step)
    assert len(replayed) == 2 * STEPS - 3 and max(replayed) < 1e-4 and min(gradients) > 0


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DDPOConfig]:
    def make(family: str = "instruct-pix2pix", *, guided: bool = True, **fields: Any) -> DDPOConfig:
        options: dict[str, Any] = {"output_dir": str(tmp_path / "run")} | tiny.short_run(family, guided) | fields
        return DDPOConfig(**options)

    return make


# --- the trainer


def likeness(images: Any, prompts: Sequence[str], metadata: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """How near a result's mean colour is to its source's."""
    sources = [np.asarray(entry["sources"][0], dtype=np.float32).mean() / 255 for entry in metadata]
    means = images.flatten(1).mean(1)
    return -abs(means - torch.tensor(np.array(sources))), {}


@pytest.mark.parametrize("family", tiny.EDITORS)
def test_one_update_changes_the_lora_and_only_it(family: str, config: Callable[..., DDPOConfig]):
    """The reward is asked with the sources, the results of a source together."""
    asked = []

    def reward(images: Any, prompts: Sequence[Any], metadata: list[dict[str, Any]]) -> Any:
        video = "num_frames" in tiny.EDITORS[family].call(True)
        assert images.ndim == 4 + video and images.shape[-3] == 3
        asked.extend(np.asarray(entry["sources"][0]).tobytes() for entry in metadata)
        return likeness(images, prompts, metadata)

    pipeline = tiny.build(family)
    settings = config(family, prompts_per_epoch=2, images_per_prompt=2)
    trainer = DDPOTrainer(pipeline, reward, EDITS, settings)
    before = weights(pipeline)
    trainer.train()
    moved = changed(before, weights(pipeline))
    assert moved and {name for name in before if "lora_B" in name} == set(moved)
    row = trainer.history[0]
    assert row["ratio_deviation"] < 1e-4 and row["clip_fraction"] == 0 and row["kl"] == 0 and row["grad_norm"] > 0
    order = [SOURCES[n].tobytes() for n in trainer._choose_prompts(0)]
    assert asked == [each for each in order for _ in range(2)]


def test_a_call_with_two_sources_gives_each_what_it_gets_alone(family: tuple[str, Any, Any], dtype: torch.dtype):
    name, pipeline, released = family
    pipeline.scheduler = log_prob_scheduler(released, noise_level=0.0)
    kinds = {cls.__name__ for cls in type(pipeline).__mro__}
    if kinds.isdisjoint(ONE_FOR_EACH):
        what = "batch_size=1" if kinds & {*ALONE} else "a batch_size that divides images_per_prompt"
        with pytest.raises(InputError, match=what):
            options_of(name, pipeline, EDITS)
        return

    def draw(*numbers: int) -> torch.Tensor:
        options, seeds = options_of(name, pipeline, [EDITS[k] for k in numbers]), [seeded(k) for k in numbers]
        return record(pipeline, [TEXT] * len(numbers), options, cast(Any, seeds)).images

    both, rounding = draw(0, 1), 1e-5 if dtype is torch.float32 else 0.03
    for k in (0, 1):
        assert torch.allclose(draw(k)[0], both[k], atol=rounding)


@pytest.mark.parametrize("family", ["instruct-pix2pix", "flux-kontext", "qwen-image-edit", "wan-i2v", "ltx-i2v"])
def test_a_stock_pipeline_reads_the_lora(family: str, config: Callable[..., DDPOConfig]):
    settings = config(family, learning_rate=0.1)
    pipeline, fresh = tiny.build(family), tiny.build(family)
    folder = DDPOTrainer(pipeline, likeness, EDITS, settings).train()

    def result(of: Any) -> torch.Tensor:
        call = {"num_inference_steps": 2, "generator": seeded(0), "output_type": "pt", **settings.call}
        return of(prompt=TEXT, image=SOURCES[0], **call)[0]

    base = result(fresh)
    fresh.load_lora_weights(folder)
    assert torch.allclose(result(fresh), result(pipeline), atol=1e-5)
    assert not torch.allclose(result(fresh), base, atol=1e-5)


@pytest.mark.parametrize("family", ["instruct-pix2pix", "qwen-image-edit-plus", "wan2.2-i2v", "ltx-i2v"])
def test_the_forward_process_loss_learns_edits_too(family: str, config: Callable[..., DDPOConfig]):
    pipeline = tiny.build(family, torch.bfloat16)
    trainer = DDPOTrainer(pipeline, likeness, EDITS, config(family, loss="nft"))
    before = weights(pipeline)
    trainer.train()
    moved = changed(before, weights(pipeline))
    assert moved and all("lora_B" in name for name in moved)


def test_several_references_reach_the_pipeline_and_the_reward(config: Callable[..., DDPOConfig]):
    pipeline, judge = tiny.build("qwen-image-edit-plus"), FakeJudge()
    lengths, encode = [], pipeline.encode_prompt

    def watched(*args: Any, **kwargs: Any) -> Any:
        lengths.append(len(kwargs["image"]))
        return encode(*args, **kwargs)

    pipeline.encode_prompt = watched
    settings = config("qwen-image-edit-plus", images_per_prompt=2)
    DDPOTrainer(pipeline, ListenerReward(cast(Any, judge)), [{"prompt": TEXT, "image": [*SOURCES]}], settings).train()
    assert lengths == [2, 2] * 2  # a prompt and its negative, for each of two results; replays remember them
    assert {prompt for call in judge.calls for prompt, _, _ in call} == {Prompt(TEXT, SOURCES)}


def test_videos_are_judged_as_clips_beside_their_first_frame(config: Callable[..., DDPOConfig]):
    judge: Any = FakeJudge(slope=50.0, listener_slope=50.0)
    settings = config("wan-i2v", prompts_per_epoch=2, images_per_prompt=2, sample_every=1, sample_prompts=2)
    trainer = DDPOTrainer(tiny.build("wan-i2v"), VideoReward(judge, frames=2), EDITS, settings)
    folder = trainer.train()
    assert trainer.history[0]["info/comparisons"] == 1 and trainer.history[0]["reward_missing"] == 0
    assert {prompt for call in judge.calls for prompt, _, _ in call} == {Prompt(TEXT, (image,)) for image in SOURCES}
    sheet = np.asarray(Image.open(folder / "samples" / "epoch-00001.png"))
    assert sheet.shape == (32, 32, 3)  # frames of 16 x 16, below sources that were reduced to that


# --- groups, samples, resume


def test_one_instruction_on_two_sources_is_two_groups(config: Callable[..., DDPOConfig]):
    judge: Any = FakeJudge(slope=50.0, listener_slope=50.0)
    settings = config(prompts_per_epoch=2, images_per_prompt=3, batch_size=6, sample_every=1, sample_prompts=2)
    trainer = DDPOTrainer(
        tiny.build("instruct-pix2pix"), ListenerReward(judge), EDITS, settings, second_reward=likeness
    )
    folder = trainer.train()
    row = trainer.history[0]
    assert row["info/comparisons"] == 2 and row["agreement"] == 1  # five, were the six images one group
    assert row["second_reward_mean"] < 0 and row["win_rate"] == pytest.approx(0.5, abs=0.5)
    asked = {prompt for call in judge.calls for prompt, _, _ in call}
    assert asked == {Prompt(TEXT, (image,)) for image in SOURCES}
    for epoch in (0, 1):
        sheet = np.asarray(Image.open(folder / "samples" / f"epoch-{epoch:05d}.png"))
        assert sheet.shape == (64, 64, 3)  # the sources above, the results below
        assert np.array_equal(sheet[:32], np.concatenate([np.asarray(image) for image in SOURCES], axis=1))


def test_a_run_that_goes_on_ends_as_it_would_have(tmp_path: Path):
    """The reward's references are by source, and the statistics are of a prompt with its source."""

    def train(folder: str, **fields: Any) -> tuple[Any, Any, Path]:
        pipeline, reward = tiny.build("instruct-pix2pix"), ListenerReward(FakeJudge(slope=40.0), scheme="reference")
        settings = DDPOConfig(
            **tiny.short_run("instruct-pix2pix", guided=True)
            | {"output_dir": str(tmp_path / folder), "epochs": 2, "save_every": 1, "learning_rate": 1e-2}
            | {"prompts_per_epoch": 2, "images_per_prompt": 2, "advantage": "prompt", "prompt_min_count": 3}
            | fields
        )
        trainer = DDPOTrainer(pipeline, reward, EDITS, settings)
        folder_of_run = trainer.train(resume=True)
        assert {*trainer.statistics.rewards} == {0, 1}
        return weights(pipeline), reward.state_dict(), folder_of_run

    train("cut", epochs=1)
    cut, whole = train("cut"), train("whole")
    assert not changed(cut[0], whole[0]) and cut[1] == whole[1]
    assert {*cut[1]["references"]} == {Prompt(TEXT, (image,)).key for image in SOURCES}
    for row, other in zip(*(read_metrics(run[2] / "metrics.jsonl") for run in (cut, whole)), strict=True):
        assert row.keys() == other.keys()
        assert all(row[name] == other[name] for name in row if not name.startswith("seconds_"))


def test_sources_of_several_sizes_are_scored_apart(config: Callable[..., DDPOConfig]):
    wide, shapes = source(2, (48, 32)), []

    def reward(images: Any, prompts: Sequence[Any], metadata: Any) -> Any:
        shapes.append(tuple(images.shape))
        return likeness(images, prompts, metadata)

    edits = [*EDITS[:1], {"prompt": TEXT, "image": wide}]
    settings = config(prompts_per_epoch=2, images_per_prompt=2, sample_every=1, sample_prompts=2)
    trainer = DDPOTrainer(tiny.build("instruct-pix2pix"), reward, edits, settings)
    folder = trainer.train()
    assert {*shapes} == {(2, 3, 32, 32), (2, 3, 32, 48)} and trainer.history[0]["win_rate"] >= 0
    assert np.asarray(Image.open(folder / "samples" / "epoch-00001.png")).shape == (64, 96, 3)
    mixed = replace(settings, batch_size=4, output_dir=str(folder.with_name("mixed")))
    with pytest.raises(InputError, match=r"32 x 32 pixels .* 48 x 32; take a batch_size that divides images_per_pr"):
        DDPOTrainer(tiny.build("instruct-pix2pix"), reward, edits, replace(mixed, sample_every=0)).train()


# --- how prompts are given


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_an_image_may_be_given_in_any_form(tmp_path: Path):
    pipeline, path = tiny.build("instruct-pix2pix"), tmp_path / "a.png"
    path.write_bytes(png(SOURCES[0]))
    forms = (SOURCES[0], str(path), path, png(SOURCES[0]), {"bytes": png(SOURCES[0])}, np.asarray(SOURCES[0]))
    given: list[Any] = [{"prompt": TEXT, "image": form, "id": 3} for form in forms]
    for prompt in read_prompts([*given, Prompt(TEXT, SOURCES[0])], pipeline):
        opened = prompt.opened()
        assert opened.text == opened.prompt == TEXT
        assert joint_arguments([opened], pipeline)["image"].tobytes() == SOURCES[0].tobytes()
        assert [image.tobytes() for image in opened.metadata["sources"]] == [SOURCES[0].tobytes()]
    assert read_prompts(given, pipeline)[0].metadata["id"] == 3
    for nothing in (None, []):  # a column of a table that has no image here
        opened = read_prompts([{"prompt": TEXT, "image": nothing, "sources": nothing}], pipeline)[0].opened()
        assert opened.arguments == {} and "sources" not in opened.metadata


def test_arguments_of_a_call_are_its_prompts_own():
    pipeline, other = tiny.build("instruct-pix2pix"), "a blue square"

    def joint(*prompts: dict[str, Any]) -> dict[str, Any]:
        return joint_arguments([prompt.opened() for prompt in read_prompts(prompts, pipeline)], pipeline)

    first, second = ({"prompt": TEXT, "negative_prompt": text, "guidance_scale": 3.0, "id": text} for text in "ab")
    assert joint(first, second) == {"negative_prompt": ["a", "b"], "guidance_scale": 3.0}
    with pytest.raises(InputError, match=r"prompts\[0\] and prompts\[1\], in the same call, have different guidance_s"):
        joint(first, second | {"guidance_scale": 4.0})
    with pytest.raises(InputError, match=r"prompts\[0\] has negative_prompt and prompts\[1\], in the same call, has"):
        joint(first, {"prompt": other, "guidance_scale": 3.0})
    with pytest.raises(InputError, match=r"a prompt has several images as its image, and .* take batch_size=1"):
        joint(*({"prompt": TEXT, "image": [*SOURCES]} for _ in range(2)))
    images = joint({"prompt": TEXT, "image": [*SOURCES]})["image"]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in SOURCES]


@pytest.mark.parametrize(
    ("family", "entry", "message"),
    [
        ("sd15", {"prompt": TEXT, "image": SOURCES[0]}, "the call of a StableDiffusionPipeline takes none"),
        (
            "instruct-pix2pix",
            {"prompt": TEXT, "image": "nowhere.png"},
            r"prompts\[0\].image is 'nowhere.png', and there",
        ),
        (
            "sd15",
            {"prompt": TEXT, "sources": [SOURCES[0], "nowhere.png"]},
            r"prompts\[0\].sources is 'nowhere.png', and",
        ),
        ("instruct-pix2pix", {"prompt": TEXT, "latents": 1}, r"prompts\[0\] has latents, which the trainer sets"),
        ("instruct-pix2pix", {"image": SOURCES[0]}, r"prompts\[0\] is .* a mapping with a 'prompt'"),
        ("instruct-pix2pix", {"prompt": Prompt(TEXT, SOURCES[0]), "image": SOURCES[1]}, "leave one of them out"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_refused(family: str, entry: Any, message: str):
    with pytest.raises(InputError, match=message):
        read_prompts([entry], tiny.build(family))


def test_the_reward_alone_may_have_sources_and_a_criterion(config: Callable[..., DDPOConfig]):
    """A drawing of a subject: the pipeline takes no image, the judge sees it."""
    judge: Any = FakeJudge()
    prompts = [Prompt(TEXT, SOURCES[0], "alignment"), {"prompt": TEXT, "sources": SOURCES[1]}]
    settings = DDPOConfig(**tiny.short_run("sd15") | {"output_dir": config().output_dir, "prompts_per_epoch": 2})
    DDPOTrainer(tiny.build("sd15"), ListenerReward(judge), prompts, settings).train()
    asked = {prompt for call in judge.calls for prompt, _, _ in call}
    assert asked == {Prompt(TEXT, SOURCES[0], "alignment"), Prompt(TEXT, SOURCES[1])}
