"""Which vision-language models can judge, and what of this package each can use: one table, by `model_type`."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple, cast

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from listener_reward.errors import InputError
from listener_reward.models.hub import cannot_load
from listener_reward.prefix.attention import MODEL_TYPES

_KNOWN: Container[str] = cast("Any", configuration_auto).CONFIG_MAPPING_NAMES
_LANGUAGE: Container[str] = cast("Any", modeling_auto).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_VISION_LANGUAGE: Container[str] = cast("Any", modeling_auto).MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


class Family(NamedTuple):
    """What the package does for checkpoints of one `model_type`."""

    name: str
    """The family as people know it."""
    processor: str | None
    """The processor of ours that reads its images, by the name of transformers' own; None for `AutoProcessor`'s."""
    clips: bool
    """Whether it can be shown a clip as a video. Any family can be shown a clip's frames as images."""
    shares_prefix: bool
    """Whether equal prompts are computed once; else every chat pays for its own prompt and images."""


def _qwen(name: str, kind: str, processor: str) -> Family:
    return Family(name, processor, clips=True, shares_prefix=kind in MODEL_TYPES)


FAMILIES = {
    kind: _qwen(name, kind, processor)
    for kind, name, processor in (
        ("qwen2_5_vl", "Qwen2.5-VL", "Qwen2_5_VLProcessor"),
        ("qwen3_vl", "Qwen3-VL", "Qwen3VLProcessor"),
        ("qwen3_vl_moe", "Qwen3-VL, mixture of experts", "Qwen3VLProcessor"),
        ("qwen3_5", "Qwen3.5", "Qwen3VLProcessor"),
        ("qwen3_5_moe", "Qwen3.5, mixture of experts", "Qwen3VLProcessor"),
    )
}
"""The families that the package knows by name. Qwen3.5's layers of linear attention have no keys to share."""


def family_of(kind: str | None, *, where: object = "", config: dict[str, Any] | None = None) -> Family:
    """The family of a checkpoint's `model_type`; those that are not in `FAMILIES` take the plain path.

    Args:
        kind: the `model_type` that stands in the checkpoint's config.json, None where none does.
        where: the checkpoint, for the message.
        config: the whole config.json, for the message.

    Raises:
        InputError: no vision-language model of the installed transformers, and why.
    """
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind is not None and kind in _VISION_LANGUAGE:
        return Family(kind, None, clips=False, shares_prefix=False)
    raise InputError(cannot_load(str(where), _reason(kind, config or {})))


def _reason(kind: str | None, config: dict[str, Any]) -> str:
    """Why a checkpoint of this type cannot judge."""
    if kind is None:
        return "its config.json names no model_type"
    if kind in _KNOWN:
        reads = "it reads text alone" if kind in _LANGUAGE else "it does not write about images"
        return f"it is a {kind!r} model, which is no vision-language model: {reads}"
    reason = f"it is a {kind!r} model, which transformers {transformers.__version__} does not know"
    if "auto_map" in config:
        reason += "; the model's code is in the checkpoint, and code from a checkpoint is not run here"
    return reason
