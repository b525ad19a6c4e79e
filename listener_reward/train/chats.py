"""Pairs in the form in which trl trains on them."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Image, List

from listener_reward.card import Card
from listener_reward.errors import InputError
from listener_reward.evaluate.asked import questions_of


def as_chats(pairs: Dataset, card: Card, reserved: frozenset[str], *, decode: bool = False) -> Dataset:
    """Pairs in trl's form: `prompt` becomes messages, and `caption` keeps the text.

    `images` begin with the prompt's sources where the pairs have some. With `decode`, `datasets` decodes them each time
    that a row is read; without, they stay encoded.

    Raises:
        InputError: the data set is empty or lacks a column.
    """
    missing = {"prompt", "images", "p_first", "id"} - set(pairs.column_names)
    if missing:
        raise InputError(
            f"train_dataset lacks the columns {sorted(missing)}; load it with listener_reward.datasets.load_pairs"
        )
    if len(pairs) == 0:
        raise InputError("train_dataset has no pairs")
    asked = list(questions_of(pairs)) or [(0, None)] * len(pairs)
    messages = [
        card.format.messages(text, reserved, sources=sources, criterion=criterion)
        for text, (sources, criterion) in zip(pairs["prompt"], asked, strict=True)
    ]
    if "sources" in pairs.column_names:  # a chat's images stand in one list
        pairs = pairs.map(_with_sources, remove_columns="sources", desc="sources before images")
    pairs = pairs.cast_column("images", List(Image(decode=decode))).rename_column("prompt", "caption")
    return pairs.add_column("prompt", messages)


def _with_sources(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose images are those of its chat."""
    return {"images": [*(row["sources"] or ()), *row["images"]]}
