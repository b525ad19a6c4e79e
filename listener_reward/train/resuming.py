"""Which checkpoints of a training run can be gone on from exactly, and which is the newest of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from listener_reward.checkpoints import fault_of, newest_whole
from listener_reward.errors import InputError
from listener_reward.models.adapters import ADAPTER


def last_checkpoint(output_dir: str | Path, tell: Callable[[str], Any] | None = None) -> Path | None:
    """The newest whole checkpoint of a run; None without one.

    A checkpoint that a kill or a full disk left incomplete, or with a file that is cut, empty or missing, is passed
    over, and `tell` gets one line that names checkpoint, file and fault.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    named = {path: pattern.fullmatch(path.name) for path in Path(output_dir).glob("*") if path.is_dir()}
    return newest_whole({int(match[1]): path for path, match in named.items() if match}, checkpoint_fault, tell)


def checkpoint_fault(folder: Path) -> str | None:
    """What keeps training from going on at a checkpoint exactly, as "FILE is ..."; None for a whole one."""
    if fault := fault_of(folder, (TRAINER_STATE_NAME,)):
        return fault
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for index in (name for name in files if name.endswith(".index.json")):
        content = json.loads((folder / index).read_bytes())
        shards = content.get("weight_map", {}) if isinstance(content, dict) else {}
        if lacking := sorted(set(shards.values()) - files):
            return f"{lacking[0]} is missing"
    if any(name.startswith(("pytorch_model_fsdp", "optimizer_", "global_step")) for name in files):
        return None  # FSDP's and DeepSpeed's own folders
    if not any(name.endswith((".safetensors", "pytorch_model.bin", "adapter_model.bin")) for name in files):
        return "the file of weights is missing"
    # With `save_only_model` there is none of these. Where one is lost, transformers goes on without it.
    states = ("optimizer.pt", "scheduler.pt", "rng_state")
    there = {name: any(file.startswith(name) for file in files) for name in states}
    return next((f"{name} is missing" for name in there if any(there.values()) and not there[name]), None)


def check_resumable(folder: str | Path) -> None:
    """Raises `InputError` for a checkpoint that cannot be resumed, which names the file and the last whole one."""
    if fault := checkpoint_fault(Path(folder)):
        whole = last_checkpoint(folder) or last_checkpoint(Path(folder).parent)
        fix = "nor is another checkpoint beside it whole" if whole is None else f"the last whole checkpoint is {whole}"
        raise InputError(f"resume_from_checkpoint is {str(folder)!r}, which cannot be resumed: {fault}; {fix}")


def check_revision(folder: str | Path, revision: str | None) -> None:
    """Raises `InputError` for a checkpoint whose adapter was trained on another `revision` of its base."""
    path = Path(folder, ADAPTER)
    if not path.is_file():  # whole weights need no other ones
        return
    trained_on = json.loads(path.read_bytes()).get("revision")
    if trained_on != revision:
        raise InputError(
            f"resume_from_checkpoint is {str(folder)!r}, an adapter to revision {trained_on or 'main'!r} of its base, "
            f"and this run has loaded {revision or 'main'!r}; set model_revision: {trained_on or 'main'}"
        )
