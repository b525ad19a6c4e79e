"""The Bradley-Terry baseline: the same backbone and votes, one score an image, no thought, by transformers' `Trainer`.

    loss = -p log sigmoid(s_first - s_second) - (1 - p) log sigmoid(s_second - s_first)

`p` is the fraction of people who prefer the first image, so that a tie teaches that the scores are equal.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from listener_reward.errors import InputError
from listener_reward.media.images import to_pil
from listener_reward.models.bradley_terry import BradleyTerryModel
from listener_reward.pairs import prompt_with


def bradley_terry_loss(first: Tensor, second: Tensor, p_first: Tensor) -> Tensor:
    """The mean loss of scores (B,) and (B,) under the fractions (B,) of people who prefer the first."""
    return F.binary_cross_entropy_with_logits(first - second, p_first)


def train_bradley_terry(
    model: str | Path,
    pairs: Dataset,
    args: TrainingArguments,
    *,
    peft_config: LoraConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Trainer:
    """Trains and returns the trainer; `args.output_dir` then holds what `bradley-terry:FOLDER` names.

    Args:
        model: the checkpoint to start from; its answers and its card play no part.
        pairs: columns `prompt, images, p_first`, as `load_pairs` gives them, and `sources` where there are some.
        args: `remove_unused_columns` is off whatever it says.
        peft_config: trains adapters beside the head, and merges them into the backbone at the end, in float32; None
            trains every weight.
        callbacks: as for transformers' `Trainer`.

    Raises:
        InputError: a checkpoint that cannot be loaded, or pairs without a column, without a row or with a criterion.
    """
    if lacking := {"prompt", "images", "p_first"} - set(pairs.column_names):
        raise InputError(f"pairs lacks the columns {sorted(lacking)}; load it with listener_reward.datasets.load_pairs")
    if len(pairs) == 0:
        raise InputError("pairs has no rows")
    args.remove_unused_columns = False
    scorer = BradleyTerryModel.from_base(model)
    if peft_config is not None:
        # No task type: the backbone has no head that writes text, which PEFT would look for.
        scorer.backbone = get_peft_model(scorer.backbone, replace(peft_config, task_type=None))
    trainer = _Trainer(
        model=scorer,
        args=args,
        train_dataset=pairs.cast_column("images", List(Image(decode=False))),
        data_collator=lambda rows: collated(scorer, rows),
        callbacks=callbacks,
    )
    trainer.train()
    if peft_config is not None:
        scorer.backbone = scorer.backbone.merge_and_unload()
    if trainer.is_world_process_zero():
        scorer.save(args.output_dir or ".")
    return trainer


def collated(scorer: BradleyTerryModel, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """B pairs as inputs of 2 B images, all first ones and then all second ones, and `p_first` (B,)."""
    prompts = [prompt_with(row["prompt"], row.get("sources"), row.get("criterion")) for row in rows]
    images = [to_pil(row["images"][place], field="images") for place in (0, 1) for row in rows]
    return {**scorer.inputs(prompts * 2, images), "p_first": torch.tensor([row["p_first"] for row in rows])}


class _Trainer(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        """Scores both images of each pair in one forward pass."""
        given = dict(inputs)
        p_first = given.pop("p_first")
        first, second = model(**given).chunk(2)
        loss = bradley_terry_loss(first, second, p_first)
        return (loss, {"first": first, "second": second}) if return_outputs else loss
