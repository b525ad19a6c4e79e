"""Whole runs of training, from data to a page or to weights: the demo, and the making of the embedded checkpoints."""

from listener_reward.errors import missing

if fault := missing("train", "a run of training"):
    raise fault
