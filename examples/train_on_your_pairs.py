"""Train a judge on your own preference pairs, and ask it about one of them.

    python examples/train_on_your_pairs.py                              # writes some pairs of the tiny world first
    python examples/train_on_your_pairs.py --data pairs.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct --tokens 512

A line of the file is a pair: a prompt, two image files, and the fraction of people who prefer the first. `-h` lists
what else to set for a large model. The same without a script is `listener-reward train --config train.yaml`.
"""

import argparse
import json
from pathlib import Path

from listener_reward import Judge
from listener_reward.datasets import load_pairs
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.world import split_pairs
from listener_reward.train.run import main as train


def write_some(folder: Path, n: int) -> Path:
    """Pairs in the generic format, as your own would be."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.jsonl").open("w") as file:
        for k, pair in enumerate(split_pairs("train", n)):
            names = [f"{k}-{side}.png" for side in "ab"]
            for name, picture in zip(names, draw_pair(pair), strict=True):
                picture.save(folder / name)
            row = {"prompt": pair.wording, "image_first": names[0], "image_second": names[1], "p_first": pair.p_first}
            file.write(json.dumps(row) + "\n")
    return folder / "pairs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="your pairs; some are written if left out")
    parser.add_argument("--model", default="tiny-base", help="the reasoner to start from")
    parser.add_argument("--listener", default="tiny-listener", help="whom it must convince")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--groups", type=int, default=2, help="prompts in a step")
    parser.add_argument("--tokens", type=int, default=48, help="longest completion")
    parser.add_argument("--out", type=Path, default=Path("your-judge"))
    args = parser.parse_args()

    data = args.data or write_some(args.out / "pairs", n=16)
    generations = 4
    options = {
        "data": data,
        "model_name_or_path": args.model,
        "listener": args.listener,
        "output_dir": args.out,
        "max_steps": args.steps,
        "num_generations": generations,
        "per_device_train_batch_size": args.groups * generations,
        "max_completion_length": args.tokens,
        "learning_rate": 1e-4 if args.model.startswith("tiny") else 1e-6,
        "logging_steps": 1,
        "report_to": "none",
    }
    train([word for name, value in options.items() for word in (f"--{name}", str(value))])

    pair = load_pairs(str(data), limit=1)[0]
    first, second = pair["images"]
    verdict = Judge.from_pretrained(args.out).compare(pair["prompt"], first, second)
    print(f"{pair['prompt']}: p(first) = {verdict.p_first:.2f}, people say {pair['p_first']:.2f}")
    print(verdict.thoughts[0].text)


if __name__ == "__main__":
    main()
