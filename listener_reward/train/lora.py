"""LoRA by the fields that trl's `ModelConfig` has for it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft import LoraConfig
from trl import ModelConfig, get_peft_config

LORA_TARGETS = r".*(language_model|text_model).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""LoRA on the language model's projections; `all-linear` would also adapt the vision tower."""

LORA_FIELDS = tuple(
    one.name
    for one in fields(ModelConfig)
    if one.name.startswith("lora_") or one.name in ("use_peft", "use_rslora", "use_dora")
)
"""Those fields of `ModelConfig`."""


def lora_of(model_args: ModelConfig) -> LoraConfig | None:
    """PEFT's configuration of the adapters that are trained; None where every weight is."""
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = LORA_TARGETS  # pyright: ignore[reportAttributeAccessIssue] - one string is a pattern
    made: Any = get_peft_config(model_args)
    return made
