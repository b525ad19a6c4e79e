"""Where the anchors of a reward's prompts come from, and how they are kept.

They are given, read from a folder, or taken from the first group seen.

A folder is what `listener-reward anchors` makes: picture files, and `anchors.jsonl` with a line for each prompt:

    {"prompt": "two red circles", "images": ["0000-0.png", ...], "scores": [1.2, ...], "votes": 40.0, "judge": "..."}
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from listener_reward.anchors import Anchors, Ask, compared, distinct_of, fit, identity_of, mutual, pick
from listener_reward.errors import InputError, JudgeError
from listener_reward.files import write_bytes
from listener_reward.media.clips import Clip, Visual
from listener_reward.media.images import png_of
from listener_reward.media.storyboards import to_visual, to_visuals
from listener_reward.pairs import PromptLike, as_prompt, key_of
from listener_reward.ranking import pairings
from listener_reward.references import AnchorFile, check_there, size
from listener_reward.verdict import PairJudge, Verdict

DEFAULT_COUNT = 4
"""How many anchors a prompt has where nobody says; docs/anchors.md has what more would give."""

MANY_PROMPTS = 1000
"""Keeping the anchors of more prompts than this in memory is worth a word in the log."""

LINES = "anchors.jsonl"

logger = logging.getLogger(__name__)

Given = Mapping[Any, Any] | Callable[[Any], Any]
"""Prompts and the images that are their anchors: a dict, or a function of the prompt."""


@dataclass(frozen=True, slots=True)
class AnchorFolder:
    """The anchors in a folder, whose pictures are read when they are wanted; `read_folder` makes one."""

    path: Path
    lines: Mapping[str, Mapping[str, Any]]
    """By `Prompt.key`."""

    def of(self, prompt: PromptLike) -> Anchors:
        """The anchors of a prompt.

        Raises:
            InputError: there are none, or a picture cannot be read.
        """
        line = self.lines.get(key_of(prompt))
        if line is None:
            text = as_prompt(prompt).text
            raise InputError(f"anchors {self.path} has none for prompt {text!r}; `listener-reward anchors` adds them")
        images = [to_visual(self.path / file) for file in line["images"]]
        return Anchors(tuple(images), tuple(line["scores"]), line["votes"], line["judge"])


class AnchorSets:
    """The anchors of each prompt of one reward. What has been fitted once stays as it is.

    Threads may share it, as long as no two of them open the same prompt at once.
    """

    def __init__(
        self, given: Given | str | os.PathLike[str] | int | None, *, state: str | os.PathLike[str] | None = None
    ):
        """
        Args:
            given: as `anchors` of `ListenerReward`.
            state: the file that keeps what is fitted; None keeps it in memory.

        Raises:
            InputError: a number below 1, or files that cannot be used.
        """
        self.count = DEFAULT_COUNT
        self.given: Given | None = None
        self.folder: AnchorFolder | None = None
        if isinstance(given, str | os.PathLike):
            path = Path(given)
            if path.is_dir():
                self.folder = read_folder(path)
            else:
                self.given = read_images(path)
        elif isinstance(given, bool) or (isinstance(given, int) and given < 1):
            raise InputError(f"anchors is {given!r}; give a number of at least 1, images for each prompt, or a folder")
        elif isinstance(given, int):
            self.count = given
        elif given is None or isinstance(given, Mapping) or callable(given):
            self.given = given
        else:
            raise InputError(
                f"anchors is a {type(given).__name__}; give a number, {{prompt: images}}, a function, or a folder"
            )
        if self.folder is not None and state is not None:
            raise InputError("state is given, but anchors of a folder have their scores there; leave one of them out")
        self.kept: dict[str, Any] | AnchorFile = {} if state is None else AnchorFile(state)
        self._same: set[str] = set()  # prompts whose given images were found to be those kept

    def has(self, prompt: PromptLike) -> bool:
        """Whether there is nothing left to fit."""
        return self.folder is not None or key_of(prompt) in self.kept

    def of(self, prompt: PromptLike, judge: str) -> Anchors | None:
        """The anchors of a prompt; None where they have yet to be fitted.

        Raises:
            InputError: their scores are another judge's, the folder has none for this prompt, or the images that are
                given are others than those whose scores are kept.
        """
        key = key_of(prompt)
        if self.folder is not None:
            anchors = self.folder.of(prompt)
        else:
            kept = self.kept.get(key)
            if kept is None:
                return None
            anchors = Anchors.from_dict(kept)
            if self.given is not None and key not in self._same:
                if [image.digest for image in self._given_images(prompt)] != [image.digest for image in anchors.images]:
                    raise InputError(
                        f"anchors of prompt {as_prompt(prompt).text!r} are other images than those whose scores are "
                        "kept; give those, or another state"
                    )
                self._same.add(key)
        anchors.check_judge(judge)
        return anchors

    def open(self, groups: Mapping[PromptLike, Sequence[Visual]], ask: Ask, judge: str) -> None:
        """Fits and keeps the anchors of prompts that have none, in one batch.

        Nothing is kept for a prompt where the judge broke on a comparison of its given anchors, or left fewer than two
        images of its group that were all compared as they should be.

        Args:
            groups: these prompts, each with its images in the call.
            ask: the judge.
            judge: its identity.

        Raises:
            InputError: a prompt has no images given, or fewer than two to take anchors from.
        """
        pools = {prompt: self._pool(prompt, pictures) for prompt, pictures in groups.items()}
        plans = {
            prompt: mutual(pool) if self.given is not None else pairings(len(pool)) for prompt, pool in pools.items()
        }
        verdicts = iter(
            ask([(prompt, pools[prompt][i], pools[prompt][j]) for prompt, plan in plans.items() for i, j in plan])
        )
        fitted: dict[str, Any] = {}
        for prompt, plan in plans.items():
            said = [(i, j, next(verdicts)) for i, j in plan]
            anchors = self._fitted(pools[prompt], said, judge)
            if anchors is not None:
                fitted[key_of(prompt)] = anchors.to_dict()
        if isinstance(self.kept, AnchorFile):
            self.kept.keep(fitted)  # in one transaction; of two processes the first one's stay
            return
        before = len(self.kept)
        self.kept.update(fitted)
        if before <= MANY_PROMPTS < len(self.kept):
            logger.warning(
                "%d prompts have their anchors kept in memory (%.0f MiB); with this many prompts, give state= to keep "
                "them in a file, or a folder that `listener-reward anchors` made",
                len(self.kept),
                sum(size(image) for anchors in self.kept.values() for image in anchors["images"]) / 2**20,
            )

    def _fitted(
        self, pool: list[Visual], said: Sequence[tuple[int, int, Verdict | None]], judge: str
    ) -> Anchors | None:
        whole = _without_failures(len(pool), said)
        if len(whole) < len(pool) and (self.given is not None or len(whole) < 2):
            return None
        outcomes = [
            (whole.index(i), whole.index(j), verdict.p_first)
            for i, j, verdict in said
            if verdict is not None and i in whole and j in whole
        ]
        images = [pool[place] for place in whole]
        return fit(images, outcomes, judge) if self.given is not None else pick(images, outcomes, self.count, judge)

    def _pool(self, prompt: PromptLike, pictures: Sequence[Visual]) -> list[Visual]:
        """The images that anchors of this prompt are, or are taken from."""
        if self.given is not None:
            return self._given_images(prompt)
        distinct = distinct_of(pictures)
        if len(distinct) < 2:
            raise InputError(
                f"prompt {as_prompt(prompt).text!r} has one image in its first call, and anchors are taken from "
                "several different ones; hand over a whole group first, or give anchors for each prompt"
            )
        return distinct

    def _given_images(self, prompt: PromptLike) -> list[Visual]:
        text = as_prompt(prompt).text
        if isinstance(self.given, Mapping):
            images = self.given.get(prompt, self.given.get(text))
        else:
            images = None if self.given is None else self.given(prompt)
        if images is None:
            raise InputError(f"anchors has no images for prompt {text!r}; add some, or leave anchors out")
        return distinct_of(to_visuals(images, field=f"anchors[{text!r}]"))

    def state(self) -> dict[str, Any]:
        """What was fitted, by `Prompt.key`, as `Anchors.to_dict` has it."""
        return dict(self.kept)

    def load(self, state: Mapping[str, Any]) -> None:
        """Puts a `state` in the place of what was fitted.

        Raises:
            InputError: it is none.
        """
        for kept in state.values():
            Anchors.from_dict(kept)
        self.kept.clear()
        self._same.clear()
        self.kept.keep(state) if isinstance(self.kept, AnchorFile) else self.kept.update(state)


def _without_failures(n: int, said: Iterable[tuple[int, int, Verdict | None]]) -> list[int]:
    """The images that are left when those with the most failed comparisons go, until none of the failed are left."""
    failed = [(i, j) for i, j, verdict in said if verdict is None]
    left = list(range(n))
    while failed:
        worst = max(left, key=lambda place: sum(place in pair for pair in failed))
        left.remove(worst)
        failed = [pair for pair in failed if worst not in pair]
    return left


def read_images(path: Path) -> dict[str, list[Path]]:
    """The image files of each prompt, from a JSON file `{"prompt": ["a.png", ...], ...}`, relative to its folder.

    Raises:
        InputError: the file cannot be read, is of another form, or names an image that is not there.
    """
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"anchors {path} cannot be read as JSON ({error}); give {{prompt: [image files]}}, or a folder that "
            "`listener-reward anchors` made"
        ) from error
    texts = isinstance(named, dict) and all(
        isinstance(files, list) and files and all(isinstance(file, str) for file in files) for files in named.values()
    )
    if not texts:
        raise InputError(f"anchors {path} is no object of lists of texts; give {{prompt: [image files]}}")
    found = {prompt: [path.parent / file for file in files] for prompt, files in named.items()}
    check_there("anchors", path, [file for files in found.values() for file in files])
    return found


def read_folder(folder: Path) -> AnchorFolder:
    """The anchors in a folder that `listener-reward anchors` made.

    Raises:
        InputError: there is no `anchors.jsonl`, a line is of another form, or a picture is missing.
    """
    lines = read_lines(folder)
    if not lines:
        raise InputError(f"anchors {folder} has no {LINES} with a line; make one by `listener-reward anchors`")
    for line in lines.values():
        files, scores = line.get("images"), line.get("scores")
        numbers = [line.get("votes"), *scores] if isinstance(scores, list) else [None]
        if not (
            isinstance(files, list)
            and all(isinstance(file, str) for file in files)
            and all(isinstance(number, int | float) for number in numbers)
            and isinstance(line.get("judge"), str)
        ):
            raise InputError(f"{folder / LINES} has the line {str(line)[:60]}, which cannot be read; make it anew")
    check_there("anchors", folder, [folder / file for line in lines.values() for file in line["images"]])
    return AnchorFolder(folder, lines)


def read_lines(folder: Path) -> dict[str, dict[str, Any]]:
    """The whole lines of a folder's `anchors.jsonl`, by prompt; what a kill cut short is passed over."""
    path = folder / LINES
    found: dict[str, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("prompt"), str):
            found[line["prompt"]] = line
    return found


