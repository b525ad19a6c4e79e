"""Train a diffusion model on the judge's reward, and see its pictures before and after.

    python examples/ddpo.py          # about ten minutes on a laptop; the settings of docs/ddpo.md

Everything here is the embedded tiny world, on CPU. For your own: any diffusers pipeline of the families in
docs/ddpo.md, your prompts, `ListenerReward()` or a checkpoint of yours, and a lower learning rate.
"""

import argparse
from typing import Any

from PIL import Image

from listener_reward import ListenerReward
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer
from listener_reward.tiny.diffusion import CALL, load_pipeline

PROMPTS = [
    f"{count} {color} {shape}{'s' * (count != 'one')}"
    for count in ("one", "two", "three")
    for color in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "star")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)  # longer is no better here
    parser.add_argument("--prompts", type=int, default=8, help="prompts an epoch")
    parser.add_argument("--images", type=int, default=8, help="images a prompt")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps")
    parser.add_argument("--out", default="ddpo", help="LoRA, metrics, pictures and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    config = DDPOConfig(
        output_dir=args.out,
        epochs=args.epochs,
        num_inference_steps=args.steps,
        call={"guidance_scale": CALL["guidance_scale"]},
        prompts_per_epoch=args.prompts,
        images_per_prompt=args.images,
        batch_size=args.prompts * args.images // 2,
        updates_per_epoch=2,  # the second one has ratios that are not 1, and clips them
        learning_rate=3e-3,  # thirty times what a large model bears
        clip_range=2e-3,
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    )
    trainer = DDPOTrainer(load_pipeline(), ListenerReward("tiny"), PROMPTS, config)
    trainer.train(resume=args.resume)

    first, last = (f"{args.out}/samples/epoch-{epoch:05d}.png" for epoch in (0, len(trainer.history)))
    print(f"the same prompts and seeds: before {first}, after {last}")
    print(f"agreement of the listener, last epoch: {trainer.history[-1]['agreement']:.2f}")

    # The LoRA is an ordinary one.
    pipeline: Any = load_pipeline()
    pipeline.load_lora_weights(args.out)
    picture = pipeline("two red circles", **CALL).images[0]
    picture.resize((384, 384), Image.Resampling.NEAREST).save(f"{args.out}/two-red-circles.png")


if __name__ == "__main__":
    main()
