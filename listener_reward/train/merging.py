"""`listener-reward merge`: an adapter into its base's weights, and how much of the update the rounding leaves.

A weight in bfloat16 has eight significant bits. An update smaller than half a step of the weight is lost when the sum
is rounded, and the update of a short LoRA run is smaller than that nearly everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from listener_reward.card import Card
from listener_reward.errors import InputError
from listener_reward.files import folder_made_whole
from listener_reward.models.adapters import base_of
from listener_reward.models.hub import resolve, same_checkpoint
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.train.rounding import Rounding, rounding_of, together

LEAST_KEPT = 0.5
"""The fraction of an update below which `merge_judge` refuses."""


def merge_into(model: Any) -> tuple[Any, list[Rounding]]:
    """The base model of the PEFT `model` with its adapter merged into the weights, and what rounding left of it.

    Each sum is made in float32 and rounded to the weight's dtype once. The model that was given is taken apart.
    """
    roundings = list(_merged(model))
    return model.unload(), roundings


def _merged(model: Any) -> Iterator[Rounding]:
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        weight: Any = layer.get_base_layer().weight
        rounded: Tensor = weight.data
        weight.data = rounded.float().clone()
        layer.merge(safe_merge=True)
        update = weight.data - rounded.float()
        yield rounding_of(name, rounded, update)
        weight.data = weight.data.to(rounded.dtype)


def merge_judge(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    tell: Callable[[list[Rounding]], object] = lambda roundings: None,
) -> list[Rounding]:
    """Writes the judge in `folder`, an adapter on a base, as whole weights into the folder `out`.

    Args:
        folder: the adapter: a folder, or a Hub name.
        out: another folder than that of the adapter and of its base.
        dtype: of the weights, a torch dtype's name; None is that of the base's files.
        force: whether to write even if rounding leaves less than `LEAST_KEPT` of the update.
        tell: is given the roundings before anything is written.

    Returns:
        One entry for each module that the adapter changes.

    Raises:
        InputError: no adapter, a folder that cannot be used, or too little kept.
    """
    base = base_of(folder)
    if base is None:
        raise InputError(f"{str(folder)!r} is no adapter: it has no adapter_config.json, and there is nothing to merge")
    for taken in (folder, base):
        if same_checkpoint(out, taken):
            raise InputError(f"out is {str(out)!r}, which holds the adapter or its base; give a new folder")
    vlm = TransformersVLM.from_pretrained(
        resolve(folder), dtype=dtype or "auto", device="cpu", shared_prefix=False, keep_memory=False
    )
    card = Card.load(resolve(folder))
    model, roundings = merge_into(vlm.model)
    tell(roundings)
    kept = together(roundings).kept
    if kept < LEAST_KEPT and not force:
        raise InputError(
            f"merged in {str(model.dtype).removeprefix('torch.')}, the judge would keep {kept:.0%} of its update and "
            "not be the one that was trained. Use the adapter as it is, merge with --dtype float32, or give --force"
        )
    with folder_made_whole(out) as beside:
        model.save_pretrained(beside)
        vlm.processor.save_pretrained(beside)
        card.save(beside)
    return roundings
