"""What each setting of the DDPO trainer does, seen in what is sampled, learnt and written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

from listener_reward.errors import InputError
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer
from listener_reward.integrations.ddpo import learner as ddpo_learn
from listener_reward.integrations.ddpo.learner import LATENTS, stream
from listener_reward.integrations.ddpo.lora import adapters_off
from listener_reward.integrations.ddpo.rollout import record

PROMPTS = ["a red circle", "a blue square", "a green triangle"]

MakeTrainer = Callable[..., DDPOTrainer]


def redness(images: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    return images[:, 0].flatten(1).mean(1), {}


def equal(images: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    return [0.5] * len(images), {}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def make(tmp_path: Path) -> MakeTrainer:
    """A trainer of a tiny pipeline, by default SD3 with one group of four in two batches."""
    runs = []

    def make(reward: Any = redness, family: str = "sd3", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        runs.append(reward)
        own = {"output_dir": str(tmp_path / f"run-{len(runs)}"), "kl": 0.0, "save_every": 99}
        config = DDPOConfig(**(tiny.short_run(family) | own | fields))
        return DDPOTrainer(tiny.build(family, dtype), reward, PROMPTS, config)

    return make


def ask(pipeline: Any) -> torch.Tensor:
    """What a tiny SD3's denoiser makes of fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    x, text, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 32), (2, 64)))
    with torch.no_grad():
        return pipeline.transformer(x, text, pooled, torch.tensor([500.0, 500.0]), return_dict=False)[0]


def copies(trainer: DDPOTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.learner.parameters]


def push(trainer: DDPOTrainer) -> None:
    """Moves the LoRA, and with it the model, off the base."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.learner.parameters:
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)


# --- the base


def test_with_its_adapters_off_a_trained_denoiser_is_the_base(make: MakeTrainer):
    trainer = make(learning_rate=0.5, updates_per_epoch=2, clip_range=1.0)
    trainer.train()
    base = ask(tiny.build("sd3"))
    trained = ask(trainer.pipeline)
    assert (trained - base).abs().max() > 0.1
    # Two objects of equal weights: a kernel may choose its order of adding by where they lie in memory.
    with adapters_off(trainer.learner.modules):
        torch.testing.assert_close(ask(trainer.pipeline), base, rtol=0, atol=1e-5)
    torch.testing.assert_close(ask(trainer.pipeline), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", ["ppo", "nft"])
def test_kl_alone_pulls_back_to_the_base_and_without_it_nothing_does(loss: str, make: MakeTrainer):
    """With equal rewards PPO's loss is flat; that of NFT is not, but `kl` outweighs it."""
    base = ask(tiny.build("sd3"))

    def distances(kl: float) -> tuple[DDPOTrainer, list[float], bool]:
        trainer = make(equal, loss=loss, kl=kl, epochs=4, learning_rate=0.02)
        push(trainer)
        before, away = copies(trainer), [float((ask(trainer.pipeline) - base).norm())]
        trainer.train()
        away.append(float((ask(trainer.pipeline) - base).norm()))
        return trainer, away, all(map(torch.equal, before, copies(trainer)))

    trainer, (before, after), same = distances(100.0)
    assert after < 0.9 * before and not same
    assert trainer.history[0]["kl"] > trainer.history[-1]["kl"] > 0 and trainer.history[0]["grad_norm"] > 0
    if loss == "ppo":
        trainer, _, same = distances(0.0)
        assert same and "kl" not in trainer.history[0] and trainer.history[0]["grad_norm"] == 0
    else:  # its own pull is towards the samples, and away from the base as often as not
        _, (_, alone), _ = distances(0.0)
        assert after < 0.9 * alone


