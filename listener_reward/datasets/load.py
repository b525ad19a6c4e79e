"""Preference data of every supported format as one data set: prompt, two images, the fraction of voters.

| spec | what it reads |
| --- | --- |
| `tiny:train`, `tiny:id`, `tiny:ood`, `tiny:wrong` | the embedded world, drawn on the spot |
| `tiny:generated` | the same world as the embedded diffusion model draws it |
| `tiny:edit-train`, `tiny:edit`, `tiny:edit-ood`, `tiny:edit-wrong` | its edits: source, instruction, two results |
| `tiny:relation-train`, `tiny:relation`, `tiny:relation-ood`, `tiny:relation-wrong` | its harder pairs: two groups |
| `hpdv2:PATH` | HPDv2's `train.json` and `test.json`, and its gallery's `annotations.json` |
| `hpdv3:PATH` | HPDv3 and HPDv3++: `train.json`, `test.json`, `all.json`, `test_aes.json`, `test_tf.json` ... |
| `imagereward:PATH` | ImageRewardDB's `test.json` and `train.json` |
| `pickapic:PATH`, `pickapic:org/name:split` | Pick-a-Pic v1 and v2 |
| `rapidata:PATH`, `rapidata:org/name:split` | Rapidata's sets; `#coherence` at the end takes another dimension |
| `genai-bench:PATH`, `genai-bench:org/name:configuration/split` | GenAI-Bench |
| `videogen:PATH` | VideoGen-RewardBench; `#VQ`, `#MQ`, `#TA`, `#Overall` or `#all` at the end picks the dimension |
| `mmrb2:PATH`, `mmrb2:rl-research/multimodal-rewardbench-2:edit/test` | MMRB2; `interleaved` by `#pages` |
| `editreward-bench:PATH`, `editreward-bench:org/name:split` | EditReward-Bench of EditReward (TIGER-Lab) |
| `editscore-bench:PATH`, `editscore-bench:org/name:split` | EditReward-Bench of EditScore; `#consistency`, `#all` ... |
| `FILE.jsonl`, `.json`, `.csv`, `.parquet` | any of the above, by its fields; else the generic schema |
| `org/name`, `org/name:split`, `org/name:configuration/split` | the same on the Hugging Face Hub |

PATH is a file, a folder that holds one under its published name, as Parquet or as `save_to_disk` writes it, or a
pattern such as `data/test-*`. The generic schema is in `listener_reward.datasets.generic`. `#general` at the end, or
`,general` after a dimension, leaves the criteria out: every pair is then judged by the general question.

**Columns.** Always: `prompt` (string), `images` (two, undecoded), `p_first` (float64 in [0, 1], 0.5 is a tie), `id`
(string), `dataset` (string, the word before the colon) and `swapped` (bool, whether the shuffle exchanged the two, so
that the label in the file's own order is 1 - p_first). Those ending in `_first` and `_second` belong to the images as
they come out, after the shuffle; `rank_*` is short for both.

Where the data has them: `sources` (the images that the prompt speaks of, undecoded; an empty list for none) and
`criterion` (string, the question that people were asked, a name of `ChatFormat.criteria`; null for the general one).

- `tiny`: no more; its edits have `sources` (one image).
- generic: those of the columns below that the file has under these names; `group` where it has sources.
- every published format: `group` (string, the record that the pair belongs to, or a hash of its prompt) and `item_*`
  (string, the image's published name, or null).
- `imagereward`: and `rank_*` (float64, 1 is best, equal is a tie), `place_*` (int64, where in the published list).
- `hpdv2`: and `rank_*` (float64, published, lower is better), `place_*`, `votes_*` (float64, annotators who rank it
  ahead, half for a tie; null without annotators).
- `hpdv3`: and `model_*` (string), `rank_*` (1 for the published first, which always won), `votes_*`, `confidence`
  (float64).
- `pickapic`: and `model_*`, `examples_per_prompt` (int64).
- `rapidata`: and `model_*`, `votes_*` (counts or weights), `dimension` (string), `category` (string), `criterion`.
- `genai-bench`: and `model_*`, `both_bad` (bool), and `sources` for its edits. The images of `video_generation` are
  paths of videos.
- `videogen`: and `dimension`, `criterion`, `model_*`, `fps_*`, `frames_*`, `mos_*` (float64). The images are paths of
  videos.
- `mmrb2`: and `dimension` (the task), `model_*`, `votes_*`, `category`. Its prompt's images are `sources`.
- `editreward-bench`: and `sources`, `model_*`, `both_bad`, `category` (2pair, 3pair or 4pair). A `group` is a ranking.
- `editscore-bench`: and `sources`, `criterion`, `dimension`, `category` (the kind of edit).
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heappop, heappush, heappushpop
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import datasets

from listener_reward.datasets.edits import EDITREWARD_BENCH, EDITSCORE_BENCH
from listener_reward.datasets.format import (
    PUBLISHED,
    Format,
    Labelled,
    Place,
    Row,
    Skipped,
    Unlabelled,
    read_pairs,
    stored_as_video,
)
from listener_reward.datasets.genai_bench import GENAI_BENCH
from listener_reward.datasets.generic import generic_format
from listener_reward.datasets.hpdv3 import HPDV3
from listener_reward.datasets.mmrb2 import MMRB2
from listener_reward.datasets.pickapic import PICKAPIC
from listener_reward.datasets.ranked import HPDV2, IMAGEREWARD
from listener_reward.datasets.rapidata import RAPIDATA
from listener_reward.datasets.rows import HUB_NAME, SUFFIXES, Files, Hub, find_files, open_hub
from listener_reward.datasets.tiny import TINY_PAIRS, tiny_pairs
from listener_reward.datasets.videogen import VIDEOGEN
from listener_reward.errors import InputError
from listener_reward.files import quoted
from listener_reward.media.containers import demuxer, head_of
from listener_reward.media.images import ImageLike, to_pil
from listener_reward.pairs import PreferencePair

__all__ = ["FEATURES", "FORMATS", "MAX_BROKEN", "TINY_PAIRS", "is_swapped", "load_pairs"]

FORMATS = {
    form.kind: form
    for form in (
        HPDV2, HPDV3, IMAGEREWARD, PICKAPIC, RAPIDATA, GENAI_BENCH, VIDEOGEN, MMRB2, EDITREWARD_BENCH, EDITSCORE_BENCH
    )
}  # fmt: skip
"""The published formats by the word before the colon."""

FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "images": datasets.List(datasets.Image(decode=False)),
        "p_first": datasets.Value("float64"),
        "id": datasets.Value("string"),
        "dataset": datasets.Value("string"),
        "swapped": datasets.Value("bool"),
    }
)
"""The columns that all data has."""

ASKED = datasets.Features(
    {"sources": datasets.List(datasets.Image(decode=False)), "criterion": datasets.Value("string")}
)
"""The columns that belong to a question, which only some data has."""

MAX_BROKEN = 0.2
"""Above this fraction of pairs with an unreadable image the data set is refused: its folder is wrong or incomplete."""

_HEAD = 32
"""Rows that show a file's format and its columns: not every line of a JSONL file has every field."""

