"""Scores every pair of a data set, however many there are, and goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from listener_reward.errors import InputError, JudgeError
from listener_reward.files import quoted
from listener_reward.progress import progress_bars
from listener_reward.scoring.cluster import Cluster
from listener_reward.scoring.pairs import Asked, Source, score_batch
from listener_reward.scoring.parts import Parts
from listener_reward.verdict import PairJudge

PART_PAIRS = 1024
"""Pairs in a part, at most."""

PART_SECONDS = 60.0
"""A part is written after this time, however few pairs it has: what a kill costs at most, and the batch under way."""

MAX_FAILED = 0.2
"""Above this fraction of pairs without a verdict the run stops: it is the data or the judge, and no single pair."""

_FEW = 100
"""Pairs before whose end a fraction of failures says little."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What a run did."""

    out: Path
    pairs: int
    """Rows of the file."""
    resumed: int
    """Those that an earlier run had scored."""
    failed: int
    """Those without a verdict; the column `error` says why."""
    left_out: int
    """Rows of the data whose publisher marks them as no pair; 0 where the file was whole already."""
    seconds: float
    """Wall-clock time of this run."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"out": str(self.out)}


def score_pairs(
    judge: PairJudge | Callable[[], PairJudge],
    data: str,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 64,
    max_failed: float = MAX_FAILED,
    fresh: bool = False,
    cluster: Cluster | None = None,
    progress: bool = True,
) -> Scored:
    """Writes a judge's verdict on every pair of `data` to the Parquet file `out`; see `scoring.table` for its columns.

    Pairs need no label. Each is judged in the data's own order of images. Memory does not grow with the data. What is
    scored lies in the folder `out` + ".parts" until the file is whole: after a kill the same call goes on there, and no
    pair is judged twice or left out. A call whose file is whole already does nothing.

    A pair on which the judge breaks, or whose image cannot be read, has a row without p_first and with an `error`.

    Args:
        judge: the judge, or what loads it, such as `partial(Judge.from_pretrained, "tiny")`. On a cluster each worker
            loads it, and else it is loaded here; `settings` then has to name it as "judge".
        data: what `datasets.load_pairs` reads. The generic schema may be without labels.
        out: a name that ends in .parquet. With a shard, "-00003-of-00016" is put before the ending.
        settings: what else, beside the arguments here and the judge's name, makes the verdicts: a file begun with other
            settings is not gone on with.
        limit: score the first `limit` pairs only; for the tiny world, how many to draw.
        seed: of the tiny world's pairs.
        columns: as for `load_pairs`.
        shard: (i, n) with 0 <= i < n: every n-th pair, from the i-th on.
        batch_size: pairs for each call of the judge.
        max_failed: stop where more than this fraction of the first hundred pairs or more has no verdict.
        fresh: throw away what an earlier run left, the whole file as well.
        cluster: score in Ray's workers; the file is the same.
        progress: show a progress bar on standard error.

    Raises:
        InputError: the data or an argument cannot be used; what is there was begun with other settings, or of other
            data; or another process is writing `out`.
        JudgeError: more than `max_failed` of the pairs have no verdict.
        FormatError: the judge is strict, and its answers are not in its format.
    """
    path = _named(Path(out), shard)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; give at least 1, or None for all pairs")
    if not 0 <= max_failed <= 1:
        raise InputError(f"max_failed is {max_failed}; give a fraction of pairs from 0 to 1")
    named = {} if callable(judge) else {"judge": judge.name}
    asked: dict[str, Any] = {**named, "data": data, "limit": limit, "seed": seed}
    asked |= {"columns": dict(columns or {}), "shard": list(shard)} | dict(settings or {})
    if "judge" not in asked:
        raise InputError("settings is without judge; name the judge that is to be loaded")
    source = Source(data, limit, seed, dict(columns or {}), shard)
    source.check()
    started = time.perf_counter()

    parts = Parts(path, asked)
    with parts.opened(fresh=fresh) as whole, progress_bars(visible=progress) as bars:
        resumed, failed = parts.done, parts.failures()
        if whole:
            return Scored(path, resumed, resumed, failed, 0, 0.0)
        if (total := source.count()) == 0:
            raise InputError(f"{data} has no pair for shard {shard[0]}/{shard[1]}; give data with at least one")
        coming = source.pairs()
        _check_same(coming, parts, data)
        if cluster is None:
            scored = _here(judge() if callable(judge) else judge, coming, batch_size)
        else:
            load = judge if callable(judge) else partial(_itself, judge)
            scored = cluster.scored(load, source, resumed, total, batch_size)
        task = bars.add_task("scoring", total=total, completed=resumed)
        rows: list[dict[str, Any]] = []
        written = time.perf_counter()
        try:
            for new in scored:
                rows += new
                failed += sum(row["error"] is not None for row in new)
                bars.update(task, advance=len(new), note=f"{failed} without a verdict" if failed else "")
                if failed > max_failed * max(parts.done + len(rows), _FEW):
                    error = _too_many(failed, parts.done + len(rows), rows)
                    rows = []  # so that the next run asks these pairs again
                    raise error
                if len(rows) + batch_size > PART_PAIRS or time.perf_counter() - written > PART_SECONDS:
                    parts.add(rows)
                    rows, written = [], time.perf_counter()
        finally:
            if rows:  # a Ctrl-C, or a judge that broke, costs nothing that was judged
                parts.add(rows)
        parts.join()
    return Scored(path, parts.done, resumed, failed, source.left_out, time.perf_counter() - started)


def _itself(judge: PairJudge) -> PairJudge:
    return judge


def _here(judge: PairJudge, coming: Iterator[Asked], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(coming, batch_size)):
        yield score_batch(judge, batch)


def _check_same(coming: Iterator[Asked], parts: Parts, data: str) -> None:
    """Passes over the pairs that are done, each of which has to be what the data has in that place."""
    for name, prompt in parts.asked():
        one = next(coming, None)
        if one is None or (name, prompt) != (one.id, one.prompt):
            has = "no more pairs" if one is None else f"the pair {quoted(one.id)} at {one.index}"
            raise InputError(
                f"{data} has {has}, where {quoted(name)} was scored before: the data has changed since. Score anew by "
                "--fresh"
            )


def _named(out: Path, shard: tuple[int, int]) -> Path:
    part, of = shard
    if of < 1 or not 0 <= part < of:
        raise InputError(f"shard is {part}/{of}; give i/n with i from 0 to n - 1")
    if out.suffix != ".parquet":
        raise InputError(f"out is {quoted(out)}; give a name that ends in .parquet")
    if out.is_dir():
        raise InputError(f"out is {quoted(out)}, which is a folder; give the name of a file")
    return out if of == 1 else out.with_name(f"{out.stem}-{part:05}-of-{of:05}.parquet")


def _too_many(failed: int, n: int, rows: Sequence[Mapping[str, Any]]) -> JudgeError:
    latest = next((row["error"] for row in reversed(rows) if row["error"]), "see the column error")
    return JudgeError(
        f"{failed} of {n} pairs have no verdict; the latest: {latest}. The rest is not scored: mend the data or the "
        "judge, or allow more by --max-failed"
    )
