"""DDPO for diffusers pipelines: `DDPOTrainer(pipeline, reward=ListenerReward(), prompts=...).train()`.

Reinforcement learning of a pipeline that draws, edits or animates, on a reward of its images (Black et al., arXiv
2305.13301; for flow matching, Flow-GRPO, arXiv 2505.05470; or DiffusionNFT's loss, arXiv 2509.16117). One trainer
serves every pipeline with a scheduler of the DDIM family or of flow matching. A pipeline's own `__call__` samples
(`rollout.record`) and runs again to learn (`rollout.replay`), so nothing here is particular to a pipeline.

Not supported: distilled models, FSDP and DeepSpeed, fp16, and training text encoders. With several processes
(`accelerate launch`), each samples its own prompts, and gradients are averaged.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from listener_reward.advantages import group_advantages, noise_fraction, normalised_sum
from listener_reward.checkpoints import saving
from listener_reward.errors import InputError, MissingExtraError
from listener_reward.files import write_text
from listener_reward.mixture import Mixture, remembers
from listener_reward.pairs import PromptLike

from ..contract import Reward, score
from .config import DDPOConfig
from .hacking import HackingGuard
from .learner import LATENTS, PROMPTS, STEPS, Learner, stream
from .log import RunLog, check_state, check_trackers, checkpoints, last_checkpoint, save_checkpoint
from .lora import adapters_off, save_lora
from .objectives import PromptStatistics, diversity, nan_mean
from .prompts import TrainingPrompt, joint_arguments, read_prompts
from .rollout import Rollout, call_options, record
from .samples import FixedSamples, in_runs
from .schedulers import log_prob_scheduler

try:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, gather_object
except ImportError as error:
    raise MissingExtraError('DDPO needs accelerate: pip install "listener-reward[diffusers]"') from error

logger = logging.getLogger(__name__)


class DDPOTrainer:
    """Trains a pipeline's denoisers on a reward.

    Args:
        pipeline: a diffusers pipeline. It is trained in place; its own scheduler is back in place after `train`.
        reward: `reward(images, prompts, metadata) -> (scores, info)`, DDPO's contract; a `ListenerReward` is one.
            Images are (B, C, H, W), or (B, F, C, H, W) for video, float32 in [0, 1] on the CPU; all images of a prompt
            come in one call. Scores are B numbers, NaN where missing. Entries of `info` with B numbers are logged. The
            reward is called in its own thread, one call at a time. A reward with `state_dict` and `load_state_dict` has
            its state kept in the checkpoints, unless the reward is an `nn.Module`, whose weights do not change here.
            The state is made of numbers, strings, bytes, lists, dicts and tensors.
        prompts: strings, `Prompt`s, or mappings with a "prompt". The other entries of a mapping reach the reward as
            metadata, and those that are arguments of the pipeline's call reach the call too, in the place of those of
            `config.call`: `{"prompt": "make it red", "image": "a.png"}`. An image is anything that `images.to_pil`
            reads, or a list of them; the reward has all of them as `metadata[i]["sources"]`. So one instruction on two
            images is two prompts, and two groups.
        config: a `DDPOConfig`.
        second_reward: another reward, only logged and watched, which shows whether the first reward is being hacked.
        accelerator: an `Accelerator` of your own; `log_with` and `mixed_precision` then have no effect.

    Raises:
        InputError: a pipeline, prompts or settings that cannot be trained.
    """

    def __init__(
        self,
        pipeline: Any,
        reward: Reward,
        prompts: Sequence[PromptLike | Mapping[str, Any]],
        config: DDPOConfig | None = None,
        *,
        second_reward: Reward | None = None,
        accelerator: Accelerator | None = None,
    ):
        self.config = config = DDPOConfig() if config is None else config
        self.prompts = read_prompts(prompts, pipeline)
        if config.prompts_per_epoch > len(self.prompts):
            raise InputError(
                f"prompts_per_epoch is {config.prompts_per_epoch} and there are {len(self.prompts)} prompts; give more "
                "prompts or lower it"
            )
        if config.advantage == "components" and not isinstance(reward, Mixture):
            raise InputError(
                f"advantage is 'components', and the reward is a {type(reward).__name__}; give a Mixture, or take "
                "advantage='group'"
            )
        self.pipeline, self.reward, self.second_reward = pipeline, reward, second_reward
        self.folder = Path(config.output_dir)
        if accelerator is None:
            check_trackers(config.log_with)
        self.accelerator = accelerator or Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=config.log_with,
            project_config=ProjectConfiguration(config.output_dir, logging_dir=str(self.folder / "logs")),
        )
        self.stock_scheduler = pipeline.scheduler
        self.scheduler = log_prob_scheduler(
            pipeline.scheduler,
            noise_level=0.0 if config.loss == "nft" else config.noise_level,
            dynamics=config.dynamics,
            window=config.window,
        )
        if config.loss == "ppo" and not self.scheduler.noisy_steps(config.num_inference_steps):
            raise InputError(
                f"window={config.window} and noise_level={config.noise_level} leave none of the "
                f"{config.num_inference_steps} steps noisy, and the last one never is; widen the window"
            )
        self.learner = Learner(pipeline, self.scheduler, config, self.accelerator)
        self.counts_noise = config.advantage_noise
        self.statistics = PromptStatistics(config.prompt_buffer, config.prompt_min_count)
        self.guard = HackingGuard()
        self.samples = FixedSamples(self.prompts[: config.sample_prompts], reward)
        self.history: list[dict[str, Any]] = []
        """The rows of `metrics.jsonl`, after or during `train`."""

    def train(self, resume: bool = False, *, watch: Callable[[int, Mapping[str, Any]], None] | None = None) -> Path:
        """Trains for `config.epochs` and saves the LoRA, or with `train="full"` the denoisers, into `output_dir`.

        Args:
            resume: go on from the newest whole checkpoint in `output_dir`, if it has one; a warning names each newer
                one that is broken, and the file. A run that was killed and resumed ends as it would have ended (bit for
                bit where kernels repeat themselves, as on one CPU with as many threads).
            watch: called in the main process after each epoch, with the number of epochs that are done and the epoch's
                row of `metrics.jsonl`; in place of the progress bar.

        Returns:
            `output_dir`; `pipeline.load_lora_weights` reads it (see `lora.save_lora`).

        Raises:
            InputError: `output_dir` holds another run's checkpoints, or a reward's state cannot be kept.
            JudgeError: the reward broke, or did not give B scores.
            OSError: the disk is full; the message names the last whole checkpoint.
            ReplayError: a replay differs from the recording; nothing has been learnt yet.
        """
        config = self.config
        if not resume:
            self._require_fresh()
        for reward in self._rewards():
            check_state(reward)
        if config.sample_every and self.accelerator.is_main_process and self.samples.base is None:
            with adapters_off(self.learner.modules):
                self.samples.base = self.draw_samples()  # before anything is loaded: a full model has no adapters
        start = self._load() if resume else 0
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {each.name: getattr(config, each.name) for each in fields(config)}
        settings["advantage_noise"] = self.counts_noise
        if self.accelerator.is_main_process:
            write_text(self.folder / "config.json", json.dumps(settings, indent=2, default=str))
        self.accelerator.init_trackers(
            "listener-reward-ddpo", {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
        )
        log = RunLog(self.folder, self.accelerator, start)
        self.history = log.history
        main = self.accelerator.is_main_process
        bar = tqdm(range(start, config.epochs), "epochs", disable=not main or watch is not None)
        try:
            if self.samples.base is not None and start == 0:
                log.draw(0, self.samples.base, self.samples.sources())
            for epoch in bar:
                row = self._run_epoch(epoch)
                last = epoch + 1 == config.epochs
                due = bool(config.sample_every) and (last or (epoch + 1) % config.sample_every == 0)
                if due:
                    row |= self._watch(log, epoch + 1)
                log.write(row)
                bar.set_postfix(reward=f"{row['reward_mean']:.3f}")
                if main and watch is not None:
                    watch(epoch + 1, row)
                messages = self.guard.update(row)
                for message in messages:
                    logger.warning("epoch %d: %s", epoch, message)
                stop = bool(messages) and config.on_hacking == "stop"
                if stop or (epoch + 1) % config.save_every == 0 or last:
                    self._save(epoch + 1)
                if stop:
                    if config.sample_every and not due:
                        self._draw(log, epoch + 1)
                    break
        finally:
            self.pipeline.scheduler = self.stock_scheduler
            for tracker in self.accelerator.trackers:  # not end_training, which leaves no process group to a next run
                tracker.finish()
        with saving(self.folder, lambda: last_checkpoint(self.folder / "checkpoints")):
            self.save(self.folder)
        return self.folder

    def save(self, folder: str | Path) -> None:
        """Writes the trained weights: LoRA by `lora.save_lora`, or each denoiser by `save_pretrained`."""
        if not self.accelerator.is_main_process:
            return
        if self.config.train == "lora":
            save_lora(self.pipeline, self.learner.modules, folder)
        else:
            for name, module in self.learner.modules.items():
                module.save_pretrained(Path(folder, name))  # pyright: ignore[reportCallIssue]

    def draw_samples(self) -> list[torch.Tensor]:
        """An image (C, H, W), or video, of each of the first prompts, drawn by the stock scheduler from fixed seeds."""
        config, images = self.config, []
        prompts = [prompt.opened() for prompt in self.prompts[: config.sample_prompts]]
        self.pipeline.scheduler = self.stock_scheduler
        # With arguments of their own one by one: not every pipeline takes the images of several prompts.
        size = 1 if any(prompt.arguments for prompt in prompts) else config.batch_size
        with torch.no_grad(), self.accelerator.autocast():
            for k in range(0, len(prompts), size):
                chosen = prompts[k : k + size]
                seeds = [torch.Generator().manual_seed(config.seed + k + j) for j in range(len(chosen))]
                options = call_options([prompt.text for prompt in chosen], self._options(chosen))
                images += self.pipeline(**options, generator=seeds, output_type="pt")[0].float().cpu()
        return images

    def _draw(self, log: RunLog, epochs: int) -> list[torch.Tensor] | None:
        """The fixed samples after so many epochs, in the main process."""
        if not self.accelerator.is_main_process:
            return None
        images = self.draw_samples()
        log.draw(epochs, images, self.samples.sources())
        return images

    def _watch(self, log: RunLog, epochs: int) -> dict[str, float]:
        """Draws the fixed samples and, with `win_rate`, compares them with the base's."""
        clock, row = _Clock(), {}
        images = self._draw(log, epochs)
        if images is not None and self.config.win_rate:
            row = self.samples.against_base(images)
        clock.lap("seconds_watching")
        return self._mean_over_processes(row | (clock.laps if images is not None else {}))

    # ------------------------------------------------------------------------------------------------------ one epoch

    def _run_epoch(self, epoch: int) -> dict[str, Any]:
        """Samples, scores and learns; the row for the log."""
        clock = _Clock()
        self.pipeline.scheduler = self.scheduler
        numbers = np.repeat(self._choose_prompts(epoch), self.config.images_per_prompt)
        opened = {n: self.prompts[n].opened() for n in dict.fromkeys(numbers.tolist())}
        rollouts, pending = self._sample(epoch, [opened[n] for n in numbers.tolist()])
        clock.lap("seconds_sampling")
        scores = [future.result() for future in pending]
        clock.lap("seconds_waiting")  # what the background did not hide
        rewards, info, second = (_join([score[k] for score in scores]) for k in (0, 1, 2))
        row = self._describe(rewards["reward"], info, second, rollouts)

        advantages = self._advantages(rewards["reward"], info, numbers)
        row |= self.learner.learn(epoch, rollouts, advantages, ~np.isnan(rewards["reward"]))
        clock.lap("seconds_training")
        return {"epoch": epoch} | self._mean_over_processes(row) | clock.laps

    def _sample(self, epoch: int, prompts: list[TrainingPrompt]) -> tuple[list[Rollout], list[Future]]:
        """Draws an image for each prompt. Each group is scored in the background as soon as it is complete."""
        config, process, rollouts, pending, asked = self.config, self.accelerator.process_index, [], [], 0
        pool = ThreadPoolExecutor(1, "reward")
        try:
            for k in range(config.batches):
                chosen = prompts[k * config.batch_size :][: config.batch_size]
                latents = stream(config.seed, LATENTS, epoch, k, process)
                self.scheduler.generator = stream(config.seed, STEPS, epoch, k, process)
                with self.accelerator.autocast():
                    witness = k == 0 and config.loss == "nft" and not self.learner.replay_checked
                    texts, options = [prompt.text for prompt in chosen], self._options(chosen)
                    rollouts.append(record(self.pipeline, texts, options, latents, keep_outputs=witness))
                ready = (k + 1) * config.batch_size // config.images_per_prompt * config.images_per_prompt
                if ready > asked:
                    images = [image for rollout in rollouts for image in rollout.images]
                    for run in in_runs(images[asked:ready]):
                        part = slice(asked, asked := asked + len(run))
                        pending.append(pool.submit(self._score, run, prompts[part]))
                for future in pending:
                    if future.done():
                        future.result()  # a reward that broke stops the run now and not after the last batch
        finally:
            pool.shutdown(wait=False)
        return rollouts, pending

    def _score(self, images: torch.Tensor, prompts: list[TrainingPrompt]) -> tuple[dict[str, np.ndarray], ...]:
        asked, metadata = [prompt.prompt for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]
        with torch.no_grad():
            scores, info = score(self.reward, images, asked, metadata, missing=True)
            second = {}
            if self.second_reward is not None:
                second["second_reward"], _ = score(self.second_reward, images, asked, metadata, missing=True)
        return {"reward": scores}, info, second

    def _advantages(self, rewards: np.ndarray, info: Mapping[str, np.ndarray], numbers: np.ndarray) -> np.ndarray:
        """This process's advantages, clipped; statistics are over all processes."""
        config = self.config
        groups = self.accelerator.process_index * len(rewards) + np.arange(len(rewards)) // config.images_per_prompt
        everyone, groups, prompts = self._gather(rewards), self._gather(groups), self._gather(numbers)
        if config.advantage == "prompt":
            advantages = self.statistics.advantages(everyone, prompts)
        elif isinstance(self.reward, Mixture) and config.advantage == "components":
            weights = self.reward.weights
            components = {name: self._gather(info[f"{name}/score"]) for name in weights}
            noise = self._errors(info, {f"{name}/standard_error": name for name in weights})
            sums, errors = normalised_sum(components, weights, groups, ~np.isnan(everyone), errors=noise)
            advantages = group_advantages(sums, groups, std_of=config.advantage_std, errors=errors)
        else:
            errors = self._errors(info, {"standard_error": "reward"}).get("reward")
            advantages = group_advantages(everyone, groups, std_of=config.advantage_std, errors=errors)
        mine = self.accelerator.process_index * len(rewards)
        return np.clip(advantages[mine : mine + len(rewards)], -config.advantage_clip, config.advantage_clip)

    def _errors(self, info: Mapping[str, np.ndarray], wanted: Mapping[str, str]) -> dict[str, np.ndarray]:
        """The standard errors of all processes by the name that is `wanted` for an entry of `info`; none where
        advantages are to take no notice of them."""
        if self.counts_noise is False:
            return {}
        found = [entry for entry in wanted if all(self._gather_object(entry in info))]
        if self.counts_noise and not found:
            raise InputError(
                f"advantage_noise is on, and the reward's info has no {' or '.join(wanted)}; leave it out, or take a "
                "reward that reports its standard errors"
            )
        return {wanted[entry]: self._gather(info[entry]) for entry in found}

    # ------------------------------------------------------------------------------------------------------- the rest

    def _options(self, prompts: Sequence[TrainingPrompt] = ()) -> dict[str, Any]:
        """What a call of the pipeline for opened prompts gets beside their texts."""
        common = {"num_inference_steps": self.config.num_inference_steps, **self.config.call}
        return common | joint_arguments(prompts, self.pipeline)

    def _choose_prompts(self, epoch: int) -> np.ndarray:
        """The numbers of this process's prompts, all different."""
        order = torch.randperm(len(self.prompts), generator=stream(self.config.seed, PROMPTS, epoch))
        first = self.accelerator.process_index * self.config.prompts_per_epoch
        places = np.arange(first, first + self.config.prompts_per_epoch) % len(order)
        return order.numpy()[places]

    def _describe(
        self,
        rewards: np.ndarray,
        info: Mapping[str, np.ndarray],
        second: Mapping[str, np.ndarray],
        rollouts: list[Rollout],
    ) -> dict[str, float]:
        """What the log says of an epoch's images."""
        images, size = [image for rollout in rollouts for image in rollout.images], self.config.images_per_prompt
        known = rewards[~np.isnan(rewards)]
        row = {
            "reward_mean": nan_mean(rewards),
            "reward_std": float(known.std()) if known.size else math.nan,
            "reward_missing": float(np.isnan(rewards).mean()),
            "diversity": diversity(torch.stack(images[k : k + size]) for k in range(0, len(images), size)),
        }
        row |= {f"{name}_mean": nan_mean(values) for name, values in second.items()}
        row |= {f"info/{name}": nan_mean(values) for name, values in info.items()}
        if "standard_error" in info:
            groups = np.arange(len(rewards)) // self.config.images_per_prompt
            row["noise_fraction"] = noise_fraction(rewards, groups, info["standard_error"])
        for name, entry in (("contradiction_rate", "contradicted"), ("position_gap", "position_gap")):
            # of a ListenerReward, by itself or within a Mixture
            if given := [values for key, values in info.items() if key.rpartition("/")[2] == entry]:
                row[name] = nan_mean(np.concatenate(given))
        if "contradiction_rate" in row:
            row["agreement"] = 1 - row["contradiction_rate"]
        return row

    def _gather(self, values: np.ndarray) -> np.ndarray:
        """The values of all processes, in their order."""
        if self.accelerator.num_processes == 1:
            return values
        gathered: Any = self.accelerator.gather(torch.as_tensor(values, device=self.accelerator.device))
        return gathered.cpu().numpy()

    def _gather_object(self, value: Any) -> list[Any]:
        """A value of each process, in their order."""
        return [value] if self.accelerator.num_processes == 1 else gather_object([value])

    def _mean_over_processes(self, row: dict[str, float]) -> dict[str, float]:
        """Each number's mean over the processes that have it; a process that learnt nothing has no loss, for
        example."""
        rows = self._gather_object(row)
        names = dict.fromkeys(name for each in rows for name in each)
        return {name: nan_mean([each.get(name, math.nan) for each in rows]) for name in names}

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, epochs: int) -> None:
        """Writes a checkpoint of the state after `epochs` epochs, with the files of `save`."""
        for reward in self._rewards():
            check_state(reward)
        remembered = [self._gather_states(reward) for reward in self._rewards()]

        def write(folder: Path) -> None:
            weights = {str(k): weight.detach().cpu() for k, weight in enumerate(self.learner.parameters)}
            save_file(weights, folder / "trained.safetensors")
            torch.save(
                {
                    "optimizer": self.learner.optimizer.state_dict(),
                    "statistics": self.statistics.state_dict(),
                    "guard": self.guard.state_dict(),
                    "rewards": remembered,
                },
                folder / "state.pt",
            )
            if self.config.train == "lora":
                self.save(folder)

        if self.accelerator.is_main_process:
            save_checkpoint(self.folder / "checkpoints", epochs, write, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _load(self) -> int:
        """Loads the newest whole checkpoint; returns the epoch to go on with."""
        found = checkpoints(self.folder / "checkpoints")
        tell = logger.warning if self.accelerator.is_main_process else None
        folder = last_checkpoint(self.folder / "checkpoints", tell)
        if folder is None:
            return 0
        epochs = next(number for number, path in found.items() if path == folder)
        weights = load_file(folder / "trained.safetensors")
        if {k: v.shape for k, v in weights.items()} != {str(k): p.shape for k, p in enumerate(self.learner.parameters)}:
            raise InputError(f"{folder} is of a run that trained other layers; resume it with its own settings")
        with torch.no_grad():
            for k, parameter in enumerate(self.learner.parameters):
                parameter.copy_(weights[str(k)])
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state_dict(state["statistics"])
        self.guard.load_state_dict(state["guard"])
        for reward, remembered in zip(self._rewards(), state["rewards"], strict=True):
            if remembered and remembers(reward):
                reward.load_state_dict(remembered[self.accelerator.process_index % len(remembered)])
        if self.config.advantage_noise is None:
            self.counts_noise = _noise_of(self.folder)
        return epochs

    def _rewards(self) -> tuple[Any, Any]:
        return self.reward, self.second_reward

    def _gather_states(self, reward: Any) -> list[Any]:
        """The reward's state in each process; empty for a reward without a state."""
        state = [reward.state_dict()] if remembers(reward) else []
        return state if self.accelerator.num_processes == 1 else gather_object(state)

    def _require_fresh(self) -> None:
        if checkpoints(self.folder / "checkpoints"):
            raise InputError(
                f"output_dir is {self.config.output_dir!r}, which holds checkpoints; call train(resume=True) to go on "
                "from them, or give another folder"
            )


def _noise_of(folder: Path) -> bool | None:
    """The `advantage_noise` that a run began with. Runs that are older than the option took no notice of noise."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings.get("advantage_noise", False)


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of several calls as one; a column that a call lacks is left out."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
