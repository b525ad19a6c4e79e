"""Trains a reasoner on trl: listener-shaped GRPO, and the supervised baseline it is measured against.

Raises:
    MissingExtraError: on import, where the extra `train` is not installed.
"""

from __future__ import annotations

from importlib.util import find_spec

from listener_reward.errors import MissingExtraError

for _name in ("trl", "peft"):
    if find_spec(_name) is None:
        raise MissingExtraError(f'training needs {_name}, which is not installed: pip install "listener-reward[train]"')
