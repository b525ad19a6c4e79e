"""What is in a data set, before anybody trains or evaluates on it: `listener-reward data check`.

One pass in the published order. What is kept of a pair is a few hashes, so memory grows by about half a kilobyte a
pair and not with the images.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from scipy.stats import binomtest

from listener_reward.chat import QWEN_RESERVED, ChatFormat
from listener_reward.datasets.format import Labelled, Skipped, stored_as_video
from listener_reward.datasets.load import ASKED, MAX_BROKEN, Opened, fault, is_swapped, open_pairs, pictures_of
from listener_reward.errors import InputError
from listener_reward.media.images import identity, to_pil
from listener_reward.progress import progress_bars

NAMED = 5
"""Broken images that are named; the rest are counted."""


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What was found. Shares are in [0, 1] and None where there is nothing to take them of."""

    data: str
    format: str
    pairs: int
    left_out: dict[str, int]
    """Rows that their publisher marks as no pair, by the reason."""
    ties: int
    shares: int
    """Untied pairs whose label is not 0 or 1 but the fraction of several voters."""
    first_preferred_as_published: float | None
    """Of the untied pairs, in the order of the file: far from 0.5, the order tells the label."""
    first_preferred_as_shown: float | None
    """The same after the seeded shuffle that `load_pairs` makes."""
    order_leaks: bool
    """Whether always answering "the first" beats chance as published (binomial test, p < 0.001)."""
    images: int
    """Different images, videos and source images among them."""
    broken_images: int
    broken_named: list[str]
    broken_pairs: int
    sizes: dict[str, list[int]] | None
    """Width and height of the smallest, median and largest image by area, as a judge gets them; None for videos."""
    pairs_with_sources: int
    """Pairs whose prompt speaks of source images."""
    sources: int
    """Different source images."""
    missing_sources: int
    """Those of them that are not there or cannot be read; they are among the broken images."""
    criteria: dict[str, int]
    """Pairs by the criterion that people were asked; those of the general question are not among them."""
    duplicate_pairs: int
    """Pairs whose prompt, sources, criterion, dimension and images have been there before, in either order."""
    contradicting_duplicates: int
    """Those of them that prefer another image than the first such pair."""
    repeated_ids: int
    prompts: int
    """Different prompts."""
    prompt_characters: dict[str, int] | None
    """Shortest, median and longest."""
    empty_prompts: int
    """Pairs whose prompt is empty or only white space."""
    long_prompts: int
    """Pairs whose prompt a judge cuts."""
    reserved_prompts: int
    """Pairs whose prompt holds a model's special token, which a judge makes harmless."""
    reserved_tokens: list[str]
    problems: list[str] = field(default_factory=list)
    """Why the data cannot be used; empty if it can."""
    notes: list[str] = field(default_factory=list)
    """What to know before using it."""

    @property
    def usable(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"usable": self.usable} | asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """The same for people to read, problems, notes and broken images apart."""
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in self.left_out.items())
        tokens = f" ({' '.join(self.reserved_tokens)})" if self.reserved_tokens else ""
        lines = [
            ("data", self.data),
            ("format", self.format),
            ("pairs", f"{self.pairs:,}; {self.ties:,} tied, {self.shares:,} with split votes"),
            ("rows left out", reasons or "none"),
        ]
        if self.first_preferred_as_published is not None and self.first_preferred_as_shown is not None:
            published, loaded = self.first_preferred_as_published, self.first_preferred_as_shown
            lines.append(("first preferred", f"{published:.1%} as published, {loaded:.1%} as load_pairs orders them"))
        lines.append(("images", f"{self.images:,}; {self.broken_images:,} broken, in {self.broken_pairs:,} pairs"))
        if self.sizes is not None:
            sizes = {name: " x ".join(map(str, size)) for name, size in self.sizes.items()}
            lines.append(("sizes", f"{sizes['least']} to {sizes['greatest']}, median {sizes['median']}"))
        if self.pairs_with_sources:
            found = f"{self.sources:,} in {self.pairs_with_sources:,} pairs"
            lines.append(("source images", f"{found}; {self.missing_sources:,} missing or broken"))
        if self.criteria:
            asked = [f"{count:,} by {name}" for name, count in sorted(self.criteria.items())]
            general = self.pairs - sum(self.criteria.values())
            lines.append(("criteria", "; ".join([*asked, *([f"{general:,} as a whole"] if general else [])])))
        lines.append(("duplicates", f"{self.duplicate_pairs:,}; {self.contradicting_duplicates:,} of them contradict"))
        lines.append(("repeated ids", f"{self.repeated_ids:,}"))
        if self.prompt_characters is not None:
            least, median, greatest = self.prompt_characters.values()
            length = f"{least:,} to {greatest:,} characters, median {median:,}"
            lines.append(("prompts", f"{self.prompts:,} different; {length}"))
        lines.append(
            (
                "prompts to look at",
                f"{self.empty_prompts:,} empty, {self.long_prompts:,} too long, "
                f"{self.reserved_prompts:,} with special tokens{tokens}",
            )
        )
        return lines


