"""Files that are whole or not there, written beside their place and moved into it at once; and names in messages.

A kill, a full disk or a second writer leaves the file that was there before, or one whole new one, and never a part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def quoted(name: str | os.PathLike[str]) -> str:
    """A name of a file, a folder or a checkpoint as messages show it: in quotes, and of bounded length."""
    text = str(name)
    return repr(text if len(text) <= 200 else text[:197] + "...")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, with the line ends that it has.

    Raises:
        OSError: the file cannot be written; what was there before is as it was.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data`; errors as in `write_text`."""
    replace_file(path, lambda beside: beside.write_bytes(data))


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Has `write` make a file beside `path`, and puts it in the place of `path` once it is on the disk.

    The new file has the access rights of the old one. A link stays a link, to a new file; what is no file at all, such
    as `/dev/stdout`, is written to.

    Raises:
        OSError: the file cannot be written; what was there before is as it was.
    """
    place = Path(os.path.realpath(path))
    rights = stat.S_IMODE(place.stat().st_mode) if place.is_file() else None
    if rights is None and place.exists():
        write(place)
        return
    beside = place.with_name(f".{place.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        if rights is not None:
            os.chmod(beside, rights)
        os.replace(beside, place)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    _sync_folder(place.parent)


@contextlib.contextmanager
def folder_made_whole(place: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `place`, whose files are put into `place` once the body has ended well, and else removed.

    Files of the same names in `place` are replaced, one after another; other files stay.

    Raises:
        OSError: the disk is full, with `place` as its file name; else what the body raises.
    """
    place = Path(os.path.realpath(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}")
    beside.mkdir()
    try:
        yield beside
        if place.exists():
            for path in list(beside.iterdir()):
                os.replace(path, place / path.name)
        else:
            os.replace(beside, place)
    except Exception as error:
        if (number := disk_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _sync_folder(place.parent)


def disk_error(error: BaseException | None) -> int | None:
    """The system's number for a disk that takes no more, found in an error or its causes; None for other errors.

    safetensors and `shutil.copytree` have it in their text alone, and `torch.save` drops it.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := _NUMBER.search(str(error))):
            number = int(found[1] or found[2])
        elif isinstance(error, RuntimeError) and _TORCH.search(str(error)):
            number = errno.ENOSPC
        if number in _DISK:
            return number
        error = error.__cause__ or error.__context__
    return None


_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_TORCH = re.compile(r"iostream error|unexpected pos|PytorchStreamWriter failed")
"""What `torch.save` says when its file cannot grow."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def _sync_folder(folder: Path) -> None:
    """Makes the new name as lasting as the content, where a folder can be opened for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
