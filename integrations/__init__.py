"""One file per host, thin: each turns that host's calls into `listener_reward` calls and imports nothing else.

`ddpo` is this package's own trainer of generators, `serving` puts the reward behind an address.

Import these modules as `listener_reward.integrations.<host>`; the bare name `integrations` is a second copy of them.
"""
