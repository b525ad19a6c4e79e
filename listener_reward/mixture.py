"""`Mixture`: several rewards as one, by weights, with each of them logged.

    Mixture({ListenerReward("tiny"): 1.0, aesthetic: 0.2})
    Mixture({"listener": (ListenerReward("tiny"), 1.0), "clip": (clip_score, 0.5)}, combine="group")

A component is any reward of the contract, `(images, prompts, metadata) -> (scores, info)`; docs/contract.md has what
the mixture makes of their scores and of their failures. Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from listener_reward.advantages import normalised_sum
from listener_reward.batching import Unwanted
from listener_reward.criteria import check_weight
from listener_reward.errors import InputError, JudgeError, MissingExtraError, check_choice
from listener_reward.pairs import PromptLike, check_company, key_of, with_sources
from listener_reward.reward import Reward, Scheme, read_scores

Combine = Literal["sum", "group"]
ComponentFailure = Literal["raise", "nan", "drop-component"]

logger = logging.getLogger(__name__)


class Mixture:
    """Scores images by several rewards: `mixture(images, prompts, metadata) -> (scores, info)`.

    A `Mixture` is a plain callable: no gradient, and as thread-safe as its components. It pickles by its configuration,
    if its components pickle.
    """

    __name__ = "mixture"  # trainers name a reward in their logs by this

    def __init__(
        self,
        rewards: Mapping[Any, Any],
        *,
        combine: Combine = "sum",
        on_failure: ComponentFailure = "raise",
    ):
        """
        Args:
            rewards: each component with its weight, a finite number other than 0: `{reward: weight}`, or
                `{"name": (reward, weight)}`. A component without a name has its function's, or its class's; of equal
                ones the second becomes `clip_2`.
            combine: "sum" adds the weighted scores. "group" first brings each component to mean 0 and standard
                deviation 1 among the images of a prompt in the call, so that none drowns the others by its scale (GDPO,
                arXiv 2601.05242; `advantages.normalised_sum` has the equation).
            on_failure: what becomes of an image to which a component gave no score (NaN), and of a component that
                raised; nowhere does its weight go to the others:

                - "raise": the image has no score (NaN), and what was raised goes on to the caller;
                - "nan": as a NaN for every image of the call, so that none has a score;
                - "drop-component": all images of that prompt are scored without the component, so that they stay
                  comparable. An image to which no component gave a score has none, and drops nothing.

        Raises:
            InputError: no components, names or weights that cannot be, or an unknown choice.
        """
        for field, value, allowed in (("combine", combine, Combine), ("on_failure", on_failure, ComponentFailure)):
            check_choice(field, value, get_args(allowed))
        self.rewards, self.weights = _read(rewards)
        self.combine: Combine = combine
        self.on_failure: ComponentFailure = on_failure
        self._told: set[str] = set()  # components whose first failure has been told

    @property
    def scheme(self) -> Scheme | None:
        """What an image's score depends on.

        "group": whole groups in one call, because a component says so, or the mixture compares a prompt's images with
        one another (`combine="group"`, `on_failure="drop-component"`). Else "auto", "reference" or "anchors",
        if a component says so; None if none says anything.
        """
        if self.combine == "group" or self.on_failure == "drop-component":
            return "group"
        said = [getattr(reward, "scheme", None) for reward in self.rewards.values()]
        neediest_first: tuple[Scheme, ...] = ("group", "auto", "reference", "anchors")
        return next((scheme for scheme in neediest_first if scheme in said), None)

    def __call__(
        self, images: Any, prompts: Sequence[PromptLike], metadata: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores a batch by every component, one after the other.

        Args:
            images: B images of a kind that every component takes.
            prompts: their B prompts; images with equal prompts form a group. Prompts with other sources are others.
            metadata: B entries, handed on to every component; None becomes B empty dicts.

        Returns:
            Scores, float32 `(B,)`, NaN where missing, and a dict of float32 arrays `(B,)`:

            - `failed`: 1 where the image has no score, else 0;
            - `dropped`: how many components were left out of the image's score;
            - `standard_error` of the score, with `combine="sum"`, if every component reports its own. Their errors are
              taken as independent;
            - for each component `NAME/score`, as the component gave it, before any weight; `NAME/missing`, 1 where it
              gave none; and `NAME/...` for each entry of its own info that is a number for each image.

        Raises:
            InputError: unusable images or prompts, or a prompt with one image where `scheme` is "group".
            JudgeError: a component gave something else than B numbers.
            Exception: what a component raised, with `on_failure="raise"`.
        """
        asked = with_sources(prompts, len(images), metadata)
        if self.scheme == "group":
            check_company(asked)
        given = tuple({} for _ in prompts) if metadata is None else metadata
        infos = {name: self._ask(name, images, prompts, given) for name in self.rewards}
        components = {name: info[f"{name}/score"] for name, info in infos.items()}
        groups = np.unique([key_of(prompt) for prompt in asked], return_inverse=True)[1]
        dropped, scored = self._mask(np.isnan([*components.values()]), groups)

        kept = {
            name: np.where(out, 0 if self.combine == "sum" else np.nan, values)
            for (name, values), out in zip(components.items(), dropped, strict=True)
        }
        if self.combine == "group":
            lone = np.bincount(groups[scored], minlength=len(groups))[groups] == 1  # the others of its group failed
            scored &= ~lone
            scores, _ = normalised_sum(kept, self.weights, groups, scored)
        else:
            scores = np.where(scored, sum(self.weights[name] * values for name, values in kept.items()), np.nan)
        info = {"failed": (~scored).astype(np.float32), "dropped": dropped.sum(0).astype(np.float32)}
        errors = {name: infos[name].get(f"{name}/standard_error") for name in self.rewards}
        if self.combine == "sum" and all(error is not None for error in errors.values()):
            parts = [
                np.where(out, 0, self.weights[name] * np.asarray(errors[name])) ** 2
                for name, out in zip(errors, dropped, strict=True)
            ]
            info["standard_error"] = np.where(scored, np.sqrt(sum(parts)), np.nan).astype(np.float32)
        return scores.astype(np.float32), info | {
            key: values for part in infos.values() for key, values in part.items()
        }

    def prefer_device(self, device: Any) -> None:
        """For hosts that name a device: tells the components that ask for one; see `ListenerReward.prefer_device`."""
        for reward in self.rewards.values():
            prefer = getattr(reward, "prefer_device", None)
            if prefer is not None:
                prefer(device)

    def state_dict(self) -> dict[str, Any]:
        """What the components remember, by name; see `ListenerReward.state_dict`."""
        return {name: reward.state_dict() for name, reward in self._remembering().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives each component what it remembered.

        Raises:
            InputError: it is no `state_dict` of this mixture.
        """
        rewards = self._remembering()
        if not isinstance(state, Mapping) or set(state) != set(rewards):
            raise InputError(
                f"state is {state!r:.80}; give what state_dict() of a Mixture of {', '.join(rewards) or 'nothing'} gave"
            )
        for name, reward in rewards.items():
            reward.load_state_dict(state[name])

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return f"Mixture({parts}, combine={self.combine!r}, on_failure={self.on_failure!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_told": set()}

    def _ask(self, name: str, images: Any, prompts: Sequence[PromptLike], metadata: Any) -> dict[str, np.ndarray]:
        """The entries that the component `name` has in the mixture's info."""
        n = len(prompts)
        try:
            with _no_gradient():
                given, own = self.rewards[name](images, prompts, metadata)
        except (InputError, MissingExtraError, Unwanted):
            raise  # not the component's fault: the caller's, or the environment's; or nobody waits for the answer
        except Exception as error:
            if self.on_failure == "raise":
                raise
            scores, entries = np.full(n, np.nan, dtype=np.float32), {}
            self._tell(name, f"raised {type(error).__name__}: {error}", error)
        else:
            try:
                scores, entries = read_scores(given, own, n)
            except JudgeError as error:
                raise JudgeError(f"component {name!r}: {error}") from error
            if np.isinf(scores).any():
                raise JudgeError(f"component {name!r} gave an infinite score; give NaN for a missing one")
            if np.isnan(scores).any() and self.on_failure != "raise":
                self._tell(name, f"gave no score to {int(np.isnan(scores).sum())} of {n} images")
        missing = np.isnan(scores).astype(np.float32)
        return {f"{name}/{entry}": values for entry, values in entries.items()} | {
            f"{name}/score": scores,
            f"{name}/missing": missing,
        }

    def _tell(self, name: str, what: str, error: Exception | None = None) -> None:
        if name in self._told:
            return
        self._told.add(name)
        then = {"nan": "these images have no score", "drop-component": "their prompts are scored without it"}
        logger.warning(
            "component %r %s; %s. This is told once: info counts it from here on, in %r and %r",
            *(name, what, then[self.on_failure], f"{name}/missing", "dropped"),
            exc_info=error,
        )

    def _mask(self, missing: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which component (K, B) is left out of which image's score, and which images (B,) have a score at all."""
        if self.on_failure != "drop-component":
            return np.zeros_like(missing), missing.sum(0) == 0
        lost = missing.all(0)
        dropped = np.zeros_like(missing)
        for group in np.unique(groups):
            members = (groups == group) & ~lost
            dropped[:, members] = missing[:, members].any(1, keepdims=True)
        return dropped, ~(lost | np.all(dropped, axis=0))

    def _remembering(self) -> dict[str, Any]:
        return {name: reward for name, reward in self.rewards.items() if remembers(reward)}


def remembers(reward: Any) -> bool:
    """Whether a reward has a state to keep. An `nn.Module`'s state does not count: its weights do not change here."""
    torch = sys.modules.get("torch")
    has_state = hasattr(reward, "state_dict") and hasattr(reward, "load_state_dict")
    return has_state and (torch is None or not isinstance(reward, torch.nn.Module))


def _read(rewards: Any) -> tuple[dict[str, Reward], dict[str, float]]:
    """Components and weights by name."""
    if not isinstance(rewards, Mapping) or not rewards:
        raise InputError(f"rewards is {rewards!r:.80}; give {{reward: weight}}, or {{'name': (reward, weight)}}")
    components: dict[str, Any] = {}
    weights: dict[str, float] = {}
    given = [key for key in rewards if isinstance(key, str)]
    for key, value in rewards.items():
        if isinstance(key, str):
            name = key
            if not (isinstance(value, (tuple, list)) and len(value) == 2):
                raise InputError(f"rewards[{key!r}] is {value!r:.80}; give (reward, weight) with a name")
            reward, weight = value
        else:
            reward, weight = key, value
            name = _free(_name_of(key), {*components, *given})
        if not name.strip() or "/" in name:
            raise InputError(f"a component is named {name!r}; give a name without '/', which joins it to its entries")
        if not callable(reward):
            raise InputError(
                f"component {name!r} is a {type(reward).__name__}; give a callable, such as ListenerReward('tiny')"
            )
        components[name], weights[name] = reward, check_weight(name, weight)
    return components, weights


def _name_of(reward: Any) -> str:
    """`clip_score` of a function, a partial of it or an object with that `__name__`; `clip_score` of a `ClipScore`."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    name = getattr(reward, "__name__", None) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(reward).__name__).lower()
    return re.sub(r"\W+", "_", name).strip("_") or "reward"  # <lambda>


def _free(name: str, taken: set[str]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


def _no_gradient() -> Any:
    """Torch's `no_grad` where torch is in use, so that a component with weights keeps no graph."""
    torch = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None else torch.no_grad()
