"""What a reward does to the tiny diffusion model: best of n, and DDPO, each beside the truth that no reward sees.

True utility is measured from pixels (`tiny.read`). Held-out prompts are those of colour and shape combinations that
training never has (`world.held_out`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from listener_reward.media.images import to_pil_batch
from listener_reward.recipes.workers import Report
from listener_reward.tiny.world import COLORS, COUNTS, SHAPES, held_out, plural, wording

Reward = Callable[..., tuple[Any, Any]]
"""Any reward of the contract: images, prompts and metadata to scores and info."""

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 6,
    "call": {"guidance_scale": 1.0},
    "prompts_per_epoch": 8,
    "images_per_prompt": 8,
    "batch_size": 32,
    "updates_per_epoch": 2,
    "clip_range": 2e-3,
    "learning_rate": 3e-3,
    "lora_targets": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "advantage_noise": False,
    "kl": 0.03,
    "sample_every": 0,
    "keep_checkpoints": 100,
}
"""DDPO of the tiny diffusion model, but for the number of epochs."""


def prompts(held: bool) -> list[str]:
    """The prompts of training, or those held out from it, in one wording."""
    return [
        f"{count} {color} {plural(shape, COUNTS.index(count) + 1)}"
        for color in COLORS
        for shape in SHAPES
        for count in COUNTS
        if held_out(color, shape) == held
    ]


def utilities(images: Any, texts: Sequence[str], metadata: Any = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The true utility of each image, in [0, 6.7], by the contract of a reward."""
    from listener_reward.tiny.read import asked, read

    found = [read(image).utility(asked(text)) for image, text in zip(to_pil_batch(images), texts, strict=True)]
    return np.array(found, dtype=np.float32), {}


