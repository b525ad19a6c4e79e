"""Measures reranking of videos in the tiny world: among n clips of a prompt, is a right one put first?

    python tests/benchmarks/videos.py --prompts 60 --strategy frames

A clip is a clean drawing that drifts over the picture. It is right if its colour, shape and count are the prompt's;
each goes wrong with probability 0.35, and a prompt is used if some of its clips are right and some are not.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace

from rich.progress import track

from listener_reward.evaluate.intervals import wilson
from listener_reward.integrations.video import read_clips
from listener_reward.judge import Judge
from listener_reward.tiny.motion import draw_clip
from listener_reward.tiny.world import sample_candidate, sample_prompt, utility, wording


def group(rng: random.Random, n: int):
    """A prompt's wording, its scenes, and which of them are right."""
    prompt = sample_prompt(rng, held=False)
    while True:
        scenes = [replace(sample_candidate(prompt, rng), quality="clean") for _ in range(n)]
        right = [utility(prompt, scene) == utility(prompt, prompt) for scene in scenes]
        if any(right) and not all(right):
            return wording(prompt, rng), scenes, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--strategy", default="frames", choices=("frames", "storyboard", "clip", "video"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    judge = Judge.from_pretrained("tiny", clips=args.strategy)
    hits, chance = 0, 0.0
    for index in track(range(args.prompts), disable=not sys.stderr.isatty()):
        rng = random.Random(f"videos/{args.seed}/{index}")
        prompt, scenes, right = group(rng, args.clips)
        clips = read_clips([draw_clip(scene, rng) for scene in scenes], frames=args.frames)
        hits += right[judge.rank(prompt, clips).order[0]]
        chance += sum(right) / len(right) / args.prompts
    low, high = wilson(hits, args.prompts) or (0.0, 1.0)
    print(
        f"{args.strategy}: a right clip first in {hits} of {args.prompts} prompts ({low:.3f} to {high:.3f}), "
        f"by chance {chance:.3f}"
    )


if __name__ == "__main__":
    main()
