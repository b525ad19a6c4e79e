"""Best of n: the reward without any training. Sample n images, compare them, keep the best.

    best = best_of_n(pipeline, "two red circles", n=8, reward=ListenerReward("tiny"))
    best.images[0].save("best.png")
    best.contact_sheet().save("sheet.png")

Every image has a random generator of its own, so any candidate can be made again, alone, from its seed:
`pipeline(prompt, generator=torch.Generator().manual_seed(best.seeds[i]))` (up to rounding, which depends on the batch).

An editing pipeline, or one that makes a video of an image, is called with `image=`; its results are judged as edits of
that image:

    best = best_of_n(editor, "make the hat red", image=original, reward=ListenerReward(edit_judge))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from listener_reward.errors import InputError, JudgeError
from listener_reward.media.images import ImageLike, Picture, to_pil
from listener_reward.media.storyboards import as_picture
from listener_reward.pairs import check_text, read_sources
from listener_reward.reward import PAPER_CHECKPOINT

from .contract import as_reward, score

CLEAR = 1.5
"""How many standard errors of the difference a preview must lie behind to be a clear loser. The errors take every
comparison for one vote, and two images' errors for independent, so they are on the large side."""


@dataclass(frozen=True)
class BestOfN:
    """What `best_of_n` made. Lists and arrays are in the order of the seeds, except `images` and `order`."""

    prompt: str
    sources: tuple[Picture, ...]
    """What the candidates were judged with beside the prompt."""
    images: list[Any]
    """The best candidates, best first."""
    candidates: list[Any]
    """All n: an image (or for a video pipeline a list of frames); of one rejected early, its preview."""
    scores: np.ndarray
    """Float32 `(n,)`, higher is better; NaN where a candidate was rejected early or the judge broke on it."""
    standard_errors: np.ndarray
    """Float32 `(n,)`, NaN where the reward gives none."""
    seeds: list[int]
    order: list[int]
    """Positions of the candidates that have a score, best first."""
    preview_scores: np.ndarray | None
    """Float32 `(n,)`, of the previews, on a scale of their own; None without them."""
    rejected: list[int]
    """Positions of the candidates that stopped at their preview."""

    def contact_sheet(self, columns: int | None = None, width: int = 192) -> Image.Image:
        """All candidates as one picture, best first, each with its place, seed, score and standard error.

        `width` is that of a thumbnail in pixels. A video is shown as its storyboard.
        """
        without = [k for k in range(len(self.candidates)) if k not in self.order]
        columns = columns or ceil(sqrt(len(self.candidates)))
        line, font = width // 11, ImageFont.load_default(width // 14)
        cell = width + 8, width + 8 + 2 * line
        rows = ceil(len(self.candidates) / columns)
        sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
        canvas = ImageDraw.Draw(sheet)
        for place, k in enumerate([*self.order, *without]):
            left, top = place % columns * cell[0] + 4, place // columns * cell[1] + 4
            sheet.paste(ImageOps.pad(as_picture(self.candidates[k]), (width, width), color="white"), (left, top))
            rank = f"#{place + 1}" if k in self.order else "rejected" if k in self.rejected else "no score"
            canvas.text((left, top + width), f"{rank}   seed {self.seeds[k]}", "black", font)
            if k in self.order:
                error = self.standard_errors[k]
                text = f"{self.scores[k]:+.2f}" + ("" if np.isnan(error) else f" ± {error:.2f}")
                canvas.text((left, top + width + line), text, "black", font)
        return sheet


