"""The table of scored pairs: its columns, a row of it, and the whole file out of its parts.

Images are *first* and *second* as the data has them. `eval --scores` reads the file: `id` and `p_first` are what it
asks of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from listener_reward.errors import InputError
from listener_reward.files import quoted, replace_file
from listener_reward.verdict import Verdict

_THOUGHT = pa.struct(
    [
        ("text", pa.string()),
        ("order", pa.string()),
        ("answer", pa.int8()),
        ("p_first", pa.float64()),
        ("listener_p_first", pa.float64()),
        ("contradicted", pa.bool_()),
    ]
)

COLUMNS = pa.schema(
    [
        ("index", pa.int64()),  # the pair's place in the data, counted from 0
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("criterion", pa.string()),  # the question that was asked; null for the general one
        ("label", pa.float64()),  # the fraction of people who prefer the first image; null without votes
        ("p_first", pa.float64()),  # null where there is no verdict, and then `error` says why
        ("preferred", pa.int8()),  # 1, 2, or null for neither
        ("listener_p_first", pa.float64()),
        ("contradicted", pa.bool_()),
        ("position_gap", pa.float64()),
        ("label_mass", pa.float64()),
        ("malformed", pa.int32()),
        ("thoughts", pa.list_(_THOUGHT)),
        ("seconds", pa.float64()),  # the batch's time, divided by its pairs
        ("error", pa.string()),
    ]
)
"""Columns and Arrow types. Each field of `Verdict` and of `Thought` means what it means there; NaN becomes null."""

_SETTINGS = b"listener_reward"
"""Under this key a whole file says what it was made of."""


def row_of(verdict: Verdict | None, error: str | None, **known: Any) -> dict[str, Any]:
    """A row, of a verdict or of the reason why there is none."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS.names) | known | {"error": error}
    if verdict is not None:
        row |= {name: getattr(verdict, name) for name in COLUMNS.names if hasattr(verdict, name)}
        row["thoughts"] = [thought.to_dict() for thought in verdict.thoughts]
    return row


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as a table; `from_pandas` reads NaN as null."""
    arrays = [pa.array([row[field.name] for row in rows], field.type, from_pandas=True) for field in COLUMNS]
    return pa.Table.from_arrays(arrays, schema=COLUMNS)


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a part. It is whole or not there."""
    table = table_of(rows)
    replace_file(path, lambda beside: pq.write_table(table, beside))


def join_tables(parts: Iterable[Path], path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the whole file, one part in memory at a time."""

    def write(beside: Path) -> None:
        schema = COLUMNS.with_metadata({_SETTINGS: json.dumps(settings)})
        with pq.ParquetWriter(beside, schema) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part, schema=COLUMNS).replace_schema_metadata(schema.metadata))

    replace_file(path, write)


def settings_of(path: Path) -> dict[str, Any] | None:
    """What a whole file was made of; None where it is of another kind."""
    try:
        metadata = cast("Mapping[bytes, bytes]", pq.read_schema(path).metadata or {})
        return json.loads(metadata[_SETTINGS]) if _SETTINGS in metadata else None
    except (OSError, ValueError):  # pyarrow's own errors are ValueErrors
        return None


def read_verdicts(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a scored file, in the order of the data, a batch of them in memory at a time.

    Args:
        path: what `score` wrote.
        columns: some of `COLUMNS`; None reads all.

    Raises:
        InputError: no such file, or `score` did not write it.
    """
    path = Path(path)
    if settings_of(path) is None:
        raise InputError(f"{quoted(path)} is no file of listener-reward score; give what its --out named")
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()
