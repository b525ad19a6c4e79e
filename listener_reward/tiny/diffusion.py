"""A tiny text-to-image model of the tiny world, a stock Stable Diffusion pipeline: `load_pipeline()`.

    pipeline = load_pipeline()
    pipeline(["two red circles"] * 4, **CALL).images[0].save("two.png")

It draws 64 by 64 pixels in milliseconds, recognisably and often wrongly: its training captions lie about as often as
the world's generators do (`world.sample_candidate`), so reinforcement learning and best-of-n have something to win.
Made, and its card written, by

    python -m listener_reward.tiny.diffusion --out FOLDER

in two stages: the decoder of an `AutoencoderTiny` learns to draw from the principal components of 8 by 8 pixels,
which its encoder computes; then a `UNet2DConditionModel` and a `CLIPTextModel` of one layer learn to denoise these
(v-prediction, zero terminal SNR, captions dropped at times so that guidance works). Seeded; an interrupted run goes
on from its last checkpoint and ends with the same weights.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# diffusers types its parts more narrowly than it takes them, and numpy its indices.
from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from listener_reward.errors import missing

if fault := missing("diffusers", "the tiny diffusion model"):
    raise fault

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from listener_reward.files import write_text
from listener_reward.tiny.drawing import draw
from listener_reward.tiny.read import asked, read
from listener_reward.tiny.world import COLORS, COUNTS, SHAPES, Scene, sample_candidate, sample_prompt, wording

WEIGHTS = Path(__file__).parent / "weights" / "diffusion"

CALL: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 1.0}
"""How it is sampled where nothing else is said: arguments of the pipeline's call."""

SIDE, PATCH, CHANNELS = 64, 8, 12
"""Pixels of a picture, pixels of a latent, and principal components kept of these."""
POOL = 2
"""Before that, so many pixels are averaged: what is finer is the decoder's to draw."""
LATENT_STD = 0.5
"""Of latents as the decoder takes them, which squeezes what is beyond 3; the denoiser's have 1."""

PICTURES = 12_000
ERROR = 0.25
"""How often each of colour, shape and count of a training picture is drawn anew, whatever its caption says."""
QUALITY = {"clean": 0.8, "faded": 0.2}
"""Not glitched: sharp bars from side to side are beyond a model of this size."""
SPOTS = {
    1: [(0.5, 0.5, 0.34)],
    2: [(0.28, 0.5, 0.18), (0.72, 0.5, 0.18)],
    3: [(0.5, 0.28, 0.18), (0.27, 0.71, 0.18), (0.73, 0.71, 0.18)],
}
"""Where the objects of a training picture lie, by their count (`drawing.draw`). Were they anywhere, a model of this
size, trained for minutes, would draw blobs."""
PALE = 150
"""Backgrounds are as bright as that in each colour: a world with fewer kinds of them is learnt sooner."""
DROPPED = 0.1
"""Fraction of captions left empty."""

SEE = {"steps": 700, "batch": 12, "rate": 4e-3}
DRAW = {"steps": 2600, "batch": 32, "rate": 2e-3}
SAVE_EVERY = 100

P = TypeVar("P", bound=DiffusionPipeline)


def load_pipeline(folder: str | Path = WEIGHTS) -> StableDiffusionPipeline:
    """The embedded pipeline, or the one that was trained into `folder`, in float32 and without a progress bar."""
    return load_quietly(StableDiffusionPipeline, folder)


def load_quietly(kind: type[P], folder: str | Path) -> P:
    """A saved pipeline of a kind, without a progress bar."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # to diffusers an AutoencoderTiny in an AutoencoderKL's place is worth two warnings
    try:
        pipeline: Any = kind.from_pretrained(folder)
    finally:
        logging.set_verbosity(level)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The pipeline with random weights."""
    return StableDiffusionPipeline(**build_parts(build_tokenizer(), CHANNELS, seed), requires_safety_checker=False)


def build_parts(tokenizer: PreTrainedTokenizerFast, channels: int, seed: int) -> dict[str, Any]:
    """What a Stable Diffusion pipeline is made of, with random weights, for a denoiser that reads so many channels."""
    torch.manual_seed(seed)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(3 * (PATCH // POOL) ** 2,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_decoder_blocks=(2, 1, 1, 1),
        latent_channels=CHANNELS,
        scaling_factor=1 / LATENT_STD,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // PATCH,
        in_channels=channels,
        out_channels=CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # trailing spacing does not read it, but the pipeline insists
    )
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }


