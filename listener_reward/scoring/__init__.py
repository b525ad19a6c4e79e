"""Bulk scoring: a judge's verdicts on any number of pairs, a row a pair, kept as they come."""

from listener_reward.errors import missing

if fault := missing("data", "scoring in bulk"):
    raise fault

from listener_reward.scoring.cluster import Cluster
from listener_reward.scoring.run import Scored, score_pairs
from listener_reward.scoring.table import COLUMNS, read_verdicts

__all__ = ["COLUMNS", "Cluster", "Scored", "read_verdicts", "score_pairs"]
