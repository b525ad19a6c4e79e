"""Inputs of the benchmarks: models of a given shape with random weights, pictures of noise, thoughts of known words."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from listener_reward.card import Card
from listener_reward.chat import Chat, ChatFormat
from listener_reward.models.older_transformers import Qwen2VLImageProcessorPil
from listener_reward.models.processing import ImageOnlyQwen2_5_VLProcessor
from listener_reward.tiny.models import CHAT_TEMPLATE, build_tokenizer
from listener_reward.tiny.world import COLORS, COUNTS, SHAPES

WORDS = [*COLORS, *COUNTS, *SHAPES]

SHAPES_BY_NAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "60m": (
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16384}
        | {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"depth": 8, "hidden_size": 384, "intermediate_size": 1152, "num_heads": 6, "fullatt_block_indexes": [3, 7]},
    ),
    "qwen2.5-vl-3b": (
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "vocab_size": 151936}
        | {"num_attention_heads": 16, "num_key_value_heads": 2},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
        | {"fullatt_block_indexes": [7, 15, 23, 31]},
    ),
    "qwen2.5-vl-7b": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
        | {"num_attention_heads": 28, "num_key_value_heads": 4},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
        | {"fullatt_block_indexes": [7, 15, 23, 31]},
    ),
}
"""Language model and vision tower: one for a laptop, and two real ones. The proportions decide the ratio. The
small one's head has a quarter of its language model's weights, as in Qwen2.5-0.5B, and its vision tower costs 2.6 times
as much for each visual token as its language model: 2.4 in InternVL3-1B, 1.7 in Qwen2-VL-2B, 0.9 in Qwen2.5-VL-3B."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One benchmark's sizes."""

    model: str = "60m"
    pixels: int = 392
    """Edge of the square images; 392 is 196 visual tokens."""
    group: int = 8
    """Completions of each prompt."""
    groups: int = 4
    """Prompts of a step, one micro-batch each; the listener and the loss are timed on one."""
    tokens: int = 96
    """Tokens of each completion, and on average of the thoughts that are only read, which differ in length."""
    images: int = 6
    """Images to rank."""
    prompt_words: int = 40
    dtype: str = "float32"
    attention: str = "sdpa"
    """Of shared rows: one of `attention.KERNELS`."""
    repeats: int = 1
    """Timed runs of each case. The listener and the ranking run once more to warm up; so do the loss and the step if
    there are several repeats."""
    lora: bool = False
    """Whether the policy trains adapters on its language model, or every weight."""
    gradient_checkpointing: bool = False
    seed: int = 0

    @property
    def warm_up(self) -> int:
        """Runs of the loss and the step that do not count: on a CPU one run takes minutes, and hardly warms."""
        return int(self.repeats > 1)


def build_checkpoint(folder: Path, size: Size) -> None:
    """A model of that shape with random weights, its processor and its card; it is its own listener."""
    text, vision = SHAPES_BY_NAME[size.model]
    tokenizer = build_tokenizer()
    token = tokenizer.get_vocab()
    head = text["hidden_size"] // text["num_attention_heads"] // 2
    rope = [head // 4, head * 3 // 8, head - head // 4 - head * 3 // 8]
    config = Qwen2_5_VLConfig(
        text_config={
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": rope},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | text,
        vision_config={"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
        | {"out_hidden_size": text["hidden_size"]}
        | vision,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )
    torch.manual_seed(size.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(getattr(torch, size.dtype))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 4096 * 4096}, patch_size=14, merge_size=2, temporal_patch_size=2
    )
    ImageOnlyQwen2_5_VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    Card(format=ChatFormat(), listener=".", max_new_tokens=size.tokens).save(folder)


def pictures(number: int, size: Size) -> list[Image.Image]:
    rng = random.Random(size.seed)
    square = size.pixels, size.pixels
    return [Image.frombytes("RGB", square, rng.randbytes(3 * size.pixels**2)) for _ in range(number)]


def words(number: int, rng: random.Random) -> str:
    """`number` words of the tokenizer, one token each."""
    return " ".join(rng.choice(WORDS) for _ in range(number))


def group_chats(size: Size, reserved: frozenset[str]) -> tuple[list[Chat], list[str]]:
    """The chats of one group, all the same, and a thought for each.

    The thoughts' lengths are evenly spaced from half of `size.tokens` to one and a half.
    """
    rng = random.Random(size.seed)
    first, second = pictures(2, size)
    chat = ChatFormat().chat(words(size.prompt_words, rng), first, second, reserved)
    step = size.tokens / max(1, size.group - 1)
    return [chat] * size.group, [words(round(size.tokens / 2 + step * place), rng) for place in range(size.group)]
