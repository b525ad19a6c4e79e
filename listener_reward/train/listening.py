"""Who listens in a training run: the listener that the configuration names, loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from listener_reward.errors import InputError
from listener_reward.listener import OWN_BASE, Listener, choose_listener, load_listener, options_of_listener
from listener_reward.models.hub import lasting, same_checkpoint
from listener_reward.models.options import is_address
from listener_reward.train.config import ListenerGRPOConfig
from listener_reward.train.policy import Policy
from listener_reward.train.sharing import unsharded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Audience:
    """Who listens to a run, before the policy's weights are loaded."""

    listener: Listener | None
    """None where nobody listens, or the policy's own base, whose weights come with the policy's."""
    own_base: bool
    name: str | None
    """Of the listener's checkpoint, for the card of the trained judge. None leaves the card as it is."""


def load_audience(
    policy: Policy, args: ListenerGRPOConfig, given: Listener | None, *, adapters: bool, kernel: str
) -> Audience:
    """The listener that a configuration names.

    Args:
        policy: that is to be trained.
        args: the configuration.
        given: a listener that is loaded already; None loads the configuration's.
        adapters: whether the policy gets adapters, which alone leave it a base to listen.
        kernel: one of `attention.KERNELS`.

    Raises:
        InputError: the listener cannot be loaded, or cannot listen to this policy; or nobody listens, and a reward
            needs it.
    """
    own_base = given is None and args.listener == OWN_BASE
    if own_base:
        _check_own_base(args, adapters)
    listener = given if given is not None or own_base else _load(policy, args, kernel)
    if listener is None and not own_base and args.gain_weight:
        raise InputError("gain_weight needs a listener, and there is none; name one, or leave it out")
    named = choose_listener(args.listener, None)
    if named is None or is_address(named):  # where this run's listener was is no checkpoint
        return Audience(listener, own_base, None)
    return Audience(listener, own_base, lasting(policy.name if own_base else str(named)))


def _check_own_base(args: ListenerGRPOConfig, adapters: bool) -> None:
    if not adapters:
        raise InputError(
            "listener is 'base', the policy with its adapters off, and full fine-tuning has no adapters; give "
            "use_peft: true, or name a checkpoint as the listener"
        )
    if args.listener_options:
        raise InputError(
            f"listener_options is {args.listener_options}, and listener 'base' is the policy itself, loaded as the "
            "policy is; leave one of them out"
        )


def _load(policy: Policy, args: ListenerGRPOConfig, kernel: str) -> Listener | None:
    """The listener that the configuration or else the policy's card names; None if there is none and its reward weight
    is 0.

    Behind an address there is the listener of the card, or the policy's checkpoint where the card has none. A listener
    of the policy's own checkpoint has its revision, unless `listener_options` have another.
    """
    name, backend = choose_listener(args.listener or None, policy.card.listener), None
    if is_address(name):
        name, backend = policy.card.listener or policy.folder, str(name)
    if name is None:
        if args.listener_options:
            raise InputError(f"listener_options is {args.listener_options}, and there is no listener; leave it out")
        if args.reward_weights is not None and args.reward_weights[2] == 0:
            return None
        raise InputError(
            f"listener is {args.listener!r} and the policy's checkpoint names {policy.card.listener!r}; give a "
            "checkpoint, or 'base' with LoRA, or reward_weights: [1, 1, 0] for accuracy-only GRPO"
        )
    return _load_named(policy, args, name, kernel, backend)


def _load_named(
    policy: Policy, args: ListenerGRPOConfig, name: str | Path, kernel: str, backend: str | None = None
) -> Listener:
    """The listener `name`, as the configuration has listeners loaded."""
    options = {
        "device": args.device,
        "dtype": args.listener_dtype,
        "batch_size": args.listener_batch_size,
        "shared_prefix": args.share_listener,
        "token_budget": args.token_budget,
        "max_pixels": args.max_pixels,
    }
    own: Any = args.listener_options
    if policy.revision is not None and same_checkpoint(name, policy.folder):
        own = {"revision": policy.revision} | (own or {})
    if backend is not None:
        own = (own or {}) | {"backend": backend}
    elif (own or {}).get("revision") is not None:
        logger.warning(
            "the trained judge names its listener %r without a revision; give listener_options={'revision': %r} where "
            "it is loaded",
            name,
            own["revision"],
        )
    with unsharded():
        return load_listener(name, policy.card, attention=kernel, **options_of_listener(options, own))
