"""What may not go into a reward: prompts that got lost on the way, groups of one, and edits, which it cannot see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from listener_reward.errors import InputError


def check_prompts(prompts: Sequence[str], n: int) -> None:
    """Raises `InputError` unless `prompts` are `n` texts with something in them.

    An empty prompt means that it was lost on the way: the judge would answer, but not the question that was meant.
    """
    if isinstance(prompts, (str, bytes)):
        raise InputError(f"prompts is one string, {prompts[:40]!r}; give one prompt for each image")
    if not hasattr(prompts, "__len__"):
        raise InputError(f"prompts is a {type(prompts).__name__}; give a list with one prompt for each image")
    if len(prompts) != n:
        raise InputError(f"prompts has {len(prompts)} entries for {n} images; give one prompt for each image")
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompts[{position}] is a {type(prompt).__name__}; a prompt is a string")
        if not prompt.strip():
            raise InputError(f"prompts[{position}] is empty; look where the host lost it, or leave the sample out")


def check_no_source(**sources: Any) -> None:
    """Raises `InputError` where a host hands over source images: a judge that does not see them cannot judge an edit.

    Args:
        sources: what the host calls them, and what it gave; None and empty lists are none.
    """
    for name, given in sources.items():
        if given is not None and not (hasattr(given, "__len__") and len(given) == 0):
            raise InputError(
                f"{name} is given, and edits are not judged yet: without the source image an edit of another picture "
                "would score as well; take this reward for text-to-image and text-to-video only"
            )


def check_company(prompts: Sequence[str]) -> None:
    """Raises `InputError` where a prompt has one image only: there is nothing to compare it with."""
    alone = [prompt for prompt, times in Counter(map(str, prompts)).items() if times == 1]
    if alone:
        raise InputError(
            f"{len(alone)} of the prompts have one image in this call, such as {alone[0][:80]!r}, and scheme='group' "
            "compares the images of a prompt with one another; hand over whole groups, or take scheme='reference'"
        )
