"""The log-probability schedulers and the replay, on eleven families of diffusers pipelines with tiny random weights."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch

from listener_reward.errors import InputError
from listener_reward.integrations.ddpo import ReplayError
from listener_reward.integrations.ddpo.rollout import Step, call_options, record, replay, replayed_log_prob
from listener_reward.integrations.ddpo.schedulers import LogProbFlowMatchScheduler, log_prob, log_prob_scheduler

PROMPTS = ["a red circle", "a cat moving"]
STEPS = 3


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return getattr(torch, request.param)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest, dtype: Any) -> tuple[Any, Any, Any]:
    """A pipeline, its released scheduler, and its family."""
    pipeline = tiny.build(request.param, dtype)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    for name in ("unet", "transformer", "transformer_2"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).requires_grad_(True)
    return pipeline, pipeline.scheduler, tiny.FAMILIES[request.param]


def seeded(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


def stock_of(released: Any) -> Any:
    """The released scheduler itself where it is of the family, else its translation, written by hand."""
    name, config = type(released).__name__, released.config
    if name in ("DDIMScheduler", "CogVideoXDDIMScheduler", "FlowMatchEulerDiscreteScheduler"):
        return released
    if config.get("use_flow_sigmas"):  # Sana's and Wan's
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "DPMSolverMultistepScheduler":  # PixArt-Sigma's
        return diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    # SD 1.5's PNDM ends on the first alpha, SDXL's Euler on 1.
    return diffusers.DDIMScheduler(
        **tiny.SCALED_LINEAR,
        prediction_type=config.prediction_type,
        set_alpha_to_one=name == "EulerDiscreteScheduler",
        clip_sample=False,
    )


def images(pipeline: Any, scheduler: Any, options: dict[str, Any]) -> Any:
    pipeline.scheduler = scheduler
    return pipeline(prompt=PROMPTS, generator=seeded(0), output_type="pt", num_inference_steps=STEPS, **options)[0]


# --- all families


@pytest.mark.parametrize("guided", [True, False])
def test_without_noise_the_images_are_the_stock_samplers(family: tuple[Any, Any, Any], guided: bool):
    pipeline, released, its = family
    ours = log_prob_scheduler(released, noise_level=0.0)
    expected = images(pipeline, stock_of(released), its.call(guided))
    assert expected.isfinite().all()
    assert torch.equal(images(pipeline, ours, its.call(guided)), expected)
    noisy = log_prob_scheduler(released, generator=seeded(3))
    assert not torch.equal(images(pipeline, noisy, its.call(guided)), expected)


@pytest.mark.parametrize("guided", [True, False])
def test_replayed_log_probabilities_are_the_recorded_ones(family: tuple[Any, Any, Any], guided: bool):
    pipeline, released, its = family
    pipeline.scheduler = log_prob_scheduler(released, generator=seeded(3))
    options = {"num_inference_steps": STEPS, **its.call(guided)}
    rollout = record(pipeline, PROMPTS, options, seeded(0))
    assert [step.index for step in rollout.steps] == list(range(STEPS - 1))  # the last step draws no noise
    assert rollout.images.dtype == torch.float32 and len(rollout.images) == len(PROMPTS)

    replayed, gradients = [], []

    def on_step(step: Step, output: Any) -> None:
        value, _, _ = replayed_log_prob(pipeline.scheduler, step, output)
        value.sum().backward()
        assert step.log_prob is not None
        replayed.append((value.detach() - step.log_prob).abs().max())
        denoisers = [m for m in (getattr(pipeline, "unet", None), getattr(pipeline, "transformer", None)) if m]
        gradients.append(
            sum(float(p.grad.abs().sum()) for m in denoisers for p in m.parameters() if p.grad is not None)
        )
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.zero_grad()

    replay(pipeline, rollout, rollout.steps, on_step)
    assert max(replayed) < 1e-4
    assert max(gradients) > 0


# --- the mathematics


def test_log_prob_is_the_gaussian_density_by_dimension():
    x, mean, std = torch.randn(3, 4, 5), torch.randn(3, 4, 5), 0.7
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(log_prob(x, mean, std), expected, atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_steps_are_those_of_diffusers_with_eta(prediction_type: str, clip: bool):
    """Against diffusers' own eta, its noise given as zeros for the mean."""
    kind: Any = diffusers.DDIMScheduler
    stock = kind(prediction_type=prediction_type, clip_sample=clip)
    ours = log_prob_scheduler(stock, noise_level=0.6)
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    x, output = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for index, timestep in enumerate(stock.timesteps[:-1]):
        mean, std = ours.transition(index, output, x)
        zeros, ones = torch.zeros_like(x), torch.ones_like(x)
        expected = stock.step(output, timestep, x, eta=0.6, variance_noise=zeros).prev_sample
        assert torch.allclose(mean, expected, atol=1e-4)
        above = stock.step(output, timestep, x, eta=0.6, variance_noise=ones).prev_sample - expected
        assert torch.allclose(above, torch.full_like(x, std), atol=1e-5)


