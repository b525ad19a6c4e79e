"""The embedded world: pairs drawn on the spot, their order random as it is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from listener_reward.datasets.format import Labelled
from listener_reward.errors import InputError
from listener_reward.media.images import png_of
from listener_reward.pairs import PreferencePair
from listener_reward.tiny.drawing import draw_edit, draw_pair, draw_relation
from listener_reward.tiny.edits import EDIT_SPLITS, EditSplit, split_edits
from listener_reward.tiny.relations import RELATION_SPLITS, RelationSplit, split_relations
from listener_reward.tiny.world import SPLITS, split_pairs

GENERATED = "generated"
"""The split of what the tiny diffusion model draws."""

TINY_PAIRS = 400
"""Pairs of a tiny split where no limit is given."""


def tiny_pairs(split: str, limit: int | None, seed: int) -> Iterator[Labelled]:
    """The first `limit` pairs of a split as `seed` draws them, with PNG bytes.

    Raises:
        InputError: there is no such split.
    """
    n = TINY_PAIRS if limit is None else limit
    if split == GENERATED:
        yield from _generated(n, seed)
        return
    if split in EDIT_SPLITS:
        yield from _edits(split, n, seed)
        return
    if split in RELATION_SPLITS:
        yield from _relations(split, n, seed)
        return
    if split not in SPLITS:
        known = ", ".join(map(repr, (*SPLITS, GENERATED, *EDIT_SPLITS, *RELATION_SPLITS)))
        raise InputError(f"split is {split!r}; the tiny world has {known}")
    for index, pair in enumerate(split_pairs(split, n, seed=seed)):
        first, second = ({"bytes": png_of(image), "path": None} for image in draw_pair(pair))
        name = f"{split}-{seed}-{index}"
        yield Labelled(PreferencePair(pair.wording, first, second, pair.p_first, name, f"tiny:{split}"), {})


def _edits(split: EditSplit, n: int, seed: int) -> Iterator[Labelled]:
    for index, edit in enumerate(split_edits(split, n, seed=seed)):
        source, first, second = ({"bytes": png_of(image), "path": None} for image in draw_edit(edit))
        name, dataset = f"{split}-{seed}-{index}", f"tiny:{split}"
        yield Labelled(PreferencePair(edit.wording, first, second, edit.p_first, name, dataset, (source,)), {})


def _relations(split: RelationSplit, n: int, seed: int) -> Iterator[Labelled]:
    for index, pair in enumerate(split_relations(split, n, seed=seed)):
        first, second = ({"bytes": png_of(image), "path": None} for image in draw_relation(pair))
        name = f"{split}-{seed}-{index}"
        yield Labelled(PreferencePair(pair.wording, first, second, pair.p_first, name, f"tiny:{split}"), {})


def _generated(n: int, seed: int) -> Iterator[Labelled]:
    from listener_reward.tiny.generated import sample_pairs  # needs diffusers, which the other splits do not

    for index, (first, second, p_first) in enumerate(islice(sample_pairs(seed), n)):
        one, other = ({"bytes": png_of(sample.picture), "path": None} for sample in (first, second))
        name = f"{GENERATED}-{seed}-{index}"
        yield Labelled(PreferencePair(first.wording, one, other, p_first, name, f"tiny:{GENERATED}"), {})
