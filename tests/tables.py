"""Rows as a file of any kind that this package reads tables from."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes `rows` by the ending of `path`: .jsonl, .json, .csv, .parquet, and a folder of `datasets` for none."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list([dict(row) for row in rows]).to_parquet(str(path))
    else:
        datasets.Dataset.from_list([dict(row) for row in rows]).save_to_disk(str(path))
    return path
