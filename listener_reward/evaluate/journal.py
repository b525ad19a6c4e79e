"""What a judge has said, kept in a file as it says it: an evaluation that is stopped goes on where it was.

What was said is found again by what was asked: prompt, both pictures' pixels, order. So nothing that was said of other
data is taken over, and each file says whose verdicts, or whose judgements, it holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from listener_reward.conclude import Judgement
from listener_reward.errors import InputError
from listener_reward.files import quoted, write_text
from listener_reward.media.images import identity
from listener_reward.pairs import PromptLike, check_questions, key_of
from listener_reward.trace import Trace
from listener_reward.verdict import PairJudge, Thought, Verdict

logger = logging.getLogger(__name__)

KEPT_DAYS = 30
"""After so long without a new verdict, `forget_old` removes a journal."""


class Journal:
    """A judge whose verdicts are kept in a file; it stands in the judge's place in `evaluate` and `calibrate`.

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

    @property
    def earlier(self) -> int:
        """How many verdicts an earlier run left."""
        return len(self._places)

    def __getattr__(self, name: str) -> Any:
        if name == "judge":  # a copy that is not made yet
            raise AttributeError(name)
        return getattr(self.judge, name)

    def compare_many(
        self, prompts: Sequence[PromptLike], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        """The verdicts, read back where they are known; contract and errors of the judge itself."""
        how = {"think": think}
        return self._said("verdict", self.judge.compare_many, (prompts, firsts, seconds), how)

    def judgements(
        self, prompts: Sequence[PromptLike], firsts: Sequence[Any], seconds: Sequence[Any], **how: Any
    ) -> list[list[Judgement]]:
        """The same for `Judge.judgements`, which `calibrate` asks for."""
        judge: Any = self.judge
        return self._said("judgements", judge.judgements, (prompts, firsts, seconds), how)

    def _said(self, kind: str, ask: Callable[..., list[Any]], asked: Any, how: Mapping[str, Any]) -> list[Any]:
        """What the judge says of each pair, in their order."""
        check_questions(*asked)
        keys = [_key(kind, prompt, first, second, how) for prompt, first, second in zip(*asked, strict=True)]
        known = self._read_back([key for key in keys if key in self._places])
        new = [place for place, key in enumerate(keys) if key not in self._places]
        if not new:
            return known
        said = ask(*([values[place] for place in new] for values in asked), **how)
        if len(said) != len(new):
            return said  # and who asked complains
        if kind != "verdict" or all(0 <= verdict.p_first <= 1 for verdict in said):
            self._write(kind, [keys[place] for place in new], said)
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

    def _read_back(self, keys: Sequence[str]) -> list[Any]:
        """What was said under these keys. Where another process has put an end to the file, nothing is known any
        more."""
        if not keys:
            return []
        said: list[Any] = []
        try:
            with self.path.open("rb") as file:
                for key in keys:
                    file.seek(self._places[key])
                    found, one = _read(file.readline())
                    if found != key:
                        raise KeyError(key)
                    said.append(one)
        except (OSError, ValueError, KeyError, TypeError):
            self._places.clear()
            return []
        self.said_before += len(said)
        return said

    def _write(self, kind: str, keys: Sequence[str], said: Sequence[Any]) -> None:
        """Appends whole lines. A disk that takes no more costs the journal, and not the evaluation."""
        if not self._keeps:
            return
        plain = [one.to_dict() if kind == "verdict" else [asdict(judgement) for judgement in one] for one in said]
        lines = [json.dumps({"pair": key, kind: one}, default=_plain) for key, one in zip(keys, plain, strict=True)]
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


def verdicts_in(path: Path) -> int:
    """How many verdicts a journal's file has."""
    return path.read_bytes().count(b'\n{"pair"') if path.exists() else 0


def forget_old(folder: Path) -> None:
    """Removes the journals in `folder` to which nothing was added for `KEPT_DAYS`."""
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - 86400 * KEPT_DAYS:
                path.unlink()


def _key(kind: str, prompt: PromptLike, first: Any, second: Any, how: Mapping[str, Any]) -> str:
    sides = [image.digest.hex() if hasattr(image, "digest") else identity(image) for image in (first, second)]
    return hashlib.sha256(
        json.dumps([kind, key_of(prompt), *sides, how], default=str, sort_keys=True).encode()
    ).hexdigest()


def _plain(value: Any) -> Any:
    """A number of NumPy's as one of Python's."""
    return value.item()


def _read(line: bytes) -> tuple[str, Any]:
    """A line's key and what was said. Raises `ValueError`, `KeyError` or `TypeError` for a line that is cut."""
    entry: Any = json.loads(line)
    if "judgements" in entry:
        return str(entry["pair"]), [_made(Judgement, one, trace=Trace(**one["trace"])) for one in entry["judgements"]]
    saved: Mapping[str, Any] = entry["verdict"]
    thoughts = tuple(_made(Thought, thought) for thought in saved["thoughts"])
    return str(entry["pair"]), _made(Verdict, saved, thoughts=thoughts, by_order=tuple(saved["by_order"]))


def _made(kind: type, saved: Mapping[str, Any], **changes: Any) -> Any:
    """A dataclass of exactly the fields that are saved: those of another version are judged anew."""
    if saved.keys() != {each.name for each in fields(kind)}:
        raise ValueError(f"no {kind.__name__} of this version")
    return kind(**{**saved, **changes})
