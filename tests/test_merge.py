"""Merging an adapter: what rounding leaves of an update, by numbers worked by hand, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.cli import app
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.models.processing import load_processor
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.tiny.models import QUESTION
from listener_reward.train.lora import LORA_TARGETS
from listener_reward.train.merging import merge_judge
from listener_reward.train.rounding import rounding_of, together

STEP = 2.0**-7
"""From one bfloat16 to the next, between 1 and 2."""


@pytest.mark.parametrize(
    ("update", "lost", "changed", "unchanged"),
    [
        ([STEP, 0.0], 0.0, 1, 0),  # a whole step is kept
        ([STEP / 4, 0.0], (STEP / 4) ** 2, 1, 1),  # a quarter is lost
        ([STEP * 3 / 4, 0.0], (STEP / 4) ** 2, 1, 0),  # three quarters become one
        ([STEP, STEP / 4], (STEP / 4) ** 2, 2, 1),
        ([0.0, 0.0], 0.0, 0, 0),
    ],
)
def test_what_rounding_leaves_by_hand(update, lost, changed, unchanged):
    found = rounding_of("q_proj", torch.tensor([1.0, 1.5], dtype=torch.bfloat16), torch.tensor(update))
    norm = sum(each**2 for each in update)
    assert found.update == pytest.approx(norm, abs=0) and found.lost == pytest.approx(lost, abs=0)
    assert (found.changed, found.unchanged) == (changed, unchanged)
    assert found.error == pytest.approx(math.sqrt(lost / norm) if norm else 0.0)
    assert found.kept == pytest.approx(1 - found.error)
    assert found.unchanged_share == (unchanged / changed if changed else 0)


def test_modules_together_are_one():
    weight = torch.ones(1, dtype=torch.bfloat16)
    whole, quarter = (rounding_of("", weight, torch.tensor([STEP * part])) for part in (1.0, 0.25))
    both = together([whole, quarter])
    assert both.error == pytest.approx(math.sqrt(1 / 17))  # a quarter squared, of one and a quarter squared
    assert both.unchanged_share == 0.5
    assert together([quarter]).error == 1 and together([quarter]).kept == 0
    assert together([]).kept == 1


def test_float32_keeps_a_small_update():
    weight, update = torch.ones(4), torch.full((4,), 1e-5)
    assert rounding_of("", weight, update).kept > 0.99
    assert rounding_of("", weight.bfloat16(), update).kept == 0
    assert rounding_of("", weight.bfloat16(), update).unchanged_share == 1


@pytest.fixture
def trained(random_judge: Path, tmp_path: Path) -> Any:
    """An adapter whose `lora_B` is of the given size, as Adam moves it by its learning rate a step."""

    def make(size: float) -> Path:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_pretrained(random_judge, dtype="float32")
        config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "up_proj"])
        adapted: Any = get_peft_model(model, config)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.uniform_(weight, -size, size)
        adapted.save_pretrained(tmp_path / "adapter")
        Card.load(random_judge).save(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def test_a_merge_into_float32_is_the_unmerged_judge(trained: Any, random_judge: Path, tmp_path: Path):
    adapter, out = trained(0.02), tmp_path / "merged"
    roundings = merge_judge(adapter, out, dtype="float32")
    assert together(roundings).kept > 0.9999
    assert {each.module.rpartition(".")[2] for each in roundings} == {"q_proj", "up_proj"}
    base = AutoModelForImageTextToText.from_pretrained(random_judge, dtype="float32")
    expected = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    found = AutoModelForImageTextToText.from_pretrained(out, dtype="float32").state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-7, rtol=0)
    assert Card.load(out) == Card.load(adapter)
    assert not (out / "adapter_config.json").exists()
    assert Judge.from_pretrained(out).card == Card.load(adapter)


def test_an_update_that_bfloat16_would_lose_is_refused_before_anything_is_written(trained: Any, tmp_path: Path):
    """As a learning rate of 1e-6 for 20 steps leaves it."""
    adapter, out, told = trained(2e-5), tmp_path / "merged", []
    with pytest.raises(InputError, match=r"merged in bfloat16, the judge would keep \d+% .* --dtype float32, or give"):
        merge_judge(adapter, out, dtype="bfloat16", tell=told.append)
    assert not out.exists()
    assert len(told) == 1 and together(told[0]).kept < 0.5 and together(told[0]).unchanged_share > 0.5
    roundings = merge_judge(adapter, out, dtype="bfloat16", force=True)
    assert roundings == told[0]
    saved = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    assert saved.dtype == torch.bfloat16
    assert together(merge_judge(adapter, tmp_path / "whole", dtype="float32")).kept > 0.99


def test_nothing_to_merge_and_nowhere_to_write(trained: Any, random_judge: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"is no adapter: it has no adapter_config\.json"):
        merge_judge(random_judge, tmp_path / "merged")
    adapter = trained(0.02)
    for taken in (adapter, random_judge):
        with pytest.raises(InputError, match="holds the adapter or its base; give a new folder"):
            merge_judge(adapter, taken)


def test_the_command_tells_first_and_then_writes(trained: Any, tmp_path: Path):
    adapter, out = str(trained(2e-5)), tmp_path / "merged"
    result = CliRunner().invoke(app, ["merge", adapter, "--out", str(out), "--dtype", "bfloat16"])
    assert result.exit_code == 2 and not out.exists()
    assert "overall" in result.stderr and "q_proj" in result.stderr and "give --force" in result.stderr
    result = CliRunner().invoke(app, ["merge", adapter, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["out"] == str(out) and told["kept"] > 0.99 and told["unchanged"] < 0.01
    assert {"module", "kept", "error", "unchanged"} == set(told["modules"][0])
    assert (out / "model.safetensors").exists()


def test_an_unmerged_adapter_loses_nothing_but_what_bfloat16_rounds_in_any_pass(random_judge: Path, tmp_path: Path):
    """Its effect on the answer's log-odds, of a size that merging into bfloat16 mostly loses."""
    model: Any = AutoModelForImageTextToText.from_pretrained(random_judge, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    processor = load_processor(random_judge)
    processor.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    wrapped: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS))
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
        if "lora_B" in name:
            weight.data = (torch.rand(weight.shape) * 2 - 1) * 1e-4
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")

    chat_format = ChatFormat(question=QUESTION)
    chat = chat_format.chat("two red circles", Image.new("RGB", (48, 48), "red"), Image.new("RGB", (48, 48), "blue"))
    words = [word for word in sorted(processor.tokenizer.get_vocab()) if word.isalpha()][:16]
    slots = [chat_format.answer_slot(f"The {word} one is better .") for word in words]

    def odds(vlm: TransformersVLM) -> torch.Tensor:
        found = vlm.label_logprobs([chat] * len(slots), slots, chat_format.labels).double()
        return found[:, 0] - found[:, 1]

    def with_and_without(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        vlm = TransformersVLM.from_pretrained(tmp_path / "adapter", device="cpu", dtype=dtype)
        return odds(vlm), odds(vlm.without_adapters(ChatFormat()))

    exact, base = with_and_without("float32")
    rounded, rounded_base = with_and_without("bfloat16")
    effect, own = (exact - base).norm(), (rounded_base - base).norm()
    assert ((rounded - rounded_base) - (exact - base)).norm() <= 2 * own, "as much as two passes without an adapter"

    model = wrapped.merge_and_unload().bfloat16().float()
    lost = (odds(TransformersVLM(model, processor)) - exact).norm() / effect
    kept = TransformersVLM.from_pretrained(tmp_path / "adapter", device="cpu", dtype="float32")
    assert torch.equal(odds(kept), exact) and lost > 0.3, "the base's weights are bfloat16's in both"
