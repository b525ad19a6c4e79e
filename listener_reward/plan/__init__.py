"""`listener-reward plan`: what a run needs of a GPU, from the checkpoint's configuration and the data alone."""

from importlib.metadata import version
from importlib.util import find_spec

from listener_reward.errors import MissingExtraError, missing

if fault := missing("judge", "a plan"):
    raise fault
if find_spec("transformers.vision_utils") is None:
    raise MissingExtraError(
        f"a plan needs transformers>=5.19, and {version('transformers')} is installed: plan elsewhere, "
        "or pip install -U transformers"
    )
