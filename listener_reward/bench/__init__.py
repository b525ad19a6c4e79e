"""`listener-reward bench`: what the shared prefix costs beside plain transformers and stock trl; random weights."""

from listener_reward.errors import missing

if fault := missing("judge", "a benchmark"):
    raise fault
