"""Sample n images of a prompt, let the judge compare them, keep the best: quality without any training.

    python examples/best_of_n.py "two red circles" --n 8

Everything here is the embedded tiny world, on CPU. For your own: any diffusers pipeline, and
`ListenerReward()` or a checkpoint of yours.
"""

import argparse
from pathlib import Path

from listener_reward import ListenerReward
from listener_reward.integrations.best_of_n import best_of_n
from listener_reward.tiny.diffusion import WEIGHTS, build_pipeline, load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="two red circles")
    parser.add_argument("--n", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--preview-steps", type=int, help="reject clear losers after so few steps")
    parser.add_argument("--out", type=Path, default=Path("best-of-n"))
    args = parser.parse_args()

    # Without the embedded weights the images are noise, and the judge has nothing to choose between.
    pipeline = load_pipeline() if WEIGHTS.exists() else build_pipeline()
    best = best_of_n(
        pipeline,
        args.prompt,
        n=args.n,
        reward=ListenerReward("tiny"),
        preview_steps=args.preview_steps,
        num_inference_steps=args.steps,
        guidance_scale=1.5,
    )

    args.out.mkdir(parents=True, exist_ok=True)
    best.images[0].save(args.out / "best.png")
    best.contact_sheet().save(args.out / "sheet.png")
    for place, k in enumerate(best.order, start=1):
        print(f"{place}. seed {best.seeds[k]}  {best.scores[k]:+.2f} ± {best.standard_errors[k]:.2f}")
    print(f"best.png and sheet.png are in {args.out}")


if __name__ == "__main__":
    main()