_FEW = 100
"""Pairs of a stream before whose end a fraction of broken ones says little."""


@overload
def load_pairs(
    spec: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    stream: Literal[False] = False,
    max_broken: float = MAX_BROKEN,
    check_images: bool = True,
) -> datasets.Dataset: ...


@overload
def load_pairs(
    spec: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    stream: Literal[True],
    max_broken: float = MAX_BROKEN,
    check_images: bool = True,
) -> datasets.IterableDataset: ...


def load_pairs(
    spec: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    stream: bool = False,
    max_broken: float = MAX_BROKEN,
    check_images: bool = True,
) -> datasets.Dataset | datasets.IterableDataset:
    """Pairs with the columns of the tables at the top of this module; images undecoded, files left where they are.

    Which image comes first is decided by a hash of `seed` and the pair's id, because published files leak the label in
    their order. The tiny world's order is random as it is.

    A pair with a missing or broken image is left out, with one warning that counts and names them.

    Args:
        spec: what to read, see the table at the top of this module.
        limit: keep at most this many pairs: all pairs of groups (records, or prompts) drawn at random, in the order of
            the file, the same for the same seed. Of a group that is larger than `limit` some pairs. Of a stream, the
            first pairs. For the tiny world, the number of pairs to draw.
        seed: of the sample and of the image order; for the tiny world, of the pairs.
        columns: what the file calls a field of the generic schema, such as `{"prompt": "caption"}`.
        stream: give an iterable that holds a batch of rows at a time, for sets larger than memory. Each pass over it
            reads the file again; images are checked, and broken ones counted, as their pairs come by.
        max_broken: the fraction of pairs with an unreadable image, in [0, 1], above which the data is refused.
        check_images: read every image once. Without, only the labels are vouched for: for scores made elsewhere.

    Raises:
        InputError: the spec, a file, a column, a label or too many images cannot be used; or there are no pairs.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; give at least 1, or None for all pairs")
    if not 0 <= max_broken <= 1:
        raise InputError(f"max_broken is {max_broken}; give a fraction of pairs from 0 to 1")
    opened = open_pairs(spec, limit=limit, seed=seed, columns=columns, stream=stream)
    if not stream:
        pairs = _sample(_labelled(opened.pairs()), limit, seed)
        if not pairs:
            raise InputError(_no_pairs(spec, opened.pairs()))
        opened = opened.with_columns_of(pairs)
        if check_images and opened.shuffled:
            pairs = _readable(pairs, spec, max_broken)
            if not pairs:
                raise InputError(f"{spec}: no pair has two images that can be read; complete the images")
        return _dataset([opened.row(pair, seed) for pair in pairs], opened.features)
    if next(_labelled(opened.pairs()), None) is None:
        raise InputError(_no_pairs(spec, opened.pairs()))
    opened = opened.looked_at()

    # Plain arguments: `datasets` makes a fingerprint of them, for which a closure would have to be pickled.
    arguments = {"spec": spec, "limit": limit, "seed": seed, "columns": columns}
    arguments |= {"max_broken": max_broken, "check_images": check_images}
    return datasets.IterableDataset.from_generator(_stream, features=opened.features, gen_kwargs=arguments)


def _stream(
    spec: str, limit: int | None, seed: int, columns: Mapping[str, str] | None, max_broken: float, check_images: bool
) -> Iterator[dict[str, Any]]:
    opened = open_pairs(spec, limit=limit, seed=seed, columns=columns, stream=True).looked_at()
    pairs = islice(_labelled(opened.pairs()), limit)
    if check_images and opened.shuffled:
        pairs = _readable_stream(pairs, spec, max_broken)
    for pair in pairs:
        yield opened.row(pair, seed)


# ---------------------------------------------------------------- what a spec means


@dataclass(frozen=True)
class Opened:
    """A spec that has been understood."""

    kind: str
    """The format: a key of `FORMATS`, "generic" or "tiny"."""
    source: Iterable[tuple[Place, Row]] | None
    form: Format | None
    tiny: tuple[str, int | None, int] | None = None
    general: bool = False
    """Whether every pair is judged by the general question, whatever people were asked."""
    asks: frozenset[str] = frozenset()
    """Those columns of `ASKED` that the data is known to have."""

    def pairs(self) -> Iterator[Labelled | Unlabelled | Skipped]:
        """From the start, in the published order."""
        if self.tiny is not None:
            pairs: Iterator[Labelled | Unlabelled | Skipped] = iter(tiny_pairs(*self.tiny))
        else:
            assert self.source is not None and self.form is not None
            pairs = read_pairs(self.source, self.form)
        return map(_by_the_general_question, pairs) if self.general else pairs

    def with_columns_of(self, pairs: Iterable[Labelled]) -> Opened:
        """The same with the columns of `ASKED` that these pairs need."""
        found = {name for one in pairs for name in ASKED if getattr(one.pair, name)}
        return replace(self, asks=self.asks | found)

    def looked_at(self) -> Opened:
        """The same with the columns of `ASKED` that the first pairs need."""
        return self.with_columns_of(islice(_labelled(self.pairs()), 1 if self.tiny else _HEAD))

    @cached_property
    def features(self) -> datasets.Features:
        columns = dict(self.form.columns) if self.form else {}
        if self.kind in FORMATS:
            columns = PUBLISHED | columns
        asked = {name: kind for name, kind in ASKED.items() if name in self.asks}
        values = {name: datasets.Value(kind) for name, kind in columns.items()}
        return datasets.Features({**FEATURES, **asked, **values})

    @property
    def shuffled(self) -> bool:
        return self.tiny is None

    def row(self, one: Labelled, seed: int) -> dict[str, Any]:
        """The pair as `load_pairs` gives it, its images in the seeded order. What checks data makes these rows too.

        Raises:
            InputError: the pair has sources or a criterion, for which the first pairs showed no need.
        """
        shown = one.exchanged() if self.shuffled and is_swapped(one.pair.id, seed) else one
        pair = shown.pair
        for name in ASKED:
            if getattr(pair, name) and name not in self.asks:
                raise InputError(
                    f"pair {pair.id} has {name}, which none of the first {_HEAD} pairs of this stream has; put a pair "
                    "that has it first, or read without stream"
                )
        row = {"prompt": pair.prompt, "images": [pair.first, pair.second], "p_first": pair.p_first}
        row |= {"id": pair.id, "dataset": pair.dataset, "swapped": shown.swapped} | dict(shown.columns)
        row |= {"sources": list(pair.sources), "criterion": pair.criterion}
        return {name: row[name] for name in self.features}


def open_pairs(
    spec: str,
    *,
    limit: int | None,
    seed: int,
    columns: Mapping[str, str] | None,
    stream: bool,
    labelled: bool = True,
) -> Opened:
    """Finds the files or the Hub data set that `spec` names, and its format. `limit` and `seed` are the tiny world's.

    Unless `labelled`, rows of the generic schema may be without a label, and come as `Unlabelled`.

    Raises:
        InputError: nothing is there, or it is of no format read here.
    """
    spec, general = _general(spec)
    kind, colon, rest = spec.partition(":")
    if columns and (kind == "tiny" or (colon and kind in FORMATS)):
        raise InputError(f"columns is {dict(columns)!r}, but {kind} has names of its own; leave it out")
    if kind == "tiny":
        return Opened("tiny", None, None, (rest, limit, seed), general)
    if colon and kind in FORMATS:
        form = FORMATS[kind]
        target, _, dimension = rest.partition("#")
        return _opened(kind, _open(target, form, dimension or None, stream), form, general)
    path = Path(spec)
    hub = HUB_NAME.fullmatch(spec)
    if path.suffix.lower() in SUFFIXES:
        source, name = Files(find_files(spec)), path.name
    elif os.path.isdir(spec):
        source, name = Files(find_files(spec)), path.resolve().name
    elif hub is not None and not os.path.exists(path):
        source = open_hub(hub[1], hub[2] or "train", stream=stream)
        name = source.name
    else:
        raise InputError(
            f"data is {quoted(spec)}; give tiny:SPLIT, {', '.join(f'{kind}:PATH' for kind in FORMATS)}, a file of type "
            f"{', '.join(SUFFIXES)}, a folder of Parquet or Arrow files, or org/name:split"
        )
    head = [row for _, row in islice(source, _HEAD)]
    fields = {field for row in head for field in row}
    form = None if columns else next((form for form in FORMATS.values() if form.recognises(fields)), None)
    form = form or generic_format(name, fields, columns or {}, labelled=labelled)
    return _opened(form.kind, source, form, general)


def _general(spec: str) -> tuple[str, bool]:
    """A spec without the word that asks for the general question, and whether it had that word."""
    target, _, words = spec.rpartition("#")
    named = words.split(",")
    if not target or "general" not in named:
        return spec, False
    named.remove("general")
    return (f"{target}#{','.join(named)}" if named else target), True


def _opened(kind: str, source: Iterable[tuple[Place, Row]], form: Format, general: bool) -> Opened:
    return Opened(kind, source, form, None, general, form.asks - {"criterion"} if general else form.asks)


def _open(target: str, form: Format, dimension: str | None, stream: bool) -> Files | Hub:
    hub = HUB_NAME.fullmatch(target)
    if hub is None or os.path.exists(target) or Path(target).suffix.lower() in SUFFIXES:
        return Files(find_files(target, form.files), dimension)
    if form.archives is not None and hub[1] != form.embedded:
        raise InputError(
            f"{form.kind} folder {target!r} is not there, and on the Hugging Face Hub this set keeps its images in "
            f"archives. Download {form.archives} by `hf download --repo-type dataset --local-dir DIR`, unpack them "
            f"there, and give {form.kind}:DIR; or check the path"
        )
    return open_hub(hub[1], hub[2] or form.split, stream=stream, dimension=dimension)


def _no_pairs(spec: str, pairs: Iterator[Labelled | Unlabelled | Skipped]) -> str:
    reasons = sorted({pair.reason for pair in pairs if isinstance(pair, Skipped)})
    left_out = f" (all rows are left out: {'; '.join(reasons)})" if reasons else ""
    return f"{spec} holds no pairs{left_out}; give data with at least one"


# ---------------------------------------------------------------- what every format goes through


def _labelled(pairs: Iterable[Labelled | Unlabelled | Skipped]) -> Iterator[Labelled]:
    return (pair for pair in pairs if isinstance(pair, Labelled))


def _by_the_general_question(one: Labelled | Unlabelled | Skipped) -> Labelled | Unlabelled | Skipped:
    if isinstance(one, Labelled):
        return replace(one, pair=replace(one.pair, criterion=None))
    return replace(one, criterion=None) if isinstance(one, Unlabelled) else one


def pictures_of(pair: PreferencePair) -> tuple[ImageLike, ...]:
    """Every image that a judge of this pair is shown."""
    return (pair.first, pair.second, *pair.sources)


def _sample(pairs: Iterable[Labelled], limit: int | None, seed: int) -> list[Labelled]:
    """All pairs, or those of as many groups at random as fit into `limit`; in their order.

    A group is what a protocol averages over: half of it would be measured as another thing. Each has a random number
    from its name, and the lowest are kept, so that no more than `limit` pairs and one group are ever held.
    """
    if limit is None:
        return list(pairs)
    groups: dict[str, _Group] = {}
    highest: list[tuple[float, str]] = []  # a heap
    held, barred = 0, math.inf
    for index, one in enumerate(pairs):
        name = one.columns.get("group") or f"\0{one.pair.prompt}"
        if name not in groups:
            number = _random(f"{seed}/{name}")
            if number >= barred:
                continue
            groups[name] = _Group(number)
            heappush(highest, (-number, name))
        held += groups[name].add(index, one, limit, seed)
        # What stands before the highest group fills the sample already: neither it nor any above it will be in.
        while len(groups) > 1 and held - len(groups[highest[0][1]].kept) >= limit:
            number, name = heappop(highest)
            held, barred = held - len(groups.pop(name).kept), -number
    sample: list[tuple[int, Labelled]] = []
    for group in sorted(groups.values(), key=lambda group: group.number):
        if sample and len(sample) + group.size > limit:
            break
        sample += [(index, one) for _, index, one in group.kept]
    return [one for _, one in sorted(sample, key=lambda pair: pair[0])]


def _random(name: str) -> float:
    """A number in [0, 1) that is the name's own."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big") / 2**56


