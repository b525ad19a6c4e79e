"""A tiny editor of the tiny world's pictures, a stock InstructPix2Pix pipeline: `load_editor()`.

    editor = load_editor()
    editor("paint the circles blue", image=picture, **CALL).images[0]

It edits pictures of 64 by 64 pixels in which objects lie where `tiny.diffusion` has them (`draw_work` draws some).
Made, and its card written, by

    python -m listener_reward.tiny.editing --out FOLDER

Its denoiser sees the source's latents beside the noisy ones. It learns from drawn edits of which some do something else
than the instruction says, so that reinforcement learning has something to win. Pictures, decoder and training are those
of `tiny.diffusion`; so are seeds and resuming.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# diffusers types its parts more narrowly than it takes them.
from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from listener_reward.errors import missing

if fault := missing("diffusers", "the tiny editor"):
    raise fault

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from listener_reward.tiny.diffusion import (
    CALL,
    CHANNELS,
    PALE,
    SEE,
    SIDE,
    SPOTS,
    build_parts,
    build_tokenizer,
    load_quietly,
    save_in_half,
    set_encoder,
    train_decoder,
    train_denoiser,
    write_card,
)
from listener_reward.tiny.drawing import draw_edit
from listener_reward.tiny.edits import TinyEdit, instruction, sample_result, sample_task
from listener_reward.tiny.models import EDIT_WORDS
from listener_reward.tiny.read import read_framed
from listener_reward.tiny.world import Scene

WEIGHTS = Path(__file__).parent / "weights" / "editor"

EDITS = 12_000
LIES = 0.4
"""How often a training edit is what just any editor makes of the instruction (`edits.sample_result`)."""
LENGTH = 20
"""Tokens of an instruction, with its marks."""
DRAW_STEPS = 3000
BATCH = 50
"""Edits made at a time where editors are measured, fixed because a picture's bits depend on it."""


def build_editor(seed: int = 0) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline with random weights."""
    tokenizer = build_tokenizer(["the", "and", *EDIT_WORDS], LENGTH)
    return StableDiffusionInstructPix2PixPipeline(
        **build_parts(tokenizer, 2 * CHANNELS, seed), requires_safety_checker=False
    )


def load_editor(folder: str | Path = WEIGHTS) -> StableDiffusionInstructPix2PixPipeline:
    """The embedded pipeline, or the one that was trained into `folder`, in float32 and without a progress bar."""
    return load_quietly(StableDiffusionInstructPix2PixPipeline, folder)


def sample_work(rng: random.Random, lies: float, held: bool | None = None) -> TinyEdit:
    """An edit whose first result is the goal, or with probability `lies` what just any editor makes of it.

    Nothing is glitched. With `held` it is a held-out edit (`edits.sample_task`), and left out one in six is, as in
    `diffusion.any_prompt`.
    """
    while True:
        source, goal, asked = sample_task(rng, rng.random() < 1 / 6 if held is None else held)
        result = sample_result(source, goal, asked, rng) if rng.random() < lies else goal
        if "glitched" not in (source.quality, result.quality):
            break
    return TinyEdit(source, goal, asked, result, goal, 0.5, instruction(source, goal, asked, rng), rng.getrandbits(31))


def draw_work(edit: TinyEdit) -> tuple[Image.Image, Image.Image]:
    """The source and the first result, 64 by 64 pixels, objects and backgrounds as `tiny.diffusion` has them."""
    rng = random.Random(edit.seed)
    while True:
        source, result, _ = draw_edit(replace(edit, seed=rng.getrandbits(31)), SPOTS)
        back: Any = source.getpixel((0, 0))
        if source.width == source.height and min(back) >= PALE:
            return source.resize((SIDE, SIDE), Image.Resampling.BOX), result.resize((SIDE, SIDE), Image.Resampling.BOX)


def draw_edits(n: int, seed: int) -> tuple[list[str], Tensor, Tensor]:
    """`n` instructions, and pictures before and after: uint8 (n, 3, 64, 64) each."""
    texts, pictures = [], np.empty((2, n, SIDE, SIDE, 3), np.uint8)
    for k in tqdm(range(n), "edits"):
        edit = sample_work(random.Random(f"editing/{seed}/{k}"), LIES)
        texts.append(edit.wording)
        pictures[0, k], pictures[1, k] = draw_work(edit)
    before, after = torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).contiguous()
    return texts, before, after


def make_edits(editor: Any, edits: Sequence[TinyEdit], seed: int = 0, **call: Any) -> list[Image.Image]:
    """What the editor makes of each edit's source and instruction, from a seed of its own."""
    made = []
    for start in range(0, len(edits), BATCH):
        part = edits[start : start + BATCH]
        generators = [torch.Generator().manual_seed(1_000_000 * seed + start + k) for k in range(len(part))]
        sources, texts = [draw_work(edit)[0] for edit in part], [edit.wording for edit in part]
        made += editor(texts, image=sources, generator=generators, **CALL | call).images
    return made


def evaluate_edits(editor: Any, n: int = 300, seed: int = 0, **call: Any) -> dict[str, float]:
    """What the editor makes of `n` sources, read by `read.read_framed`: true utility, and the fraction that is right.

    Beside it, the utilities of the sources as they are and of the goals, between which an editor should come.
    """
    edits = [sample_work(random.Random(f"measure/{seed}/{k}"), 0.0) for k in range(n)]
    rows = []
    for edit, picture in zip(edits, make_edits(editor, edits, seed, **call), strict=True):
        reading = read_framed(picture)
        rows.append(
            {
                "utility": reading.edit_utility(edit.goal, edit.asked),
                "utility of the source": edit.utility(edit.source),
                "utility of the goal": edit.utility(edit.goal),
                "as it should be": reading.scene() == _plain(edit.goal),
                "a scene": reading.scene() is not None,
            }
        )
    return {name: sum(float(row[name]) for row in rows) / n for name in rows[0]}


def _plain(scene: Scene) -> Scene:
    """As it is read: neither mark nor style."""
    return replace(scene, framed=False, sketch=False)


CARD = """# The embedded tiny editor

An InstructPix2Pix pipeline of {size:.1f} MB in float16 for the tiny world, made, and this card written, by

```bash
python -m listener_reward.tiny.editing --out FOLDER
```

from {edits} drawn edits, of which {lies:.0%} are what just any editor makes of the instruction. Its own results, {n} of
them with {call}, read by `listener_reward.tiny.read`:

| measure | value |
| --- | --- |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the pipeline's folder; left out, the embedded one")
    parser.add_argument("--scratch", type=Path, default=Path("tiny-editing"), help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, default=DRAW_STEPS, help="of the denoiser")
    parser.add_argument("--edits", type=int, default=EDITS, help="how many it learns from")
    parser.add_argument("--samples", type=int, default=600, help="how many it is measured with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # however many cores there are, so that the weights do not depend on it
    editor: Any = build_editor(args.seed)
    texts, before, after = draw_edits(args.edits, args.seed)
    both = set_encoder(editor.vae, torch.cat([before, after]))
    sources, latents = both.chunk(2)
    train_decoder(editor.vae, torch.cat([before, after]), both, args.seed, args.scratch, min(args.steps, SEE["steps"]))
    train_denoiser(editor, texts, latents, args.seed, args.scratch, args.steps, sources)
    save_in_half(editor, args.out)
    metrics = evaluate_edits(load_editor(args.out), args.samples, args.seed)
    write_card(args.out, CARD, CALL, metrics, n=args.samples, edits=args.edits, lies=LIES)


if __name__ == "__main__":
    main()
