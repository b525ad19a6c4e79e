"""Rows of local files and Hub data sets, one after another: no file is ever in memory as a whole."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import config
from datasets.exceptions import DatasetsError

from listener_reward.datasets.format import Place, Row
from listener_reward.errors import InputError
from listener_reward.files import quoted

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::((?:[\w.-]+/)?[\w.-]+))?")

BATCH = 64
"""Rows of a Parquet or Arrow file or Hub data set decoded at a time; each may hold two images of a megabyte."""

_CHUNK = 2**20
_LONGEST_ENTRY = 2**27
"""Characters of one entry of a JSON list, beyond which the list is taken to be broken."""

_SPACE = re.compile(r"[ \t\n\r]*")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")


@dataclass(frozen=True, slots=True)
class Files:
    """The rows of local files, read anew at every iteration."""

    paths: tuple[Path, ...]
    dimension: str | None = None

    def __iter__(self) -> Iterator[tuple[Place, Row]]:
        index = 0
        for path in self.paths:
            for row in read_file(path):
                yield Place(path.name, index, path.parent, self.dimension), row
                index += 1


@dataclass(frozen=True, slots=True)
class Hub:
    """The rows of one split of a Hub data set; images stay undecoded."""

    name: str
    data: datasets.Dataset | datasets.IterableDataset
    dimension: str | None = None

    def __iter__(self) -> Iterator[tuple[Place, Row]]:
        index = 0
        for table in self.data.with_format("arrow").iter(batch_size=BATCH):
            for row in table.to_pylist():  # pyright: ignore[reportAttributeAccessIssue] - arrow format gives tables
                yield Place(self.name, index, None, self.dimension), row
                index += 1


# ---------------------------------------------------------------- local files


def find_files(spec: str, wanted: tuple[str, ...] = ()) -> tuple[Path, ...]:
    """The files that a path, a pattern with `*`, or a folder means; in a folder, the first of `wanted` that is there,
    else its Parquet files, else the Arrow files that `save_to_disk` wrote.

    Raises:
        InputError: there is none, or a folder holds the shards of several splits.
    """
    path = Path(spec)
    if has_magic(spec) and not os.path.exists(path):
        found = tuple(Path(name) for name in sorted(glob(spec, recursive=True)))
        if not found:
            raise InputError(f"data is {quoted(spec)}, which no file matches; check the pattern")
        return found
    if not os.path.isdir(path):
        if not os.path.isfile(path):
            raise InputError(f"data is {quoted(spec)}, where there is no file; check the path")
        return (path,)
    named = [path / name for name in wanted if (path / name).is_file()]
    if named:
        return (named[0],)
    shards = tuple(sorted(path.rglob("*.parquet")))
    splits = sorted({match[1] for shard in shards if (match := _SHARD.fullmatch(shard.stem))})
    if len(splits) > 1:
        raise InputError(f"{spec} holds the splits {', '.join(splits)}; name one by a pattern: {spec}/**/{splits[0]}-*")
    if not shards:
        # Beside the shards lie the caches of whoever worked with the data.
        shards = tuple(shard for shard in sorted(path.rglob("*.arrow")) if not shard.name.startswith("cache-"))
        splits = sorted({str(shard.parent.relative_to(path)) for shard in shards})
        if len(splits) > 1:
            raise InputError(f"{spec} holds the splits {', '.join(splits)}; name one: {spec}/{splits[0]}")
    if not shards:
        looked = " or ".join(wanted) or "Parquet or Arrow files"
        raise InputError(f"folder {quoted(spec)} is without {looked}; check the path, or give the file itself")
    return shards


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file by its suffix.

    Raises:
        InputError: no such file, another suffix, or it does not parse (when that place is reached).
    """
    readers: dict[str, Callable[[Path], Iterator[Any]]] = {
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".json": _json,
    }
    read = readers.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path.name} is of no type read here; give a file of type {', '.join(SUFFIXES)}")
    if not os.path.isfile(path):
        raise InputError(f"data is {quoted(path)}, where there is no file; check the path")
    try:
        for row in read(path):
            if not isinstance(row, dict):
                raise InputError(f"{path.name} is not a list of objects; give one object for each entry")
            yield row
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path.name} does not parse ({error}); repair the file") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()


def _arrow(path: Path) -> Iterator[dict[str, Any]]:
    """What the `datasets` library writes, a stream, or a file with an index at its end."""
    with pa.memory_map(str(path)) as file:
        try:
            batches: Any = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.slice(start, BATCH).to_pylist()


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, strict=True)


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _json(path: Path) -> Iterator[Any]:
    """The entries of a list, or of the list `pairs` of an object (MMRB2)."""
    with path.open(encoding="utf-8-sig") as file:
        head = file.read(_CHUNK).lstrip()
        while not head and (more := file.read(_CHUNK)):
            head = more.lstrip()
        if head.startswith("["):
            yield from _entries(file.read, head, 1)
            return
        whole = json.loads(head + file.read())
    yield from whole["pairs"] if isinstance(whole, dict) and isinstance(whole.get("pairs"), list) else [None]


def _entries(read: Callable[[int], str], buffer: str, at: int) -> Iterator[Any]:
    """The entries of a JSON list whose text goes on in `read`, so that a list of gigabytes takes a chunk of memory."""
    decoder, count, comma_due = json.JSONDecoder(), 0, False
    while True:
        at = _skip_space(buffer, at)
        sign = buffer[at : at + 1]
        if sign == "]" and (comma_due or count == 0):
            rest = buffer[at + 1 :]
            while not rest.strip():
                if not (rest := read(_CHUNK)):
                    return
            raise ValueError(f"something follows the list of {count} entries")
        problem = f"the list ends within entry {count}"
        if sign and comma_due:
            if sign != ",":
                raise ValueError(f"no comma after entry {count - 1}")
            at, comma_due = at + 1, False
            continue
        if sign:
            try:
                entry, at = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:  # cut off by the end of the chunk, or really broken
                problem = f"entry {count}: {error.msg}"
            else:
                yield entry
                count, comma_due = count + 1, True
                continue
        more = read(max(_CHUNK, len(buffer) - at)) if len(buffer) - at < _LONGEST_ENTRY else ""
        if not more:
            raise ValueError(problem)
        buffer, at = buffer[at:] + more, 0


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


# ---------------------------------------------------------------- the Hub


def open_hub(name: str, split: str, *, stream: bool, dimension: str | None = None) -> Hub:
    """One split, `"split"` or `"configuration/split"`, downloaded and kept in the Hub's cache, or streamed.

    Raises:
        InputError: the Hub cannot be reached and the cache has it not, or there is no such data set or split.
    """
    configuration, _, part = split.rpartition("/")
    options: dict[str, Any] = {"name": configuration} if configuration else {}
    if stream:
        options["streaming"] = True
    try:
        with _told_if_offline(name):
            data = datasets.load_dataset(name, split=part, **options)
    except ConnectionError as error:
        raise InputError(f"{name}: the Hugging Face Hub cannot be reached; connect, or give a local file") from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = f"{error}"[:500]
        raise InputError(
            f"{quoted(name)}, split {quoted(split)}, cannot be loaded from the Hugging Face Hub: {reason}"
        ) from error
    return Hub(f"{name}:{split}", data, dimension)


@contextmanager
def _told_if_offline(name: str) -> Iterator[None]:
    """Tells `datasets` of a Hub that cannot be reached: left to itself it tries for half a minute, then says so.

    Its cache is still read.
    """
    from huggingface_hub import constants

    from listener_reward.models.hub import hub_options

    if not hub_options(name):
        yield
        return
    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
