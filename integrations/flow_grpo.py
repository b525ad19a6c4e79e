"""flow_grpo, DiffusionNFT and AWM, which share `flow_grpo/rewards.py`.

    listener-reward serve                             # the hosts pin transformers 4.40, so the judge is a server

As one of the rewards that the host weighs and adds up, three lines in `flow_grpo/rewards.py`:

    from listener_reward.integrations.flow_grpo import listener_score
    LISTENER = listener_score("http://127.0.0.1:8300")  # beside multi_score, so that training and evaluation share it
    score_functions = {..., "listener": LISTENER}     # in multi_score; config.reward_fn = {"listener": 1.0}

Or in place of `multi_score`, two lines of the training script, which also log how sure the scores are:

    reward_fn = listener_multi_score("http://127.0.0.1:8300")
    eval_reward_fn = reward_fn                        # the same: a second one would be a second judge, or other zeros

These hosts scatter the images of a prompt over processes and batches, and normalise per prompt only after gathering
them. So the scheme is `reference`: what a process sees is part of a group, whose own mean must not be taken out. Give
several processes one judge, a `listener-reward serve`, by its URL; else each keeps a reference image of its own.

Editing jobs (train_flux_kontext.py, train_qwenimage_edit.py) hand `ref_images` to `multi_score`, which hands them to
one reward only. Three more lines hand them to this one:

    elif score_name == "listener":
        score_fn = score_fns[score_name]
        scores, rewards = score_fn(images, prompts, metadata, ref_images)

With `edits=True` a call without them is an `InputError`. Without `edits` so it is, too, where the metadata name an
`image`, as the data of these scripts does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.media.storyboards import as_pictures
from listener_reward.reward import PAPER_CHECKPOINT

from .contract import as_reward, logged, score


def listener_score(reward: Any = PAPER_CHECKPOINT, *, edits: bool = False, **options: Any) -> Callable[[Any], Callable]:
    """An entry of `score_functions`: a plain function of `device`, `_fn(images, prompts, metadata, ref_images=None)`.

    The host looks into the function's code for the word `device`, so it can be neither a class nor a partial. The judge
    is loaded once, where `options` say (`device="cuda:1"`), or on the device that the host gives.

    Raises:
        InputError, JudgeError: when called, so at `.result()` in the host, which has no word for a missing score.
    """
    scorer = as_reward(reward, options, scheme="reference")

    def factory(device: Any) -> Callable:
        as_reward(scorer, {}, scheme="reference", device=device)

        def _fn(images: Any, prompts: Any, metadata: Any, ref_images: Any = None) -> tuple[np.ndarray, dict]:
            return _score(scorer, images, prompts, metadata, ref_images, edits)[0], {}

        return _fn

    return factory


def listener_multi_score(reward: Any = PAPER_CHECKPOINT, *, edits: bool = False, **options: Any) -> Callable:
    """Stands in for `multi_score(device, score_dict)`: `_fn(images, prompts, metadata, ...) -> (dict, {})`.

    The dict has `listener` and `avg`, which is the same, and of the info what `contract.logged` takes: the entries that
    are never NaN, and a `Mixture`'s components. Every one is float32 `(B,)` and there in every batch: the host gathers
    them all and logs their means.

    `images` are NCHW floats in [0, 1], or videos (B, F, C, H, W), each judged as a storyboard. `ref_images` are the
    source images of edits, one for each, or a list of several.

    Raises:
        InputError, JudgeError: when called, so at `.result()` in the host, which has no word for a missing score.
        InputError: `edits` without source images, or `on_failure="group-mean"` without `scheme="group"`. A call holds
            some of a group's images, and their mean is not the group's: the image would have an advantage that nobody
            judged. With `scheme="group"` the mean of every call is 0, so that it has none.
    """
    scorer = as_reward(reward, options, scheme="reference")

    def _fn(
        images: Any, prompts: Any, metadata: Any, ref_images: Any = None, only_strict: bool = True
    ) -> tuple[dict[str, np.ndarray], dict]:
        scores, info = _score(scorer, images, prompts, metadata, ref_images, edits)
        return logged(info) | {"listener": scores, "avg": scores}, {}

    return _fn


def _score(
    scorer: Any, images: Any, prompts: Any, metadata: Any, ref_images: Any, edits: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if getattr(images, "ndim", 0) == 5:
        images = as_pictures(images)
    if ref_images is None:
        _check_lost(metadata)
    elif not isinstance(ref_images, (list, tuple)):
        ref_images = list(ref_images)  # a tensor's first axis is the batch's
    return score(scorer, images, prompts, metadata, sources=ref_images, edits=edits)


def _check_lost(metadata: Any) -> None:
    """Raises `InputError` where the host's data of edits came without the images that it names."""
    for position, entry in enumerate(metadata if isinstance(metadata, (list, tuple)) else ()):
        if isinstance(entry, Mapping) and isinstance(entry.get("image"), str) and not entry.get("sources"):
            raise InputError(
                f"metadata[{position}] names a source image, {entry['image'][:80]!r}, and ref_images did not come; add "
                "the lines to multi_score that hand them to this reward"
            )
