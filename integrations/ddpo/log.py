"""Writes a DDPO run's files: a line of numbers for each epoch, grids of samples, and atomic checkpoints."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from listener_reward.checkpoints import fault_of, newest_whole, saving
from listener_reward.errors import InputError
from listener_reward.files import replace_file, write_text
from listener_reward.media.images import to_pil
from listener_reward.mixture import remembers

MAX_COLUMNS = 8

PIP_NAMES = {"comet_ml": "comet-ml"}
"""A tracker's name on PyPI, where it differs from accelerate's name."""


def check_trackers(log_with: Any) -> None:
    """Raises `InputError` for a tracker of accelerate's that is not installed; accelerate would log nothing, silently.

    Names that accelerate does not know, and trackers that are objects, are left to it.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    there = {str(each) for each in get_available_trackers()}
    for asked in log_with if isinstance(log_with, list | tuple) else [log_with]:
        name = str(asked) if isinstance(asked, str | LoggerType) else ""
        if name == "all" and not there:
            raise InputError("log_with is 'all', and no tracker is installed: pip install tensorboard, or give None")
        if name in LoggerType.list() and name != "all" and name not in there:
            raise InputError(
                f"log_with names {name!r}, which is not installed: pip install {PIP_NAMES.get(name, name)}; or leave "
                "it out, metrics.jsonl is written in any case"
            )


class RunLog:
    """`metrics.jsonl` and accelerate's trackers, written by the main process.

    Args:
        folder: the run's folder.
        accelerator: whose trackers are written to; they have been started.
        start: the epoch that the run goes on from. Lines of this and later epochs, left by a run that was cut short,
            are removed.
    """

    def __init__(self, folder: Path, accelerator: Any, start: int):
        self.folder, self.accelerator = folder, accelerator
        self.file = folder / "metrics.jsonl"
        self.history = [row for row in read_metrics(self.file) if row["epoch"] < start]
        if accelerator.is_main_process:
            write_text(self.file, "".join(map(_line, self.history)))

    def write(self, row: dict[str, Any]) -> None:
        """Adds an epoch; NaN becomes null in the file and is left out of the trackers."""
        self.history.append(row)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        numbers = {name: value for name, value in row.items() if value is not None and not np.isnan(value)}
        self.accelerator.log(numbers, step=row["epoch"])

    def draw(
        self, epoch: int, images: Sequence[torch.Tensor], sources: Sequence[Image.Image | None] | None = None
    ) -> None:
        """Keeps images (C, H, W), or the middle frames of videos (F, C, H, W), as one PNG, below their sources."""
        if not self.accelerator.is_main_process:
            return
        pictures = [to_pil(image if image.ndim == 3 else image[len(image) // 2]) for image in images]
        picture, cells = grid(pictures, sources or ()), in_cells(pictures)
        path = self.folder / "samples" / f"epoch-{epoch:05d}.png"
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda file: picture.save(file, "PNG"))
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.stack([np.asarray(p) for p in cells])}, step=epoch, **layout)


def grid(pictures: Sequence[Image.Image], sources: Sequence[Image.Image | None] = ()) -> Image.Image:
    """Pictures side by side, at most `MAX_COLUMNS` in a row, below a row of their sources where there are any."""
    columns, given = min(len(pictures), MAX_COLUMNS), any(source is not None for source in sources)
    cells = in_cells(pictures)
    width, height = cells[0].size
    rows = -(-len(cells) // columns) * (1 + given)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for k, cell in enumerate(cells):
        left, top = k % columns * width, k // columns * (1 + given) * height
        if given and (source := sources[k]) is not None:
            sheet.paste(ImageOps.contain(source, (width, height)), (left, top))
        sheet.paste(cell, (left, top + given * height))
    return sheet


def in_cells(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of one size: smaller ones get white to the right and below."""
    width, height = (max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    cells = [Image.new("RGB", (width, height), "white") for _ in pictures]
    for cell, picture in zip(cells, pictures, strict=True):
        cell.paste(picture, (0, 0))
    return cells


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a line that a kill cut short is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, epoch: int, write: Callable[[Path], None], keep: int) -> None:
    """Has `write` fill a new folder, moves it into place at once, and removes all but the newest `keep`.

    A run that is killed meanwhile leaves the older checkpoints and a folder that `checkpoints` does not list. Of what
    is there of later epochs, broken or given up, nothing counts.

    Raises:
        OSError: the disk is full; the message names the last whole checkpoint.
    """
    beside, place = folder / ".writing", folder / f"epoch-{epoch:05d}"
    with saving(folder, lambda: last_checkpoint(folder), remove=beside):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        write(beside)
        if place.exists():
            shutil.rmtree(place)
        os.replace(beside, place)
    for old in [path for number, path in checkpoints(folder).items() if number <= epoch][:-keep]:
        shutil.rmtree(old)


def check_state(reward: Any) -> None:
    """Raises `InputError` unless what a reward remembers can be saved and loaded again.

    Checkpoints are loaded as data only, so that no code in them can run. A state that pickles may therefore still be
    refused; the check comes before the first checkpoint is needed.
    """
    if not remembers(reward):
        return
    file = io.BytesIO()
    try:
        torch.save(reward.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # picklers raise what they like
        raise InputError(
            f"a checkpoint cannot keep the state_dict of the reward {type(reward).__name__}: make it of numbers, "
            f"strings, bytes, lists, dicts and tensors (torch.from_numpy(array) or array.tolist() for numpy). {error}"[
                :600
            ]
        ) from error


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints whose writing was finished, by their number of epochs, in rising order."""
    found = {path: re.fullmatch(r"epoch-(\d+)", path.name) for path in folder.glob("*")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def last_checkpoint(folder: Path, tell: Callable[[str], Any] | None = None) -> Path | None:
    """The newest of the `checkpoints` whose files are whole; `tell` gets one line for each that is passed over."""
    return newest_whole(checkpoints(folder), lambda found: fault_of(found, CHECKPOINT_FILES), tell)


CHECKPOINT_FILES = ("trained.safetensors", "state.pt")


def _line(row: dict[str, Any]) -> str:
    return json.dumps({k: None if v is None or np.isnan(v) else v for k, v in row.items()}) + "\n"
