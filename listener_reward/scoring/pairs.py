"""The pairs that are to be scored, read as they come, and the rows of a batch of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from listener_reward.datasets.format import Labelled, Skipped, Unlabelled
from listener_reward.datasets.load import Opened, open_pairs
from listener_reward.datasets.rows import Files
from listener_reward.datasets.tiny import TINY_PAIRS
from listener_reward.errors import FormatError, InputError, JudgeError, UnreachableError
from listener_reward.evaluate.batches import Batch, load_batches
from listener_reward.scoring.table import row_of
from listener_reward.verdict import PairJudge, Verdict, checked


@dataclass(frozen=True, slots=True)
class Asked:
    """A pair on its way to the judge."""

    index: int
    id: str
    prompt: str
    images: list[Any]
    sources: list[Any]
    criterion: str | None
    label: float | None

    @property
    def known(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("index", "id", "prompt", "criterion", "label")}


@dataclass
class Source:
    """The pairs of a shard, read anew for every iteration. It pickles, and another process reads for itself."""

    data: str
    limit: int | None
    seed: int
    columns: Mapping[str, str]
    shard: tuple[int, int]
    left_out: int = field(default=0, init=False)
    """Rows of the data that are no pairs, as far as the latest iteration has come."""

    @cached_property
    def _opened(self) -> Opened:
        options: dict[str, Any] = {"limit": self.limit, "seed": self.seed, "columns": self.columns}
        return open_pairs(self.data, stream=True, labelled=False, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def check(self) -> None:
        """Opens the data.

        Raises:
            InputError: nothing is there, or it cannot be read.
        """
        _ = self._opened

    def pairs(self) -> Iterator[Asked]:
        """The shard's pairs, from the first on."""
        part, of = self.shard
        found = self.left_out = 0
        for one in self._opened.pairs():
            if isinstance(one, Skipped):
                self.left_out += 1
            elif found == self.limit:
                return
            else:
                if found % of == part:
                    pair, label = (one.pair, one.pair.p_first) if isinstance(one, Labelled) else (one, None)
                    images, sources = [pair.first, pair.second], list(pair.sources)
                    yield Asked(found, pair.id, pair.prompt, images, sources, pair.criterion, label)
                found += 1

    def count(self) -> int | None:
        """How many pairs the shard has, by reading local files once; None for a stream of the Hub."""
        if self._opened.tiny is not None:  # drawn, not read
            pairs = self.limit or TINY_PAIRS
        elif not isinstance(self._opened.source, Files):
            return None
        else:
            given = (one for one in self._opened.pairs() if isinstance(one, (Labelled, Unlabelled)))
            pairs = sum(1 for _ in islice(given, self.limit))
        return len(range(self.shard[0], pairs, self.shard[1]))


def score_batch(judge: PairJudge, batch: Sequence[Asked]) -> list[dict[str, Any]]:
    """A row for each pair. A batch that fails is halved until the failing pairs stand alone: one costs no other."""
    started = time.perf_counter()
    columns = ("images", "prompt", "sources", "criterion")
    rows: dict[str, list[Any]] = {name: [getattr(one, name) for one in batch] for name in columns}
    try:
        verdicts = [verdict for part in load_batches([rows]) for verdict in _judged(judge, part)]
    except FormatError:  # every pair would fail
        raise
    except (InputError, JudgeError) as error:
        if len(batch) == 1 or isinstance(error, UnreachableError):
            seconds = (time.perf_counter() - started) / len(batch)
            return [row_of(None, f"{type(error).__name__}: {error}", seconds=seconds, **one.known) for one in batch]
        half = len(batch) // 2
        return score_batch(judge, batch[:half]) + score_batch(judge, batch[half:])
    seconds = (time.perf_counter() - started) / len(batch)
    return [row_of(verdict, None, seconds=seconds, **one.known) for one, verdict in zip(batch, verdicts, strict=True)]


def _judged(judge: PairJudge, part: Batch) -> list[Verdict]:
    firsts, seconds = map(list, zip(*part["images"], strict=True))
    return checked(judge.compare_many(part["asked"], firsts, seconds), part["asked"], judge.name)
