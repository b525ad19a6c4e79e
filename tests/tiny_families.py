"""Checkpoints of many families, tiny and random, in the file layout of the Hub.

The configurations have each family's own parts: tiles of an image, tokens around it, sliding windows, experts, linear
attention. The vocabulary is that of the tiny judge, with the family's special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.tiny.models import QUESTION, TAGS, WORDS
from listener_reward.tiny.world import COLORS, COUNTS, QUALITIES, SHAPES

SIDE, PATCH = 56, 14
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IDS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
QWEN_PIXELS = {
    "size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2},
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


class Tiny(NamedTuple):
    """What a tiny checkpoint of a family is made of."""

    config: dict[str, Any]
    """Of the whole model; token ids are filled in."""
    ids: dict[str, str]
    """The configuration's fields that hold a token's id, and the token."""
    pixels: tuple[str, dict[str, Any]]
    """Class and settings of its image processor."""
    processor: dict[str, Any]
    """The settings of its processor."""
    image: str
    """What its chat template writes for an image."""
    turns: tuple[str, str]
    """What opens a turn, with the role in it, and what closes it."""
    named: dict[str, str] = {}  # noqa: RUF012
    """Tokens that its tokenizer knows by a name."""
    more: tuple[str, ...] = ()
    """Other tokens of its vocabulary."""
    bos: str | None = None


def _qwen3(kind: str, **text: Any) -> Tiny:
    vision = QWEN_VISION | {"num_position_embeddings": 16}
    if kind.startswith("qwen3_vl"):
        vision |= {"deepstack_visual_indexes": [0, 1]}
    rope = ROPE | {"mrope_interleaved": True} | ({} if kind.startswith("qwen3_vl") else {"partial_rotary_factor": 1.0})
    return _qwen(kind, TEXT | {"rope_parameters": rope} | text, vision, "Qwen3VLProcessor")


def _qwen(kind: str, text: dict[str, Any], vision: dict[str, Any], processor: str) -> Tiny:
    return Tiny(
        {"model_type": kind, "text_config": text, "vision_config": vision},
        dict(zip(QWEN_IDS, QWEN_TOKENS, strict=True)),
        ("Qwen2VLImageProcessorPil", QWEN_PIXELS),
        {"processor_class": processor},
        "<|vision_start|><|image_pad|><|vision_end|>",
        ("<|im_start|>ROLE\n", "<|im_end|>\n"),
        more=QWEN_TOKENS,
    )


def _idefics(kind: str, name: str, named: dict[str, str], **pixels: Any) -> Tiny:
    return Tiny(
        {
            "model_type": kind,
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"image_size": SIDE, "patch_size": PATCH},
            "scale_factor": 2,
        },
        {"image_token_id": "<image>"},
        (
            f"{name}ImageProcessorPil",
            {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}} | pixels,
        ),
        {"processor_class": f"{name}Processor", "image_seq_len": 4},
        "<image>",
        ("<|im_start|>ROLE: ", "<end_of_utterance>\n"),
        named=named,
        more=(
            *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
            *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        ),
        bos="<|im_start|>",
    )


SIGLIP = VISION | {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH}

_ALL: dict[str, Callable[[], Tiny]] = {
    "qwen2_5_vl": lambda: _qwen(
        "qwen2_5_vl",
        TEXT | {"rope_parameters": ROPE},
        QWEN_VISION | {"window_size": 56, "fullatt_block_indexes": [1]},
        "Qwen2_5_VLProcessor",
    ),
    "qwen3_vl": lambda: _qwen3("qwen3_vl"),
    "qwen3_vl_moe": lambda: _qwen3("qwen3_vl_moe", **EXPERTS),
    "qwen3_5": lambda: _qwen3("qwen3_5", **LINEAR),
    "qwen3_5_moe": lambda: _qwen3("qwen3_5_moe", **LINEAR, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen2_vl": lambda: _qwen(
        "qwen2_vl",
        TEXT | {"rope_parameters": ROPE},
        {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "Qwen2VLProcessor",
    ),
    "internvl": lambda: Tiny(
        {
            "model_type": "internvl",
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
            "image_seq_length": 4,
        },
        {"image_token_id": "<IMG_CONTEXT>"},
        (
            "GotOcr2ImageProcessorPil",
            {"size": {"height": SIDE, "width": SIDE}, "crop_to_patches": True, "max_patches": 2},
        ),
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        "<IMG_CONTEXT>\n",
        ("<|im_start|>ROLE\n", "<|im_end|>\n"),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "gemma3": lambda: Tiny(
        {
            "model_type": "gemma3",
            "text_config": TEXT | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": SIGLIP | {"vision_use_head": False},
            "mm_tokens_per_image": 4,
        },
        {
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        ("Gemma3ImageProcessorPil", {"size": {"height": SIDE, "width": SIDE}}),
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        "<start_of_image>",
        ("<start_of_turn>ROLE\n", "<end_of_turn>\n"),
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        more=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
    ),
    "smolvlm": lambda: _idefics(
        *("smolvlm", "SmolVLM"),
        {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        do_image_splitting=False,
    ),
    "idefics3": lambda: _idefics("idefics3", "Idefics3", {}, do_image_splitting=True),
    "llava_onevision": lambda: Tiny(
        {
            "model_type": "llava_onevision",
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": SIGLIP | {"vision_use_head": False},
            "image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        },
        {"image_token_index": "<image>", "video_token_index": "<video>"},
        (
            "LlavaOnevisionImageProcessorPil",
            {
                "size": {"height": SIDE, "width": SIDE},
                "image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
            },
        ),
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
        },
        "<image>\n",
        ("<|im_start|>ROLE\n", "<|im_end|>\n"),
        more=("<image>", "<video>"),
    ),
    "llava": lambda: Tiny(
        {
            "model_type": "llava",
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH},
            "vision_feature_select_strategy": "default",
        },
        {"image_token_index": "<image>"},
        (
            "CLIPImageProcessorPil",
            {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
        ),
        {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "<image>\n",
        ("<|im_start|>ROLE\n", "<|im_end|>\n"),
        more=("<image>",),
    ),
}
TINY = {kind: make for kind, make in _ALL.items() if kind in CONFIG_MAPPING}
"""By `model_type`, those of the installed transformers."""


def build(kind: str, folder: Path, **card: Any) -> None:
    """Writes the checkpoint and a card with the tiny judge's question; it is its own listener."""
    tiny = TINY[kind]()
    tokenizer = build_tokenizer(tiny)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template(tiny), encoding="utf-8")
    getattr(transformers, tiny.pixels[0])(**tiny.pixels[1]).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(tiny.processor), encoding="utf-8")

    config = dict(tiny.config)
    config |= {field: tokenizer.convert_tokens_to_ids(token) for field, token in tiny.ids.items()}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config["text_config"] = config["text_config"] | ends | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with torch.no_grad():  # wider than a fresh model's, for answers that differ
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embed" not in name:
                weight.normal_(0, 0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    Card(**({"format": ChatFormat(question=QUESTION), "listener": ".", "max_new_tokens": 6} | card)).save(folder)


def build_tokenizer(tiny: Tiny) -> PreTrainedTokenizerFast:
    words = dict.fromkeys([*WORDS, *COLORS, *COUNTS, *QUALITIES, *SHAPES, *(shape + "s" for shape in SHAPES)])
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict.fromkeys(["<pad>", "<|im_start|>", "<|im_end|>", *tiny.named.values(), *tiny.more])
    if tiny.bos:
        special[tiny.bos] = None
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tiny.bos,
        eos_token=tiny.turns[1].strip(),
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=4096,
        extra_special_tokens=tiny.named,
    )


def chat_template(tiny: Tiny) -> str:
    opens, closes = (text.replace("\n", "\\n") for text in tiny.turns)
    opened = "{{ '" + opens.replace("ROLE", "' + message.role + '") + "' }}"
    asked = "{{ '" + opens.replace("ROLE", "assistant") + "' }}"
    image = tiny.image.replace("\n", "\\n")
    video = image.replace("image_pad", "video_pad") if "<|video_pad|>" in tiny.more else "<video>"
    return (
        ("{{ '" + tiny.bos + "' }}" if tiny.bos and not tiny.turns[0].startswith(tiny.bos) else "")
        + "{% for message in messages %}"
        + opened
        + "{% if message.content is string %}{{ message.content }}{% else %}"
        + "{% for block in message.content %}{% if block.type == 'image' %}{{ '"
        + image
        + "' }}{% elif block.type == 'video' %}{{ '"
        + video
        + "' }}{% else %}{{ block.text }}{% endif %}{% endfor %}"
        + "{% endif %}{{ '"
        + closes
        + "' }}{% endfor %}{% if add_generation_prompt %}"
        + asked
        + "{% endif %}"
    )
