"""One call of a diffusers pipeline, recorded step by step, and its replay through the pipeline's own code.

A replay runs the pipeline's `__call__` again, with gradients, on the recorded latents and the chosen steps. So guidance
of any kind, several denoisers, packed latents and source images need no code here: the pipeline handles them. What the
pipeline encodes, prompts and images, is remembered from the recording.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
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
    memory: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    """What the encoders gave, by their names and in order, so that replays do not run them again; see `_remembered`."""
    leaps: bool = False
    """Whether the pipeline cannot be given latents as its scheduler gets them; see `_leaps`."""


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
        pipeline: a pipeline of images or videos whose scheduler is a `LogProbScheduler`.
        prompts: one prompt for each sample.
        options: what else the pipeline is called with, `num_inference_steps` and source images included.
        generator: draws the initial latents. The steps' noise is the scheduler's.
        keep_outputs: whether the rollout has `outputs`.

    Raises:
        InputError: the pipeline gives no tensor with one entry for each prompt.
    """
    scheduler = scheduler_of(pipeline)
    recorder = _Recorder(keep_outputs)
    memory: dict[str, list[Any]] = {}
    options, prepared = call_options(prompts, options), []
    watched = _watched(pipeline, "prepare_latents", prepared)
    with _taped(scheduler, recorder), _remembered(pipeline, memory), watched, torch.no_grad():
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
        leaps=_leaps(pipeline, prepared, memory, recorder.first),
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
    leap = rollout.leaps
    player = _Player(steps, on_step, grad, leap)
    begin: dict[str, Any] = {"generator": torch.Generator()} if leap else {"latents": steps[0].x}
    with _taped(scheduler, player), _remembered(pipeline, rollout.memory), torch.set_grad_enabled(grad and not leap):
        call(pipeline, **rollout.options, **begin, output_type="latent")
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
        self.first: torch.Tensor | None = None
        self.latents: torch.Tensor | None = None
        self.dtype = torch.float32

    def choose(self, n: int) -> list[int]:
        return list(range(n))

    def step(self, scheduler: LogProbScheduler, index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        self.first = sample if self.first is None else self.first
        latents, log_prob_drawn = scheduler.draw(index, output, sample)
        if log_prob_drawn is not None:
            self.steps.append(Step(index, sample, latents, log_prob_drawn))
        if self.keep_outputs:
            self.outputs[index] = sample, output
        self.latents, self.dtype = latents, sample.dtype
        return latents


class _Player:
    def __init__(self, steps: Sequence[Step], on_step: OnStep, grad: bool, leap: bool) -> None:
        self.steps, self.on_step, self.grad, self.played = steps, on_step, grad, 0
        self.leap = leap
        """Whether the first step is still to come that only puts the recorded latents in the place of those that the
        call began with. It takes no gradient."""

    def choose(self, n: int) -> list[int]:
        return [step.index for step in (self.steps[:1] if self.leap else [])] + [step.index for step in self.steps]

    def step(self, scheduler: LogProbScheduler, index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if self.leap:
            self.leap = False
            torch.set_grad_enabled(self.grad)
            return self.steps[0].x.detach()
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


ENCODERS = ("encode_prompt", "_encode_prompt", "encode_image")
"""What a pipeline calls its encoding of texts and images that the denoiser attends to."""


@contextlib.contextmanager
def _remembered(pipeline: Any, memory: dict[str, list[Any]]) -> Iterator[None]:
    """Has each encoder of the pipeline run while a call is recorded, and give the same in each replay.

    This saves time, and a source image has one latent: some pipelines draw it from the VAE's posterior. No gradient
    reaches the encoders.
    """
    owners = [(pipeline, name) for name in ENCODERS] + [(getattr(pipeline, "vae", None), "encode")]
    with contextlib.ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(_once(owner, name, memory.setdefault(name, [])))
        yield


@contextlib.contextmanager
def _watched(owner: Any, name: str, calls: list[Any]) -> Iterator[None]:
    """Keeps the arguments of a method's calls."""

    def watch(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return run(*args, **kwargs)

    with _replaced(owner, name, watch):
        yield


@contextlib.contextmanager
def _once(owner: Any, name: str, results: list[Any]) -> Iterator[None]:
    """Keeps what the calls of a method give; the k-th call gives the k-th of `results` where that is there already."""
    numbers = itertools.count()

    def give(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        k = next(numbers)
        if k >= len(results):
            with torch.no_grad():
                results.append(_drawn_once(run(*args, **kwargs)))
        return results[k]

    with _replaced(owner, name, give):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """The object with another method, whose first argument is its own; nothing where it has none of the name."""
    run = getattr(owner, name, None)
    if run is None:
        yield
        return
    own = vars(owner).get(name)
    setattr(owner, name, functools.partial(method, run))
    try:
        yield
    finally:
        delattr(owner, name)  # the instance's; the class's comes back
        if own is not None:
            setattr(owner, name, own)


def _drawn_once(result: Any) -> Any:
    if hasattr(result, "latent_dist"):
        result.latent_dist = _DrawnOnce(result.latent_dist)
    return result


class _DrawnOnce:
    """A VAE's posterior whose sample is drawn by the first who asks, and the same for all others."""

    def __init__(self, posterior: Any) -> None:
        self._posterior, self._sample = posterior, None

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        if self._sample is None:
            self._sample = self._posterior.sample(generator)
        return self._sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self._posterior, name)


def _leaps(pipeline: Any, prepared: list[Any], memory: dict[str, list[Any]], first: torch.Tensor | None) -> bool:
    """Whether the pipeline cannot be given latents as its scheduler gets them.

    Then a replay begins with other latents, and a first step without a gradient puts the recorded ones in their place.
    An image-to-video pipeline may keep the first frame from its scheduler (LTX), and another may pack what it is given
    (Flux 2). The pipeline's `prepare_latents` is asked, with the arguments that it was called with.
    """
    if not prepared or first is None:
        return False
    prepare, (args, kwargs) = pipeline.prepare_latents, prepared[0]
    call = inspect.signature(prepare).bind(*args, **kwargs)
    if "latents" not in call.signature.parameters:
        return False
    call.arguments["latents"] = first
    try:
        with _remembered(pipeline, memory), torch.no_grad():
            made = prepare(*call.args, **call.kwargs)
    except Exception:  # pipelines raise what they like about a shape
        return True
    latents = made[0] if isinstance(made, tuple) else made
    return isinstance(latents, torch.Tensor) and latents.shape != first.shape
