"""What has been scored so far: a folder of parts beside the file that they will become.

A part is written beside its place and moved into it, so that a kill at any moment leaves whole parts of consecutive
pairs, and no pair twice. The folder also has what the run was asked, and a lock.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from listener_reward.errors import InputError
from listener_reward.files import quoted, write_text
from listener_reward.scoring.table import join_tables, settings_of, write_table

_PART = re.compile(r"(\d{10})-(\d{10})\.parquet")
"""A part's name: its first pair, and the one after its last, counted within the shard."""


@dataclass
class Parts:
    """The parts of one output file.

    Raises:
        InputError: what is there already was made by other settings; the message names the first that differs.
    """

    out: Path
    settings: Mapping[str, Any]
    done: int = 0
    """Pairs of the shard that are in parts."""

    def __post_init__(self) -> None:
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self._asked = self.folder / "settings.json"

    @contextmanager
    def opened(self, *, fresh: bool) -> Iterator[bool]:
        """Takes over what is there, or throws it away; yields whether the file is whole already.

        Raises:
            InputError: other settings, no whole file of `score` in the place of `out`, or another process at work.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"out is {quoted(self.out)}, which another process is writing; give another name"
            ) from error
        try:
            if fresh:
                self._clear()
            whole = self._is_whole()
            if not whole:
                self._take_over()
            yield whole
        finally:
            lock.release()
        if self.out.exists() and self._is_whole():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _clear(self) -> None:
        for path in [*self._paths(), self._asked, self.out]:
            path.unlink(missing_ok=True)

    def _is_whole(self) -> bool:
        if not self.out.exists():
            return False
        settings = settings_of(self.out)
        if settings is None:
            raise InputError(f"out is {quoted(self.out)}, which exists and is no file of score; give another name")
        self._refuse_others(settings)
        self.done = pq.read_metadata(self.out).num_rows
        return True

    def _take_over(self) -> None:
        if self._asked.exists():
            self._refuse_others(json.loads(self._asked.read_text(encoding="utf-8")))
        else:
            write_text(self._asked, json.dumps(self.settings, indent=2) + "\n")
        for start, end in map(_span, self._paths()):
            if start != self.done:
                raise InputError(
                    f"{quoted(self.folder)} lacks the part that starts at pair {self.done}; put it back, or score anew "
                    "by --fresh"
                )
            self.done = end

    def _refuse_others(self, before: Mapping[str, Any]) -> None:
        for name in dict.fromkeys((*self.settings, *before)):
            if (was := before.get(name)) != (now := _plain(self.settings.get(name))):
                raise InputError(
                    f"{name} is {now!r}, and {quoted(self.out)} was begun with {was!r}; give another --out, or score "
                    "anew by --fresh"
                )

    def _paths(self) -> list[Path]:
        """In the order of their pairs: the names are of one length."""
        return sorted(path for path in self.folder.iterdir() if _PART.fullmatch(path.name))

    def asked(self) -> Iterator[tuple[str, str]]:
        """Id and prompt of every pair that is done, for a check against the data."""
        for path in self._paths():
            columns = pq.read_table(path, columns=["id", "prompt"])
            yield from zip(columns["id"].to_pylist(), columns["prompt"].to_pylist(), strict=True)

    def failures(self) -> int:
        """How many of the pairs that are done have no verdict."""
        paths = [self.out] if self.out.exists() else self._paths()
        columns = (pq.read_table(path, columns=["error"])["error"] for path in paths)
        return sum(len(column) - column.null_count for column in columns)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the rows of the next pairs."""
        end = self.done + len(rows)
        write_table(rows, self.folder / f"{self.done:010}-{end:010}.parquet")
        self.done = end

    def join(self) -> None:
        """Makes the file; the folder goes when it is closed."""
        join_tables(self._paths(), self.out, self.settings)


def _span(path: Path) -> tuple[int, int]:
    start, end = path.stem.split("-")
    return int(start), int(end)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
