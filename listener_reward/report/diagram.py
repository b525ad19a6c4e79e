"""A reliability diagram as a drawing of its own: how sure a judge was against how many people agreed."""

from __future__ import annotations