def build_tokenizer(more: Sequence[str] = (), length: int = 12) -> PreTrainedTokenizerFast:
    """Lower-cased whole words, those of prompts and `more`; any other becomes `<unk>`. A text has `length` tokens."""
    special = "<pad> <bos> <eos> <unk>".split()
    words = "a an of picture drawing image photo".split()
    words += [*COUNTS, *COLORS, *SHAPES, *(shape + "s" for shape in SHAPES), *more]
    tokenizer: Any = Tokenizer(models.WordLevel({w: k for k, w in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


# ------------------------------------------------------------------------------------------------------ training


def draw_pictures(n: int, seed: int) -> tuple[list[str], Tensor]:
    """`n` captions, and pictures of them, or not quite of them: uint8 (n, 3, 64, 64)."""
    captions, pictures = [], np.empty((n, SIDE, SIDE, 3), np.uint8)
    for k in tqdm(range(n), "pictures"):
        rng = random.Random(f"diffusion/{seed}/{k}")
        prompt = any_prompt(rng)
        scene = sample_candidate(prompt, rng, ERROR)
        (quality,) = rng.choices(list(QUALITY), list(QUALITY.values()))
        scene = Scene(scene.color, scene.shape, scene.count, quality)
        while True:
            picture = draw(scene, rng, SPOTS[scene.count])
            if picture.width == picture.height and min(picture.getpixel((0, 0))) >= PALE:
                break
        pictures[k] = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
        captions.append(wording(prompt, rng))
    return captions, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def any_prompt(rng: random.Random) -> Scene:
    """A prompt of the world, one in six of a combination that `world.held_out` holds out."""
    return sample_prompt(rng, held=rng.random() < 1 / 6)


@torch.no_grad()
def set_encoder(vae: Any, pictures: Tensor) -> Tensor:
    """Makes the encoder, which is linear, compute the principal components of patches.

    Its first strided convolution averages; the others only gather: each channel of a patch's 48 is a colour of one of
    its 4 by 4 averages. A component's standard deviation is made its square root: left as they are, fine detail would
    drown in the first noise; made equal, it would be as important as what the picture shows.

    Args:
        vae: its encoder is overwritten; its latents have variance `LATENT_STD` squared over all channels.
        pictures: uint8 (n, 3, 64, 64).

    Returns:
        Their latents as the denoiser sees them, of unit variance over all channels: float32 (n, 12, 8, 8).
    """
    side = PATCH // POOL
    patches = F.pixel_unshuffle(F.avg_pool2d(pictures.float() / 255, POOL), side).permute(0, 2, 3, 1)
    mean = patches.mean((0, 1, 2))
    variances, components = torch.linalg.eigh(torch.cov(patches.flatten(0, 2).T))
    deviations = variances[-CHANNELS:].sqrt()
    components = components[:, -CHANNELS:] / (deviations * deviations.mean()).sqrt()
    for parameter in vae.encoder.parameters():
        parameter.zero_()
    copy, average, halve, quarter, project = vae.encoder.layers
    for color, y, x in np.ndindex(3, side, side):
        fine = 4 * color + 2 * (y % 2) + x % 2
        copy.weight[color, color, 1, 1] = 1
        average.weight[color, color, 1:, 1:] = 1 / POOL**2
        halve.weight[fine, color, 1 + y % 2, 1 + x % 2] = 1
        quarter.weight[side**2 * color + side * y + x, fine, 1 + y // 2, 1 + x // 2] = 1
    project.weight[:, :, 1, 1] = LATENT_STD * components.T
    project.bias.copy_(-LATENT_STD * mean @ components)
    return ((patches - mean) @ components).permute(0, 3, 1, 2).contiguous()


def train_decoder(vae: Any, pictures: Tensor, latents: Tensor, seed: int, scratch: Path, steps: int) -> None:
    """Learns to draw from latents, which are blurred by a little noise."""
    optimizer, schedule = _optimizer(vae.decoder.parameters(), SEE["rate"], steps)
    for _, generator in _steps("decoder", scratch, steps, seed, (vae, optimizer, schedule)):
        chosen = torch.randint(len(pictures), (SEE["batch"],), generator=generator)
        images, noise = _normalised(pictures[chosen]), torch.randn(latents[chosen].shape, generator=generator)
        drawn = vae.decode((latents[chosen] + 0.2 * noise) / vae.config.scaling_factor).sample
        loss = F.l1_loss(drawn, images) + F.mse_loss(drawn, images)
        _update(loss, vae.decoder.parameters(), optimizer, schedule)


def train_denoiser(
    pipeline: Any,
    captions: list[str],
    latents: Tensor,
    seed: int,
    scratch: Path,
    steps: int,
    sources: Tensor | None = None,
) -> None:
    """Learns the velocity that the scheduler's noising gives, together with the text encoder.

    `sources` are the latents of pictures that an editor begins with, (n, 12, 8, 8); some are left out, as captions are.
    """
    tokenizer, scheduler = pipeline.tokenizer, pipeline.scheduler
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids[0]
    both = nn.ModuleList([pipeline.unet, pipeline.text_encoder])
    optimizer, schedule = _optimizer(both.parameters(), DRAW["rate"], steps)
    for _, generator in _steps("denoiser", scratch, steps, seed, (both, optimizer, schedule)):
        chosen = torch.randint(len(latents), (DRAW["batch"],), generator=generator)
        ids = tokens[chosen]
        ids[torch.rand(len(ids), generator=generator) < DROPPED] = empty
        noise = torch.randn(latents[chosen].shape, generator=generator)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(ids),), generator=generator)
        noisy = scheduler.add_noise(latents[chosen], noise, times)
        target = scheduler.get_velocity(latents[chosen], noise, times)
        if sources is not None:
            kept = torch.rand(len(ids), generator=generator) >= DROPPED
            noisy = torch.cat([noisy, LATENT_STD * sources[chosen] * kept.view(-1, 1, 1, 1)], 1)
        guess = pipeline.unet(noisy, times, pipeline.text_encoder(ids)[0]).sample
        _update(F.mse_loss(guess, target), both.parameters(), optimizer, schedule)


def _steps(
    what: str, scratch: Path, steps: int, seed: int, parts: tuple[Any, ...]
) -> Iterator[tuple[int, torch.Generator]]:
    """The steps still to do, each with random numbers of its own; `parts` are kept every so often and at the end."""
    kept = scratch / f"{what}-{steps}-{seed}.pt"
    done = 0
    if kept.exists():
        state = torch.load(kept)
        done = state["done"]
        for part, content in zip(parts, state["parts"], strict=True):
            part.load_state_dict(content)
    for step in tqdm(range(done, steps), what):
        yield step, torch.Generator().manual_seed(1_000_003 * seed + step)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"done": step + 1, "parts": [part.state_dict() for part in parts]}, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)