def check_data(
    spec: str, *, limit: int | None = None, seed: int = 0, max_broken: float = MAX_BROKEN, progress: bool = False
) -> DataCheck:
    """Reads every pair, or the first `limit`, and every image of them once.

    Raises:
        InputError: the spec, the file or one of its rows cannot be read at all.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; give at least 1, or None for all pairs")
    opened = open_pairs(spec, limit=limit, seed=seed, columns=None, stream=True)
    opened = replace(opened, asks=frozenset(ASKED))
    tally = _Tally(seed, opened)
    with ThreadPoolExecutor() as pool, progress_bars(visible=progress, transient=True) as bars:
        pairs = iter(bars.track(islice(opened.pairs(), limit), description="checking pairs"))
        while some := list(islice(pairs, 64)):
            tally.add([one for one in some if isinstance(one, Labelled)], pool)
            tally.left_out.update(one.reason for one in some if isinstance(one, Skipped))
    return tally.found(spec, max_broken)


class _Tally:
    """Counts as the pairs come by."""

    def __init__(self, seed: int, opened: Opened) -> None:
        self.seed, self.opened = seed, opened
        self.left_out: Counter[str] = Counter()
        self.first: list[float] = []
        self.flipped: list[bool] = []
        self.looked: dict[int, tuple[str | None, tuple[int, int] | None]] = {}
        self.broken_pairs = 0
        self.before: dict[tuple[int, int, int], float] = {}
        """Pairs by their question and their two images, the lower key first, to the fraction that prefers that image.
        The question is the prompt, its sources, the criterion and, where a format labels several, the dimension."""
        self.with_sources = 0
        self.sources: set[int] = set()
        self.criteria: Counter[str] = Counter()
        self.duplicates = self.contradicting = 0
        self.ids: set[int] = set()
        self.prompts: set[int] = set()
        self.lengths: list[int] = []
        self.empty = self.reserved = 0
        self.tokens: Counter[str] = Counter()

    def add(self, pairs: list[Labelled], pool: Executor) -> None:
        images = {}
        for one in pairs:
            self.opened.row(one, self.seed)  # what no row can be made of is found here, and not by whoever loads it
            for image in pictures_of(one.pair):
                images.setdefault(_image_key(image), (one.pair.id, image))
        new = {key: named for key, named in images.items() if key not in self.looked}
        self.looked |= zip(new, pool.map(lambda named: _look(*named), new.values()), strict=True)
        for one in pairs:
            self._add(one)

    def _add(self, one: Labelled) -> None:
        pair = one.pair
        self.first.append(pair.p_first)
        self.flipped.append(self.opened.shuffled and is_swapped(pair.id, self.seed))
        self.ids.add(_hash(pair.id.encode()))
        first, second, *sources = map(_image_key, pictures_of(pair))
        self.broken_pairs += any(self.looked[key][0] is not None for key in (first, second, *sources))
        self.with_sources += bool(sources)
        self.sources.update(sources)
        if pair.criterion is not None:
            self.criteria[pair.criterion] += 1
        question = _hash(repr((pair.prompt, sources, pair.criterion, one.columns.get("dimension"))).encode())
        p_low = pair.p_first if first <= second else 1 - pair.p_first
        known = self.before.setdefault((question, min(first, second), max(first, second)), p_low)
        if len(self.before) + self.duplicates < len(self.first):
            self.duplicates += 1
            self.contradicting += np.sign(known - 0.5) != np.sign(p_low - 0.5)
        self.prompts.add(_hash(pair.prompt.encode()))
        self.lengths.append(len(pair.prompt))
        self.empty += not pair.prompt.strip()
        tokens = [token for token in QWEN_RESERVED if token in pair.prompt]
        self.reserved += bool(tokens)
        self.tokens.update(tokens)

    def found(self, spec: str, max_broken: float) -> DataCheck:
        n, first = len(self.first), np.array(self.first)
        untied, most = first != 0.5, ChatFormat().max_prompt_chars
        loaded = np.where(np.array(self.flipped, dtype=bool), 1 - first, first)
        wins, decided = int((first > 0.5).sum()), int(untied.sum())
        faults = [why for why, _ in self.looked.values() if why is not None]
        sizes = sorted((size for _, size in self.looked.values() if size), key=lambda size: size[0] * size[1])
        check = DataCheck(
            data=spec,
            format=self.opened.kind,
            pairs=n,
            left_out=dict(self.left_out),
            ties=n - decided,
            shares=int((untied & (first != 0) & (first != 1)).sum()),
            first_preferred_as_published=wins / decided if decided else None,
            first_preferred_as_shown=float((loaded > 0.5).sum() / decided) if decided else None,
            order_leaks=decided > 0 and bool(binomtest(wins, decided).pvalue < 1e-3),
            images=len(self.looked),
            broken_images=len(faults),
            broken_named=faults[:NAMED],
            broken_pairs=self.broken_pairs,
            sizes=_three([list(size) for size in sizes]),
            pairs_with_sources=self.with_sources,
            sources=len(self.sources),
            missing_sources=sum(self.looked[key][0] is not None for key in self.sources),
            criteria=dict(self.criteria),
            duplicate_pairs=self.duplicates,
            contradicting_duplicates=int(self.contradicting),
            repeated_ids=n - len(self.ids),
            prompts=len(self.prompts),
            prompt_characters=_three(sorted(self.lengths)),
            empty_prompts=self.empty,
            long_prompts=sum(length > most for length in self.lengths),
            reserved_prompts=self.reserved,
            reserved_tokens=sorted(self.tokens),
        )
        check.problems.extend(_problems(check, max_broken))
        check.notes.extend(_notes(check))
        return check


def _problems(check: DataCheck, max_broken: float) -> Iterator[str]:
    if not check.pairs:
        yield "there are no pairs"
        return
    if check.broken_pairs > max_broken * check.pairs:
        broken = check.broken_pairs / check.pairs
        yield f"{broken:.1%} of the pairs have an unreadable image, more than {max_broken:.0%}: complete the images"
    if check.ties == check.pairs:
        yield "every pair is a tie: there is nothing to prefer"
    if check.empty_prompts == check.pairs:
        yield "every prompt is empty"


def _notes(check: DataCheck) -> Iterator[str]:
    if check.order_leaks:
        yield (
            f'the published order tells the label: "always the first" is right in '
            f"{check.first_preferred_as_published:.1%}. load_pairs shuffles it; other tools may not"
        )
    if check.repeated_ids:
        yield f"{check.repeated_ids} ids are not the first of their kind: scores cannot be joined by id"
    if check.contradicting_duplicates:
        yield f"{check.contradicting_duplicates} duplicates disagree with the first such pair"
    if check.empty_prompts:
        yield f"{check.empty_prompts} prompts are empty"
    if check.long_prompts:
        yield f"{check.long_prompts} prompts are longer than a judge reads ({ChatFormat().max_prompt_chars} characters)"
    if check.reserved_prompts:
        yield f"{check.reserved_prompts} prompts hold special tokens of a model, which are made harmless"
    if check.format == "mmrb2":
        yield "MMRB2 is licensed for evaluation only (CC BY-NC 4.0): do not train on it"


def _three(values: list[Any]) -> dict[str, Any] | None:
    """The least, the median and the greatest of sorted values."""
    if not values:
        return None
    return {"least": values[0], "median": values[len(values) // 2], "greatest": values[-1]}


def _look(pair_id: str, image: Any) -> tuple[str | None, tuple[int, int] | None]:
    """Why an image cannot be used, or its size."""
    if stored_as_video(image):
        return fault(pair_id, image), None
    try:
        return None, to_pil(image, field=f"an image of pair {pair_id}").size
    except InputError as error:
        return str(error), None


def _image_key(image: Any) -> int:
    return _hash(identity(image).encode())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
