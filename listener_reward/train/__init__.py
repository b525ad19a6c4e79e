"""Trains a reasoner on trl: listener-shaped GRPO, and the supervised baseline it is measured against.

Raises:
    MissingExtraError: on import, where the extra `train` is not installed.
"""

from listener_reward.errors import missing

if fault := missing("train", "training"):
    raise fault