def test_kl_is_that_of_two_gaussians_by_its_weight(make: MakeTrainer):
    means, norms = [], []
    for kl in (0.5, 1.0):
        trainer = make(equal, kl=kl, batch_size=4)
        push(trainer)
        scheduler: Any = trainer.scheduler
        transition = scheduler.transition

        def watch(*args: Any, transition: Any = transition) -> Any:
            mean, std = transition(*args)
            means.append((mean.detach(), std))
            return mean, std

        scheduler.transition = watch
        trainer.train()
        norms.append(trainer.history[0]["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3)
    base, trained = means[-4:-2], means[-2:]  # at both noisy steps, after those of sampling
    apart = [((a - b) ** 2).mean() / (2 * std**2) for (a, std), (b, _) in zip(trained, base, strict=True)]
    assert trainer.history[0]["kl"] == pytest.approx(float(sum(apart)) / 2, rel=1e-4)


# --- which steps


def watched(trainer: DDPOTrainer, name: str) -> dict[str, list[int]]:
    """The steps that a method of the scheduler is asked about, with gradients ("learnt") and without ("drawn")."""
    seen, method = {"drawn": [], "learnt": []}, getattr(trainer.scheduler, name)

    @functools.wraps(method)
    def watch(index: int, *args: Any, **kwargs: Any) -> Any:
        seen["learnt" if torch.is_grad_enabled() else "drawn"].append(index)
        return method(index, *args, **kwargs)

    setattr(trainer.scheduler, name, watch)
    return seen


def test_only_steps_within_the_window_are_noisy_and_trained(make: MakeTrainer):
    trainer = make(num_inference_steps=5, window=(0.2, 0.6))
    noisy, stock = watched(trainer, "transition"), watched(trainer, "stock_step")
    trainer.train()
    assert noisy == {"drawn": [1, 2] * 2, "learnt": [1, 2] * 2}  # two batches
    assert stock == {"drawn": [0, 3, 4] * 2, "learnt": []}


@pytest.mark.parametrize(("loss", "method", "among"), [("ppo", "transition", 4), ("nft", "predict_x0", 5)])
def test_a_share_of_the_steps_is_trained(loss: str, method: str, among: int, make: MakeTrainer):
    """Of four noisy steps half are two, drawn anew for each batch; NFT trains at any of the five."""
    trainer = make(loss=loss, num_inference_steps=5, train_fraction=0.5, epochs=3)
    seen = watched(trainer, method)["learnt"]
    trainer.train()
    pairs = [tuple(seen[k : k + 2]) for k in range(0, len(seen), 2)]
    assert len(pairs) == 6 and all(0 <= first < second < among for first, second in pairs)
    assert len(set(pairs)) > 1


# --- PPO


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, ...]]:
    """Of each PPO loss that a trainer takes: log-probabilities, old ones, advantages."""
    taken, ppo_loss = [], ddpo_learn.ppo_loss

    def watch(log_prob: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, *rest: Any) -> torch.Tensor:
        taken.append(tuple(each.detach().double().numpy() for each in (log_prob, old, advantages)))
        return ppo_loss(log_prob, old, advantages, *rest)

    monkeypatch.setattr(ddpo_learn, "ppo_loss", watch)
    return taken


def test_ratios_are_clipped_from_the_second_update_on(losses: list[tuple[np.ndarray, ...]], make: MakeTrainer):
    trainer = make(learning_rate=0.1, updates_per_epoch=2, clip_range=1e-3)
    trainer.train()
    row, by_hand, clipped = trainer.history[0], [], []
    for now, old, advantages in losses:
        ratio = np.exp(now - old)
        by_hand.append(-np.minimum(advantages * ratio, advantages * np.clip(ratio, 0.999, 1.001)).mean())
        clipped.append((np.abs(now - old) > 1e-3).mean())
    assert len(losses) == 4 and not any(clipped[:2]) and any(clipped[2:])  # two steps of each batch
    assert row["clip_fraction"] == pytest.approx(np.mean(clipped)) and row["clip_fraction"] > 0
    assert row["loss"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    free = [-(advantages * np.exp(now - old)).mean() for now, old, advantages in losses]
    assert abs(np.mean(free) - row["loss"]) > 1e-5  # so that the clipping is in the number


def test_an_advantage_that_sticks_out_is_clipped(losses: list[tuple[np.ndarray, ...]], make: MakeTrainer):
    trainer = make(lambda *_: ([0.0] * 7 + [1.0], {}), images_per_prompt=8, batch_size=8, advantage_clip=1.0)
    trainer.train()
    # The mean is 1/8 and the deviation sqrt(1/8 x 7/8) = 0.3307: -0.378 seven times, and 2.646 without the clip.
    assert losses[0][2] == pytest.approx([-0.378] * 7 + [1.0], abs=1e-3)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_bfloat16_pipeline_learns_by_ppo(family: str, make: MakeTrainer):
    """The densities are those of the rounded latents; otherwise the self-check would stop it."""
    trainer = make(family=family, dtype=torch.bfloat16, learning_rate=1e-2, weight_decay=0.0, kl=0.03)
    before = copies(trainer)
    assert {weight.dtype for weight in before} == {torch.float32}  # bfloat16 would round updates away
    trainer.train()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, copies(trainer), strict=True))
    assert moved == len(before) // 2  # every B; A has no gradient while B is zero
    row = trainer.history[0]
    assert row["ratio_deviation"] < 1e-4 and row["clip_fraction"] == 0 and row["grad_norm"] > 0


# --- NFT


def test_nft_samples_as_the_stock_sampler_does(make: MakeTrainer):
    seen = []

    def reward(images: Any, *rest: Any) -> Any:
        seen.append(images)
        return redness(images, *rest)

    trainer = make(reward, loss="nft", noise_level=0.7)
    trainer.train()
    fresh = tiny.build("sd3")
    prompt, options = PROMPTS[trainer._choose_prompts(0)[0]], trainer._options() | {"output_type": "pt"}
    stock = [fresh(prompt=[prompt] * 2, generator=stream(0, LATENTS, 0, k), **options)[0] for k in range(2)]
    # The trainer samples two images at once and this test one by one: kernels may differ by shape.
    torch.testing.assert_close(seen[0], torch.cat(stock), rtol=0, atol=1e-5)

    def twice(trainer: DDPOTrainer) -> bool:
        trainer.pipeline.scheduler, trainer.scheduler.generator = trainer.scheduler, None
        pair = [record(trainer.pipeline, PROMPTS, trainer._options(), stream(0, LATENTS, 1)) for _ in range(2)]
        return bool((pair[0].images - pair[1].images).abs().max() <= 1e-5)

    assert twice(trainer) and not twice(make(noise_level=0.7))


