"""Reward models that score one image at a time, as judges of pairs: p(first) is the sigmoid of the scores' difference.

For PickScore and CLIP that is the softmax over the two images which the models were trained with. For the others it is
the Bradley-Terry reading of their score, and only as calibrated as that is. Position means nothing to any of them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from PIL.Image import Image
from scipy.special import expit

from listener_reward.conclude import Evidence, make_verdict
from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.media.clips import Visual
from listener_reward.media.images import ImageLike, Picture
from listener_reward.media.storyboards import to_still, to_visual
from listener_reward.models.bradley_terry import BradleyTerryModel
from listener_reward.models.hub import hub_options
from listener_reward.pairs import PromptLike, as_prompt, check_questions, key_of, plain_texts
from listener_reward.verdict import Verdict

Score = Callable[[list[Any], list[Image]], Sequence[float]]
"""Prompts and images of equal number to one score each, higher is better. Prompts are texts, or `Prompt`s for a model
that reads sources."""

CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The CLIP that PickScore was trained from, and whose processor it uses."""
PICKSCORE = "yuvalkirstain/PickScore_v1"

IMSCORE: dict[str, tuple[str, str, float]] = {
    "ImageReward": ("imscore.imreward.model", "RE-N-Y/ImageReward", 1.0),
    "HPSv2": ("imscore.hps.model", "RE-N-Y/hpsv21", 100.0),
    "HPSv3": ("imscore.hpsv3.model", "RE-N-Y/hpsv3", 1.0),
    "MPS": ("imscore.mps.model", "RE-N-Y/mpsv1", 1.0),
    "PickScorer": ("imscore.pickscore.model", "RE-N-Y/pickscore", 1.0),
    "CLIPScore": ("imscore.preference.model", "RE-N-Y/clipscore-vit-large-patch14", 1.0),
    "SiglipPreferenceScorer": ("imscore.preference.model", "RE-N-Y/pickscore-siglip", 1.0),
    "CycleReward": ("imscore.cyclereward.model", "NagaSaiAbhinay/CycleReward-Combo", 1.0),
    "EvalMuse": ("imscore.evalmuse.model", "RE-N-Y/evalmuse", 1.0),
    "VQAScore": ("imscore.vqascore.model", "RE-N-Y/clip-t5-xxl", 1.0),
    "ShadowAesthetic": ("imscore.aesthetic.model", "RE-N-Y/aesthetic-shadow-v2", 1.0),
    "LAIONAestheticScorer": ("imscore.aesthetic.model", "RE-N-Y/laion-aesthetic", 1.0),
}
"""imscore's classes: their module, their weights as its README names them, and what their score is multiplied by to be
log-odds. imscore's HPSv2 gives a bare cosine, which was trained under CLIP's largest logit scale."""


