"""Training with vLLM rollouts in the trainer's process: two steps, and whose weights write the completions.

Needs vLLM, which is not among the test's own packages; `.ci/run` makes an environment with the build for CPUs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

if find_spec("vllm") is None:
    pytest.skip("needs vLLM", allow_module_level=True)

from served import Served, serving

from listener_reward import tiny
from listener_reward.judge import Judge

ROLLOUTS: dict[str, Any] = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 512,
    "vllm_gpu_memory_utilization": 0.05,
    "max_completion_length": 48,
}
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SAME_NAME = re.compile(r"language_model.*\.(layers\.\d+\.(?:self_attn\.o_proj|mlp\.down_proj)\.weight)$")
"""Weights that vLLM keeps as they are; it joins others to larger ones."""


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {match[1]: weight for name, weight in model.named_parameters() if (match := SAME_NAME.search(name))}
    return {name: weight.detach().clone() for name, weight in found.items()}


def in_bfloat16(folder: Path) -> str:
    """The embedded base in bfloat16, for which vLLM has kernels with packed weights on any recent CPU."""
    shutil.copytree(Path(tiny.__file__).parent / "weights" / "base", folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text(encoding="utf-8"))
    save_file({name: weight.bfloat16() for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")
    return str(folder)


def test_completions_are_written_by_the_weights_of_their_step(
    tiny_pairs: Any, grpo_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from trl.generation.vllm_generation import VLLMGeneration

    from listener_reward.train.trainer import ListenerGRPOTrainer

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    stock = VLLMGeneration.generate

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        inside = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        seen.append((named(inside), named(trainer.accelerator.unwrap_model(trainer.model))))
        return stock(self, *args, **options)

    monkeypatch.setattr(VLLMGeneration, "generate", spy)
    listener: Any = Judge.from_pretrained("tiny-edit-listener", listener="none", device="cpu").reasoner
    with serving(Served(listener)) as server:
        config = grpo_config(**ROLLOUTS, listener=server.address)
        trainer = ListenerGRPOTrainer(in_bfloat16(tmp_path / "base"), config, tiny_pairs)
        trainer.train()
        assert server.requests
    assert len(seen) == 2
    for inside, here in seen:
        assert inside and inside.keys() == here.keys()
        # trl loads vLLM in the dtype in which the checkpoint is saved, here bfloat16, and trains in float32.
        assert all(torch.equal(inside[name], here[name].to(inside[name].dtype)) for name in inside)
    assert any(not torch.equal(seen[0][0][name], seen[1][0][name]) for name in seen[0][0])
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(entries) == 2 and entries[0]["malformed_rate"] < 0.5


def test_a_vllm_that_chooses_kernels_in_another_way_is_left_alone(
    grpo_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from vllm.model_executor.layers import utils as kernels  # pyright: ignore[reportMissingImports]

    from listener_reward.train.reloading import keeping_weights

    def another(layer: Any, packed: bool) -> None: ...

    stock = kernels.dispatch_cpu_unquantized_gemm
    with keeping_weights(grpo_config(**ROLLOUTS)):
        assert kernels.dispatch_cpu_unquantized_gemm is not stock
    assert kernels.dispatch_cpu_unquantized_gemm is stock
    with keeping_weights(grpo_config(**ROLLOUTS | {"vllm_mode": "server"})):
        assert kernels.dispatch_cpu_unquantized_gemm is stock
    monkeypatch.setattr(kernels, "dispatch_cpu_unquantized_gemm", another)
    with keeping_weights(grpo_config(**ROLLOUTS)):
        assert kernels.dispatch_cpu_unquantized_gemm is another
    assert "gemm(layer, packed), and listener-reward expects (layer, remove_weight)" in caplog.text


def test_the_command_trains_with_a_listener_in_its_process(tmp_path: Path):
    config = ROLLOUTS | {
        "data": "tiny:train",
        "data_limit": 8,
        "model_name_or_path": "tiny",
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "listener_reward.cli", "train", "--config", str(tmp_path / "train.yaml")]
    # trl's colocated mode leaves a launch's variables in the environment of whoever trains.
    env = {name: value for name, value in os.environ.items() if name not in LAUNCH} | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"The judge is in {tmp_path / 'run'}" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").is_file()
