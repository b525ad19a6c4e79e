"""What every use of Ray here has in common: how it is reached, and that one's own lets nobody else in."""

from __future__ import annotations

import os
import secrets
import sys
from importlib import import_module
from typing import Any, NamedTuple

from listener_reward.errors import InputError, missing


class Connected(NamedTuple):
    """Ray, as this process has it."""

    ray: Any
    """The package; by name, so that its types are not asked for where it is not installed."""
    begun: bool
    """Whether the connection was made here, so that who asked for it ends it."""
    own: bool
    """Whether no cluster is named, and a Ray on this machine is meant."""


def connected(address: str | None, what: str, **own: Any) -> Connected:
    """The cluster at `address`, or at RAY_ADDRESS, or a Ray of one's own on this machine; or what is connected already.

    The ports of a Ray are open to the network, and whoever is let in can run code. One's own therefore gets a token,
    unless the process has imported Ray already, which reads it when imported, or says itself how it is protected.

    Args:
        address: a cluster's, such as "auto" or "ray://head:10001".
        what: what needs Ray, for the message where it is not installed.
        own: further arguments of `ray.init` for a Ray of one's own.

    Raises:
        InputError: no cluster is at the address.
        MissingExtraError: Ray is not installed.
    """
    if fault := missing("ray", what):
        raise fault
    address = address or os.environ.get("RAY_ADDRESS")
    if not address and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray: Any = import_module("ray")
    if ray.is_initialized():
        return Connected(ray, begun=False, own=not address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **({} if address else own))
    except ConnectionError as error:
        raise InputError(f"no Ray is at {address!r} ({last_line(error)}); start one by `ray start`") from None
    return Connected(ray, begun=True, own=not address)


def last_line(error: BaseException) -> str:
    """Of an error of Ray's, which come with a page of another process's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