class ScoreJudge:
    """A model that scores images, as a judge of pairs.

    Swapping the two images gives exactly `1 - p_first`. An image that comes back in several pairs of a call is scored
    once.
    """

    def __init__(self, name: str, score: Score, *, scale: float = 1.0, batch_size: int = 32, sources: bool = False):
        """
        Args:
            name: what tables and errors call the model.
            score: the model.
            scale: what a score is multiplied by to be log-odds.
            batch_size: images for each call of `score`.
            sources: whether `score` reads the sources of a `Prompt`. Without, prompts are handed on as texts, and one
                with sources or a criterion is refused.
        """
        self.name = name
        self._score, self._scale, self._batch_size, self._sources = score, scale, batch_size, sources

    def compare_many(
        self,
        prompts: Sequence[PromptLike],
        firsts: Sequence[ImageLike],
        seconds: Sequence[ImageLike],
        *,
        think: bool | None = None,
    ) -> list[Verdict]:
        """One verdict for each pair; `think` changes nothing.

        Raises:
            InputError: unequal lengths, an image that cannot be read, or a prompt with sources or a criterion that the
                model does not read.
            JudgeError: the model gave a score that is no finite number.
        """
        check_questions(prompts, firsts, seconds)
        fields = [f"{place}[{number}]" for place in ("firsts", "seconds") for number in range(len(prompts))]
        scores = self.score_many([*prompts, *prompts], [*firsts, *seconds], fields)
        return [
            _verdict(one - other) for one, other in zip(scores[: len(prompts)], scores[len(prompts) :], strict=True)
        ]

    def check_question(self, *, sources: int = 0, criterion: str | None = None) -> None:
        """Refuses, as `compare_many` does, any criterion, and source images that the model does not look at.

        Raises:
            InputError: there is one.
        """
        if (sources and not self._sources) or criterion is not None:
            what = f"the criterion {criterion!r}" if criterion is not None else "source images"
            raise InputError(f"the pairs have {what}, which {self.name} cannot judge by; take a Judge")

    def score_many(
        self, prompts: Sequence[PromptLike], images: Sequence[ImageLike | Visual], fields: Sequence[str] | None = None
    ) -> list[float]:
        """One score for each image and its prompt, in log-odds; `fields` are what errors call the images.

        Raises:
            InputError, JudgeError: as `compare_many`.
        """
        asked_of: Sequence[PromptLike] = prompts if self._sources else plain_texts(prompts, self.name)
        asked: dict[tuple[str, bytes], tuple[PromptLike, Image]] = {}
        keys: list[tuple[str, bytes]] = []
        read: dict[int, Picture] = {}  # by object: whoever shows a picture in many pairs may hand over one
        for number, (prompt, image) in enumerate(zip(asked_of, images, strict=True)):
            if id(image) not in read:
                field = f"images[{number}]" if fields is None else fields[number]
                read[id(image)] = to_still(to_visual(image, field=field))
            picture = read[id(image)]
            keys.append((key_of(prompt), picture.digest))
            asked[keys[-1]] = prompt, picture.image
        scored = (
            dict(zip(asked, self._scored(*map(list, zip(*asked.values(), strict=True))), strict=True)) if asked else {}
        )
        return [self._scale * scored[key] for key in keys]

    def _scored(self, prompts: list[Any], images: list[Any]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(images), self._batch_size):
            part = slice(start, start + self._batch_size)
            scores += map(float, self._score(prompts[part], images[part]))
        for prompt, score in zip(prompts, scores, strict=True):
            if not math.isfinite(score):
                raise JudgeError(f"{self.name} gave the score {score} for prompt {as_prompt(prompt).text[:60]!r}")
        return scores


def _verdict(log_odds: float) -> Verdict:
    # 1 - x is exact for x in [1/2, 1], so the mirror image of a verdict is exact.
    high = float(expit(abs(log_odds)))
    p_first = high if log_odds >= 0 else 1 - high
    return make_verdict([Evidence(p_first, by_order=(p_first, p_first), position_gap=0.0)])


# ---------------------------------------------------------------------------------------------------------------------
# Through transformers
# ---------------------------------------------------------------------------------------------------------------------


def bradley_terry_judge(folder: str) -> ScoreJudge:
    """A model of one's own, trained by `train.bradley_terry`.

    Raises:
        InputError: the folder holds none.
    """
    if not folder:
        raise InputError("bradley-terry needs a folder: bradley-terry:FOLDER, as train_bradley_terry writes one")
    model: BradleyTerryModel = BradleyTerryModel.from_pretrained(folder)
    return ScoreJudge(f"bradley-terry:{folder}", model.score, sources=True)


def clip_judge(checkpoint: str = "") -> ScoreJudge:
    """CLIP's similarity of prompt and image, times its logit scale. `checkpoint` is a folder or Hub name.

    Raises:
        InputError: the checkpoint cannot be loaded.
    """
    checkpoint = checkpoint or CLIP
    return ScoreJudge(f"clip:{checkpoint}" if checkpoint != CLIP else "clip", _clip_score(checkpoint, checkpoint))


