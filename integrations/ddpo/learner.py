"""Updates the weights from an epoch's images: gradients of the losses, step by step, and optimizer steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from listener_reward.errors import InputError

from .config import DDPOConfig
from .lora import adapters_off, add_lora, denoisers, trainable
from .objectives import goodness, nan_mean, nft_loss, ppo_loss
from .rollout import ReplayError, Rollout, Step, replay, replayed_log_prob
from .schedulers import LogProbScheduler

PROMPTS, LATENTS, STEPS, CHOICE, RENOISE, ORDER = range(6)
"""Purposes of random draws; see `stream`."""

CAUSES = (
    "Usual causes: dropout or a module in training mode; torch.compile or a caching hook on the denoiser; guidance "
    "that depends on the number of the step (then train_fraction=1 and a window that begins at 0); kernels that "
    "are not deterministic"
)


def stream(seed: int, purpose: int, epoch: int, part: int = 0, process: int = 0) -> torch.Generator:
    """A generator for one draw, seeded by the draw's purpose and place, so that a resumed run needs no state of earlier
    draws."""
    drawn = np.random.SeedSequence([seed, purpose, epoch, part, process]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(drawn[0] % 2**63))


@dataclass
class _Batch:
    """B samples of one call, with their advantages and the steps to train."""

    rollout: Rollout
    advantages: torch.Tensor
    """(B,), clipped."""
    scored: torch.Tensor
    """(B,) bool."""
    plan: list[Step]
    """The steps to train."""
    base: dict[int, torch.Tensor] = field(default_factory=dict)
    """The base's result at each step: the transition's mean (PPO) or the model's output (NFT)."""
    old: dict[int, torch.Tensor] = field(default_factory=dict)
    """NFT only: the clean latents that the model predicted at each step before the update."""


