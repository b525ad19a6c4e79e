"""`AbsoluteReward`: a model that scores every image for itself, as the scalar reward that trainers call."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.forks import renew
from listener_reward.media.storyboards import to_visuals
from listener_reward.pairs import PromptLike, with_sources
from listener_reward.peers import is_peer, load_peer

if TYPE_CHECKING:
    from listener_reward.peers.scorers import ScoreJudge


class AbsoluteReward:
    """`reward(images, prompts, metadata) -> (scores, info)` by PickScore, CLIP, imscore's models, or a Bradley-Terry
    model of one's own.

    A score depends on its image and prompt alone, so that scores of different calls and steps are on one scale. Like a
    `ListenerReward` it is a plain callable without gradient, thread-safe, and pickles by name; the model is loaded on
    first use.
    """

    __name__ = "absolute_reward"  # trainers name a reward in their logs by this

    def __init__(self, scorer: str | ScoreJudge):
        """
        Args:
            scorer: a peer's name, such as "bradley-terry:runs/votes" or "pickscore", or a `ScoreJudge`, which pickles
                if its model does.

        Raises:
            InputError: the name is none of a peer that scores single images.
        """
        if isinstance(scorer, str) and (not is_peer(scorer) or scorer.startswith("openai")):
            raise InputError(
                f"scorer is {scorer!r}; give a peer that scores single images: bradley-terry:FOLDER, pickscore, clip, "
                "imscore:MODEL"
            )
        self.scorer = scorer
        self._loaded: Any = None
        self._lock = threading.Lock()
        renew(self)

    def __call__(
        self, images: Any, prompts: Sequence[PromptLike], metadata: Any = None, *, sources: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores a batch; the arguments are those of `ListenerReward`.

        Returns:
            Scores, float32 (B,), in log-odds (higher is better), and no info.

        Raises:
            InputError: unusable images, sources or prompts, lengths that differ, or sources that the model cannot read.
            JudgeError: the model gave a score that is no finite number.
        """
        visuals = to_visuals(images)
        asked = with_sources(prompts, len(visuals), metadata, sources)
        with self._lock:
            if self._loaded is None:
                self._loaded = load_peer(self.scorer) if isinstance(self.scorer, str) else self.scorer
            return np.array(self._loaded.score_many(asked, visuals), dtype=np.float32), {}

    def __repr__(self) -> str:
        return f"AbsoluteReward({self.scorer if isinstance(self.scorer, str) else self.scorer.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"scorer": self.scorer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["scorer"])

    def after_fork(self) -> None:
        """For the child of a fork, in which no lock is held; a model by name is loaded anew."""
        self._lock = threading.Lock()
        if isinstance(self.scorer, str):
            self._loaded = None
