"""Preference data of every supported format as one data set; `load` has the table of formats and columns."""

from listener_reward.errors import missing

if fault := missing("data", "reading labelled pairs"):
    raise fault

from listener_reward.datasets.load import FEATURES, FORMATS, MAX_BROKEN, is_swapped, load_pairs
from listener_reward.datasets.tiny import TINY_PAIRS

__all__ = ["FEATURES", "FORMATS", "MAX_BROKEN", "TINY_PAIRS", "is_swapped", "load_pairs"]
