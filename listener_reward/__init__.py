"""An image-preference judge that thinks, is checked by a listener, and serves as a reward for image generators.

    reward = ListenerReward("tiny")
    scores, info = reward(images, prompts)    # or RemoteReward("http://127.0.0.1:8300"), of `listener-reward serve`

    judge = Judge.from_pretrained("tiny")
    verdict = judge.compare(prompt, first, second)

Importing this package loads neither torch nor transformers: every public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from listener_reward.errors import InputError, JudgeError
    from listener_reward.judge import Judge
    from listener_reward.mixture import Mixture
    from listener_reward.pairs import PreferencePair, Prompt
    from listener_reward.ranking import Ranking
    from listener_reward.remote import RemoteReward
    from listener_reward.reward import ListenerReward
    from listener_reward.verdict import Verdict

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Judge",
    "JudgeError",
    "ListenerReward",
    "Mixture",
    "PreferencePair",
    "Prompt",
    "Ranking",
    "RemoteReward",
    "Verdict",
]

_HOME = {
    "InputError": "errors",
    "Judge": "judge",
    "JudgeError": "errors",
    "ListenerReward": "reward",
    "Mixture": "mixture",
    "PreferencePair": "pairs",
    "Prompt": "pairs",
    "Ranking": "ranking",
    "RemoteReward": "remote",
    "Verdict": "verdict",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
