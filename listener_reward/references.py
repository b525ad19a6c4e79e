"""Where the first images of prompts are kept, and given ones are read.

The scheme `reference` compares every image of a prompt with the same one, the scheme `anchors` with the same few.
`ReferenceFile` and `AnchorFile` keep those images on disk: memory does not grow with the prompts, a restart goes on
with the same scale, and processes of one machine share them.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, ClassVar

from listener_reward.errors import InputError, JudgeError
from listener_reward.media.clips import Clip, Visual
from listener_reward.media.images import png_of, to_picture
from listener_reward.media.storyboards import to_visual

Kept = bytes | dict[str, Any]
"""A picture as the bytes of a PNG; a clip as `{"frames": such bytes, "seconds": times}`."""


_INHERITED: list[sqlite3.Connection] = []
"""Connections of a parent process. Closing one here could undo what the parent is in the middle of writing."""


def packed(visual: Visual) -> Kept:
    """`visual` in a tenth of the memory of its pixels."""
    if isinstance(visual, Clip):
        seconds = None if visual.seconds is None else list(visual.seconds)
        return {"frames": [packed(frame) for frame in visual.frames], "seconds": seconds}
    return png_of(visual.image)


def unpacked(kept: Kept) -> Visual:
    if isinstance(kept, bytes):
        return to_visual(kept)
    seconds = None if kept["seconds"] is None else tuple(kept["seconds"])
    return Clip(tuple(to_picture(frame) for frame in kept["frames"]), seconds)


def is_kept(kept: Any) -> bool:
    return isinstance(kept, bytes) or (
        isinstance(kept, dict)
        and set(kept) == {"frames", "seconds"}
        and all(isinstance(frame, bytes) for frame in kept["frames"])
    )


def size(kept: Kept) -> int:
    """In bytes."""
    return len(kept) if isinstance(kept, bytes) else sum(map(len, kept["frames"]))


def read_references(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The image file of each prompt, from a JSON file `{"prompt": "image.png", ...}`, relative to its folder.

    Raises:
        InputError: the file cannot be read, is of another form, or names an image that is not there.
    """
    path = Path(path)
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"reference {path} cannot be read as JSON ({error}); give {{prompt: image file}}") from error
    if not isinstance(named, dict) or not all(isinstance(image, str) for image in named.values()):
        raise InputError(f"reference {path} is no object of texts; give {{prompt: image file}}")
    found = {prompt: path.parent / image for prompt, image in named.items()}
    check_there("reference", path, found.values())
    return found


def check_there(field: str, path: Path, files: Iterable[Path]) -> None:
    """Raises `InputError` for files that `path`, given as `field`, names and that are not there."""
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{field} {path} names {len(missing)} files that are not there, such as {missing[0]}")


class ReferenceFile(MutableMapping[str, Any]):
    """A dict of prompts and kept images that lives in one SQLite file. Threads and processes may share it.

    Every change is whole or absent, whenever the process is killed. Where two processes keep an image of the same
    prompt at once, the first one stays. SQLite needs a disk of the same machine: no network file system.
    """

    TABLE: ClassVar[str] = "references"

    def __init__(self, path: str | os.PathLike[str]):
        """
        Args:
            path: a file, made where it is missing; "" is a temporary one, gone with the process.

        Raises:
            InputError: the file cannot be opened, or is no file of references.
        """
        self.path = os.fspath(path)
        self._connection: sqlite3.Connection | None = None
        self._owner = 0  # the process that connected: SQLite's connections must not cross a fork
        self._lock = threading.RLock()
        try:
            with self._lock:
                self._connect()
        except sqlite3.Error as error:
            raise InputError(f"state {self.path} cannot be opened ({error}); give a file of your own") from error

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None or self._owner != os.getpid():
            connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            columns = "prompt TEXT PRIMARY KEY, image BLOB NOT NULL"
            connection.execute(f'CREATE TABLE IF NOT EXISTS "{self.TABLE}" ({columns})')
            connection.commit()
            if self._connection is not None:
                _INHERITED.append(self._connection)
            self._connection, self._owner = connection, os.getpid()
        return self._connection

    def after_fork(self) -> None:
        """For the child of a fork: the thread that may have held the lock was not copied."""
        self._lock = threading.RLock()

    def _run(self, statement: str, *rows: tuple) -> list[tuple]:
        """The statement with each of `rows`, in one transaction."""
        try:
            with self._lock, self._connect() as connection:
                if len(rows) > 1:
                    connection.executemany(statement, rows)
                    return []
                return connection.execute(statement, *rows).fetchall()
        except sqlite3.Error as error:
            raise JudgeError(f"{self.TABLE} cannot be kept in {self.path or 'a temporary file'}: {error}") from error

    def __getitem__(self, prompt: str) -> Any:
        found = self._run(f'SELECT image FROM "{self.TABLE}" WHERE prompt = ?', (prompt,))
        if not found:
            raise KeyError(prompt)
        return self._decoded(found[0][0])

    def __setitem__(self, prompt: str, kept: Any) -> None:
        self.keep({prompt: kept})

    def keep(self, images: Mapping[str, Any]) -> None:
        """Adds those whose prompts have none."""
        if images:
            rows = [(prompt, self._encoded(kept)) for prompt, kept in images.items()]
            self._run(f'INSERT OR IGNORE INTO "{self.TABLE}" VALUES (?, ?)', *rows)

    def __delitem__(self, prompt: str) -> None:
        if prompt not in self:
            raise KeyError(prompt)
        self._run(f'DELETE FROM "{self.TABLE}" WHERE prompt = ?', (prompt,))

    def clear(self) -> None:
        self._run(f'DELETE FROM "{self.TABLE}"')

    def __contains__(self, prompt: object) -> bool:
        return bool(self._run(f'SELECT 1 FROM "{self.TABLE}" WHERE prompt = ?', (prompt,)))

    def __iter__(self) -> Iterator[str]:
        return iter([prompt for (prompt,) in self._run(f'SELECT prompt FROM "{self.TABLE}" ORDER BY rowid')])

    def __len__(self) -> int:
        return self._run(f'SELECT count(*) FROM "{self.TABLE}"')[0][0]

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.__init__(path)

    @staticmethod
    def _encoded(kept: Any) -> bytes:
        """A picture's PNG as it is; a clip as JSON, which begins with another byte."""
        return kept if isinstance(kept, bytes) else json.dumps(_texts(kept)).encode()

    @staticmethod
    def _decoded(data: bytes) -> Any:
        return data if not data.startswith(b"{") else _bytes(json.loads(data))


class AnchorFile(ReferenceFile):
    """The same for the anchors of prompts, as `Anchors.to_dict` has them."""

    TABLE = "anchors"

    @staticmethod
    def _encoded(kept: Any) -> bytes:
        return json.dumps(kept | {"images": [_texts(image) for image in kept["images"]]}).encode()

    @staticmethod
    def _decoded(data: bytes) -> Any:
        kept = json.loads(data)
        return kept | {"images": [_bytes(image) for image in kept["images"]]}


def _texts(kept: Kept) -> Any:
    """As JSON can hold it."""
    if isinstance(kept, bytes):
        return base64.b64encode(kept).decode()
    return kept | {"frames": [_texts(frame) for frame in kept["frames"]]}


def _bytes(saved: Any) -> Kept:
    """What `_texts` was given."""
    if isinstance(saved, str):
        return base64.b64decode(saved)
    return saved | {"frames": [_bytes(frame) for frame in saved["frames"]]}
