"""What the tiny diffusion model draws, and what people of the tiny world would say of it.

A generated picture has no scene, only pixels; `read.read` says what they show and so how much people like it. Pairs of
two samples of one prompt, with votes, are what preference data are made of elsewhere; the embedded judge learns from
some (`pretrain`), and the split `tiny:generated` has others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from listener_reward.errors import missing

if fault := missing("diffusers", "the tiny diffusion model"):
    raise fault

import torch
from PIL import Image

from listener_reward.tiny.diffusion import CALL, load_pipeline
from listener_reward.tiny.read import Reading, read
from listener_reward.tiny.world import MIN_GAP, Scene, sample_prompt, votes_for_first, wording

GUIDANCES = (CALL["guidance_scale"], 3.0)
"""Half of the samples each: as the model is sampled by default, and nearer to what was asked for."""

BATCH = 64
"""Samples drawn at a time, fixed because a sample's bits depend on it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated picture: what was asked for, what came, and what it shows."""

    prompt: Scene
    wording: str
    picture: Image.Image
    reading: Reading


def samples(seed: int, each: int = 1) -> Iterator[list[Sample]]:
    """Endless groups of `each` samples of one prompt, a pure function of the seed. Prompts are those of training."""
    pipeline: Any = load_pipeline()
    batch = 0
    while True:
        rng = random.Random(f"generated/{seed}/{batch}")
        prompts = [sample_prompt(rng, held=False) for _ in range(BATCH // each)]
        texts = [wording(prompt, rng) for prompt in prompts]
        generator = torch.Generator().manual_seed(1_000_003 * seed + batch)
        call = CALL | {"guidance_scale": GUIDANCES[batch % len(GUIDANCES)]}
        drawn = pipeline([text for text in texts for _ in range(each)], generator=generator, **call).images
        for k, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            group = drawn[each * k : each * (k + 1)]
            yield [Sample(prompt, text, picture, read(picture)) for picture in group]
        batch += 1


def sample_pairs(seed: int, votes: int = 15) -> Iterator[tuple[Sample, Sample, float]]:
    """Endless pairs of samples of one prompt, with the fraction of `votes` voters who prefer the first."""
    rng = random.Random(f"generated votes/{seed}")
    for first, second in samples(seed, each=2):
        gap = first.reading.utility(first.prompt) - second.reading.utility(first.prompt)
        if abs(gap) >= MIN_GAP:
            yield first, second, votes_for_first(gap, votes, rng)
