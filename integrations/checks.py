"""What may not go into a reward beside wrong prompts and groups of one (see `pairs`): edits."""

from __future__ import annotations

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
