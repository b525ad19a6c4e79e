"""Where `eval` and `calibrate` keep what their judges have said until they are done: a file for each judge and
question."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from listener_reward import __version__
from listener_reward.cli.options import JudgeOptions, load_rater, making_verdicts
from listener_reward.cli.terminal import plain, stderr

if TYPE_CHECKING:
    from listener_reward.verdict import PairJudge


class Journals(contextlib.AbstractContextManager[None]):
    """The journals of one command; as a context, says after Ctrl-C what is kept."""

    def __init__(
        self,
        options: JudgeOptions,
        asked: Mapping[str, Any],
        *,
        fresh: bool,
        loads: Callable[..., Any] | None = None,
    ):
        """
        Args:
            options: how the judges are loaded.
            loads: the function that loads a judge; None for `load_rater`.
            asked: what else tells this evaluation from others.
            fresh: begin each journal anew.
        """
        self.options, self.asked, self.fresh = options, asked, fresh
        self.loads = loads or load_rater
        self.paths: list[Path] = []  # and no journals, for these hold their judges, and one is in memory at a time

    def load(self, name: str | None) -> PairJudge:
        """The judge of that name, with a journal; without one where no file can be written."""
        from listener_reward.evaluate.journal import Journal, forget_old

        judge = self.loads(name, **self.options)
        about = {
            "name": name,
            "options": making_verdicts(self.options),  # so that a run that lacked memory goes on with less
            "asked": self.asked,
            "files": {str(each): _state(each) for each in (*_checkpoints(name, judge), *self.options.values())},
            "versions": {"listener-reward": __version__} | {each: _version(each) for each in ("torch", "transformers")},
        }
        digest = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode()).hexdigest()
        folder = cache_folder() / "eval"
        try:
            forget_old(folder)
            journal = Journal(judge, folder / f"{digest[:32]}.jsonl", about=about, fresh=self.fresh)
        except OSError as error:
            _tell(f"verdicts are not kept for a later run: {error}")
            return judge
        self.paths.append(journal.path)
        if journal.earlier:
            _tell(f"{journal.earlier} verdicts of {judge.name} are taken over from a run that was stopped; see --fresh")
        return journal

    def remove(self) -> None:
        """Removes the journals: the work is done."""
        for path in self.paths:
            with contextlib.suppress(OSError):
                path.unlink()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt and self.paths:
            from listener_reward.evaluate.journal import verdicts_in

            kept = sum(map(verdicts_in, self.paths))
            _tell(f"stopped; {kept} verdicts are kept, and the same line goes on from there")


def cache_folder() -> Path:
    """Where this package keeps what it may lose: `LISTENER_REWARD_CACHE`, or a folder in the user's cache."""
    if given := os.environ.get("LISTENER_REWARD_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "listener-reward"


def _checkpoints(name: str | None, judge: Any) -> Iterable[str]:
    """The names of the checkpoints that a judge is made of."""
    from listener_reward.models.adapters import base_of
    from listener_reward.models.hub import resolve
    from listener_reward.reward import PAPER_CHECKPOINT

    own = PAPER_CHECKPOINT if name is None else name
    for each in (own, own.partition(":")[2], getattr(getattr(judge, "card", None), "listener", None)):
        if isinstance(each, str) and each:
            yield (folder := resolve(each))
            if os.path.isdir(folder) and (base := base_of(folder)):
                yield base


def _state(value: Any) -> Any:
    """What changes where the file, the folder's files, or the Hub's checkpoint of that name change; None for the
    rest."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        return None
    with contextlib.suppress(OSError, ValueError):
        path = Path(value)
        files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
        return [(each.name, (stat := each.stat()).st_size, stat.st_mtime_ns) for each in files]
    with contextlib.suppress(ImportError, ValueError):  # no name of the Hub's
        from huggingface_hub import try_to_load_from_cache

        return str(try_to_load_from_cache(str(value), "config.json"))  # whose path has the commit
    return None


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _tell(text: str) -> None:
    stderr().print(plain(text), markup=False, soft_wrap=True)
