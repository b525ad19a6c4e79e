"""One call of a diffusers pipeline, recorded step by step, and its replay through the pipeline's own code.

A replay runs the pipeline's `__call__` again, with gradients, on the recorded latents and the chosen steps. So guidance
of any kind, several denoisers and packed latents need no code here: the pipeline handles them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from listener_reward.errors import InputError

from .schedulers import LogProbScheduler, log_prob

RESERVED = (
    "prompt",
    "num_inference_steps",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "eta",
)
"""Options of a call that the caller may not give, because recording or replaying sets them."""


class ReplayError(RuntimeError):
    """A replay differs from the recorded call, so its gradients would be wrong."""


@dataclass
class Step:
    """One noisy step of B samples; for `on_step` also any other step that a loss needs."""

    index: int
    """Position in the whole schedule."""
    x: torch.Tensor
    """The latents (B, ...) that the model gets."""
    x_next: torch.Tensor | None = None
    """The latents that were drawn."""
    log_prob: torch.Tensor | None = None
    """Of `x_next`, float32 (B,)."""


@dataclass
class Rollout:
    """B samples of one call."""

    options: dict[str, Any]
    """The arguments of the pipeline's call."""
    images: torch.Tensor
    """(B, C, H, W), or (B, F, C, H, W) for video, float32 in [0, 1], on the CPU."""
    latents: torch.Tensor
    """The last latents, before they were decoded."""
    steps: list[Step]
    """The noisy steps, in order."""
    dtype: torch.dtype
    """The dtype of the latents that the scheduler gets."""
    length: int
    """Steps of the whole schedule."""
    outputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)
    """With `keep_outputs`, the latents that the model got at each step, and its guided output."""
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    """Encoded prompts, so that replays do not run the text encoders again."""


OnStep = Callable[[Step, torch.Tensor], None]
"""Called with a step and the guided model output (B, ...). May call `backward`: the graph covers this step only."""


def record(
    pipeline: Any,
    prompts: Sequence[str],
    options: dict[str, Any],
    generator: torch.Generator,
    *,
    keep_outputs: bool = False,
) -> Rollout:
    """Samples one image for each of `prompts` with the pipeline's `LogProbScheduler`.

    Args:
        pipeline: a text-to-image or text-to-video pipeline whose scheduler is a `LogProbScheduler`.
        prompts: one prompt for each sample.
        options: what else the pipeline is called with, `num_inference_steps` included.
        generator: draws the initial latents. The steps' noise is the scheduler's.
        keep_outputs: whether the rollout has `outputs`.

    Raises:
        InputError: the pipeline gives no tensor with one entry for each prompt.
    """
    scheduler = scheduler_of(pipeline)
    recorder = _Recorder(keep_outputs)
    memory: dict[str, Any] = {}
    options = call_options(prompts, options)
    with _taped(scheduler, recorder), _remembered_prompts(pipeline, memory), torch.no_grad():
        images = pipeline(**options, generator=generator, output_type="pt")[0]
    if not isinstance(images, torch.Tensor) or len(images) != len(prompts) or recorder.latents is None:
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise InputError(
            f"{type(pipeline).__name__} gave {shape} for {len(prompts)} prompts; it has to give one image or video for "
            "each, as a tensor"
        )
    return Rollout(
        options=options,
        images=images.float().cpu(),
        latents=recorder.latents,
        steps=recorder.steps,
        dtype=recorder.dtype,
        length=len(scheduler.schedule),
        outputs=recorder.outputs,
        memory=memory,
    )


def replay(pipeline: Any, rollout: Rollout, steps: Sequence[Step], on_step: OnStep, *, grad: bool = True) -> None:
    """Runs the pipeline's denoisers on `steps` in order, as in the recorded call, and passes each output to `on_step`.

    Args:
        pipeline: the pipeline of `record`.
        rollout: what `record` gave.
        steps: recorded steps, or others with the same samples at other latents; by rising index.
        on_step: see `OnStep`.
        grad: whether outputs carry gradients: the pipeline's `__call__` then runs without its `no_grad`.

    Raises:
        ReplayError: the scheduler gets other latents than the recorded ones, a step is not run, or no gradient passes.
    """
    scheduler = scheduler_of(pipeline)
    call = type(pipeline).__call__
    call = inspect.unwrap(call) if grad else call
    player = _Player(steps, on_step, grad)
    with _taped(scheduler, player), _remembered_prompts(pipeline, rollout.memory), torch.set_grad_enabled(grad):
        call(pipeline, **rollout.options, latents=steps[0].x, output_type="latent")
    if player.played != len(steps):
        raise ReplayError(f"the pipeline ran {player.played} of {len(steps)} steps")


