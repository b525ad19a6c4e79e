"""Train a diffusion model on the judge's reward, and see its pictures before and after.

    python examples/ddpo.py          # about ten minutes on a laptop; nearly the settings of docs/ddpo.md
    python examples/ddpo.py --edits  # an editor, whose prompts have an image each; the judge sees it too

Everything here is the embedded tiny world, on CPU. For your own: any diffusers pipeline of the families in
docs/ddpo.md, your prompts, `ListenerReward()` or a checkpoint of yours, and a lower learning rate.
"""

import argparse
import random
from typing import Any

from PIL import Image

from listener_reward import ListenerReward
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer
from listener_reward.tiny.diffusion import CALL, load_pipeline
from listener_reward.tiny.editing import draw_work, load_editor, sample_work

PROMPTS = [
    f"{count} {color} {shape}{'s' * (count != 'one')}"
    for count in ("one", "two", "three")
    for color in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "star")
]


def edits(n: int) -> list[dict[str, Any]]:
    """Instructions, each with the picture to edit."""
    drawn = [sample_work(random.Random(k), lies=0.0, held=False) for k in range(n)]
    return [{"prompt": edit.wording, "image": draw_work(edit)[0]} for edit in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", action="store_true", help="train the embedded editor")
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
    load: Any = load_editor if args.edits else load_pipeline
    prompts = edits(300) if args.edits else [{"prompt": text} for text in PROMPTS]
    trainer = DDPOTrainer(load(), ListenerReward("tiny"), prompts, config)
    trainer.train(resume=args.resume)

    first, last = (f"{args.out}/samples/epoch-{epoch:05d}.png" for epoch in (0, len(trainer.history)))
    print(f"the same prompts and seeds: before {first}, after {last}")
    print(f"agreement of the listener, last epoch: {trainer.history[-1]['agreement']:.2f}")

    # The LoRA is an ordinary one.
    pipeline = load()
    pipeline.load_lora_weights(args.out)
    picture = pipeline(**prompts[0], **CALL).images[0]
    picture.resize((384, 384), Image.Resampling.NEAREST).save(f"{args.out}/picture.png")


if __name__ == "__main__":
    main()
