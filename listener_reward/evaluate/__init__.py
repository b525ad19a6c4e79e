"""How good a judge is on labelled pairs.

`run` takes a judge's record; each other module is one part of it, or one way to look at it.
"""

from listener_reward.evaluate.run import Evaluation, evaluate, evaluate_scores

__all__ = ["Evaluation", "evaluate", "evaluate_scores"]
