"""The DDPO trainer: one update on each of eleven families, learning, resume after a kill, and what may go wrong."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from conftest import FakeJudge
from peft import PeftModel
from PIL import Image

from listener_reward import ListenerReward, Mixture
from listener_reward.advantages import group_advantages, normalised_sum
from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer, ReplayError
from listener_reward.integrations.ddpo.log import checkpoints, read_metrics, save_checkpoint
from listener_reward.integrations.ddpo.rollout import record
from listener_reward.integrations.video import VideoReward

PROMPTS = ["a red circle", "a blue square", "a green triangle"]


def brightness(images: Any, prompts: Sequence[str], metadata: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    return images.flatten(1).mean(1), {}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DDPOConfig]:
    def make(family: str = "sd15", *, guided: bool = False, **fields: Any) -> DDPOConfig:
        options: dict[str, Any] = {"output_dir": str(tmp_path / "run")} | tiny.short_run(family, guided) | fields
        return DDPOConfig(**options)

    return make


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the pipeline, by name."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for key, value in module.state_dict().items()
    }


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


# --- one update


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_update_changes_the_lora_and_only_it(family: str, config: Callable[..., DDPOConfig]):
    pipeline = tiny.build(family)
    trainer = DDPOTrainer(pipeline, brightness, PROMPTS, config(family, guided=True))
    before = weights(pipeline)
    trainer.train()
    moved = changed(before, weights(pipeline))
    assert moved and all("lora_" in name for name in moved)
    # B starts at zero, so that A has no gradient in the first update; every B has to move.
    assert {name for name in before if "lora_B" in name} == set(moved)
    row = trainer.history[0]
    assert row["ratio_deviation"] < 1e-4 and row["clip_fraction"] == 0 and row["kl"] == 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("family", ["sd15", "sd3", "wan2.2", "cogvideox"])
def test_the_forward_process_loss_is_one_switch(family: str, config: Callable[..., DDPOConfig]):
    pipeline = tiny.build(family, torch.bfloat16)
    trainer = DDPOTrainer(pipeline, brightness, PROMPTS, config(family, guided=True, loss="nft"))
    before = weights(pipeline)
    trainer.train()
    moved = changed(before, weights(pipeline))
    assert moved and all("lora_B" in name for name in moved)
    assert "ratio_deviation" not in trainer.history[0]


def test_full_fine_tuning_changes_the_denoiser_and_nothing_else(config: Callable[..., DDPOConfig]):
    pipeline = tiny.build("sd3")
    before = weights(pipeline)
    folder = DDPOTrainer(pipeline, brightness, PROMPTS, config("sd3", train="full", kl=0.0)).train()
    after = weights(pipeline)
    moved = changed(before, after)
    assert moved and all(name.startswith("transformer.") for name in moved)
    reloaded = type(pipeline.transformer).from_pretrained(folder / "transformer").state_dict()
    assert all(torch.equal(value, after[f"transformer.{name}"]) for name, value in reloaded.items())


@pytest.mark.parametrize("family", ["sd15", "flux", "pixart-sigma", "wan2.2"])
def test_a_stock_pipeline_reads_the_lora(family: str, config: Callable[..., DDPOConfig]):
    """With alpha other than the rank, which diffusers loses unless it is told."""
    settings = config(family, lora_alpha=6.0, learning_rate=0.1, train_fraction=1.0)
    pipeline = tiny.build(family)
    trainer = DDPOTrainer(pipeline, brightness, PROMPTS, settings)
    folder = trainer.train()
    fresh = tiny.build(family)
    assert type(pipeline.scheduler) is type(fresh.scheduler)  # the user's own is back

    def images(of: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return of("a red circle", num_inference_steps=2, generator=generator, output_type="pt", **settings.call)[0]

    base = images(fresh)
    if family == "pixart-sigma":  # diffusers has no LoRA loader for it
        fresh.transformer = PeftModel.from_pretrained(fresh.transformer, folder / "transformer")
    else:
        fresh.load_lora_weights(folder)
    if family == "wan2.2":
        fresh.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)
    assert torch.allclose(images(fresh), images(pipeline), atol=1e-5)
    assert not torch.allclose(images(fresh), base, atol=1e-5)


@pytest.mark.parametrize("extra", [{"gradient_checkpointing": True}, {"mixed_precision": "bf16"}])
def test_checkpointing_and_autocast_learn_the_same(extra: dict[str, Any], config: Callable[..., DDPOConfig]):
    def update(**fields: Any) -> torch.Tensor:
        pipeline = tiny.build("sd3")
        trainer = DDPOTrainer(pipeline, brightness, PROMPTS, config("sd3", save_every=9, **fields))
        trainer.train()
        AcceleratorState._reset_state()
        assert trainer.history[0]["ratio_deviation"] < 1e-4
        return torch.cat([parameter.detach().flatten() for parameter in trainer.learner.parameters])

    plain = update(output_dir=str(Path(config().output_dir).with_name("plain")))
    other = update(**extra)
    assert torch.cosine_similarity(plain, other, dim=0) > 0.9
    if "gradient_checkpointing" in extra:
        assert torch.allclose(plain, other, atol=1e-6)


# --- learning


@pytest.fixture(scope="module")
def painter() -> dict[str, torch.Tensor]:
    """Weights of a tiny SD3 that draws plain pictures of any colour: a few seconds of training make a sampler."""
    from listener_reward.integrations.ddpo.schedulers import log_prob_scheduler

    pipeline = tiny.build("sd3")
    transformer, prompts = pipeline.transformer, [PROMPTS[0]] * 16
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=16
        )
    scheduler, generator = log_prob_scheduler(pipeline.scheduler), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(50)
    optimizer = torch.optim.AdamW(transformer.parameters(), 4e-3)
    for _ in range(120):
        x0 = (torch.rand(16, 4, 1, 1, generator=generator) * 2 - 1).expand(16, 4, 8, 8)
        noise = torch.randn(x0.shape, generator=generator)
        index = int(torch.randint(0, 50, (1,), generator=generator))
        time = scheduler.schedule[index].expand(16)
        output = transformer(scheduler.diffuse(index, x0, noise), embeds, pooled, time, return_dict=False)[0]
        ((output - (noise - x0)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return transformer.state_dict()


@pytest.mark.parametrize("loss", ["ppo", "nft"])
def test_the_reward_rises(loss: str, painter: dict[str, torch.Tensor], config: Callable[..., DDPOConfig]):
    pipeline = tiny.build("sd3")
    pipeline.transformer.load_state_dict(painter)
    settings = config(
        "sd3",
        loss=loss,
        dynamics="flow_sde",
        epochs=6,
        num_inference_steps=4,
        images_per_prompt=16,
        batch_size=16,
        learning_rate=1e-2,
        kl=0.0,
    )
    trainer = DDPOTrainer(pipeline, brightness, PROMPTS, settings)
    trainer.train()
    rewards = [row["reward_mean"] for row in trainer.history]
    assert rewards[-1] - rewards[0] > trainer.history[0]["reward_std"]


# --- rewards


def test_a_missing_reward_has_no_part_in_anything(config: Callable[..., DDPOConfig]):
    """The update with a score missing is the one that the other three make by themselves, whatever its image."""

    def only(scores: list[float | None]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        pipeline = tiny.build("sd15")
        settings = config(kl=0.0, batch_size=4, output_dir=str(Path(config().output_dir).with_name(str(len(runs)))))
        trainer = DDPOTrainer(pipeline, lambda images, prompts, metadata: (scores, {}), PROMPTS, settings)
        trainer.train()
        runs.append(trainer)
        return weights(pipeline), trainer.history[0]

    runs: list[DDPOTrainer] = []
    masked, row = only([0.1, None, 0.3, 0.8])
    assert row["reward_missing"] == 0.25 and row["reward_mean"] == pytest.approx(0.4)
    as_zero, _ = only([0.1, 0.0, 0.3, 0.8])
    as_nan, _ = only([0.1, float("nan"), 0.3, 0.8])
    assert not changed(masked, as_nan)
    assert changed(masked, as_zero)
    before = weights(DDPOTrainer(tiny.build("sd15"), brightness, PROMPTS, config()).pipeline)
    nothing, _ = only([None] * 4)
    assert not changed(before, nothing)


def test_rewards_are_computed_while_the_next_batch_is_sampled(config: Callable[..., DDPOConfig]):
    threads, overlapped = set(), []
    sampling = threading.Event()

    def reward(images: Any, prompts: Sequence[str], metadata: Any) -> Any:
        threads.add(threading.current_thread().name)
        overlapped.append(sampling.wait(20))  # only another thread can end this wait
        return brightness(images, prompts, metadata)

    pipeline = tiny.build("sd15")
    trainer = DDPOTrainer(pipeline, reward, PROMPTS, config(prompts_per_epoch=2, images_per_prompt=2))
    calls, call = [], type(pipeline).__call__

    class Watched(type(pipeline)):
        @functools.wraps(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                sampling.set()
            return call(self, *args, **kwargs)

    pipeline.__class__ = Watched
    trainer.train()
    assert overlapped == [True, True]
    assert threading.current_thread().name not in threads


def test_a_prompts_images_come_in_one_call_with_their_metadata(config: Callable[..., DDPOConfig]):
    seen = []

    def reward(images: Any, prompts: Sequence[str], metadata: list[dict[str, Any]]) -> Any:
        assert images.shape == (len(prompts), 3, 16, 16) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        seen.append((prompts, [entry["id"] for entry in metadata]))
        return np.arange(len(prompts)), {"even": np.arange(len(prompts)) % 2, "text": ["x"] * len(prompts), "one": 1}

    prompts = [{"prompt": text, "id": number} for number, text in enumerate(PROMPTS)]
    settings = config(prompts_per_epoch=3, images_per_prompt=4, batch_size=6)
    trainer = DDPOTrainer(tiny.build("sd15"), reward, prompts, settings)
    trainer.train()
    for texts, numbers in seen:
        assert texts == [PROMPTS[number] for number in numbers]
        assert all(numbers.count(number) == 4 for number in numbers)
    assert sorted(number for _, numbers in seen for number in numbers) == [0] * 4 + [1] * 4 + [2] * 4
    assert trainer.history[0]["info/even"] == 0.5 and "info/text" not in trainer.history[0]


def test_the_listener_is_the_reward(config: Callable[..., DDPOConfig], FakeJudge: Any):
    """The group scheme scores a prompt's images against one another; its numbers reach the log and the guard."""
    reward = ListenerReward(FakeJudge(slope=50.0, listener_slope=-50.0))
    trainer = DDPOTrainer(tiny.build("sd15"), reward, PROMPTS, config(), second_reward=brightness)
    trainer.train()
    row = trainer.history[0]
    assert row["reward_mean"] == pytest.approx(0, abs=1e-4) and row["reward_std"] > 0
    assert row["contradiction_rate"] == 1 and row["agreement"] == 0 and row["position_gap"] == 0
    assert 0 < row["second_reward_mean"] < 1 and 0 < row["diversity"] < 1
    assert trainer.guard.rows[0]["second_reward_mean"] == row["second_reward_mean"]


