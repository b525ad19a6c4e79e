"""`listener-reward plan`: what a run needs of a GPU, from the checkpoint's configuration and the data alone."""

from listener_reward.errors import missing

if fault := missing("judge", "a plan"):
    raise fault