def test_full_noise_from_zero_terminal_snr_stays_finite():
    """diffusers' own step with eta 1 takes the root of a rounding error below zero there."""
    stock = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    ours = log_prob_scheduler(stock, noise_level=1.0)
    ours.set_timesteps(10)
    for index in range(9):
        mean, std = ours.transition(index, torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8))
        assert mean.isfinite().all() and 0 < std < 1.01


def test_a_linspace_schedule_becomes_steps_that_meet():
    """DDIM's own "linspace" would go 166 down from each timestep where the next one begins 200 below."""
    released = diffusers.DPMSolverMultistepScheduler(timestep_spacing="linspace")
    ours = log_prob_scheduler(released)
    released.set_timesteps(6)
    ours.set_timesteps(6)
    assert (ours.schedule - released.timesteps).abs().max() <= 1
    step = ours.config.num_train_timesteps // 6
    assert all(abs(int(a) - step - int(b)) <= 1 for a, b in zip(ours.schedule, ours.schedule[1:], strict=False))


def test_cps_at_full_noise_is_diffusers_stochastic_sampling():
    stock: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    ours = log_prob_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), noise_level=1.0)
    stock.set_timesteps(5)
    ours.set_timesteps(5)
    x, v = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    torch.manual_seed(0)
    expected = stock.step(v, stock.timesteps[0], x).prev_sample
    torch.manual_seed(0)
    mean, std = ours.transition(0, v, x)
    assert torch.allclose(mean + std * torch.randn_like(x), expected, atol=1e-5)


@pytest.mark.parametrize(("dynamics", "tolerance"), [("cps", 1e-5), ("flow_sde", 2e-2)])
def test_noisy_flow_steps_keep_the_marginals(dynamics: Any, tolerance: float):
    """With data at one point the velocity is exact, and a latent at noise s has mean (1 - s) x0 and deviation s.

    Exact for CPS; for the SDE up to its discretisation, hence many steps.
    """
    scheduler = log_prob_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), noise_level=0.7, dynamics=dynamics)
    assert isinstance(scheduler, LogProbFlowMatchScheduler)
    scheduler.set_timesteps(200)
    sigmas: Any = scheduler.sigmas
    x0 = 2.0
    for index in range(60, 140):
        s, after = float(sigmas[index]), float(sigmas[index + 1])
        noise = torch.tensor([[-1.0], [1.0]])  # a deviation of 1 around 0
        mean, std = scheduler.transition(index, noise - x0, (1 - s) * x0 + s * noise)
        assert float(mean.mean()) == pytest.approx((1 - after) * x0, abs=1e-5)
        deviation = math.sqrt(float(mean[1] - mean[0]) ** 2 / 4 + std**2)
        assert deviation == pytest.approx(after, rel=tolerance)


def test_one_flow_step_by_hand():
    """From noise 1/2 to 1/4, at noise level 0.7, with x = 1 and v = 2, so that x0 = 0 and the noise is 2."""

    def step(dynamics: Any) -> tuple[float, float]:
        scheduler = log_prob_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), dynamics=dynamics)
        scheduler.set_timesteps(sigmas=[0.5, 0.25])
        mean, std = scheduler.transition(0, torch.tensor([2.0]), torch.tensor([1.0]))
        return float(mean), std

    # Flow-GRPO: a^2 = 0.49 * (1/2) / (1/2); mean = 1 - 0.49 / 4 - (1 + 0.49 / 2) * 2 / 4; std = 0.7 * sqrt(1/4).
    assert step("flow_sde") == pytest.approx((0.8775 - 0.6225, 0.35), abs=1e-5)
    # CPS: std = 1/4 sin(0.35 pi) = 0.22275; mean = 3/4 * 0 + sqrt(1/16 - std^2) * 2.
    assert step("cps") == pytest.approx((2 * math.sqrt(1 / 16 - 0.22275**2), 0.22275), abs=1e-4)


def test_inverted_schedules_are_the_same_process():
    """Mochi counts from noise to data and gives the velocity with the other sign."""
    usual = log_prob_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    inverted = log_prob_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    usual.set_timesteps(6)
    inverted.set_timesteps(6)
    for index in range(5):
        (mean, std), (other, other_std) = usual.transition(index, v, x), inverted.transition(index, -v, x)
        assert torch.allclose(mean, other, atol=1e-5) and std == pytest.approx(other_std, abs=1e-5)
        assert torch.allclose(usual.predict_x0(index, v, x), inverted.predict_x0(index, -v, x), atol=1e-5)
        assert torch.allclose(usual.diffuse(index, x, v), inverted.diffuse(index, x, v), atol=1e-5)


@pytest.mark.parametrize("stock", [diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()])
def test_a_noised_latent_is_denoised_by_the_true_output(stock: Any):
    scheduler = log_prob_scheduler(stock)
    scheduler.set_timesteps(7)
    x0, noise = torch.rand(2, 4, 3, 3) - 0.5, torch.randn(2, 4, 3, 3)
    output = noise - x0 if isinstance(scheduler, LogProbFlowMatchScheduler) else noise
    for index in range(7):
        x = scheduler.diffuse(index, x0, noise)
        assert torch.allclose(scheduler.predict_x0(index, output, x), x0, atol=1e-3)


