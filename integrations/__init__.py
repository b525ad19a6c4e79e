"""One file per host, thin: each turns that host's calls into `listener_reward` calls and imports nothing else.

Import these modules as `listener_reward.integrations.<host>`; the bare name `integrations` is a second copy of them.
"""
