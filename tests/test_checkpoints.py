"""A checkpoint with a file that is cut, empty, overwritten or lost is found, and a full disk leaves none behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from listener_reward.card import Card
from listener_reward.checkpoints import fault_of, newest_whole, saving
from listener_reward.cli import app
from listener_reward.integrations.ddpo.log import CHECKPOINT_FILES, checkpoints, save_checkpoint
from listener_reward.integrations.ddpo.log import last_checkpoint as last_of_ddpo
from listener_reward.train.resuming import checkpoint_fault, last_checkpoint

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def write_checkpoint(folder: Path, kind: str = "full") -> Path:
    """A checkpoint as transformers writes it: `full`, `sharded` or `adapter`."""
    folder.mkdir(parents=True)
    weights = {"a": torch.arange(600.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
    if kind == "sharded":
        shards = {name: f"model-0000{k}-of-00002.safetensors" for k, name in enumerate(weights, 1)}
        for name, shard in shards.items():
            save_file({name: weights[name]}, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 2430}, "weight_map": shards}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        save_file(weights, folder / ("model.safetensors" if kind == "full" else "adapter_model.safetensors"))
    for name in STATES:
        torch.save({"state": torch.arange(300), "name": name}, folder / name)
    for name in ("config.json", "trainer_state.json"):
        (folder / name).write_text('{"global_step": 3}', encoding="utf-8")
    (folder / "merges.txt").write_text("", encoding="utf-8")
    torch.save(None, folder / "training_args.bin")
    Card().save(folder)
    return folder


KINDS: dict[str, tuple[str, ...]] = {
    "full": ("model.safetensors",),
    "sharded": ("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    "adapter": ("adapter_model.safetensors",),
}
FILES = [
    *((kind, file) for kind, files in KINDS.items() for file in files),
    *(("full", file) for file in (*STATES, "config.json", "trainer_state.json", "listener_reward.json")),
]

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data.rstrip()[:-1],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "garbage": lambda data: b"<html>502 Bad Gateway</html>" * 9,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_has_no_fault(kind: str, tmp_path: Path):
    folder = write_checkpoint(tmp_path / "one", kind)
    assert checkpoint_fault(folder) is None
    (folder / "training_args.bin").write_bytes(b"")  # which no resume reads
    assert checkpoint_fault(folder) is None


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("kind", "name"), FILES, ids=[name for _, name in FILES])
def test_a_damaged_file_is_named(kind: str, name: str, damage: str, tmp_path: Path):
    file = write_checkpoint(tmp_path / "checkpoint-3", kind) / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    fault = checkpoint_fault(file.parent)
    assert fault is not None and fault.startswith(f"{name} is ")
    assert ("empty" if damage == "empty" else "damaged") in fault
    earlier, told = write_checkpoint(tmp_path / "checkpoint-2", kind), []
    assert last_checkpoint(tmp_path, told.append) == earlier
    assert told == [f"{file.parent} is passed over: {fault}"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, files[0]) for kind, files in KINDS.items()]
    + [("full", name) for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json")],
)
def test_a_lost_file_is_named(kind: str, name: str, tmp_path: Path):
    folder = write_checkpoint(tmp_path / "one", kind)
    (folder / name).unlink()
    expected = "the file of weights" if kind != "sharded" and "model" in name else name
    assert checkpoint_fault(folder) == f"{expected} is missing"


def test_weights_saved_alone_are_whole(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "one")
    for name in STATES:
        (folder / name).unlink()
    assert checkpoint_fault(folder) is None


def test_files_of_sharded_training_are_looked_at(tmp_path: Path):
    """DeepSpeed's in a folder of their own, FSDP's as distributed checkpoints; both without `optimizer.pt`."""
    folder = write_checkpoint(tmp_path / "one")
    (folder / "optimizer.pt").unlink()
    state = folder / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state.parent.mkdir()
    torch.save({"state": torch.arange(300)}, state)
    assert checkpoint_fault(folder) is None
    os.truncate(state, 500)
    assert checkpoint_fault(folder) == f"global_step3/{state.name} is cut short or damaged"
    shutil.rmtree(state.parent)
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").touch()
    assert checkpoint_fault(folder) == "pytorch_model_fsdp_0/__0_0.distcp is empty"


def test_an_unreadable_file_is_a_fault(tmp_path: Path):
    (tmp_path / "a.json").symlink_to(tmp_path / "a.json")  # a loop, which is no file
    assert fault_of(tmp_path) is None
    assert fault_of(tmp_path, ("a.json",)) == "a.json is missing"
    assert newest_whole({}, fault_of) is None


# --- DDPO


def write_ddpo(folder: Path) -> None:
    save_file({"0": torch.ones(4)}, folder / "trained.safetensors")
    torch.save({"optimizer": {}}, folder / "state.pt")


@pytest.mark.parametrize("damage", [*DAMAGE, "lost"])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_of_ddpo_is_passed_over(name: str, damage: str, tmp_path: Path):
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path, epoch, write_ddpo, keep=3)
    file = tmp_path / "epoch-00003" / name
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    told: list[str] = []
    assert last_of_ddpo(tmp_path, told.append) == tmp_path / "epoch-00002"
    assert len(told) == 1 and told[0].startswith(f"{file.parent} is passed over: {name} is ")


def test_what_is_kept_is_never_later_than_what_was_saved(tmp_path: Path):
    """A run that went on before a broken checkpoint must not count it among those that it keeps."""
    for epoch in (3, 6):
        save_checkpoint(tmp_path, epoch, write_ddpo, keep=2)
    (tmp_path / "epoch-00006" / "state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, 4, write_ddpo, keep=1)
    assert last_of_ddpo(tmp_path) == tmp_path / "epoch-00004"


# --- a full disk


def test_a_full_disk_while_a_checkpoint_of_ddpo_is_saved(small_disk: Callable[[str], Path]):
    folder = small_disk("1m") / "checkpoints"
    large = torch.zeros(2**19)  # 2 MiB
    writers: list[Callable[[Path], Any]] = [
        lambda place: save_file({"0": large}, place / "trained.safetensors"),
        lambda place: torch.save(large, place / "state.pt"),
        lambda place: (place / "config.json").write_bytes(large.numpy().tobytes()),
    ]
    for write in writers:
        with pytest.raises(OSError, match=rf"no space left in {folder}; there is no whole checkpoint$"):
            save_checkpoint(folder, 1, write, keep=2)
    save_checkpoint(folder, 1, write_ddpo, keep=2)
    for write in writers:
        with pytest.raises(OSError, match=r"no space left in .*; the last whole checkpoint is .*epoch-00001") as raised:
            save_checkpoint(folder, 2, write, keep=2)
        assert raised.value.errno == errno.ENOSPC
        assert list(folder.iterdir()) == [folder / "epoch-00001"] and list(checkpoints(folder)) == [1]


def test_another_error_is_not_taken_for_a_full_disk(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), saving(tmp_path, lambda: None, remove=tmp_path / "a"):
        (tmp_path / "a").mkdir()
        raise RuntimeError("shapes differ")
    assert (tmp_path / "a").exists()


def test_a_full_disk_while_training_is_one_line(small_disk: Callable[[str], Path], tmp_path: Path):
    """The first checkpoint fits, and of the second only a part."""
    run, config = small_disk("20m") / "run", tmp_path / "train.yaml"
    config.write_text(
        f"""
model_name_or_path: tiny-base
malformed_rounds: 0
output_dir: {run}
data: tiny:train
data_limit: 8
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 8
max_steps: 2
save_steps: 1
gradient_checkpointing: false
use_cpu: true
bf16: false
disable_tqdm: true
""",
        encoding="utf-8",
    )
    done = CliRunner().invoke(app, ["train", "--config", str(config)])
    assert done.exit_code == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    last = run / "checkpoint-1"
    assert line.startswith(
        f"Error: no space left in {run}; the last whole checkpoint is {last}; make room, then resume"
    )
    assert last_checkpoint(run) == last
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
