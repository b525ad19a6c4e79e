"""Training of families that take the plain path: trl's own code runs, and says so."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_families
from transformers import AutoModelForImageTextToText
from trl import SFTConfig

from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.train.lora import LORA_TARGETS
from listener_reward.train.sft import train_sft
from listener_reward.train.trainer import ListenerGRPOTrainer


def built(once, kind: str) -> Path:
    return once(f"tiny-{kind}", lambda path: tiny_families.build(kind, path))


def test_a_family_of_the_plain_path_learns_by_trls_own_code(once, tiny_pairs, grpo_config, tmp_path, caplog):
    """A little supervised training first, for completions that earn something; then micro-batches of half a round."""
    quick: dict[str, Any] = {"save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    formed = SFTConfig(
        output_dir=str(tmp_path / "formed"),
        per_device_train_batch_size=8,
        max_steps=12,
        learning_rate=3e-3,
        gradient_checkpointing=False,
        **quick,
    )
    train_sft(built(once, "idefics3"), tiny_pairs, formed)
    args = grpo_config(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_completion_length=12)
    with caplog.at_level(logging.WARNING, "listener_reward"):
        trainer = ListenerGRPOTrainer(tmp_path / "formed", args, tiny_pairs)
    for switch in ("share_rollout", "share_logprobs", "share_groups"):
        assert f"{switch} is on, but trl's own code runs, because 'idefics3' is not one of the archi" in caplog.text
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == 2
    assert any(step["malformed_rate"] < 1 and step["grad_norm"] > 0 for step in steps)
    trainer.save_judge(tmp_path / "judge")
    judge: Any = Judge.from_pretrained(tmp_path / "judge", device="cpu")
    pair = tiny_pairs[0]
    assert 0 < judge.compare(pair["prompt"], *[image["bytes"] for image in pair["images"]]).p_first < 1


def test_a_model_whose_inputs_trl_drops_is_not_trained(once, tiny_pairs, grpo_config):
    """Of several images LLaVA-OneVision makes no tiles, which it learns from how many images a chat has."""
    with pytest.raises(InputError, match=r"cannot be trained: trl \S+ does not hand its inputs batch_num_images on"):
        ListenerGRPOTrainer(built(once, "llava_onevision"), grpo_config(), tiny_pairs)


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_vl_moe", "idefics3", "gemma3", "internvl"])
def test_lora_adapts_the_language_model_and_no_vision_tower(once, kind):
    model: Any = AutoModelForImageTextToText.from_pretrained(built(once, kind))
    adapted = [name for name, _ in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    assert any(name.endswith("layers.1.self_attn.q_proj") for name in adapted)
    assert not any("vis" in name for name in adapted)
