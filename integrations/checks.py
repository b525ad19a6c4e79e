"""What may not go into a reward beside wrong prompts (`pairs.check_prompts`): groups of one, and edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from listener_reward.errors import InputError


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