def pickscore_judge(checkpoint: str = "") -> ScoreJudge:
    """PickScore: a CLIP finetuned on Pick-a-Pic's choices. `checkpoint` is a folder or Hub name of another of its kind.

    Raises:
        InputError: the checkpoint, or the processor of the CLIP it comes from, cannot be loaded.
    """
    checkpoint = checkpoint or PICKSCORE
    own = any((Path(checkpoint) / file).exists() for file in ("preprocessor_config.json", "processor_config.json"))
    name = f"pickscore:{checkpoint}" if checkpoint != PICKSCORE else "pickscore"
    return ScoreJudge(name, _clip_score(checkpoint, checkpoint if own else CLIP))


def _clip_score(checkpoint: str, processor_name: str) -> Score:
    from transformers import AutoModel, AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            processor_name, trust_remote_code=False, **hub_options(processor_name)
        )
        loaded = AutoModel.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            checkpoint, trust_remote_code=False, **hub_options(checkpoint)
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_cannot_load("CLIP checkpoint", checkpoint, error)) from error
    processor, model = cast("Any", found), cast("Any", loaded)
    model.eval().to(_device())
    longest = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def score(prompts: list[str], images: list[Image]) -> list[float]:
        inputs = processor(
            text=prompts, images=images, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(model.device)
        embedded = model(**inputs)  # both of unit length
        similar = (embedded.text_embeds * embedded.image_embeds).sum(-1)
        return (model.logit_scale.exp() * similar).tolist()

    return score


# ---------------------------------------------------------------------------------------------------------------------
# Through imscore
# ---------------------------------------------------------------------------------------------------------------------


def imscore_judge(model: str) -> ScoreJudge:
    """A model of the imscore package by its class's name.

    Raises:
        InputError: imscore has no such model, or its weights cannot be loaded.
        MissingExtraError: imscore, or a package that it needs, is not installed.
    """
    if model not in IMSCORE:
        raise InputError(f"imscore:{model!r} is unknown; there are {', '.join(f'imscore:{name}' for name in IMSCORE)}")
    module, weights, scale = IMSCORE[model]
    try:
        loaded: Any = getattr(importlib.import_module(module), model)
    except ImportError as error:
        raise MissingExtraError(
            f"imscore:{model} needs a package that is not here ({error}): pip install imscore\n"
            "Where its versions clash with ours, run it in an environment of its own and give its scores by --scores"
        ) from error
    try:
        scorer = loaded.from_pretrained(weights, **hub_options(weights)).eval().to(_device())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_cannot_load("imscore checkpoint", weights, error)) from error
    except (AttributeError, TypeError) as error:
        raise MissingExtraError(_other_versions(model, error)) from error

    @torch.inference_mode()
    def score(prompts: list[str], images: list[Image]) -> list[float]:
        # One size at a time: imscore takes one tensor for a batch.
        scores = [math.nan] * len(images)
        for size in {image.size for image in images}:
            rows = [row for row, image in enumerate(images) if image.size == size]
            pixels = torch.stack([_pixels(images[row]) for row in rows]).to(_device())
            try:
                found = scorer.score(pixels, [prompts[row] for row in rows])
            except (AttributeError, TypeError) as error:
                raise MissingExtraError(_other_versions(model, error)) from error
            # (B,) or (B, 1), which differs from model to model.
            for row, value in zip(rows, found.float().reshape(len(rows), -1)[:, 0].tolist(), strict=True):
                scores[row] = value
        return scores

    return ScoreJudge(f"imscore:{model}", score, scale=scale)


def _other_versions(model: str, error: Exception) -> str:
    """imscore 0.0.11 asks for transformers 4.53 or later, but was written for 4: in 5 `get_image_features` gives an
    object, and tokenizers have no `additional_special_tokens_ids`."""
    return (
        f"imscore:{model} does not work with this version of transformers ({type(error).__name__}: {error}); score in "
        "an environment of its own by docs/score_with_imscore.py, and give the file by --scores"
    )


def _pixels(image: Image) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"the {what} {name!r} cannot be loaded ({reason}); check the name and the connection, or give a local folder"