def _optimizer(parameters: Any, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)


def _update(loss: Tensor, parameters: Any, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def _normalised(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------ measuring


def evaluate_samples(pipeline: Any, n: int = 300, seed: int = 0, **call: Any) -> dict[str, float]:
    """What the pipeline draws, read by `read.read`: true utility, and fractions that show what the prompt asks for.

    Args:
        pipeline: draws the tiny world.
        n: samples, each of a prompt and a seed of its own.
        call: arguments of the pipeline's call, `CALL` where left out.
    """
    rng = random.Random(f"measure/{seed}")
    prompts = [wording(any_prompt(rng), rng) for _ in range(n)]
    rows = []
    for start in tqdm(range(0, n, 50), "measuring"):
        part = prompts[start : start + 50]
        generators = [torch.Generator().manual_seed(1_000_000 * seed + start + k) for k in range(len(part))]
        pictures = pipeline(part, generator=generators, **CALL | call).images
        for prompt, picture in zip(part, pictures, strict=True):
            reading, wanted = read(picture), asked(prompt)
            fits = reading.fits(wanted)
            rows.append(
                {
                    "utility": reading.utility(wanted),
                    **fits,
                    "all three": all(fits.values()),
                    "a scene": reading.scene() is not None,
                    "clean": reading.quality == "clean",
                }
            )
    return {name: sum(float(row[name]) for row in rows) / n for name in rows[0]}


CARD = """# The embedded tiny diffusion model

A Stable Diffusion pipeline of {size:.1f} MB in float16 for the tiny world, made, and this card written, by

```bash
python -m listener_reward.tiny.diffusion --out FOLDER
```

from {pictures} drawn pictures with captions that lie: colour, shape and count are each drawn anew in {error:.0%}.
Its own samples, {n} of them with {call}, read by `listener_reward.tiny.read`:

| measure | value |
| --- | --- |
{rows}
"""


def save_in_half(pipeline: Any, folder: Path) -> None:
    """Saves a trained pipeline in float16."""
    for part in (pipeline.unet, pipeline.vae):  # not the text encoder: transformers would load it in half precision
        part.half()
    pipeline.save_pretrained(folder)


def write_card(folder: Path, card: str, call: Mapping[str, Any], metrics: Mapping[str, float], **about: Any) -> None:
    """Writes the README of a pipeline in `folder`, and prints its table.

    Args:
        folder: the pipeline's, saved.
        card: the text, with `{size}`, `{call}`, `{rows}` and what `about` names.
        call: the arguments that the samples were drawn with.
        metrics: of the samples.
        about: what else the text tells.
    """
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in metrics.items())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    drawn = ", ".join(f"{name}={value}" for name, value in call.items())
    write_text(folder / "README.md", card.format(size=size, call=drawn, rows=rows, **about))
    print(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the pipeline's folder; left out, the embedded one")
    parser.add_argument("--scratch", type=Path, default=Path("tiny-diffusion"), help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, help="of the denoiser, and at most so many of the decoder")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="how many it learns from")
    parser.add_argument("--samples", type=int, default=600, help="how many it is measured with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(2)  # however many cores there are, so that the weights do not depend on it
    steps = DRAW["steps"] if args.steps is None else args.steps
    pipeline: Any = build_pipeline(args.seed)
    captions, pictures = draw_pictures(args.pictures, args.seed)
    latents = set_encoder(pipeline.vae, pictures)
    first = SEE["steps"] if args.steps is None else min(args.steps, SEE["steps"])
    train_decoder(pipeline.vae, pictures, latents, args.seed, args.scratch, first)
    train_denoiser(pipeline, captions, latents, args.seed, args.scratch, steps)
    save_in_half(pipeline, args.out)
    metrics = evaluate_samples(load_pipeline(args.out), args.samples, args.seed)
    write_card(args.out, CARD, CALL, metrics, n=args.samples, pictures=args.pictures, error=ERROR)


if __name__ == "__main__":
    main()
