"""The server's answers: JSON, and refusals that say why in the status line, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from listener_reward.errors import missing

if fault := missing("serve", "a server"):
    raise fault

from starlette.responses import Response

REASON = b"x-reason"
"""A header that `protocol.Protocol` puts into the status line: of a refusal Flow-Factory's client shows no more."""


class Reply(Response):
    """JSON without NaN. An ASGI application, too, which answers so whatever it is asked."""

    media_type = "application/json"

    def __init__(self, status: int, body: Any, headers: Mapping[str, str] | None = None):
        """
        Raises:
            ValueError, RecursionError: the body is no JSON.
        """
        super().__init__(json.dumps(body, allow_nan=False).encode(), status, headers)


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Reply:
    """`{"detail": ...}`."""
    reply = Reply(status, {"detail": detail}, headers)
    reason = "".join(sign if " " <= sign <= "~" else "?" for sign in " ".join(detail.split())[:300])
    reply.raw_headers.append((REASON, reason.encode()))
    return reply
