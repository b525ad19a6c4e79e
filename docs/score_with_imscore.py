"""Scores of imscore's models for `listener-reward eval --scores`, from an environment that has only imscore.

imscore 0.0.11 was written for transformers 4, and this package needs 5: some of its models do not load there. So the
pictures of a data set are listed where listener-reward is installed, and scored where imscore is:

    python docs/score_with_imscore.py list --data hpdv2:FOLDER --to pictures
    python -m venv imscore-env
    imscore-env/bin/pip install imscore "transformers<5" pillow
    imscore-env/bin/python docs/score_with_imscore.py score --model ImageReward --to pictures > ImageReward.jsonl
    listener-reward eval --data hpdv2:FOLDER --scores ImageReward.jsonl --judge tiny

A picture that comes back in many pairs is scored once for each prompt. Left out: batches, for imscore takes pictures of
one size at a time; and data without `item_first` and `item_second`, whose pictures have no published names.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

MODELS = {
    "ImageReward": ("imscore.imreward.model", "RE-N-Y/ImageReward", 1.0),
    "HPSv2": ("imscore.hps.model", "RE-N-Y/hpsv21", 100.0),
    "HPSv3": ("imscore.hpsv3.model", "RE-N-Y/hpsv3", 1.0),
    "MPS": ("imscore.mps.model", "RE-N-Y/mpsv1", 1.0),
    "PickScorer": ("imscore.pickscore.model", "RE-N-Y/pickscore", 1.0),
    "CLIPScore": ("imscore.preference.model", "RE-N-Y/clipscore-vit-large-patch14", 1.0),
    "SiglipPreferenceScorer": ("imscore.preference.model", "RE-N-Y/pickscore-siglip", 1.0),
    "CycleReward": ("imscore.cyclereward.model", "NagaSaiAbhinay/CycleReward-Combo", 1.0),
    "EvalMuse": ("imscore.evalmuse.model", "RE-N-Y/evalmuse", 1.0),
    "VQAScore": ("imscore.vqascore.model", "RE-N-Y/clip-t5-xxl", 1.0),
    "ShadowAesthetic": ("imscore.aesthetic.model", "RE-N-Y/aesthetic-shadow-v2", 1.0),
    "LAIONAestheticScorer": ("imscore.aesthetic.model", "RE-N-Y/laion-aesthetic", 1.0),
}
"""Class to its module, its weights, and what its score is multiplied by to be log-odds."""


def list_pictures(data: str, folder: Path) -> None:
    """Writes `pictures.jsonl`: prompt, published name, and a file for each picture; embedded ones are written out."""
    from listener_reward.datasets import load_pairs

    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[tuple[str, str], None] = {}
    with (folder / "pictures.jsonl").open("w", encoding="utf-8") as file:
        for row in load_pairs(data, stream=True):
            for side, image in zip(("item_first", "item_second"), row["images"], strict=True):
                if row.get(side) is None:
                    raise SystemExit(f"{data} has no {side} for pair {row['id']}: its pictures have no published names")
                if (row["prompt"], row[side]) in seen:
                    continue
                seen[row["prompt"], row[side]] = None
                path = image["path"] and Path(image["path"]).resolve()
                if image["bytes"] is not None:
                    path = (folder / f"{len(seen)}.picture").resolve()
                    path.write_bytes(image["bytes"])
                line = {"prompt": row["prompt"], "image": row[side], "file": str(path)}
                file.write(json.dumps(line) + "\n")


def score(name: str, folder: Path) -> None:
    """Prints a score for each picture that was listed."""
    import torch
    from PIL import Image

    module, weights, scale = MODELS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = getattr(importlib.import_module(module), name).from_pretrained(weights).eval().to(device)
    for line in (folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        picture = Image.open(row.pop("file")).convert("RGB")
        flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).to(device)
        pixels = flat.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            found = model.score(pixels, [row["prompt"]])
        print(json.dumps(row | {"score": scale * float(found.float().reshape(-1)[0])}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("list", "score"))
    parser.add_argument("--data", help="for list: what `eval --data` takes")
    parser.add_argument("--model", choices=MODELS, default="ImageReward", help="for score: a class of imscore")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the list is")
    options = parser.parse_args()
    if options.step == "list":
        if options.data is None:
            parser.error("list needs --data")
        list_pictures(options.data, options.to)
    else:
        score(options.model, options.to)


if __name__ == "__main__":
    main()