def test_a_broken_judge_stops_the_run_or_masks_its_images(config: Callable[..., DDPOConfig], FakeJudge: Any):
    broken = FakeJudge(breaks_on=lambda *_: True)
    trainer = DDPOTrainer(tiny.build("sd15"), ListenerReward(broken), PROMPTS, config())
    with pytest.raises(JudgeError):
        trainer.train()
    trainer = DDPOTrainer(tiny.build("sd15"), ListenerReward(broken, on_failure="nan"), PROMPTS, config(kl=0.0))
    before = weights(trainer.pipeline)
    trainer.train()
    assert trainer.history[0]["reward_missing"] == 1 and not changed(before, weights(trainer.pipeline))


@pytest.mark.parametrize("policy", ["nan", "drop-component"])
def test_a_mixture_teaches_by_its_components(
    policy: Any, config: Callable[..., DDPOConfig], FakeJudge: Any, monkeypatch: pytest.MonkeyPatch
):
    """Two epochs; in the second one a component has no score for an image of the first prompt."""
    calls = []

    def large(images: Any, prompts: Sequence[str], metadata: Any) -> Any:
        calls.append(prompts[0])
        scores = 1000 * images[:, 0].mean((1, 2))
        return torch.where(torch.arange(len(scores)) == (0 if len(calls) == 3 else -1), torch.nan, scores), {}

    listener = ListenerReward(FakeJudge(slope=50.0, listener_slope=-50.0), scheme="group")
    mixture = Mixture({"listener": (listener, 1.0), "large": (large, 0.5)}, on_failure=policy)
    settings = config(epochs=2, prompts_per_epoch=2, images_per_prompt=3, batch_size=3)
    settings = replace(settings, advantage="components", advantage_noise=False)
    trainer = DDPOTrainer(tiny.build("sd15"), mixture, PROMPTS, settings)
    before, given, learnt = weights(trainer.pipeline), [], []
    advantages, learn = trainer._advantages, trainer.learner.learn
    monkeypatch.setattr(trainer, "_advantages", lambda *args: given.append(args[:2]) or advantages(*args))
    monkeypatch.setattr(trainer.learner, "learn", lambda *args: learnt.append(args) or learn(*args))
    trainer.train()
    assert changed(before, weights(trainer.pipeline))
    row, last = trainer.history
    assert row["agreement"] == 0 and row["info/listener/contradicted"] == 1 and row["info/large/missing"] == 0
    assert row["reward_mean"] == pytest.approx(0.5 * row["info/large/score"], rel=1e-4)  # the listener's mean is 0
    groups = np.array([0, 0, 0, 1, 1, 1])
    for (rewards, info), (_, _, taught, scored) in zip(given, learnt, strict=True):
        parts = {"listener": info["listener/score"], "large": info["large/score"]}
        total, _ = normalised_sum(parts, {"listener": 1.0, "large": 0.5}, groups, ~np.isnan(rewards))
        assert (
            taught == pytest.approx(group_advantages(total, groups))
            and scored.tolist() == (~np.isnan(rewards)).tolist()
        )
        assert np.abs(taught).max() > 0.5 and abs(taught.sum()) < 1e-6
    if policy == "nan":
        assert last["reward_missing"] == pytest.approx(1 / 6) and learnt[1][2][0] == 0
    else:
        assert last["reward_missing"] == 0 and last["info/dropped"] == 0.5 and learnt[1][2][0] != 0
    assert last["info/large/missing"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("given", [[1.0], ["a", "b", "c", "d"], [1.0, 2.0, 3.0, float("inf")], np.ones((4, 1))])
def test_what_is_no_reward_stops_the_run(given: Any, config: Callable[..., DDPOConfig]):
    trainer = DDPOTrainer(tiny.build("sd15"), lambda *_: (given, {}), PROMPTS, config())
    before = weights(trainer.pipeline)
    with pytest.raises(JudgeError):
        trainer.train()
    assert not changed(before, weights(trainer.pipeline))


# --- the self-check


def shake(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 0.1 * torch.randn_like(output)


def test_a_replay_that_differs_is_caught_before_anything_is_learnt(config: Callable[..., DDPOConfig]):
    pipeline = tiny.build("sd3")
    trainer = DDPOTrainer(pipeline, brightness, PROMPTS, config("sd3"))
    before = weights(pipeline)
    for module in pipeline.transformer.modules():
        if isinstance(module, torch.nn.SiLU):  # as dropout does: another output each time
            module.register_forward_hook(shake)
    with pytest.raises(ReplayError, match="dropout"):
        trainer.train()
    assert not changed(before, weights(pipeline))


def shaken(pipeline: Any) -> Any:
    """A pipeline that gives another output each time, as with dropout."""
    for module in pipeline.transformer.modules():
        if isinstance(module, torch.nn.SiLU):
            module.register_forward_hook(shake)
    return pipeline


@pytest.mark.parametrize("score", [0.5, float("nan")])
def test_the_replay_is_checked_though_the_first_epoch_teaches_nothing(score: float, config: Callable[..., DDPOConfig]):
    settings = config("sd3", kl=0.0)
    trainer = DDPOTrainer(shaken(tiny.build("sd3")), lambda images, *_: ([score] * len(images), {}), PROMPTS, settings)
    with pytest.raises(ReplayError, match="log-probability"):
        trainer.train()


def test_nft_is_checked_by_its_outputs(config: Callable[..., DDPOConfig]):
    pipeline = shaken(tiny.build("sd3"))
    trainer = DDPOTrainer(pipeline, brightness, PROMPTS, config("sd3", loss="nft"))
    before = weights(pipeline)
    with pytest.raises(ReplayError, match="the model's output at step 0"):
        trainer.train()
    assert not changed(before, weights(pipeline))


def test_an_epoch_that_teaches_nothing_leaves_the_weights_alone(config: Callable[..., DDPOConfig]):
    """Weight decay and momentum are of updates, and there is none."""
    settings = config(kl=0.0, learning_rate=0.1, weight_decay=0.5)
    trainer = DDPOTrainer(tiny.build("sd15"), lambda images, *_: ([1.0] * len(images), {}), PROMPTS, settings)
    before = weights(trainer.pipeline)
    trainer.train()
    assert trainer.history[0]["ratio_deviation"] < 1e-4 and not changed(before, weights(trainer.pipeline))


def test_a_pipeline_that_lets_no_gradient_through_is_told_of(config: Callable[..., DDPOConfig]):
    pipeline = tiny.build("sd3")

    class Sealed(type(pipeline)):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    pipeline.__class__ = Sealed
    with pytest.raises(ReplayError, match=r"functools\.wraps"):
        DDPOTrainer(pipeline, brightness, PROMPTS, config("sd3")).train()


# --- resume


SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import tiny_pipelines as tiny
    from test_ddpo import FAMILY, PROMPTS, resumable, reward_called
    from listener_reward.integrations.ddpo import DDPOTrainer

    class Deadly:
        reward, calls = reward_called(sys.argv[3]), 0

        def __call__(self, images, prompts, metadata):
            self.calls += 1
            if self.calls == 6:  # in the third epoch, while the second batch is sampled
                os.kill(os.getpid(), signal.SIGKILL)
            return type(self).reward(images, prompts, metadata)

        def __getattr__(self, name):
            return getattr(type(self).reward, name)

    family = FAMILY[sys.argv[3]]
    DDPOTrainer(tiny.build(family), Deadly(), PROMPTS, resumable(sys.argv[2], family)).train()
"""

FAMILY = {"brightness": "sd15", "images": "sd15", "clips": "wan"}


def reward_called(name: str) -> Any:
    """A reward that remembers nothing, and two that keep the first image, or clip, of each prompt."""
    if name == "brightness":
        return brightness
    judge: Any = FakeJudge(slope=40.0)
    if name == "images":
        return ListenerReward(judge, scheme="reference")
    return VideoReward(judge, frames=2, scheme="reference")


def resumable(folder: str, family: str) -> DDPOConfig:
    return DDPOConfig(
        output_dir=folder,
        epochs=4,
        num_inference_steps=3,
        call=tiny.FAMILIES[family].call(False),
        prompts_per_epoch=2,
        images_per_prompt=2,
        batch_size=2,
        lora_rank=2,
        learning_rate=1e-2,
        clip_range=1e-2,
        updates_per_epoch=2,
        inner_epochs=2,
        train_fraction=0.5,
        window=(0.0, 1.0),
        advantage="prompt",
        prompt_min_count=3,
        sample_every=2,
        sample_prompts=2,
        save_every=1,
    )


@pytest.mark.parametrize("name", FAMILY)
def test_a_killed_run_resumes_to_the_same_result(name: str, tmp_path: Path):
    whole, cut, family = tmp_path / "whole", tmp_path / "cut", FAMILY[name]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(Path(__file__).parent), str(cut), name]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list(checkpoints(cut / "checkpoints")) == [1, 2]
    (cut / "checkpoints" / ".writing").mkdir()  # as if the kill had come in the middle of a third
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "rew')

    with pytest.raises(InputError, match="resume=True"):
        DDPOTrainer(tiny.build(family), brightness, PROMPTS, resumable(str(cut), family)).train()
    pipelines = []
    for folder in (whole, cut):
        pipelines.append(tiny.build(family))
        DDPOTrainer(pipelines[-1], reward_called(name), PROMPTS, resumable(str(folder), family)).train(resume=True)
    assert not changed(*map(weights, pipelines))
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (whole, cut)]
    assert [row["epoch"] for row in rows[1]] == [0, 1, 2, 3]
    for row, other in zip(*rows, strict=True):
        assert row.keys() == other.keys()
        assert all(row[name] == other[name] for name in row if not name.startswith("seconds_"))
    for file in ("epoch-00000.png", "epoch-00002.png", "epoch-00004.png"):
        drawn = [np.asarray(Image.open(folder / "samples" / file)) for folder in (whole, cut)]
        assert drawn[0].shape[1] == 2 * drawn[0].shape[0] and np.array_equal(drawn[0], drawn[1])


TWO_PROCESSES = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import tiny_pipelines as tiny
    import torch
    from test_ddpo import PROMPTS, resumable, reward_called
    from listener_reward.integrations.ddpo import DDPOTrainer

    states, weights = [], []
    for resume in (False, True):
        reward, second = reward_called("images"), reward_called("images")
        config = resumable(sys.argv[2], "sd15")
        config.epochs, config.sample_every = 1, 0
        trainer = DDPOTrainer(tiny.build("sd15"), reward, PROMPTS, config, second_reward=second)
        trainer.train(resume=resume)
        states.append([each.state_dict()["references"] for each in (reward, second)])
        weights.append([weight.detach() for weight in trainer.learner.parameters])
    torch.save((states, weights), f"{sys.argv[2]}-{trainer.accelerator.process_index}.pt")
"""


def launch_two(source: str, tmp_path: Path) -> list[Any]:
    """What each of two processes that run `source` has saved."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(tmp_path / f"run-{process}.pt", weights_only=True) for process in (0, 1)]


def test_each_of_two_processes_has_its_own_references_back(tmp_path: Path):
    found = launch_two(TWO_PROCESSES, tmp_path)
    for (before, after), _ in found:
        assert before == after and all(before)
    assert found[0][0] != found[1][0], "each has drawn its own images"
    learnt = [weight for _, weights in found for weight in weights]
    assert all(torch.equal(a, b) for other in learnt[1:] for a, b in zip(learnt[0], other, strict=True))


ONE_WITHOUT_REWARDS = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import tiny_pipelines as tiny
    import torch
    from test_ddpo import PROMPTS, resumable
    from listener_reward.integrations.ddpo import DDPOTrainer

    def reward(images, prompts, metadata):
        if trainer.accelerator.process_index:
            return [float("nan")] * len(images), {}
        return [float(k) for k in range(len(images))], {"standard_error": [0.1] * len(images)}

    runs = []
    for folder in ("", "-again"):
        config = resumable(sys.argv[2] + folder, "sd15")
        config.epochs, config.sample_every, config.kl, config.advantage = 2, 0, 0.0, "group"
        trainer = DDPOTrainer(tiny.build("sd15"), reward, PROMPTS, config)
        trainer.train()
        runs.append(([w.detach() for w in trainer.learner.parameters], trainer.history[-1]))
    torch.save(runs, f"{sys.argv[2]}-{trainer.accelerator.process_index}.pt")
"""


def test_two_processes_of_which_one_has_no_rewards_learn_the_same(tmp_path: Path):
    """In the second epoch, with the replay checked, the process without rewards replays nothing and has no loss. It
    reports no standard errors either, so both leave them out. A second run in the same processes is as good as the
    first."""
    ((weights, row), (again, _)), ((others, other), _) = launch_two(ONE_WITHOUT_REWARDS, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert row["reward_missing"] == 0.5 and row["reward_mean"] == 0.5 and row["grad_norm"] > 0
    assert row["loss"] == other["loss"] != 0


def test_what_a_reward_remembers_is_kept_in_the_checkpoints(config: Callable[..., DDPOConfig]):
    class Counting:
        calls = 0

        def __call__(self, images: Any, prompts: Sequence[str], metadata: Any) -> Any:
            self.calls += 1
            return brightness(images, prompts, metadata)

        def state_dict(self) -> dict[str, int]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    DDPOTrainer(tiny.build("sd15"), Counting(), PROMPTS, config(epochs=2, save_every=1)).train()
    reward = Counting()
    DDPOTrainer(tiny.build("sd15"), reward, PROMPTS, config(epochs=3)).train(resume=True)
    assert reward.calls == 3
    with pytest.raises(InputError, match="trained other layers"):
        DDPOTrainer(tiny.build("sd15"), reward, PROMPTS, config(lora_rank=4)).train(resume=True)


def test_a_broken_newest_checkpoint_is_passed_over_and_the_result_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def train(folder: Path, resume: bool, **changes: Any) -> Any:
        pipeline = tiny.build("sd15")
        DDPOTrainer(pipeline, brightness, PROMPTS, replace(resumable(str(folder), "sd15"), **changes)).train(resume)
        return weights(pipeline)

    cut, wanted = tmp_path / "cut", train(tmp_path / "whole", False, sample_every=0)
    train(cut, False, epochs=2, sample_every=0)
    broken = cut / "checkpoints" / "epoch-00002" / "state.pt"
    os.truncate(broken, broken.stat().st_size // 2)
    with caplog.at_level("WARNING", "listener_reward"):
        assert not changed(train(cut, True, sample_every=0), wanted)
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert told == [f"{broken.parent} is passed over: state.pt is cut short or damaged"]
    assert [row["epoch"] for row in read_metrics(cut / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path):
    def write(folder: Path) -> None:
        (folder / "a").write_text("half")
        if failing:
            raise OSError("disk full")

    for epoch, failing in ((1, False), (2, False), (3, False), (4, True)):
        try:
            save_checkpoint(tmp_path, epoch, write, keep=2)
        except OSError:
            assert failing
    assert list(checkpoints(tmp_path)) == [2, 3]


# --- what a run leaves behind


class Notebook(GeneralTracker):
    """A tracker of accelerate's that keeps what it is told."""

    name = "notebook"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.pictures: list[Any] = []

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append({"step": step, **values})

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.pictures.append((step, values["samples"].shape))


def test_trackers_get_curves_and_grids(config: Callable[..., DDPOConfig]):
    notebook = Notebook()
    settings = config(epochs=2, sample_every=1, sample_prompts=3, log_with=notebook)
    folder = DDPOTrainer(tiny.build("sd15"), brightness, PROMPTS, settings).train()
    assert [row["step"] for row in notebook.rows] == [0, 1] and "reward_mean" in notebook.rows[0]
    assert notebook.pictures == [(epoch, (3, 16, 16, 3)) for epoch in (0, 1, 2)]
    assert notebook.settings["num_inference_steps"] == 3
    assert json.loads((folder / "config.json").read_text())["lora_rank"] == 2
    assert {row["epoch"] for row in read_metrics(folder / "metrics.jsonl")} == {0, 1}


def test_hacking_stops_the_run_where_asked(
    config: Callable[..., DDPOConfig], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The reward rises while the second one falls; both are made up, by the number of the call."""
    calls = {"first": 0, "second": 0}

    def made_up(name: str, sign: int) -> Any:
        def reward(images: Any, prompts: Sequence[str], metadata: Any) -> Any:
            calls[name] += 1
            return [sign * calls[name] + 0.1 * k for k in range(len(prompts))], {}

        return reward

    settings = config(epochs=12, images_per_prompt=2, kl=0.0, on_hacking="stop")
    trainer = DDPOTrainer(
        tiny.build("sd15"), made_up("first", 1), PROMPTS, settings, second_reward=made_up("second", -1)
    )
    folder = trainer.train()
    assert len(trainer.history) == trainer.guard.min_epochs
    assert "second_reward_mean fell" in caplog.text
    assert list(checkpoints(folder / "checkpoints")) == [trainer.guard.min_epochs]


# --- settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "dpo"}, "loss is 'dpo'; choose one of 'ppo', 'nft'"),
        ({"batch_size": 3}, "batch_size is 3; it must divide"),
        ({"images_per_prompt": 1, "prompts_per_epoch": 2}, "no group"),
        ({"updates_per_epoch": 3}, "updates_per_epoch is 3 with 2 batches"),
        ({"train": "full"}, "no base to switch to"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"kl": -1.0}, "kl is -1.0; it must be at least 0"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"train_fraction": 0.0}, "train_fraction is 0.0"),
        ({"call": {"eta": 1.0}}, "call has eta"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16'"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str, config: Callable[..., DDPOConfig]):
    with pytest.raises(InputError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("noise", "reports", "shrunk"),
    [
        (True, True, True),
        (False, True, False),
        (False, False, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_noise_shrinks_advantages_where_the_reward_says_how_sure_it_is(
    noise: bool | None, reports: bool, shrunk: bool, config: Callable[..., DDPOConfig]
):
    def reward(images: Any, prompts: Sequence[str], metadata: Any) -> Any:
        return [0.0, 1.0, 0.0, 1.0], {"standard_error": [0.5] * 4} if reports else {}

    def advantages(given: Any, **fields: Any) -> np.ndarray:
        trainer, learnt = DDPOTrainer(tiny.build("sd15"), given, PROMPTS, config(advantage_noise=noise, **fields)), []
        trainer.learner.learn = lambda epoch, rollouts, advantages, scored: learnt.append(advantages) or {}
        trainer.train()
        assert ("noise_fraction" in trainer.history[0]) == reports
        Path(trainer.folder).rename(trainer.folder.with_name(f"run-{len(done)}"))
        done.append(trainer.history[0])
        return learnt[0]

    done: list[dict[str, Any]] = []
    expected = np.array([-1, 1, -1, 1]) * (0.5**0.5 if shrunk else 1)  # the spread is as large as the errors
    assert advantages(reward) == pytest.approx(expected, abs=1e-3)
    mixture = Mixture({"listener": (reward, 2.0)})
    assert advantages(mixture, advantage="components") == pytest.approx(expected, abs=1e-3)
    assert not reports or done[0]["noise_fraction"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("began", "asked", "kept", "shrunk"),
    [
        (None, None, None, True),
        (False, None, False, False),
        ("before the option", None, False, False),
        (False, True, True, True),
        (None, False, False, False),
    ],
)
def test_a_resumed_run_counts_noise_as_it_began_unless_told(
    began: Any, asked: bool | None, kept: bool | None, shrunk: bool, config: Callable[..., DDPOConfig]
):
    def reward(images: Any, prompts: Sequence[str], metadata: Any) -> Any:
        return [0.0, 1.0, 0.0, 1.0], {"standard_error": [0.5] * 4}

    first = None if began == "before the option" else began
    folder = DDPOTrainer(tiny.build("sd15"), reward, PROMPTS, config(save_every=1, advantage_noise=first)).train()
    if began == "before the option":
        settings = json.loads((folder / "config.json").read_text())
        del settings["advantage_noise"]
        (folder / "config.json").write_text(json.dumps(settings))
    for epochs in (2, 3):  # what was kept is kept again
        changed = config(epochs=epochs, save_every=1, advantage_noise=asked)
        trainer, learnt = DDPOTrainer(tiny.build("sd15"), reward, PROMPTS, changed), []
        trainer.learner.learn = lambda epoch, rollouts, advantages, scored, kept=learnt: kept.append(advantages) or {}
        trainer.train(resume=True)
        expected = np.array([-1, 1, -1, 1]) * (0.5**0.5 if shrunk else 1)
        assert len(learnt) == 1 and learnt[0] == pytest.approx(expected, abs=1e-3)
        assert json.loads((folder / "config.json").read_text())["advantage_noise"] is kept


def test_noise_of_which_nothing_is_known_cannot_be_counted(config: Callable[..., DDPOConfig]):
    with pytest.raises(InputError, match="the reward's info has no standard_error; leave it out"):
        DDPOTrainer(tiny.build("sd15"), brightness, PROMPTS, config(advantage_noise=True)).train()
    with pytest.raises(InputError, match="advantage_noise is about the spread of a group"):
        config(advantage="prompt", advantage_noise=True)


def test_components_are_those_of_a_mixture(config: Callable[..., DDPOConfig]):
    with pytest.raises(InputError, match="advantage is 'components', and the reward is a function; give a Mixture"):
        DDPOTrainer(tiny.build("sd15"), brightness, PROMPTS, config(advantage="components"))
    with pytest.raises(InputError, match="no group"):
        config(advantage="components", images_per_prompt=1, prompts_per_epoch=2)


def test_what_cannot_be_trained_is_refused(config: Callable[..., DDPOConfig]):
    def trainer(pipeline: Any = None, prompts: Any = PROMPTS, **fields: Any) -> DDPOTrainer:
        return DDPOTrainer(pipeline or tiny.build("sd3"), brightness, prompts, config("sd3", **fields))

    for prompts in ("a red circle", [], [3], [{"text": "x"}], [" "]):
        with pytest.raises(InputError, match="prompts"):
            trainer(prompts=prompts)
    with pytest.raises(InputError, match="prompts_per_epoch is 4 and there are 3"):
        trainer(prompts_per_epoch=4)
    with pytest.raises(InputError, match="leave none of the 3 steps noisy"):
        trainer(window=(0.9, 1.0))
    with pytest.raises(InputError, match="lora_targets"):
        trainer(lora_targets=("no_such_layer",))
    with pytest.raises(InputError, match="rounds updates away"):
        trainer(tiny.build("sd3", torch.bfloat16), train="full", kl=0.0)
    pipeline = tiny.build("sd3")
    trainer(pipeline)
    with pytest.raises(InputError, match="adapters already"):
        trainer(pipeline)


@pytest.mark.parametrize(
    ("module", "missing"), [("schedulers", "diffusers"), ("lora", "peft"), ("trainer", "accelerate")]
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    module: str, missing: str, monkeypatch: pytest.MonkeyPatch
):
    source = importlib.import_module(f"listener_reward.integrations.ddpo.{module}").__file__
    spec = importlib.util.spec_from_file_location("listener_reward.integrations.ddpo.anew", source)
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, missing, None)  # what an import of a missing package finds
    with pytest.raises(MissingExtraError, match=rf'needs {missing}: pip install "listener-reward\[diffusers\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_draws_depend_on_the_epoch_and_repeat(config: Callable[..., DDPOConfig]):
    trainer = DDPOTrainer(tiny.build("sd15"), brightness, PROMPTS, config(prompts_per_epoch=3))
    orders = [tuple(trainer._choose_prompts(epoch)) for epoch in range(6)]
    assert orders == [tuple(trainer._choose_prompts(epoch)) for epoch in range(6)]
    assert len(set(orders)) > 1 and all(sorted(order) == [0, 1, 2] for order in orders)


def test_a_pipeline_that_gives_no_image_for_each_prompt_is_refused(config: Callable[..., DDPOConfig]):
    trainer = DDPOTrainer(tiny.build("sd15"), brightness, PROMPTS, config())
    trainer.pipeline.scheduler = trainer.scheduler
    with pytest.raises(InputError, match="one image or video for each"):
        record(trainer.pipeline, PROMPTS, trainer._options() | {"num_images_per_prompt": 2}, torch.Generator())