# --- memory


def test_checkpointed_blocks_run_again_for_their_gradients(make: MakeTrainer):
    def runs(checkpointing: bool) -> int:
        trainer, count = make(gradient_checkpointing=checkpointing), []
        assert trainer.pipeline.transformer.is_gradient_checkpointing is checkpointing
        block = trainer.pipeline.transformer.transformer_blocks[0]
        block.register_forward_pre_hook(lambda *_: count.append(torch.is_grad_enabled()))
        trainer.train()
        return sum(count)

    assert runs(True) == 2 * runs(False) > 0


# --- watching


@pytest.mark.parametrize(("on_hacking", "epochs"), [("warn", 10), ("stop", 8)])
def test_a_warning_lets_the_run_go_on_and_a_stop_does_not(
    on_hacking: str, epochs: int, make: MakeTrainer, caplog: pytest.LogCaptureFixture
):
    calls = []

    def rising(images: Any, *_: Any) -> Any:
        calls.append(1)
        return [len(calls) + 0.1 * k for k in range(len(images))], {}

    trainer = make(rising, epochs=10, images_per_prompt=2, num_inference_steps=2, on_hacking=on_hacking)
    trainer.second_reward = lambda images, *_: ([-len(calls) + 0.1 * k for k in range(len(images))], {})
    trainer.train()
    assert len(trainer.history) == epochs and caplog.text.count("second_reward_mean fell") == 1


def test_fixed_samples_are_set_against_the_bases(make: MakeTrainer):
    """A model that is pushed up wins: its decoder is made to paint brighter in the third of four epochs."""
    calls = []

    def reward(images: Any, *rest: Any) -> Any:
        calls.append(len(images))
        if calls.count(4) == 3:
            trainer.pipeline.vae.decoder.conv_out.bias.data.fill_(1.0)
        return redness(images, *rest)

    trainer = make(reward, epochs=4, sample_every=2, sample_prompts=3, learning_rate=1e-9)
    trainer.train()
    names = {"win_rate", "reward_over_base", "reward_over_base_se"}
    assert [names <= row.keys() for row in trainer.history] == [False, True, False, True]
    assert calls == [4, 4, 6, 4, 4, 6]
    before, after = trainer.history[1], trainer.history[3]
    assert before["reward_over_base"] == pytest.approx(0, abs=1e-5)
    assert after["win_rate"] == 1 and after["reward_over_base"] > 0.05 > after["reward_over_base_se"] >= 0
    assert trainer.samples.base is not None
    base, pushed = (
        redness(torch.stack(images), [], [])[0] for images in (trainer.samples.base, trainer.draw_samples())
    )
    assert after["reward_over_base"] == pytest.approx(float((pushed - base).mean()), abs=1e-5)


def test_no_samples_are_scored_where_the_win_rate_is_off(make: MakeTrainer):
    calls = []

    def reward(images: Any, *rest: Any) -> Any:
        calls.append(len(images))
        return redness(images, *rest)

    trainer = make(reward, epochs=2, sample_every=1, sample_prompts=3, win_rate=False)
    folder = trainer.train()
    assert calls == [4, 4] and len(list((folder / "samples").iterdir())) == 3
    assert not any("win_rate" in row or "reward_over_base" in row for row in trainer.history)


# --- trackers and states


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("comet_ml", "comet-ml")])
def test_a_tracker_that_is_not_installed_is_named(
    name: str, package: str, make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(InputError, match=f"'{name}', which is not installed: pip install {package};"):
        make(log_with=[name])


def test_tensorboard_shows_the_curve_and_the_samples(make: MakeTrainer):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make(log_with="tensorboard", epochs=2, sample_every=1, sample_prompts=3)
    folder = trainer.train()
    (file,) = (folder / "logs").rglob("events.out.tfevents.*.0")
    events = loader.EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("reward_mean")]
    assert curve == [(k, pytest.approx(row["reward_mean"])) for k, row in enumerate(trainer.history)]
    pictures = events.Images("samples")
    assert [picture.step for picture in pictures] == [0, 1, 2]
    assert pictures[0].height < pictures[0].width  # a row of three with tensorboard's borders


def test_a_state_that_no_checkpoint_can_hold_is_refused_at_the_start(make: MakeTrainer):
    calls = []

    class Hoarder:
        def __call__(self, images: Any, *rest: Any) -> Any:
            calls.append(1)
            return redness(images, *rest)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": np.array(["a", None], dtype=object)}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    trainer = make(Hoarder())
    with pytest.raises(InputError, match=r"state_dict of the reward Hoarder: .*\.tolist\(\)"):
        trainer.train()
    assert not calls
    trainer = make()
    trainer.second_reward = Hoarder()
    with pytest.raises(InputError, match="reward Hoarder"):
        trainer.train()