def replayed_log_prob(
    scheduler: LogProbScheduler, step: Step, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The log-probability (B,) of a recorded step under `output`, and its transition's mean and standard deviation."""
    assert step.x_next is not None
    mean, std = scheduler.transition(step.index, output, step.x)
    return log_prob(step.x_next, mean, std), mean, std


def call_options(prompts: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call for a list of prompts. A negative prompt becomes a list of equal length, which some
    pipelines require."""
    many = {
        name: [value] * len(prompts)
        for name, value in options.items()
        if name.startswith("negative_prompt") and isinstance(value, str)
    }
    return {"prompt": list(prompts), **options, **many}


def scheduler_of(pipeline: Any) -> LogProbScheduler:
    """The pipeline's scheduler.

    Raises:
        InputError: it is not one of this package's.
    """
    if not isinstance(pipeline.scheduler, LogProbScheduler):
        raise InputError(
            f"the pipeline's scheduler is {type(pipeline.scheduler).__name__}; set "
            "pipeline.scheduler = log_prob_scheduler(pipeline.scheduler)"
        )
    return pipeline.scheduler


class _Recorder:
    def __init__(self, keep_outputs: bool) -> None:
        self.keep_outputs = keep_outputs
        self.steps: list[Step] = []
        self.outputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.latents: torch.Tensor | None = None
        self.dtype = torch.float32

    def choose(self, n: int) -> list[int]:
        return list(range(n))

    def step(self, scheduler: LogProbScheduler, index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        latents, log_prob_drawn = scheduler.draw(index, output, sample)
        if log_prob_drawn is not None:
            self.steps.append(Step(index, sample, latents, log_prob_drawn))
        if self.keep_outputs:
            self.outputs[index] = sample, output
        self.latents, self.dtype = latents, sample.dtype
        return latents


class _Player:
    def __init__(self, steps: Sequence[Step], on_step: OnStep, grad: bool) -> None:
        self.steps, self.on_step, self.grad, self.played = steps, on_step, grad, 0

    def choose(self, n: int) -> list[int]:
        return [step.index for step in self.steps]

    def step(self, scheduler: LogProbScheduler, index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        step = self.steps[self.played]
        if index != step.index or not torch.equal(sample.float(), step.x.float()):
            raise ReplayError(
                f"step {step.index} was recorded and the pipeline replays step {index} with other latents; it changes "
                "the latents that it is given, or its loop is not the plain one"
            )
        if self.grad and not output.requires_grad:
            raise ReplayError(
                "the model's output carries no gradient: nothing of the denoiser is trained, or the pipeline's "
                "__call__ is a no_grad inside a function of yours that functools.wraps does not mark"
            )
        self.on_step(step, output)
        self.played += 1
        following = self.steps[min(self.played, len(self.steps) - 1)]
        return following.x.detach()


@contextlib.contextmanager
def _taped(scheduler: LogProbScheduler, tape: Any) -> Iterator[None]:
    scheduler.tape = tape
    try:
        yield
    finally:
        scheduler.tape = None


@contextlib.contextmanager
def _remembered_prompts(pipeline: Any, memory: dict[str, Any]) -> Iterator[None]:
    """Calls the pipeline's `encode_prompt` once for equal arguments. No gradient reaches the text encoders."""
    if not hasattr(pipeline, "encode_prompt"):
        yield
        return
    encode = pipeline.encode_prompt

    def encode_once(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        with torch.no_grad():
            if any(isinstance(value, torch.Tensor) for value in given):
                return encode(*args, **kwargs)
            key = repr((args, sorted(kwargs.items())))
            if key not in memory:
                memory[key] = encode(*args, **kwargs)
            return memory[key]

    pipeline.encode_prompt = encode_once
    try:
        yield
    finally:
        del pipeline.encode_prompt  # the instance's; the class's comes back