@dataclass
class _Group:
    """Pairs of one group, of which no more than the limit are kept: those with the lowest random numbers."""

    number: float
    size: int = 0
    kept: list[tuple[float, int, Labelled]] = field(default_factory=list)

    def add(self, index: int, one: Labelled, limit: int, seed: int) -> int:
        """How many more are kept now, 1 or 0."""
        self.size += 1
        entry = (-_random(f"{seed}/{one.pair.id}/{index}"), index, one)
        if len(self.kept) < limit:
            heappush(self.kept, entry)
            return 1
        heappushpop(self.kept, entry)
        return 0


def _readable(pairs: Sequence[Labelled], spec: str, max_broken: float) -> list[Labelled]:
    """The pairs whose images all decode. Every distinct image is decoded once, so that no run breaks on one later."""
    images = {_key(image): (one.pair.id, image) for one in pairs for image in pictures_of(one.pair)}
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda named: fault(*named), images.values())
        faults = dict(zip(images, found, strict=True))
    kept = [one for one in pairs if not any(faults[_key(image)] for image in pictures_of(one.pair))]
    _report_broken(spec, len(pairs) - len(kept), len(pairs), [fault for fault in faults.values() if fault], max_broken)
    return kept


def _readable_stream(pairs: Iterable[Labelled], spec: str, max_broken: float) -> Iterator[Labelled]:
    """As `_readable`, pair by pair: refuses as soon as it is clear, warns at the end."""
    seen = broken = 0
    messages: list[str] = []
    for seen, one in enumerate(pairs, start=1):
        faults = [why for image in pictures_of(one.pair) if (why := fault(one.pair.id, image))]
        if not faults:
            yield one
            continue
        broken, messages = broken + 1, messages + faults if len(messages) < 5 else messages
        if broken > max_broken * max(seen, _FEW):
            break
    _report_broken(spec, broken, seen, messages, max_broken)


