"""What every use of Ray here has in common: a Ray that is started on this machine lets nobody else in."""

from __future__ import annotations

import os
import secrets
import sys


def address_of(given: str | None) -> str | None:
    """The cluster to ask: the one that is given, or that RAY_ADDRESS names; None for a Ray of one's own.

    The ports of a Ray are open to the network, and whoever is let in can run code. One's own therefore gets a token,
    unless the process has imported Ray already, which reads it when imported, or says itself how it is protected.
    """
    address = given or os.environ.get("RAY_ADDRESS")
    if not address and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return address
