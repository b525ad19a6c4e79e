"""Best of 16 by the judge, against the best of the same 16 by an oracle that knows the true utility.

    python tests/benchmarks/best_of_16.py --prompts 40

The tiny diffusion model draws 16 pictures for each prompt; `listener_reward.tiny.read` measures their true utility,
which neither the model nor the judge sees. Printed: one sample, the judge's best, the oracle's best, and which fraction
of the oracle's gain over one sample is the judge's, with a 95 % bootstrap interval over prompts.
"""

from __future__ import annotations

import argparse
import random

import numpy as np
from tqdm import tqdm

from listener_reward import ListenerReward
from listener_reward.integrations.best_of_n import best_of_n
from listener_reward.tiny.diffusion import CALL, any_prompt, load_pipeline
from listener_reward.tiny.read import read
from listener_reward.tiny.world import wording


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="the judge without its thoughts")
    parser.add_argument("--weights", help="another pipeline's folder")
    parser.add_argument("--sheets", help="a folder for contact sheets")
    args = parser.parse_args()

    pipeline = load_pipeline(args.weights) if args.weights else load_pipeline()
    reward = ListenerReward("tiny", batch_size=64, think=not args.fast)
    rows = []
    for index in (bar := tqdm(range(args.prompts))):
        rng = random.Random(f"best-of-16/{args.seed}/{index}")
        wanted = any_prompt(rng)
        prompt = wording(wanted, rng)
        best = best_of_n(pipeline, prompt, args.n, reward=reward, seed=1000 * index, batch_size=args.n, **CALL)
        true = [read(picture).utility(wanted) for picture in best.candidates]
        rows.append((np.mean(true), true[best.order[0]], max(true)))
        one, judged, oracle = np.mean(rows, axis=0)
        bar.set_postfix(one=f"{one:.2f}", judge=f"{judged:.2f}", oracle=f"{oracle:.2f}")
        if args.sheets:
            best.contact_sheet().save(f"{args.sheets}/{index:03d} {prompt}.png")

    table = np.array(rows)
    draws = np.random.default_rng(0).integers(len(table), size=(10_000, len(table)))
    ones, judges, oracles = table[draws].mean(1).T
    low, high = np.quantile((judges - ones) / (oracles - ones), [0.025, 0.975])
    one, judged, oracle = table.mean(0)
    print(
        f"true utility of one sample {one:.3f}, best of {args.n} by judge {judged:.3f}, by oracle {oracle:.3f}, "
        f"the judge's fraction of the gain {(judged - one) / (oracle - one):.3f} ({low:.3f} to {high:.3f}), "
        f"{args.prompts} prompts"
    )


if __name__ == "__main__":
    main()
