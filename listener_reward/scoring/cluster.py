"""Scoring by Ray Data: the judge in many workers, on this machine or a cluster, and the rows in order here.

Each worker loads the judge and reads the data for itself, so that no picture travels. It is sent the numbers of the
pairs to score, and answers with their rows. Whoever started the run keeps them, exactly as without Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from typing import Any

from listener_reward.clusters import connected
from listener_reward.errors import InputError
from listener_reward.scoring.pairs import Asked, Source, score_batch
from listener_reward.scoring.table import table_of
from listener_reward.verdict import PairJudge


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where Ray is, and how many judges it runs. Data and judge have the same names on every machine."""

    workers: int = 1
    gpus_per_worker: float = 0.0
    """GPUs of each worker, fractions allowed. 0 runs the judge on the CPU."""
    address: str | None = None
    """A cluster's address, such as "auto" or "ray://head:10001"; None starts Ray on this machine."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.gpus_per_worker < 0:
            raise InputError(
                f"workers and gpus_per_worker are {self.workers} and {self.gpus_per_worker}; give at least 1 and 0"
            )

    def scored(
        self, load: Callable[[], PairJudge], source: Source, first: int, total: int | None, batch_size: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Batches of rows, in the order of the data, of all pairs of the shard from the `first` on.

        Raises:
            InputError: the data is a stream of the Hub, whose length nobody knows, or no Ray is at the address.
            MissingExtraError: Ray is not installed.
        """
        if total is None:
            raise InputError(f"data is {source.data!r}, a stream of the Hub; download it, and give its files")
        ray = connected(self.address, "scoring on a cluster", include_dashboard=False).ray
        import_module("ray.data")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one already
        context.execution_options.preserve_order = True
        places = ray.data.range(total - first, override_num_blocks=max(1, -(-(total - first) // batch_size)))
        rows = places.map_batches(
            _Worker,
            fn_constructor_args=(load, source, first),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=self.workers),
            num_gpus=self.gpus_per_worker or None,
            num_cpus=0,  # workers that take every CPU would leave none to the task that hands out the numbers
        )
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield table.to_pylist()


class _Worker:
    """A judge in a process of Ray's, and its place in the data."""

    def __init__(self, load: Callable[[], PairJudge], source: Source, first: int):
        self._judge, self._source, self._first = load(), source, first
        self._at, self._coming = 0, source.pairs()

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        wanted = [self._first + int(place) for place in batch["id"]]
        return table_of(score_batch(self._judge, [self._pair(place) for place in wanted]))

    def _pair(self, place: int) -> Asked:
        """The shard's pair of that number. Work comes in order, so that the data is read on, and rarely anew."""
        if place < self._at:
            self._at, self._coming = 0, self._source.pairs()
        pair = next(islice(self._coming, place - self._at, None))
        self._at = place + 1
        return pair
