"""Whether a server gives the scores that a client wants: by the same scheme, or none at all.

Scores by a reference and scores within a group look alike. A trainer that normalises within groups learns from either,
and nobody sees that it compares less than it could, or that the zero of its scores moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from listener_reward.errors import InputError

from .collector import GroupCollector


class OtherScheme(InputError):
    """The server answers by another scheme than the request wants."""


def scheme_of(reward: Any) -> str | None:
    """What `reward` compares an image with: one of `Scheme`; None where a callable does not say."""
    return "group" if isinstance(reward, GroupCollector) else getattr(reward, "scheme", None)


def check_scheme(reward: Any, wanted: str | None, prompts: Sequence[Any]) -> None:
    """Raises `OtherScheme` unless `reward` scores images of these prompts by the scheme that is `wanted`.

    `auto` is group for a prompt with two images or more in the request and reference for one that stands alone, so it
    agrees with either where the request leaves no choice. Anchors keep what a reference promises, scores of all calls
    on one scale.
    """
    has = scheme_of(reward)
    if wanted is None or wanted == has:
        return
    promised = "reference" if has == "anchors" and wanted != "anchors" else has
    if promised is None or _in(promised, prompts) != _in(wanted, prompts):
        start = "with --scheme group, --scheme auto or --group-size" if wanted == "group" else f"with --scheme {wanted}"
        raise OtherScheme(
            f"the client wants scores by scheme {wanted!r}, and this server answers by {has!r}; start `listener-reward "
            f"serve` {start}, or ask for scheme {has!r}"
        )


def _in(scheme: str, prompts: Sequence[Any]) -> str:
    """What `scheme` is for a request with these prompts."""
    if scheme != "auto":
        return scheme
    lone = [times == 1 for times in Counter(map(str, prompts)).values()]
    return "reference" if all(lone) else "auto" if any(lone) else "group"