def best_of_n(
    pipeline: Callable[..., Any],
    prompt: str,
    n: int = 8,
    *,
    reward: Any = PAPER_CHECKPOINT,
    sources: Sequence[ImageLike] | ImageLike | None = None,
    keep: int = 1,
    seed: int | Sequence[int] = 0,
    batch_size: int = 4,
    preview_steps: int | None = None,
    **call: Any,
) -> BestOfN:
    """Samples `n` candidates of one prompt and orders them by `reward`.

    Args:
        pipeline: any diffusers pipeline of images or videos: from text, or from text and images.
        prompt: what to make; for an editing pipeline the instruction.
        n: candidates, at least 2.
        reward: a judge's name or folder, a judge, a URL, or a callable of the contract: a `ListenerReward`; for a
            video pipeline a `VideoReward`.
        sources: the images to judge the candidates with. Left out, they are those that the call has as `image`: an
            edit's original, reference subjects, a first frame. Not so where the pipeline has a `strength`, whose image
            is a start that the prompt does not speak of. `()` judges by the prompt alone.
        keep: how many of the best to return.
        seed: the first of `n` consecutive seeds, or all of them.
        batch_size: candidates sampled at a time.
        preview_steps: sample all candidates with so few steps first, and finish only those that are not clear losers:
            a preview is rejected if the `keep`-th best one leads it by more than `CLEAR` standard errors of their
            difference. At least two are finished. It pays where a preview costs little of a full sample; whether the
            pipeline's previews resemble its images is for you to see.
        call: arguments of the pipeline's call, such as `num_inference_steps`, or `image`: one image, or a list of those
            that every candidate is made from. A pipeline that wants one for each prompt gets
            `[original] * batch_size`, or one with `batch_size=1`.

    Raises:
        InputError: unusable arguments, or previews asked of a reward that gives no `standard_error`.
        JudgeError: the judge broke on every candidate, or it raised (`on_failure="nan"` makes it go on).
    """
    check_text(prompt, field="prompt")
    seeds = _seeds(seed, n)
    if not 1 <= keep <= n:
        raise InputError(f"keep is {keep}; choose 1 to n={n}")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; choose at least 1")
    taken = {"prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt"} & {
        *call
    }
    if taken:
        raise InputError(f"{', '.join(sorted(taken))} cannot be given; best_of_n sets what it needs of them itself")
    pictures = _sources(pipeline, call) if sources is None else read_sources(sources)
    scorer = as_reward(reward, {}, scheme="group")

    def judged(candidates: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        given = [pictures] * len(candidates) if pictures else None
        scores, info = score(scorer, candidates, [prompt] * len(candidates), sources=given, missing=True)
        return scores, info.get("standard_error", np.full_like(scores, np.nan))

    going, preview_scores = list(range(n)), None
    candidates: list[Any] = [None] * n
    if preview_steps is not None:
        candidates = samples(pipeline, prompt, seeds, batch_size, call | {"num_inference_steps": preview_steps})
        preview_scores, errors = judged(candidates)
        if np.isnan(errors).all():
            raise InputError("preview_steps is given, but the reward gives no standard_error to tell clear losers by")
        going = _not_clearly_lost(preview_scores, errors, keep)

    finished = samples(pipeline, prompt, [seeds[k] for k in going], batch_size, call)
    scores, errors = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
    scores[going], errors[going] = judged(finished)
    for k, candidate in zip(going, finished, strict=True):
        candidates[k] = candidate
    order = [k for k in np.argsort(-scores, kind="stable").tolist() if not np.isnan(scores[k])]
    if not order:
        raise JudgeError(f"the judge broke on every one of the {len(going)} candidates")
    return BestOfN(
        prompt=prompt,
        sources=pictures,
        images=[candidates[k] for k in order[:keep]],
        candidates=candidates,
        scores=scores,
        standard_errors=errors,
        seeds=seeds,
        order=order,
        preview_scores=preview_scores,
        rejected=[k for k in range(n) if k not in going],
    )


def _sources(pipeline: Any, call: dict[str, Any]) -> tuple[Picture, ...]:
    """The distinct images that the pipeline is to change."""
    if call.get("image") is None or "strength" in inspect.signature(pipeline.__call__).parameters:
        return ()
    return tuple(dict.fromkeys(read_sources(call["image"], field="image")))


def _seeds(seed: int | Sequence[int], n: int) -> list[int]:
    if n < 2:
        raise InputError(f"n is {n}; there must be at least 2 candidates to compare")
    seeds = list(range(seed, seed + n)) if isinstance(seed, int) else [int(one) for one in seed]
    if len(set(seeds)) != n:
        raise InputError(f"seed has {len(set(seeds))} different entries for n={n} candidates; give one for each")
    return seeds


def _not_clearly_lost(scores: np.ndarray, errors: np.ndarray, keep: int) -> list[int]:
    """Positions of the previews to finish. One without a score is finished: nothing is known against it."""
    order = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()]
    if len(order) < keep:
        return list(range(len(scores)))
    bar = order[keep - 1]
    lost = scores[bar] - scores > CLEAR * np.hypot(errors[bar], errors)  # False for NaN
    lost[order[: max(keep, 2)]] = False
    return np.flatnonzero(~lost).tolist()


def samples(pipeline: Any, prompt: str, seeds: Sequence[int], batch_size: int, call: Mapping[str, Any]) -> list[Any]:
    """One candidate for each seed, in its order. Generators are the CPU's, whose numbers are the same everywhere."""
    if "generator" not in inspect.signature(pipeline.__call__).parameters:
        raise InputError(
            f"pipeline is a {type(pipeline).__name__}, whose call has no generator; give a diffusers pipeline"
        )
    import torch  # the pipeline's own, so that the rest of this module needs none

    made: list[Any] = []
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        output = pipeline(prompt=[prompt] * len(batch), generator=generators, output_type="pil", **call)
        given = output.images if hasattr(output, "images") else output.frames
        if len(given) != len(batch):
            raise InputError(
                f"the pipeline made {len(given)} images for {len(batch)} prompts; best_of_n needs one for each"
            )
        made += [[to_pil(frame) for frame in one] if isinstance(one, (list, tuple)) else to_pil(one) for one in given]
    return made