class Learner:
    """The trained weights, and the updates that an epoch's images make to them.

    Args:
        pipeline: gets LoRA, or its denoisers made trainable; everything else in it is frozen.
        scheduler: the one that draws the images; it is on the pipeline whenever `learn` is called.
        config: what to train, and how.
        accelerator: its device, its precision, and its other processes, with whom gradients are averaged.

    Raises:
        InputError: modules or settings that cannot be trained.
    """

    def __init__(self, pipeline: Any, scheduler: LogProbScheduler, config: DDPOConfig, accelerator: Any):
        self.pipeline, self.scheduler, self.config, self.accelerator = pipeline, scheduler, config, accelerator
        self.modules = denoisers(pipeline)
        self._prepare_modules()
        self.parameters = trainable(list(self.modules.values()))
        self.optimizer = torch.optim.AdamW(self.parameters, config.learning_rate, weight_decay=config.weight_decay)
        self.replay_checked = False
        """Whether a replay has been checked against its recording; until then "nft" needs a rollout with outputs."""

    def learn(
        self, epoch: int, rollouts: list[Rollout], advantages: np.ndarray, scored: np.ndarray
    ) -> dict[str, float]:
        """Makes the epoch's updates and returns the numbers to log.

        Args:
            epoch: seeds what is drawn.
            rollouts: the epoch's batches.
            advantages: clipped, for their N images in order.
            scored: (N,) bool, false where the reward is missing.

        Raises:
            ReplayError: a replay differs from the recording; nothing has been learnt yet.
            FloatingPointError: a gradient is not finite.
        """
        config, seen = self.config, defaultdict(list)
        batches = self._make_batches(epoch, rollouts, advantages, scored)
        if config.loss == "nft" and not self.replay_checked:
            self._check_outputs(batches[0])
        for inner in range(config.inner_epochs):
            order = torch.randperm(len(batches), generator=self._stream(ORDER, epoch, inner)).numpy()
            for part in np.array_split(order, config.updates_per_epoch):
                for k in part:
                    self._backward(batches[k], 1 / len(part), seen)
                seen["grad_norm"].append(self._step())
                self.replay_checked = True
        return {name: nan_mean(values) for name, values in seen.items()}

    def _make_batches(
        self, epoch: int, rollouts: list[Rollout], advantages: np.ndarray, scored: np.ndarray
    ) -> list[_Batch]:
        """Chooses the steps to train, and runs the base there; with NFT also the model before the update."""
        config, batches, size = self.config, [], self.config.batch_size
        device = rollouts[0].latents.device
        for k, rollout in enumerate(rollouts):
            rows = slice(k * size, (k + 1) * size)
            candidates = [step.index for step in rollout.steps] if config.loss == "ppo" else range(rollout.length)
            count = max(1, round(config.train_fraction * len(candidates)))
            order = torch.randperm(len(candidates), generator=self._stream(CHOICE, epoch, k))
            chosen = sorted(candidates[j] for j in order[:count].tolist())
            if config.loss == "ppo":
                plan = [step for step in rollout.steps if step.index in chosen]
            else:
                plan = self._renoise(rollout, chosen, self._stream(RENOISE, epoch, k))
            batch = _Batch(
                rollout,
                torch.as_tensor(advantages[rows], dtype=torch.float32, device=device),
                torch.as_tensor(scored[rows], device=device),
                plan,
            )
            if config.kl:
                with adapters_off(self.modules):
                    self._replay(
                        batch, lambda step, output, b=batch: b.base.update({step.index: self._at(step, output)})
                    )
            if config.loss == "nft":
                self._replay(
                    batch,
                    lambda step, output, b=batch: b.old.update(
                        {step.index: self.scheduler.predict_x0(step.index, output, step.x)}
                    ),
                )
            batches.append(batch)
        return batches

    def _at(self, step: Step, output: torch.Tensor) -> torch.Tensor:
        """What the divergence from the base compares."""
        return output.float() if self.config.loss == "nft" else self.scheduler.transition(step.index, output, step.x)[0]

    def _renoise(self, rollout: Rollout, indices: list[int], generator: torch.Generator) -> list[Step]:
        """The sampled latents, noised anew to where each of `indices` starts."""
        x0, plan = rollout.latents, []
        for index in indices:
            noise = torch.randn(x0.shape, generator=generator).to(x0.device)
            plan.append(Step(index, self.scheduler.diffuse(index, x0, noise).to(rollout.dtype)))
        return plan

    def _backward(self, batch: _Batch, weight: float, seen: dict[str, list[float]]) -> None:
        config = self.config
        nothing = not config.kl and not (batch.scored.any() if config.loss == "nft" else batch.advantages.any())
        # Before the first update even a batch without a gradient is replayed, because the replay check must run.
        if nothing and self.replay_checked:
            return

        def on_step(step: Step, output: torch.Tensor) -> None:
            if config.loss == "ppo":
                loss, here, scale = self._ppo(batch, step, output, seen)
            else:
                loss, here, scale = self._nft(batch, step, output)
            seen["loss"].append(float(loss.detach()))
            if config.kl:
                kl = ((here - batch.base[step.index]) ** 2).mean() * scale
                seen["kl"].append(float(kl.detach()))
                loss = loss + config.kl * kl
            (loss * weight / len(batch.plan)).backward()

        self._replay(batch, on_step, grad=True)

    def _ppo(
        self, batch: _Batch, step: Step, output: torch.Tensor, seen: dict[str, list[float]]
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The loss, and for the divergence the transition's mean and its precision, halved."""
        log_prob, mean, std = replayed_log_prob(self.scheduler, step, output)
        assert step.log_prob is not None
        difference = (log_prob.detach() - step.log_prob).abs()
        if not self.replay_checked and not bool((difference <= self.config.replay_tolerance).all()):
            raise ReplayError(
                f"before any update the log-probability of step {step.index} is {float(difference.max()):.2g} off in "
                f"its replay (replay_tolerance={self.config.replay_tolerance:g}), so ratios would not start at 1. "
                f"{CAUSES}"
            )
        seen["ratio_deviation"].append(float(torch.expm1(log_prob.detach() - step.log_prob).abs().mean()))
        seen["clip_fraction"].append(float((difference > self.config.clip_range).float().mean()))
        loss = ppo_loss(log_prob, step.log_prob, batch.advantages, batch.scored, self.config.clip_range)
        return loss, mean, 0.5 / std**2

    def _check_outputs(self, batch: _Batch) -> None:
        """Checks that a replay gives the model's outputs of sampling. NFT draws no noise, so there are no ratios to
        check.

        The difference is the mean squared error over the output's mean square, which bfloat16 rounding hardly changes.
        """
        outputs = batch.rollout.outputs
        steps = [Step(step.index, outputs[step.index][0]) for step in batch.plan]

        def on_step(step: Step, output: torch.Tensor) -> None:
            recorded = outputs[step.index][1].float()
            difference = float(
                ((output.detach().float() - recorded) ** 2).mean() / (recorded**2).mean().clamp_min(1e-12)
            )
            if not difference <= self.config.replay_tolerance:
                raise ReplayError(
                    f"before any update the model's output at step {step.index} is {difference:.2g} off in its replay "
                    f"(mean squares; replay_tolerance={self.config.replay_tolerance:g}). {CAUSES}"
                )

        with self.accelerator.autocast():
            replay(self.pipeline, batch.rollout, steps, on_step)

    def _nft(self, batch: _Batch, step: Step, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The loss, and for the divergence the model's output."""
        clip = self.config.advantage_clip
        loss = clip * nft_loss(
            batch.rollout.latents,
            self.scheduler.predict_x0(step.index, output, step.x),
            batch.old[step.index],
            torch.as_tensor(goodness(batch.advantages.cpu().numpy(), clip), device=batch.advantages.device),
            batch.scored,
            self.config.nft_beta,
        )
        return loss, output.float(), 1.0

    def _replay(self, batch: _Batch, on_step: Callable[[Step, torch.Tensor], Any], *, grad: bool = False) -> None:
        with self.accelerator.autocast():
            replay(self.pipeline, batch.rollout, batch.plan, on_step, grad=grad)

    def _step(self) -> float:
        """One optimizer step from all processes' gradients; returns the gradient's norm before clipping."""
        for parameter in self.parameters:
            if self.accelerator.num_processes > 1:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(grad, "mean")
        if all(parameter.grad is None for parameter in self.parameters):
            return 0.0
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if norm == 0:  # no process has learnt anything, and AdamW would move on by its momentum alone
            self.optimizer.zero_grad()
            return 0.0
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm}; resume from the last checkpoint with a lower learning_rate or a kl"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _prepare_modules(self) -> None:
        """Freezes the pipeline, moves it to the device, and adds what is trained."""
        config = self.config
        self.pipeline.set_progress_bar_config(disable=True)
        components = [module for module in self.pipeline.components.values() if isinstance(module, torch.nn.Module)]
        if any(hasattr(module, "_hf_hook") for module in components):
            raise InputError(
                "the pipeline offloads its weights, which would move them between gradient and update; load it without"
            )
        self.pipeline.to(self.accelerator.device)
        for module in components:
            module.requires_grad_(False)
            module.eval()  # dropout would make every replay another one
        if config.train == "lora":
            add_lora(
                self.modules,
                rank=config.lora_rank,
                alpha=config.lora_alpha or config.lora_rank,
                targets=config.lora_targets,
                seed=config.seed,
            )
        for name, module in self.modules.items():
            if config.train == "full":
                module.requires_grad_(True)
                dtypes = {parameter.dtype for parameter in module.parameters()} - {torch.float32}
                if dtypes:
                    raise InputError(
                        f"the {name} is in {dtypes.pop()}, which rounds updates away; with train='full' load the "
                        "pipeline in float32 and give mixed_precision='bf16'"
                    )
            if config.gradient_checkpointing:
                if not getattr(module, "_supports_gradient_checkpointing", False):
                    raise InputError(f"the {name} has no gradient checkpointing; give gradient_checkpointing=False")
                module.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]

    def _stream(self, purpose: int, epoch: int, part: int) -> torch.Generator:
        return stream(self.config.seed, purpose, epoch, part, self.accelerator.process_index)
