"""What a judge has said, kept in a file as it says it: an evaluation that is stopped goes on where it was.

A verdict is found again by what was asked: prompt, both pictures' pixels, order. So verdicts on other data are never
taken for these, and each file says whose verdicts it holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from listener_reward.errors import InputError
from listener_reward.files import quoted, write_text
from listener_reward.media.images import identity
from listener_reward.pairs import check_questions
from listener_reward.verdict import PairJudge, Thought, Verdict

logger = logging.getLogger(__name__)

KEPT_DAYS = 30
"""After so long without a new verdict, `forget_old` removes a journal."""


class Journal:
    """A judge whose verdicts are kept in a file; it stands in the judge's place, such as in `evaluate`.

    Each batch of verdicts is on the disk before the next one is judged, so a kill loses one batch at the most. Only
    what an earlier run left is read back, and as a verdict depends on its pair alone, the results are those of a run
    that was never stopped.
    """

    def __init__(self, judge: PairJudge, path: str | Path, *, about: Any = None, fresh: bool = False):
        """
        Args:
            judge: what judges the pairs that the file does not have.
            path: the file, made if need be.
            about: what else verdicts depend on, such as the judge's settings; JSON-able.
            fresh: begin the file anew.

        Raises:
            InputError: the file is of another judge or other settings, or no journal.
            OSError: it cannot be read or written.
        """
        self.judge, self.path = judge, Path(path)
        self.name = judge.name
        self.said_before = self.said_now = 0
        """Verdicts that were read back, and new ones in the file."""
        head = json.dumps({"journal": 1, "judge": judge.name, "about": about}, default=str, sort_keys=True)
        self._places: dict[str, int] = {}
        if fresh or not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, head + "\n")
        else:
            self._find_places(head)
        self._keeps = True

    def __len__(self) -> int:
        """How many verdicts an earlier run left."""
        return len(self._places)

    def compare_many(
        self, prompts: Sequence[str], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        """The verdicts, read back where they are known; contract and errors of the judge itself."""
        check_questions(prompts, firsts, seconds)
        keys = [_key(*asked, think) for asked in zip(prompts, firsts, seconds, strict=True)]
        new = [place for place, key in enumerate(keys) if key not in self._places]
        known = self._read_back([key for key in keys if key in self._places])
        if not new:
            return known
        asked = ([values[place] for place in new] for values in (prompts, firsts, seconds))
        said = self.judge.compare_many(*asked, think=think)
        if len(said) != len(new):
            return said  # and who asked complains
        if all(0 <= verdict.p_first <= 1 for verdict in said):
            self._write([keys[place] for place in new], said)
        fresh, old = iter(said), iter(known)
        return [next(old if key in self._places else fresh) for key in keys]

    def remove(self) -> None:
        """Removes the file: nothing is left to go on with."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _find_places(self, head: str) -> None:
        """Where in the file each verdict is. What a kill cut short is passed over."""
        with self.path.open("rb") as file:
            found = file.readline().decode("utf-8", "replace").rstrip("\n")
            if found != head:
                raise InputError(
                    f"the journal {quoted(self.path)} is of another judge, of one with other settings, or no journal; "
                    "give another file, or fresh=True to begin it anew"
                )
            place = file.tell()
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._places[_read(line)[0]] = place
                place += len(line)

    def _read_back(self, keys: Sequence[str]) -> list[Verdict]:
        if not keys:
            return []
        with self.path.open("rb") as file:
            verdicts: list[Verdict] = []
            for key in keys:
                file.seek(self._places[key])
                verdicts.append(_read(file.readline())[1])
        self.said_before += len(verdicts)
        return verdicts

    def _write(self, keys: Sequence[str], verdicts: Sequence[Verdict]) -> None:
        """Appends whole lines. A disk that takes no more costs the journal, and not the evaluation."""
        if not self._keeps:
            return
        lines = [
            json.dumps({"pair": key, "verdict": verdict.to_dict()}, default=_plain)
            for key, verdict in zip(keys, verdicts, strict=True)
        ]
        try:
            with self.path.open("ab") as file:
                # An empty line first, for what a kill cut short has no end.
                file.write(("\n" + "\n".join(lines) + "\n").encode())
                file.flush()
                self.said_now += len(lines)
                os.fsync(file.fileno())
        except OSError as error:
            self._keeps = False
            logger.warning("verdicts are no longer kept for a later run: %s", error)


def forget_old(folder: Path) -> None:
    """Removes the journals in `folder` to which nothing was added for `KEPT_DAYS`."""
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - 86400 * KEPT_DAYS:
                path.unlink()


def _key(prompt: str, first: Any, second: Any, think: bool | None) -> str:
    sides = [image.digest.hex() if hasattr(image, "digest") else identity(image) for image in (first, second)]
    return hashlib.sha256(json.dumps([prompt, *sides, think], default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A number of NumPy's as one of Python's."""
    return value.item()


def _read(line: bytes) -> tuple[str, Verdict]:
    """A line's key and verdict. Raises `ValueError`, `KeyError` or `TypeError` for one that is cut or no verdict."""
    entry: Any = json.loads(line)
    saved: Mapping[str, Any] = entry["verdict"]
    if saved.keys() != {field.name for field in fields(Verdict)}:
        raise ValueError("a verdict of another version")
    thoughts = tuple(Thought(**thought) for thought in saved["thoughts"])
    verdict = Verdict(**{**saved, "thoughts": thoughts, "by_order": tuple(saved["by_order"])})
    return str(entry["pair"]), verdict
