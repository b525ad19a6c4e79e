"""Small Qwen-VLs with random weights, and prompts with images for them, for the tests of shared prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from listener_reward.prefix.attention import take_layouts
from listener_reward.prefix.rows import Prompt, prompt_positions

IMAGE = 10


def build(kind: str, **text_options: Any) -> Any:
    """A small model with grouped heads and random weights."""
    text = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
    }
    ids: dict[str, Any] = {
        "image_token_id": IMAGE,
        "video_token_id": 11,
        "vision_start_token_id": 12,
        "vision_end_token_id": 13,
    }
    torch.manual_seed(0)
    if kind == "qwen2_5_vl":
        text |= {"rope_parameters": rope} | text_options
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        model: Any = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    else:
        text |= {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}} | text_options
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        if kind == "qwen3_vl":
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
        else:
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids))
    model.generation_config.eos_token_id = [1, *range(30, 36)]
    model.generation_config.pad_token_id = 0
    take_layouts(model)
    return model


@dataclass
class Case:
    model: Any
    prompts: list[Prompt]
    pixels: list[Tensor]
    grids: list[Tensor]

    @property
    def vision(self) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat(self.pixels), "image_grid_thw": torch.cat(self.grids)}

    def alone(self, group: int, tokens: Tensor) -> Tensor:
        """Logits (C + 1, V) of one continuation, by plain transformers."""
        ids = torch.cat([self.prompts[group].ids, tokens])[None]
        output = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == IMAGE).int(),
            pixel_values=self.pixels[group],
            image_grid_thw=self.grids[group],
        )
        return output.logits[0, len(self.prompts[group].ids) - 1 :]


def make_case(model: Any, same_prompts: bool = False) -> Case:
    """Two prompts with two images each, of different lengths and image shapes unless `same_prompts`."""
    generator = torch.Generator().manual_seed(1)
    prompts, pixels, grids = [], [], []
    for words, (height, width) in [(7, (8, 8)), (7, (8, 8)) if same_prompts else (12, (6, 10))]:
        grid = torch.tensor([[1, height, width], [1, width, height]])
        placeholders = [12, *[IMAGE] * (height * width // 4), 13]
        ids = torch.tensor([5, 6, *placeholders, 7, *placeholders, *range(40, 40 + words)])
        prompts.append(Prompt(ids, prompt_positions(model, ids, grid)))
        pixels.append(torch.randn(2 * height * width, 3 * 2 * 14 * 14, generator=generator))
        grids.append(grid)
    return Case(model, prompts, pixels, grids)


def continuations(lengths) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randint(40, 200, (n,), generator=generator) for n in group] for group in lengths]