# --- which steps are noisy, and what is refused


def test_the_window_says_which_steps_are_noisy_and_the_last_never_is():
    stock = diffusers.DDIMScheduler()
    assert log_prob_scheduler(stock, window=(0.0, 0.6)).noisy_steps(10) == [0, 1, 2, 3, 4, 5]
    assert log_prob_scheduler(stock, window=(0.2, 0.4)).noisy_steps(10) == [2, 3]
    assert log_prob_scheduler(stock).noisy_steps(4) == [0, 1, 2]
    assert log_prob_scheduler(stock, noise_level=0.0).noisy_steps(4) == []


def test_the_configuration_of_the_released_scheduler_is_kept():
    """diffusers' from_config would reset what the other class has as its default, and DDIM would clip latents."""
    released = diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False)
    ours = log_prob_scheduler(released)
    assert ours.config.steps_offset == 1 and not ours.config.set_alpha_to_one and not ours.config.clip_sample
    assert torch.equal(ours.alphas_cumprod, released.alphas_cumprod)
    flow = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert log_prob_scheduler(flow).config.shift == 5.0
    clipping = diffusers.DDIMScheduler(clip_sample=True)
    assert log_prob_scheduler(clipping).config.clip_sample  # its own, not a default of ours


@pytest.mark.parametrize(
    ("stock", "options", "message"),
    [
        (diffusers.LCMScheduler(), {}, "distilled"),
        (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}, "distilled"),
        (diffusers.EDMEulerScheduler(), {}, "neither of the DDIM family"),
        (diffusers.DDIMScheduler(), {"noise_level": 1.5}, "noise_level is 1.5"),
        (diffusers.DDIMScheduler(), {"noise_level": math.nan}, "noise_level is nan"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), {"noise_level": 1.5}, "noise_level is 1.5"),
        (diffusers.DDIMScheduler(), {"window": (0.5, 0.5)}, "window is"),
        (diffusers.DDIMScheduler(), {"dynamics": "dance"}, "dynamics is 'dance'"),
    ],
)
def test_what_has_no_log_probability_is_refused(stock: Any, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        log_prob_scheduler(stock, **options)


def test_a_pipeline_with_its_stock_scheduler_is_refused():
    with pytest.raises(InputError, match=r"set pipeline\.scheduler"):
        record(tiny.build("sd15"), PROMPTS, {}, seeded(0))


# --- the replay


@pytest.mark.parametrize("dynamics", ["cps", "flow_sde"])
def test_any_of_the_steps_can_be_replayed_and_the_prompts_are_encoded_once(
    dynamics: Any, monkeypatch: pytest.MonkeyPatch
):
    pipeline = tiny.build("sd3")
    pipeline.scheduler = log_prob_scheduler(pipeline.scheduler, dynamics=dynamics, generator=seeded(1))
    encoded = []
    encode = type(pipeline).encode_prompt
    monkeypatch.setattr(
        type(pipeline), "encode_prompt", lambda self, *a, **k: encoded.append(1) or encode(self, *a, **k)
    )
    options = {"num_inference_steps": 6, **tiny.FAMILIES["sd3"].call(True)}
    rollout = record(pipeline, PROMPTS, options, seeded(0))
    seen = []

    def on_step(step: Step, output: Any) -> None:
        assert step.log_prob is not None
        seen.append((replayed_log_prob(pipeline.scheduler, step, output)[0] - step.log_prob).abs().max())

    for steps in (rollout.steps, rollout.steps[3:4], rollout.steps[1::2]):
        replay(pipeline, rollout, steps, on_step, grad=False)
    assert len(seen) == 5 + 1 + 2 and max(seen) < 1e-4
    assert len(encoded) == 1
    assert "encode_prompt" not in vars(pipeline)


def test_a_negative_prompt_is_given_once_for_each_prompt():
    """Stable Diffusion refuses one string beside a list of prompts."""
    options = call_options(PROMPTS, {"negative_prompt": "green", "guidance_scale": 5.0})
    assert options == {"prompt": PROMPTS, "negative_prompt": ["green", "green"], "guidance_scale": 5.0}


def test_a_pipeline_that_changes_the_latents_is_caught(monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny.build("sd15")
    pipeline.scheduler = log_prob_scheduler(pipeline.scheduler, generator=seeded(1))
    options = {"num_inference_steps": STEPS, **tiny.FAMILIES["sd15"].call(False)}
    rollout = record(pipeline, PROMPTS, options, seeded(0))
    prepare = type(pipeline).prepare_latents
    monkeypatch.setattr(type(pipeline), "prepare_latents", lambda self, *args: prepare(self, *args) * 1.01)
    with pytest.raises(ReplayError, match="other latents"):
        replay(pipeline, rollout, rollout.steps, lambda step, output: None)
