"""Who may ask: a token, a Host that is this server's, no other web page, and JSON only. All before a body is read.

Browsers send what a web page tells them to, to this machine too. A page of another origin is refused by its `Origin`; a
page whose name was pointed at this machine (DNS rebinding) by its `Host`; a form by its content type.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from listener_reward.errors import InputError
from listener_reward.remote import API_KEY_VARIABLE

from .replies import Reply, refusal

OPEN = ("/health", "/ready", "/openapi.json", "/docs")
"""What may be asked without a token: by probes, and by people who look for how to ask."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def check_exposure(host: str, token: str | None, insecure: bool) -> None:
    """Refuses to listen beyond this machine without a token.

    Raises:
        InputError: what to do about it; or the token is one that nobody could send.
    """
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token or len(token) < 8):
        raise InputError("the API key has to be 8 or more printable ASCII characters, without spaces")
    if token is None and not insecure and not is_loopback(host):
        raise InputError(
            f"host is {host}, which others can reach, without an API key; set {API_KEY_VARIABLE}, or give --insecure"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """An ASGI application in front of another one, which asks it only what may be asked."""

    def __init__(self, app: App, *, host: str, token: str | None, names: Iterable[str] = ()):
        """
        Args:
            app: who answers.
            host: the address that the server listens on.
            token: what clients have to send; None asks for none.
            names: names that the server is called by, beside those of this machine; "*" allows every name.
        """
        self.app = app
        self._digest = None if token is None else _digest(token)
        self._names = {"localhost", host.lower(), socket.gethostname().lower(), *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        scope["authorized"] = self._authorized(headers)
        refusal = self._refusal(scope["method"], scope["path"], headers, scope["authorized"])
        await (self.app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, method: str, path: str, headers: list[tuple[str, str]], authorized: bool) -> Reply | None:
        given = dict(headers)
        name = _name(given.get("host", "localhost"))
        if not self._is_own(name):
            return refusal(421, f"{name[:80]!r} is no name of this server; start it with --allow-host to make it one")
        if method not in ("GET", "HEAD"):
            origin, site = given.get("origin"), given.get("sec-fetch-site", "same-origin")
            if (origin is not None and origin.partition("://")[2] != given.get("host")) or site not in (
                "same-origin",
                "none",
            ):
                return refusal(403, "a web page of another origin asks, which this server does not answer")
            kind = given.get("content-type", "application/json").partition(";")[0].strip().lower()
            if kind != "application/json":
                return refusal(415, f"the content type is {kind[:80]!r}; send application/json")
        if not authorized and not path.endswith(OPEN):
            detail = (
                f"the API key is missing or wrong; send it as 'Authorization: Bearer ...', or set {API_KEY_VARIABLE}"
            )
            return refusal(401, detail, {"WWW-Authenticate": "Bearer"})
        return None

    def _is_own(self, name: str) -> bool:
        """An address is: a web page's name cannot be one."""
        if "*" in self._names or name.lower().rstrip(".") in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _authorized(self, headers: list[tuple[str, str]]) -> bool:
        if self._digest is None:
            return True
        sent = [value for name, value in headers if name == "authorization"]
        return len(sent) == 1 and hmac.compare_digest(_digest(_token(sent[0])), self._digest)


def _digest(token: str) -> bytes:
    """Of equal length whatever was sent, so that a comparison says nothing about how much was right."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _token(sent: str) -> str:
    """Of a Bearer, or the password of a Basic: what HTTP clients make of http://any:TOKEN@host."""
    kind, _, value = sent.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2]
        except binascii.Error:
            return ""
    return ""


def _name(host: str) -> str:
    """A Host without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
