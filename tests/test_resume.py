"""A run that was interrupted ends as one that was not, to the last bit."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from listener_reward.card import Card
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.train.config import ListenerGRPOConfig
from listener_reward.train.lora import LORA_TARGETS
from listener_reward.train.run import checkpoint_to_resume, main
from listener_reward.train.trainer import ListenerGRPOTrainer, last_checkpoint

ROOT = Path(__file__).parent.parent
CLOCK = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
"""Logged values that are the clock's, and the mean loss of what this process trained."""

Result = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
Train = Callable[..., Result]


def result_of(trainer: ListenerGRPOTrainer) -> Result:
    model: Any = trainer.model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, [
        {name: value for name, value in entry.items() if name not in CLOCK} for entry in trainer.state.log_history
    ]


def assert_same(one: Result, other: Result) -> None:
    assert one[0].keys() == other[0].keys()
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []
    assert one[1] == other[1]


KINDS = {"full": {}, "lora": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(request.param)


@pytest.fixture(scope="module")
def train(folder: Path, formed_judge: Path, tiny_pairs: Dataset) -> Train:
    """`train(resume)` trains seven steps, of which four are an epoch, from the start or from a checkpoint; with
    `newest`, from the newest one in that output folder."""
    kind = folder.name.rstrip("0123456789")

    def run(resume: Path | None = None, *, newest: Path | None = None) -> Result:
        config = ListenerGRPOConfig(
            output_dir=str(newest or folder / ("whole" if resume is None else f"after-{resume.name}")),
            **{"per_device_train_batch_size": 8, **KINDS[kind]},
            num_generations=4,
            max_completion_length=8,
            max_steps=7,
            learning_rate=2e-4,
            logging_steps=1,
            save_steps=1,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        lora = LoraConfig(r=4, target_modules=LORA_TARGETS, task_type="CAUSAL_LM", lora_dropout=0.1)
        trainer = ListenerGRPOTrainer(formed_judge, config, tiny_pairs, peft_config=lora if kind == "lora" else None)
        trainer.train(resume_from_checkpoint=bool(newest) if resume is None else str(resume))
        return result_of(trainer)

    return run


@pytest.fixture(scope="module")
def whole(train: Train) -> Result:
    return train()


def test_the_run_learns_in_both_epochs(whole: Result):
    """Else the tests below would compare runs in which nothing happens."""
    moved = [entry["epoch"] for entry in whole[1] if entry.get("grad_norm", 0) > 0]
    assert min(moved) < 1 < max(moved) == 1.75


@pytest.mark.parametrize("step", [2, 4, 6], ids=["in epoch 0", "between epochs", "in epoch 1"])
def test_resumed_is_the_same_to_the_last_bit(train: Train, whole: Result, folder: Path, step: int):
    assert_same(train(folder / "whole" / f"checkpoint-{step}"), whole)


def test_a_broken_newest_checkpoint_is_passed_over_and_the_result_is_the_same(
    train: Train, whole: Result, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for step in (2, 4):
        shutil.copytree(folder / "whole" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    broken = tmp_path / "checkpoint-4" / "optimizer.pt"
    os.truncate(broken, broken.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, "listener_reward"):
        assert_same(train(newest=tmp_path), whole)
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert told == [f"{tmp_path / 'checkpoint-4'} is passed over: optimizer.pt is cut short or damaged"]


# --- which checkpoint


@pytest.fixture
def checkpoints(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoints({step: text of its state, or None for no state})` is an output folder."""

    def make(states: dict[int, str | None]) -> Path:
        for step, state in states.items():
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
            if state is not None:
                (folder / "trainer_state.json").write_text(state, encoding="utf-8")
        return tmp_path

    return make


def test_the_newest_complete_checkpoint_is_taken(checkpoints: Callable[..., Path]):
    folder = checkpoints({2: "{}", 10: "{}", 11: None, 12: '{"epoch": '})
    (folder / "checkpoint-99.tmp").mkdir()
    (folder / "checkpoint-98").touch()
    assert last_checkpoint(folder) == folder / "checkpoint-10"


def test_no_complete_checkpoint_is_none(checkpoints: Callable[..., Path], tmp_path: Path):
    assert last_checkpoint(checkpoints({2: None})) is None
    assert last_checkpoint(tmp_path / "missing") is None


def test_what_resume_from_checkpoint_means(checkpoints: Callable[..., Path], grpo_config: Any):
    folder = checkpoints({4: "{}"})
    asked = {"true": str(folder / "checkpoint-4"), True: str(folder / "checkpoint-4"), None: None, "false": None}
    for wanted, expected in {**asked, str(folder / "checkpoint-4"): str(folder / "checkpoint-4")}.items():
        config = grpo_config(output_dir=str(folder), resume_from_checkpoint=wanted)
        assert checkpoint_to_resume(config) == expected
    with pytest.raises(InputError, match="resume_from_checkpoint is 'nowhere', which is not a folder"):
        checkpoint_to_resume(grpo_config(resume_from_checkpoint="nowhere"))
    with pytest.raises(InputError, match=r"trainer_state.json is missing; the last whole checkpoint is .*checkpoint-4"):
        checkpoint_to_resume(grpo_config(resume_from_checkpoint=str(folder)))


def test_a_broken_checkpoint_that_is_named_is_refused(checkpoints: Callable[..., Path], grpo_config: Any):
    folder = checkpoints({2: "{}", 4: "{}", 6: "{}"})
    for step in (4, 6):
        (folder / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model.safetensors is empty; the last whole checkpoint is .*checkpoint-2$"):
        checkpoint_to_resume(grpo_config(resume_from_checkpoint=str(folder / "checkpoint-6")))
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="nor is another checkpoint beside it whole"):
        checkpoint_to_resume(grpo_config(resume_from_checkpoint=str(folder / "checkpoint-6")))


# --- killed


def test_killed_and_resumed_ends_with_the_same_weights(formed_judge: Path, tmp_path: Path):
    """SIGKILL in the middle of the third step; the kill is then made to have hit the writing of the next checkpoint."""
    config = tmp_path / "train.yaml"
    config.write_text(
        f"""
model_name_or_path: {formed_judge}
data: tiny:train
data_limit: 8
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 8
max_steps: 8
save_steps: 1
learning_rate: 2.0e-4
gradient_checkpointing: false
use_cpu: true
bf16: false
disable_tqdm: true
""",
        encoding="utf-8",
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from transformers.trainer_callback import DefaultFlowCallback

from listener_reward.cli import main

def kill(self, args, state, control, **more):
    if state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)

DefaultFlowCallback.on_pre_optimizer_step = kill
main()
"""
    arguments = ["train", "--config", str(config), "--output_dir", str(killed)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", command, str(ROOT), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (killed / "checkpoint-8").exists(), "the run was over before it was killed"
    newest = last_checkpoint(killed)
    assert newest is not None and newest.name == "checkpoint-2"
    assert Judge.from_pretrained(newest).card == Card.load(formed_judge)
    torn = killed / f"checkpoint-{int(newest.name.split('-')[1]) + 1}"
    shutil.copytree(newest, torn, dirs_exist_ok=True)
    (torn / "trainer_state.json").unlink()
    (torn / "model.safetensors").write_bytes(b"torn")

    main(["--config", str(config), "--output_dir", str(killed), "--resume_from_checkpoint", "true"])
    main(["--config", str(config), "--output_dir", str(whole)])
    ends = [load_file(folder / "model.safetensors") for folder in (killed, whole)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    start = load_file(formed_judge / "model.safetensors")
    assert not all(torch.equal(ends[0][name], start[name]) for name in start)
