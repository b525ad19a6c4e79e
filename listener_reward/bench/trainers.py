"""The trainers that are timed: ours, and stock trl's, with equal weights, data, seed and rewards."""

from __future__ import annotations

import io
import random
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL import Image as PIL_Image
from transformers import AutoConfig

from listener_reward.bench.shapes import Size, pictures, words
from listener_reward.card import Card
from listener_reward.chat import ChatFormat, reserved_tokens
from listener_reward.listener import load_listener
from listener_reward.models.processing import load_processor
from listener_reward.train.chats import as_chats
from listener_reward.train.config import ListenerGRPOConfig
from listener_reward.train.lora import LORA_TARGETS
from listener_reward.train.rewards import ShapedReward, text_of
from listener_reward.train.trainer import ListenerGRPOTrainer


def make_trainer(folder: Path, size: Size, shared: bool, callbacks: list[Any] | None = None) -> tuple[Any, Any]:
    """A trainer of the model in `folder`, and the listener that its rewards ask.

    The trainer is ours where the prefix is `shared`, else stock trl's with a listener that reads every prompt anew.
    """
    warnings.simplefilter("ignore")
    adapters = LoraConfig(target_modules=LORA_TARGETS, r=16) if size.lora else None
    processor, card, pairs = load_processor(folder), Card.load(folder), _pairs(size)
    args = _config(folder / ("shared" if shared else "plain"), size, folder, processor.tokenizer)
    if shared:
        trainer: Any = ListenerGRPOTrainer(folder, args, pairs, peft_config=adapters, callbacks=callbacks)
        listener = trainer.listener
    else:
        listener = load_listener(folder, card, dtype=size.dtype, batch_size=size.group, shared_prefix=False)
        chats = as_chats(pairs, card, reserved_tokens(processor.tokenizer)).cast_column("images", List(Image()))
        trainer = trl.GRPOTrainer(
            str(folder),
            ShapedReward(card.format, listener).functions,  # pyright: ignore[reportArgumentType]
            args,
            chats,
            processing_class=processor,
            peft_config=adapters,
            callbacks=callbacks,
        )
    _draw_adapters(trainer.model, size.seed)
    trainer.reward_funcs = _as_thoughts(trainer.reward_funcs, card.format)
    return trainer, listener


def _config(out: Path, size: Size, folder: Path, tokenizer: Any) -> ListenerGRPOConfig:
    return ListenerGRPOConfig(
        output_dir=str(out),
        listener=str(folder),
        listener_batch_size=size.group,
        per_device_train_batch_size=size.group,
        gradient_accumulation_steps=size.groups,
        num_generations=size.group,
        max_completion_length=size.tokens,
        max_steps=size.warm_up + size.repeats,
        learning_rate=1e-6,
        generation_kwargs={"suppress_tokens": _not_words(folder, tokenizer)},
        model_init_kwargs={"dtype": size.dtype},
        listener_dtype=size.dtype,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=size.gradient_checkpointing,
        logging_steps=1,
        log_completions=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=size.seed,
        share_attention=size.attention,
        token_budget=2**20,
    )


def _draw_adapters(model: Any, seed: int) -> None:
    """Gives both trainers equal adapters, and none that is zero, as new ones are."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if "lora_" in name:
            weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))


def _as_thoughts(parts: list[Callable[..., Any]], chat_format: ChatFormat) -> list[Callable[..., Any]]:
    """The reward functions, each completion handed to them as a thought with an answer after it.

    Random weights write nothing well-formed, and the listener reads nothing else. The answers differ as a reasoner's
    do. Were they equal, the advantages would be a random listener's small differences, and those mostly rounding.
    """
    last: tuple[Any, list[str]] = None, []  # the parts know a batch by its list, and read it once

    def answered(completion: Any) -> str:
        thought = text_of(completion)
        label = chat_format.labels[1 - zlib.crc32(thought.encode()) % 2]
        return chat_format.answer_slot(thought) + label + chat_format.answer[1]

    def formed(completions: list[Any]) -> list[str]:
        nonlocal last
        if last[0] is not completions:
            last = completions, [answered(completion) for completion in completions]
        return last[1]

    def reading(part: Callable[..., Any]) -> Callable[..., Any]:
        return lambda completions, **columns: part(completions=formed(completions), **columns)

    return [reading(part) for part in parts]


def _not_words(folder: Path, tokenizer: Any) -> list[int]:
    """Tokens that the reasoner may not sample: special tokens, which would end or break a thought, and unused ids."""
    size = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size
    return sorted({*tokenizer.get_added_vocab().values(), *range(len(tokenizer), size)})


def _pairs(size: Size) -> Dataset:
    number = size.groups * (size.warm_up + size.repeats)
    images = pictures(2 * number, size)
    rng = random.Random(size.seed)
    rows = {
        "prompt": [words(size.prompt_words, rng) for _ in range(number)],
        "images": [[_png(image) for image in images[2 * i : 2 * i + 2]] for i in range(number)],
        "p_first": [1.0] * number,
        "id": [str(i) for i in range(number)],
    }
    return Dataset.from_dict(rows)


def _png(image: PIL_Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}
