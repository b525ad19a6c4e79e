"""`python -m listener_reward.cli`, which is how launchers start `train`."""

from listener_reward.cli import main

if __name__ == "__main__":
    main()
