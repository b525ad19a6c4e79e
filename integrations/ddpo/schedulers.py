"""Schedulers that draw the next latent from a Gaussian whose density is known, as reinforcement learning needs.

Each is a subclass of a diffusers scheduler and is set on the user's own pipeline. A step without noise is the stock
scheduler's own `step`, so at noise level zero a batch's images are the stock sampler's bit for bit. A noisy step is

- for DDIM (epsilon, sample and v-prediction): equation 16 of Song et al. (arXiv 2010.02502), the noise level being eta;
- for flow matching, "cps": the coefficient-preserving step of Wang and Yu (arXiv 2509.05952), a level in [0, 1];
- for flow matching, "flow_sde": the SDE of Flow-GRPO (arXiv 2505.05470), the noise level being its a.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast, get_args

import torch

from listener_reward.errors import InputError, MissingExtraError, check_choice

try:
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise MissingExtraError('DDPO needs diffusers: pip install "listener-reward[diffusers]"') from error

_Method = TypeVar("_Method", bound=Callable[..., None])

Dynamics = Literal["cps", "flow_sde"]

DEFAULT_NOISE = {"ddim": 1.0, "cps": 0.7, "flow_sde": 0.7}
"""Noise levels of DDPO (DDIM, eta) and of Flow-GRPO."""


class Tape(Protocol):
    """Stands in for the scheduler's step, to record or to replay (`rollout.py`)."""

    def choose(self, n: int) -> list[int]:
        """Which of the schedule's `n` steps the pipeline is to run."""
        ...

    def step(self, scheduler: LogProbScheduler, index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The next latent, after step `index` of the whole schedule."""
        ...


def log_prob(x: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """Log-density of `x` (B, ...) under N(mean, std^2), the mean over all dimensions but the first: float32 (B,).

    A mean and not a sum, as in DDPO and Flow-GRPO, so that ratios do not depend on the latent's size.
    """
    z = (x.float() - mean) / std
    return (-0.5 * z**2 - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


class _LogProb:
    """The common part of the schedulers below. The caller sets the attributes."""

    noise_level: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    """The part of the schedule, as fractions, whose steps are noisy. The last step never is: its noise would stay
    visible."""
    generator: torch.Generator | None = None
    """Draws the noise. An attribute, because flow-matching pipelines pass no generator to `step`."""
    tape: Tape | None = None
    schedule: torch.Tensor
    """The timesteps of the whole schedule; `timesteps` holds fewer while a tape replays."""

    # From the stock scheduler that is mixed in.
    timesteps: torch.Tensor
    config: Any

    def _choose_steps(self) -> None:
        self.schedule = self.timesteps
        if self.tape is not None:
            self.timesteps = self.schedule[self.tape.choose(len(self.schedule))]

    def noisy_steps(self, n: int) -> list[int]:
        """Which of `n` steps draw noise."""
        first, end = (math.ceil(fraction * n - 1e-9) for fraction in self.window)
        return list(range(first, min(end, n - 1))) if self.noise_level > 0 else []

    def index_of(self, timestep: Any) -> int:
        """The position of `timestep` in the whole schedule."""
        found = (self.schedule == torch.as_tensor(timestep, device=self.schedule.device)).nonzero()
        if len(found) != 1:
            raise InputError(
                f"the pipeline asks for timestep {timestep}, which its schedule of {len(self.schedule)} steps holds "
                f"{len(found)} times; this pipeline's sampling loop is not supported"
            )
        return int(found)

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True, **options: Any) -> Any:
        """The next latent, in the stock scheduler's place; `options` go to the stock scheduler's deterministic step."""
        index = self.index_of(timestep)
        if self.tape is None:
            latent, _ = self.draw(index, model_output, sample, **options)
        else:
            _refuse(options)
            latent = self.tape.step(self, index, model_output, sample)  # pyright: ignore[reportArgumentType]
        return SchedulerOutput(prev_sample=latent) if return_dict else (latent,)

    def draw(
        self, index: int, output: torch.Tensor, sample: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latent after step `index` and its log-probability (B,), None where the step is deterministic."""
        if index not in self.noisy_steps(len(self.schedule)):
            return self.stock_step(index, output, sample, **options).prev_sample, None
        _refuse(options)
        mean, std = self.transition(index, output, sample)
        noise = randn_tensor(mean.shape, generator=self.generator, device=mean.device, dtype=torch.float32)
        latent = (mean + std * noise).to(sample.dtype)
        return latent, log_prob(latent, mean, std)  # of the rounded latent: it is the one that is replayed

    def stock_step(self, index: int, output: torch.Tensor, sample: torch.Tensor, **options: Any) -> Any:
        """The stock scheduler's own step."""
        stock: Any = super()
        return stock.step(output, self.schedule[index], sample, **options)

    def transition(self, index: int, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Mean, float32 and shaped as `sample`, and standard deviation of a noisy step's next latent."""
        raise NotImplementedError

    def predict_x0(self, index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The clean latent, float32, that the model's output at step `index` stands for; affine in the output."""
        raise NotImplementedError

    def diffuse(self, index: int, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The clean latent `x0` with as much of `noise` as step `index` starts from, float32."""
        raise NotImplementedError


class _DDIM(_LogProb):
    alphas_cumprod: torch.Tensor
    final_alpha_cumprod: torch.Tensor
    num_inference_steps: int

    def _alphas(self, index: int) -> tuple[float, float]:
        """The cumulative alpha before and after the step."""
        now = int(self.schedule[index])
        after = now - self.config.num_train_timesteps // self.num_inference_steps
        return float(self.alphas_cumprod[now]), float(
            self.alphas_cumprod[after] if after >= 0 else self.final_alpha_cumprod
        )

    def transition(self, index: int, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, float]:
        # diffusers' own step with eta, but for the root below: at zero terminal SNR and full noise rounding makes its
        # radicand negative there, and the latents NaN.
        alpha, alpha_after = self._alphas(index)
        variance = self.noise_level**2 * (1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)
        onward = math.sqrt(max(0.0, 1 - alpha_after - variance))
        x0, noise = self.predict_x0(index, output, sample), self._predict_noise(alpha, output.float(), sample.float())
        return math.sqrt(alpha_after) * x0 + onward * noise, math.sqrt(variance)

    def _predict_noise(self, alpha: float, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """From the model's output as it is: diffusers clips the predicted picture only."""
        if self.config.prediction_type == "epsilon":
            return output
        if self.config.prediction_type == "v_prediction":
            return math.sqrt(alpha) * output + math.sqrt(1 - alpha) * sample
        return (sample - math.sqrt(alpha) * output) / math.sqrt(1 - alpha)

    def predict_x0(self, index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return self.stock_step(index, output.float(), sample.float()).pred_original_sample

    def diffuse(self, index: int, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        alpha, _ = self._alphas(index)
        return math.sqrt(alpha) * x0.float() + math.sqrt(1 - alpha) * noise.float()


def _wraps(stock: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """`functools.wraps`, after which type checkers still know a method for one; pipelines look at its signature."""
    return cast("Any", functools.wraps(stock))


class LogProbDDIMScheduler(_DDIM, DDIMScheduler):  # pyright: ignore[reportIncompatibleMethodOverride]
    """DDIM with eta and log-probabilities."""

    @_wraps(DDIMScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._choose_steps()


class LogProbCogVideoXDDIMScheduler(  # pyright: ignore[reportIncompatibleMethodOverride]
    _DDIM, CogVideoXDDIMScheduler
):
    """The same for CogVideoX's DDIM, which rounds otherwise, has no eta of its own and clips nothing."""

    @_wraps(CogVideoXDDIMScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._choose_steps()


class LogProbFlowMatchScheduler(  # pyright: ignore[reportIncompatibleMethodOverride]
    _LogProb, FlowMatchEulerDiscreteScheduler
):
    """Flow matching's Euler steps as stochastic differential equations with the same marginals.

    A latent at noise s in [0, 1] is (1 - s) x0 + s noise, and the model gives its velocity, noise - x0.
    """

    dynamics: Dynamics = "cps"

    @_wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._choose_steps()

    def _noise(self, index: int) -> float:
        """How much of the latent is noise where the step begins, in [0, 1]."""
        sigmas: Any = self.sigmas
        sigma = float(sigmas[index])
        return 1 - sigma if self.config.invert_sigmas else sigma  # Mochi counts from noise to data

    def _velocity(self, output: torch.Tensor) -> torch.Tensor:
        return -output.float() if self.config.invert_sigmas else output.float()

    def stock_step(self, index: int, output: torch.Tensor, sample: torch.Tensor, **options: Any) -> Any:
        self._step_index = index
        return super().stock_step(index, output, sample, **options)

    def transition(self, index: int, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, float]:
        x, v, s, after = sample.float(), self._velocity(output), self._noise(index), self._noise(index + 1)
        if self.dynamics == "cps":
            std = after * math.sin(self.noise_level * math.pi / 2)
            x0, noise = x - s * v, x + (1 - s) * v
            return (1 - after) * x0 + math.sqrt(max(after**2 - std**2, 0.0)) * noise, std
        dt = after - s
        # At s = 1 the drift has a pole; Flow-GRPO takes the next step's s in its place.
        a2 = self.noise_level**2 * s / (1 - (s if s < 1 else after))
        return x * (1 + a2 / (2 * s) * dt) + v * (1 + a2 * (1 - s) / (2 * s)) * dt, math.sqrt(-a2 * dt)

    def predict_x0(self, index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return sample.float() - self._noise(index) * self._velocity(output)

    def diffuse(self, index: int, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        s = self._noise(index)
        return (1 - s) * x0.float() + s * noise.float()


LogProbScheduler: TypeAlias = LogProbDDIMScheduler | LogProbCogVideoXDDIMScheduler | LogProbFlowMatchScheduler


def log_prob_scheduler(
    stock: Any,
    *,
    noise_level: float | None = None,
    dynamics: Dynamics = "cps",
    window: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> LogProbScheduler:
    """A scheduler with log-probabilities for the model of `stock`, a pipeline's own scheduler.

    A multistep or ancestral scheduler (PNDM, UniPC, DPM-Solver, Euler) becomes the first-order one of its family.

    Args:
        stock: the pipeline's own scheduler; it is not changed.
        noise_level: eta of DDIM or the level of `dynamics`, at least 0; None takes `DEFAULT_NOISE`.
        dynamics: which SDE, where the model is a flow-matching one.
        window: the part of the schedule whose steps are noisy, as two fractions in [0, 1].
        generator: draws the noise; None takes torch's global one.

    Raises:
        InputError: a scheduler of a distilled model or of another family, or a level or window out of range.
    """
    check_choice("dynamics", dynamics, get_args(Dynamics))
    if not (len(window) == 2 and 0 <= window[0] < window[1] <= 1):
        raise InputError(f"window is {window!r}; give two rising fractions of the schedule, for example (0.0, 0.6)")
    family, config = _family(stock)
    law = dynamics if family is LogProbFlowMatchScheduler else "ddim"
    noise_level = DEFAULT_NOISE[law] if noise_level is None else noise_level
    if not (0 <= noise_level < math.inf) or (noise_level > 1 and law != "flow_sde"):
        raise InputError(f"noise_level is {noise_level}; for {law} it is a number from 0 to 1, for flow_sde from 0 up")
    scheduler = family(**config)
    if isinstance(scheduler, LogProbFlowMatchScheduler):
        scheduler.dynamics = dynamics
    elif hasattr(stock, "alphas_cumprod"):
        scheduler.alphas_cumprod = stock.alphas_cumprod  # what a loader may have changed beside the configuration
    scheduler.noise_level, scheduler.window, scheduler.generator = float(noise_level), window, generator
    return scheduler


def _refuse(options: dict[str, Any]) -> None:
    if any(value is not None for value in options.values()):
        raise InputError(f"the pipeline gives its scheduler {', '.join(options)}, which no noisy step supports")


DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Their models jump to the clean image and noise it again: neither DDIM nor its log-probabilities describe them."""


def _family(stock: Any) -> tuple[type[LogProbScheduler], dict[str, Any]]:
    """The class that samples from `stock`'s model, and its arguments."""
    config, name = dict(stock.config), type(stock).__name__
    distilled = any(cls.__name__ in DISTILLED for cls in type(stock).__mro__) or config.get("stochastic_sampling")
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas") or "FlowMatch" in name:
        family = LogProbFlowMatchScheduler
        config["shift"] = config.get("flow_shift", config.get("shift", 1.0))  # UniPC and DPM-Solver spell it so
    elif hasattr(stock, "alphas_cumprod"):
        family = LogProbCogVideoXDDIMScheduler if "CogVideoX" in name else LogProbDDIMScheduler
        config.setdefault("clip_sample", False)  # DDIM's own default cuts latents off
        ddim = isinstance(stock, DDIMScheduler | CogVideoXDDIMScheduler)
        if not ddim and config.get("timestep_spacing") == "linspace":
            # DDIM goes 1000 // n down from each timestep, which in its "linspace" is not where the next step begins.
            # "trailing" has the timesteps of DPM-Solver's "linspace", and steps that meet.
            config["timestep_spacing"] = "trailing"
    else:
        family = None
    if distilled or family is None:
        why = "is of a distilled model" if distilled else "is neither of the DDIM family nor of flow matching"
        raise InputError(f"the pipeline's scheduler, {name}, {why}; its steps have no log-probability here")
    # Not from_config: it resets what `_use_default_values` lists to the new class's defaults.
    known = inspect.signature(family.__init__).parameters
    return family, {key: value for key, value in config.items() if key in known}
