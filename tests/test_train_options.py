"""Options of a training file that a large judge needs: rounded weights under an adapter, and how the listener loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from listener_reward.errors import JudgeError
from listener_reward.judge import Judge
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.world import split_pairs
from listener_reward.train import run
from listener_reward.train.trainer import ListenerGRPOTrainer

TRAIN = """
model_name_or_path: tiny-base
use_peft: true
listener: tiny-listener
data: tiny:train
data_limit: 4
output_dir: OUT
per_device_train_batch_size: 4
num_generations: 4
max_completion_length: 40
max_steps: 1
learning_rate: 1.0e-3
lr_scheduler_type: constant
logging_steps: 1
save_strategy: "no"
report_to: none
disable_tqdm: true
gradient_checkpointing: false
use_cpu: true
bf16: false
log_completions: false
"""


def config(folder: Path, more: str) -> list[str]:
    file = folder / "train.yaml"
    file.write_text(TRAIN.replace("OUT", str(folder / "judge")) + more, encoding="utf-8")
    return ["--config", str(file)]


def test_adapters_are_trained_on_weights_in_4_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = "load_in_4bit: true\nlistener_options: {quantization: 8bit, memory: 1GB, batch_size: 7}\nmax_pixels: 2700\n"
    trainer = run.train(*run.parse(config(tmp_path, more)))
    listener: Any = trainer.listener
    assert type(listener.vlm.model.model.language_model.layers[0].mlp.down_proj).__name__ == "Linear8bitLt"
    assert (listener.vlm.memory, listener.vlm.batch_size) == (10**9, 7)
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    assert type(policy.base_model.model.model.language_model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert trainer.sharing == {"rollout", "logprobs", "groups"}
    assert "Judge.from_pretrained(" in (said := capsys.readouterr().out) and "quantization='4bit')" in said

    learnt = load_file(tmp_path / "judge" / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in learnt.items() if "lora_B" in name)
    pair = next(split_pairs("id", 1))
    sides = draw_pair(pair)
    for bits in ("4bit", None):
        judge = Judge.from_pretrained(tmp_path / "judge", listener="none", quantization=bits, think=False)
        verdict, swapped = judge.compare(pair.wording, *sides), judge.compare(pair.wording, *reversed(sides))
        assert swapped.p_first == 1 - verdict.p_first
        processor: Any = judge.reasoner.processor  # pyright: ignore[reportAttributeAccessIssue]
        assert processor.image_processor.size["longest_edge"] == 2700, "the limit is the judge's, too"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("__init__", "memory ran out while the trainer was set up.*use_peft: true.*listener_options"),
        ("train", "memory ran out while it trained, which asked for .* bytes more; lower per_device_train_batch_size"),
    ],
)
def test_a_full_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, said: str):
    def fill(*_: Any, **__: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(ListenerGRPOTrainer, method, fill)
    with pytest.raises(JudgeError, match=said):
        run.main(config(tmp_path, ""))
