"""uvicorn's HTTP/1.1 with deadlines for slow clients, and with a refusal's reason in the status line.

uvicorn alone waits for a head or a body as long as a client takes: who sends a byte a second holds a connection for
ever.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

from listener_reward.errors import missing

from .limits import Limits
from .replies import REASON

if fault := missing("serve", "a server"):
    raise fault

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

_HEAD = 2**16


class _Connection(h11.Connection):
    def send(self, event: Any) -> Any:
        if isinstance(event, h11.Response):
            reasons = [value for name, value in event.headers if name == REASON]
            event = h11.Response(
                status_code=event.status_code,
                headers=[(name, value) for name, value in event.headers if name != REASON],
                reason=reasons[0] if reasons else event.reason,
            )
        return super().send(event)


class Protocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, limits: Limits, **options: Any):
        super().__init__(*args, **options)
        self.conn = _Connection(h11.SERVER)
        self.limits = limits
        self._head = b""
        self._phase: str | None = None
        self._since = 0.0
        self._came = 0  # bytes, in this phase
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            logger.warning("more than %d connections", self.limits.connections)
            self._refuse(503, "too many connections are open", b"Retry-After: 1\r\n")
        else:
            self._enter("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._came += len(data)
        self._head = (self._head + data)[:_HEAD] if self.conn.their_state is h11.IDLE else b""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self._head = b""
        super().on_response_complete()
        if not self.transport.is_closing():
            if self.conn.their_state is h11.SEND_BODY:  # it was answered before its end, which is read for nobody
                self._enter("rest")
            else:
                self._enter(None)
                self._watch()

    def send_400_response(self, msg: str) -> None:
        """What h11 refuses. A length that cannot be taken has a status of its own."""
        found = re.search(rb"^content-length:[ \t]*([^\r\n]*)", self._head, re.I | re.M)
        given = b"0" if found is None else found[1].strip()
        digits = given.lstrip(b"0") or b"0"
        length = f"send at most {self.limits.body} bytes, and say how many"
        if not given.isdigit():
            self._refuse(411, length)
        elif len(digits) > 12 or int(digits) > self.limits.body:
            self._refuse(413, length)
        else:
            self._refuse(400, "this is no HTTP request")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch(self) -> None:
        """What of a request is being waited for."""
        if self.transport.is_closing():
            return self._enter(None)
        theirs = self.conn.their_state
        if theirs is h11.SEND_BODY:
            phase = "rest" if self._phase == "rest" else "body"
        else:
            phase = "head" if theirs is h11.IDLE and self.conn.trailing_data[0] else None
        if phase != self._phase:
            self._enter(phase)

    def _enter(self, phase: str | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._phase, self._since, self._came = phase, self.loop.time(), 0
        if phase is not None:
            self._timer = self.loop.call_later(self._left(), self._late)

    def _left(self) -> float:
        """Seconds until the client is too slow."""
        if self._phase == "head":
            allowed = self.limits.head_seconds
        elif self._phase == "body":
            allowed = self.limits.body_seconds + self._came / self.limits.rate
        else:
            allowed = self.limits.body_seconds
        return self._since + allowed - self.loop.time()

    def _late(self) -> None:
        left = self._left()
        if left > 0:
            self._timer = self.loop.call_later(left, self._late)
            return
        logger.info("%s is too slow (%s)", self.client, self._phase)
        if self._phase == "rest" or not (self._head or self._phase == "body"):
            self.transport.abort()
        else:
            self._refuse(408, f"the {self._phase} of the request did not come in time")

    def _refuse(self, status: int, detail: str, headers: bytes = b"") -> None:
        """An answer to what is no request yet, past h11 and the application, and the end of the connection."""
        body = json.dumps({"detail": detail}).encode()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%sConnection: close\r\n\r\n%s"
            % (status, detail.encode(), len(body), headers, body)
        )
        self.transport.close()