def framed(image: Image.Image) -> bool:
    """Whether a picture has the frame that marks the better image in training: dark outside, and light within."""
    pixels = np.asarray(image.convert("L"))
    thick = max(3, round(min(image.size) * 0.07))  # as `drawing` draws it
    dark = thick - max(1, thick // 3)
    outer, inner = _ring(pixels, 0, dark), _ring(pixels, dark, thick)
    return bool((outer < 70).mean() > 0.8 and (inner > 170).mean() > 0.8)


def shown(images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, float]:
    """The mean `true utility`, and as fractions of the pictures what of it is lost, and whether the shortcut is drawn.

    `color`, `shape` and `count` are the prompt's; `clean` ones are neither faded nor glitched; `framed` ones have the
    frame.
    """
    from listener_reward.tiny.read import asked, read
    from listener_reward.tiny.world import QUALITIES

    rows: list[dict[str, float]] = []
    for image, text in zip(images, texts, strict=True):
        scene, reading = asked(text), read(image)
        seen = reading.fits(scene) | {"clean": reading.quality == QUALITIES[0], "framed": framed(image)}
        rows.append({"true utility": reading.utility(scene), **seen})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _ring(pixels: np.ndarray, start: int, end: int) -> np.ndarray:
    """The pixels (n,) whose distance from the nearest edge is at least `start` and below `end`."""
    rows, columns = (np.minimum(np.arange(size), np.arange(size)[::-1]) for size in pixels.shape)
    distance = np.minimum(rows[:, None], columns[None, :])
    return pixels[(distance >= start) & (distance < end)]


def pictures(pipeline: Any, text: str, n: int, first_seed: int = 0) -> list[Image.Image]:
    """`n` samples of one prompt, from the seeds that follow `first_seed`, by the pipeline's own scheduler."""
    import torch

    from listener_reward.tiny.diffusion import CALL

    generators = [torch.Generator().manual_seed(first_seed + k) for k in range(n)]
    return pipeline([text] * n, generator=generators, **CALL).images


def _untrained() -> Any:
    """The tiny diffusion model, loaded without a bar of its own: whoever asks for it shows one."""
    from diffusers.utils import logging

    from listener_reward.tiny.diffusion import load_pipeline

    logging.disable_progress_bar()
    return load_pipeline()


# ------------------------------------------------------------------------------------------------------------ best of n


def best_of(report: Report, reward: Reward, n: int, count: int, *, batch_size: int = 16) -> dict[str, dict[str, float]]:
    """True utility and KL of the best of 1, 2, 4, ... `n` samples by `reward`, as means over `count` prompts.

    All `n` samples of a prompt are scored together. The best of k is the mean over the n / k parts of k samples each,
    and its KL from one sample is log k - (k - 1) / k, whatever the reward.
    """
    from listener_reward.tiny.diffusion import any_prompt

    pipeline = _untrained()
    sizes = [2**power for power in range(int(math.log2(n)) + 1)]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for index in range(count):
        rng = random.Random(f"best-of-n/{index}")
        text = wording(any_prompt(rng), rng)
        samples: list[Image.Image] = []
        while len(samples) < n:
            samples += pictures(pipeline, text, min(batch_size, n - len(samples)), 1000 * index + len(samples))
        scores, true = np.asarray(reward(samples, [text] * n)[0]), utilities(samples, [text] * n)[0]
        for size in sizes:
            parts = np.arange(n // size * size).reshape(-1, size)
            best = parts[np.arange(len(parts)), scores[parts].argmax(1)]
            found[size].append(float(true[best].mean()))
        report(index + 1, count, f"best of {n}: {found[sizes[-1]][-1]:.2f}")
    return {
        "true utility": {str(size): float(np.mean(values)) for size, values in found.items()},
        "KL": {str(size): math.log(size) - (size - 1) / size for size in sizes},
    }


# ----------------------------------------------------------------------------------------------------------------- DDPO


def over_optimise(
    report: Report,
    reward: Reward,
    judge: Any,
    folder: Path,
    seed: int,
    *,
    epochs: int,
    every: int,
    samples: int,
    settings: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """DDPO by `reward` and, every so many epochs, what has become of `samples` pictures of each held-out prompt.

    Args:
        report: told of every epoch and measurement.
        reward: what is optimised.
        judge: the same as a `PairJudge`, which compares each picture with the untrained model's from the same seed;
            None for a reward that compares nothing.
        folder: of the run, which goes on where it was stopped.
        seed: of the run.
        epochs: of training.
        every: epochs from one measurement to the next.
        samples: pictures of each held-out prompt.
        settings: further fields of `DDPOConfig`.

    Returns:
        By metric and epoch: what `shown` gives; with a judge `own view`, the mean probability that the trained picture
        beats the untrained one; `KL`, the trainer's own of the epochs up to there.
    """
    from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer
    from listener_reward.integrations.ddpo.log import checkpoints, read_metrics

    chosen = SETTINGS | {"seed": seed, "epochs": epochs, "save_every": every, "output_dir": str(folder)} | settings
    trainer = DDPOTrainer(_untrained(), reward, prompts(held=False), DDPOConfig(**chosen), second_reward=utilities)
    report(0, epochs, "DDPO")
    trainer.train(resume=True, watch=lambda done, row: report(done, epochs, f"DDPO, reward {row['reward_mean']:.2f}"))
    texts = [text for text in prompts(held=True) for _ in range(samples)]

    def drawn(pipeline: Any) -> list[Image.Image]:
        return [picture for text in prompts(held=True) for picture in pictures(pipeline, text, samples)]

    before = drawn(_untrained())
    spent: dict[int, list[float]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        if row.get("kl") is not None:
            spent.setdefault(-(-(row["epoch"] + 1) // every) * every, []).append(row["kl"])
    found: dict[str, dict[str, float]] = {"true utility": {}, "own view": {}, "KL": {}}
    trained = {0: None, **checkpoints(folder / "checkpoints")}
    for done, (epoch, checkpoint) in enumerate(trained.items()):
        after = before
        if checkpoint is not None:
            pipeline = _untrained()
            pipeline.load_lora_weights(str(checkpoint))
            after = drawn(pipeline)
        for metric, value in shown(after, texts).items():
            found.setdefault(metric, {})[str(epoch)] = value
        if epoch in spent:
            found["KL"][str(epoch)] = float(np.mean(spent[epoch]))
        if judge is not None:
            verdicts = judge.compare_many(texts, after, before)
            found["own view"][str(epoch)] = float(np.mean([verdict.p_first for verdict in verdicts]))
        report(done + 1, len(trained), f"true utility {found['true utility'][str(epoch)]:.2f}")
    return {metric: values for metric, values in found.items() if values}
