"""The shared-prefix engine: images and prompt once for a group, then its continuations."""

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault
