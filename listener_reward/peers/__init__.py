"""Other models as judges of pairs, so that one table says who is best on your own data.

| name | what it is | needs |
| --- | --- | --- |
| `pickscore`, `pickscore:FOLDER` | PickScore v1, or a checkpoint of that kind | nothing more |
| `clip`, `clip:FOLDER_OR_HUB_NAME` | CLIP ViT-H/14, or another CLIP | nothing more |
| `imscore:MODEL` | a model of the imscore package: ImageReward, HPSv2, HPSv3, MPS, ... | `pip install imscore` |
| `bradley-terry:FOLDER` | a model with a scalar head, trained by `train.bradley_terry` | nothing more |
| `openai:MODEL@BASE_URL` | a vision-language model behind an OpenAI-compatible endpoint | an address, extra `openai` |

A peer has what `evaluate` needs of a judge: a `name`, and `compare_many`, which gives a `Verdict` for each pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from listener_reward.peers.endpoint import EndpointJudge
    from listener_reward.peers.scorers import ScoreJudge

PEERS = ("pickscore", "clip", "imscore", "bradley-terry", "openai")


def is_peer(name: str) -> bool:
    """Whether `name` is a peer's. A folder that is called like one is meant by a path: `./clip`."""
    return name.partition(":")[0] in PEERS


def load_peer(name: str) -> ScoreJudge | EndpointJudge:
    """A peer by its name; see the table at the top of this module.

    Raises:
        InputError: the name is incomplete, or its model cannot be found or reached.
        MissingExtraError: its package is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind == "openai":
        from listener_reward.peers.endpoint import endpoint_judge

        return endpoint_judge(rest)
    from listener_reward.peers import scorers

    if kind == "imscore":
        return scorers.imscore_judge(rest)
    if kind == "bradley-terry":
        return scorers.bradley_terry_judge(rest)
    return scorers.pickscore_judge(rest) if kind == "pickscore" else scorers.clip_judge(rest)