def _report_broken(spec: str, broken: int, n: int, messages: Sequence[str], max_broken: float) -> None:
    if not broken:
        return
    more = f"; and {len(messages) - 5} more" if len(messages) > 5 else ""
    summary = f"{spec}: {broken} of {n} pairs have an unreadable image: {'; '.join(messages[:5])}{more}"
    if broken > max_broken * n:
        raise InputError(f"{summary}. More than {max_broken:.0%} cannot be right; complete the images")
    warnings.warn(f"{summary}. These pairs are left out", stacklevel=4)


def fault(pair_id: str, image: Any) -> str | None:
    """Why an image cannot be used, None if it can. A video only has to be there and to start as one."""
    if stored_as_video(image):
        return None if image["bytes"] is not None else _video_fault(f"a video of pair {pair_id}", image["path"])
    try:
        to_pil(image, field=f"an image of pair {pair_id}")
    except InputError as error:
        return str(error)
    return None


def _video_fault(what: str, path: str) -> str | None:
    named = f"{what} is {quoted(path)}"
    if "://" in path:
        return f"{named}, which is not on this machine; download the videos and give a file that names them"
    if not os.path.isfile(path):
        return f"{named}, where there is no file; check the path"
    return None if demuxer(head_of(path)) else f"{named}, which is no video by its first bytes; get it anew"


def _key(image: Any) -> str | int:
    return image["path"] or id(image)


def is_swapped(pair_id: str, seed: int) -> bool:
    """Whether the seeded shuffle shows the published first image second."""
    return bool(hashlib.blake2b(f"{seed}/{pair_id}".encode(), digest_size=1).digest()[0] & 1)


def _dataset(rows: list[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    # In parts, because one Arrow array holds at most 2 GiB of image bytes.
    parts = [datasets.Dataset.from_list(rows[i : i + 500], features=features) for i in range(0, len(rows), 500)]
    return datasets.concatenate_datasets(parts)
