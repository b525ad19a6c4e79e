"""Finished runs: one JSON file each, found by what it says of itself and not by its name."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from listener_reward import __version__
from listener_reward.errors import InputError
from listener_reward.files import quoted, write_text
from listener_reward.recipes.study.configuration import Arm, key, measurement, read, to_dict
from listener_reward.recipes.study.plans import Run

RUNS = "runs"
"""The folder of finished runs in a study's folder."""

VERSIONS = ("torch", "transformers", "trl", "diffusers")


def finished(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Every finished run in a study's folder by its key.

    The key is made anew from the configuration in the file: a field that has come to the code since has its default
    there, so that older runs still count, and a default that has changed since makes another run.

    Raises:
        InputError: a file that is no run.
    """
    return {record["key"]: record for record in _records(Path(folder, RUNS))}


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            arm, measured = read(Arm, record["arm"], "arm"), measurement(record["measurement"], "measurement")
            record["key"] = key(arm, record["seed"], measured)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{quoted(path)} is no run of this version ({error}); move it out of the folder"
            ) from error
        yield record


def record_of(
    run: Run, results: Mapping[str, Any], seconds: float, training: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What is kept of a run: what decides its result, the result, and the circumstances."""
    return {
        "name": run.label,
        "seed": run.seed,
        "arm": to_dict(run.arm),
        "measurement": to_dict(run.measured),
        "results": dict(results),
        "seconds": round(seconds, 1),
        "training": training,
        "finished_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
        "checkpoints": {name: digest_of(name) for name in (run.arm.recipe.base, run.arm.recipe.listener)},
    }


def keep(folder: str | Path, run: Run, record: Mapping[str, Any]) -> Path:
    """Writes a run's file, whole or not at all."""
    path = Path(folder, RUNS, f"{slug(run.label)}-{run.seed}-{run.key}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-zA-Z0-9.]+", "-", name).strip("-")


def versions() -> dict[str, str]:
    found = {"listener-reward": __version__}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that runs, with "+" where its files are changed; None where it is no checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")


def digest_of(checkpoint: str) -> str | None:
    """Ten hexadecimal digits of a checkpoint's weights that lie on this machine; None of others."""
    from listener_reward.models.hub import resolve

    try:
        folder = Path(resolve(checkpoint))
    except InputError:
        return None
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10] if files else None