def add_line(folder: Path, prompt: str, files: Sequence[str], anchors: Anchors) -> None:
    """Appends the anchors of a prompt, whose pictures lie in the folder already. A line is whole or passed over."""
    line = {"prompt": prompt, "images": list(files), "scores": list(anchors.scores), "votes": anchors.votes}
    with (folder / LINES).open("ab") as file:
        file.write(("\n" + json.dumps(line | {"judge": anchors.judge}, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def fill_folder(
    folder: Path,
    prompts: Sequence[str],
    images_of: Callable[[str], Sequence[Any]],
    judge: PairJudge,
    count: int,
) -> Iterator[tuple[str, Anchors | JudgeError | None]]:
    """Makes the anchors of prompts that a folder lacks, one prompt after the other.

    Each is in the folder, with its pictures, before the next is begun; so a run that was stopped goes on where it was.

    Args:
        folder: made where it is missing.
        prompts: no two equal.
        images_of: gives the images of a prompt that anchors are taken from, two different ones or more.
        judge: compares them.
        count: how many of them become anchors, spread over their quality.

    Yields:
        Each prompt with its anchors; with None where they were there before; with the error where the judge broke.

    Raises:
        InputError: the folder has anchors of another judge, or images that cannot be used.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, there = identity_of(judge), read_lines(folder)
    if others := {str(line.get("judge")) for line in there.values()} - {name}:
        raise InputError(
            f"{folder} has anchors by the judge {min(others)!r}, and this is {name!r}; give another folder"
        )
    for prompt in prompts:
        if prompt in there:
            yield prompt, None
            continue
        images = distinct_of(to_visuals(images_of(prompt), field=f"images of {prompt!r}"))
        if len(images) < 2:
            raise InputError(
                f"prompt {prompt!r} has {len(images)} different image; give at least two to take anchors from"
            )
        try:
            anchors = pick(images, compared(judge, prompt, images, pairings(len(images))), count, name)
        except JudgeError as error:
            yield prompt, error
            continue
        files = [f"{hashlib.blake2b(prompt.encode(), digest_size=6).hexdigest()}-{k}.png" for k in range(len(anchors))]
        for file, image in zip(files, anchors.images, strict=True):
            if isinstance(image, Clip):
                raise InputError(f"images of {prompt!r} are clips; a folder of anchors has pictures only")
            write_bytes(folder / file, png_of(image.image))
        add_line(folder, prompt, files, anchors)
        yield prompt, anchors
