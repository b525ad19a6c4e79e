"""One evaluation on several processes, as `accelerate launch` or `torchrun` start them: each judges a part.

Every process goes through all the pairs and ends with all the verdicts, so each has the whole evaluation; the first
shows and writes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.misfits import check_format
from listener_reward.pairs import PromptLike
from listener_reward.verdict import PairJudge, Verdict

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This process's number and how many there are, as a launcher says; (0, 1) without one."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes of a launcher can be reached; the first to leave waits for none."""
    if place()[1] == 1:
        yield
        return
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo")  # only verdicts are sent, and those are no tensors on a GPU
    try:
        yield
    finally:
        if own:
            dist.destroy_process_group()


def together(work: Callable[[], T]) -> list[T]:
    """What `work` gives on every process, in their order.

    Raises:
        InputError, MissingExtraError, JudgeError: what was raised on any of them, on all of them: one that waited for
            the others would wait for ever.
    """
    found: Any = None
    try:
        found = work()
    except (InputError, MissingExtraError, JudgeError) as error:
        found = error
    everywhere: list[Any] = [found]
    if place()[1] > 1:
        import torch.distributed as dist

        everywhere = [None] * place()[1]
        dist.all_gather_object(everywhere, found)
    for each in everywhere:
        if isinstance(each, Exception):
            raise each
    return everywhere


class Divided:
    """A judge on every process, each of which judges a part of every batch: process r of n the pairs r, r + n, ...

    All processes have to call it with the same pairs.
    """

    def __init__(self, load: Callable[[], PairJudge]):
        """`load` loads this process's judge. What it raises on one process is raised on all."""
        loaded: list[PairJudge] = []
        self.name = together(lambda: loaded.append(load()) or loaded[0].name)[0]
        self.judge = loaded[0]

    def compare_many(
        self, prompts: Sequence[PromptLike], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        rank, world = place()
        mine = [column[rank::world] for column in (prompts, firsts, seconds)]
        parts = together(lambda: self.judge.compare_many(*mine, think=think) if mine[0] else [])
        verdicts: list[Any] = [None] * len(prompts)
        for number, part in enumerate(parts):
            verdicts[number::world] = part
        return verdicts

    def check_format(self) -> None:
        """As `Judge.check_format`, of every process's own answers; what a strict judge raises on one is raised on all.

        All processes have to call it.
        """
        together(lambda: check_format(self.judge))


def divided(load: Callable[[], PairJudge]) -> Callable[[], PairJudge]:
    """`load` as it is in a single process; among several, a function that loads a `Divided` judge."""
    return load if place()[1] == 1 else lambda: Divided(load)


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Inside, what all but the first process print goes nowhere."""
    if place()[0] == 0:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
