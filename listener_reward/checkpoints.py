"""Which checkpoints of a run are whole, by what is cheap to look at, and what is said where one cannot be written.

No tensor is read. A safetensors file states its own length, PyTorch's files are zip archives whose table stands at the
end, and JSON is parsed: a file that was cut, emptied or overwritten is found at once. Other bytes of the same length
within a tensor are not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from listener_reward.files import disk_error

UNREAD = ("training_args.bin",)
"""Files that no resume reads."""


def fault_of(folder: Path, required: tuple[str, ...] = ()) -> str | None:
    """What keeps a checkpoint from being read, as "FILE is ...": None for a whole one.

    Args:
        folder: the checkpoint.
        required: names of files that it has to have.
    """
    for name in required:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNREAD):
        if fault := _fault_of_file(file):
            return f"{file.relative_to(folder)} is {fault}"
    return None


def newest_whole(
    found: Mapping[int, Path], fault: Callable[[Path], str | None], tell: Callable[[str], Any] | None = None
) -> Path | None:
    """The whole checkpoint of the highest number; None without one.

    Args:
        found: number to folder.
        fault: what is wrong with a checkpoint; None for a whole one.
        tell: called with one line for each newer checkpoint that is passed over.
    """
    for number in sorted(found, reverse=True):
        reason = fault(found[number])
        if reason is None:
            return found[number]
        if tell is not None:
            tell(f"{found[number]} is passed over: {reason}")
    return None


@contextlib.contextmanager
def saving(place: Path, last: Callable[[], Path | None], remove: Path | None = None) -> Iterator[None]:
    """Where the disk has no room for what the body writes, says so in one line, with the last whole checkpoint.

    Args:
        place: the folder that is written to, as the message names it.
        last: gives the last whole checkpoint.
        remove: a folder that is then incomplete, and is removed.

    Raises:
        OSError: the disk is full or cannot be written; the text is one line. Anything else that the body raises is
            raised as it is, and what it wrote is left.
    """
    try:
        yield
    except Exception as error:
        number = disk_error(error)
        if number is None:
            raise
        if remove is not None:
            shutil.rmtree(remove, ignore_errors=True)
        reason = "no space left" if number == errno.ENOSPC else os.strerror(number).lower()
        before = last()
        kept = "there is no whole checkpoint" if before is None else f"the last whole checkpoint is {before}"
        raise OSError(number, f"{reason} in {place}; {kept}") from error


def _fault_of_file(file: Path) -> str | None:
    """What is wrong with the file, in words that can follow "is"; None for a sound one, or one of another kind."""
    try:
        match file.suffix:
            case ".json":
                if not isinstance(json.loads(file.read_bytes()), dict | list):
                    return "damaged"
            case ".safetensors":
                return _fault_of_tensors(file)
            case ".pt" | ".pth" | ".bin":
                with zipfile.ZipFile(file):
                    return None
            case ".distcp" | ".metadata":
                return None if file.stat().st_size else "empty"
            case _:
                return None
    except OSError as error:
        return f"not readable ({error.strerror})"
    except (ValueError, RecursionError, zipfile.BadZipFile):
        return "cut short or damaged" if file.stat().st_size else "empty"
    return None


def _fault_of_tensors(file: Path) -> str | None:
    """As `_fault_of_file`. Eight bytes are the length of a JSON header, which says where each tensor ends."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 + length or length == 0:
            return "cut short or damaged" if size else "empty"
        header: Any = json.loads(opened.read(length))
    try:
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (AttributeError, KeyError, IndexError, TypeError):
        return "damaged: its header names no tensors"
    return None if size == whole else f"cut short or damaged: {size} bytes where its header says {whole}"
