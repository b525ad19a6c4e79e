"""The supervised baseline: the same pairs, the same chat, the answer without a thought, by trl's `SFTTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from listener_reward.card import Card
from listener_reward.chat import reserved_tokens
from listener_reward.errors import InputError
from listener_reward.media.images import to_pil
from listener_reward.models.hub import lasting, resolve
from listener_reward.train.chats import as_chats
from listener_reward.train.policy import load_policy_processor


def as_examples(pairs: Dataset, card: Card, reserved: frozenset[str]) -> Dataset:
    """Pairs as prompt and completion: the answer that most people gave, after an empty thought. Ties are left out.

    Raises:
        InputError: no pair with a majority is left.
    """
    pairs = pairs.filter(lambda p_first: p_first != 0.5, input_columns="p_first")
    if len(pairs) == 0:
        raise InputError("train_dataset has no pair with a majority; p_first is 0.5 in all of them")
    chats = as_chats(pairs, card, reserved)
    completions = [
        [{"role": "assistant", "content": [{"type": "text", "text": _completion(card, p_first)}]}]
        for p_first in chats["p_first"]
    ]
    chats = chats.select_columns(["prompt", "images"]).add_column("completion", completions)
    return chats.with_transform(_decode)


def train_sft(
    model: str | Path,
    pairs: Dataset,
    args: SFTConfig,
    *,
    peft_config: LoraConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Any:
    """Trains and returns the trainer; `args.output_dir` then holds a judge, an adapter with `peft_config`."""
    folder = lasting(resolve(model))
    card, processor = Card.load(folder), load_policy_processor(folder)
    trainer = SFTTrainer(
        model=folder,
        args=args,
        train_dataset=as_examples(pairs, card, reserved_tokens(processor.tokenizer)),
        processing_class=processor,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    card.save(args.output_dir or ".")
    return trainer


def _decode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Images by `to_pil`, as everywhere in this package; `datasets` would hand on whatever mode a file has."""
    return rows | {"images": [[to_pil(image, field="images") for image in images] for images in rows["images"]]}


def _completion(card: Card, p_first: float) -> str:
    label = card.format.labels[0 if p_first > 0.5 else 1]
    return f"{card.format.answer_slot('')}{label}{card.format.answer[1]}"
