"""Makes the embedded weights: `python -m listener_reward.recipes.pretrain`.

Three models of one architecture, seeded, in about two hours on two cores:

- `base`: the reasoner that GRPO starts from. Imperfect on purpose, as an instruction-tuned VLM is: its descriptions
  err, and its answer follows its own description only most of the time.
- `listener`: another seed, whose thoughts are true and whose answers follow from them. It has never read a false
  thought, and would believe one; that it doubts what it would not have written itself is `Listener.grounding`.
- `judge`: the base, taught to look closely at drawn and at generated pictures, then trained by listener-shaped GRPO on
  votes about both, and last taught to be as sure as people are; `ListenerReward("tiny")` loads it.

Each learns as large VLMs do, in stages: the language model reads text alone, until it can tell whether a description
fits a prompt; the vision tower learns to see with a throw-away classifier, because shapes are slow to be found through
the language model's loss; then both learn together to describe pictures; last, the base learns its imperfection.
When all three are made, they learn edits (`recipes.edits`), and the judge is calibrated on votes about pairs and edits
that no split's default seed has.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from PIL import Image
from transformers import AutoModelForImageTextToText

from listener_reward.card import Card
from listener_reward.datasets import load_pairs
from listener_reward.evaluate.calibrate import calibrate
from listener_reward.files import write_text
from listener_reward.judge import Judge
from listener_reward.recipes.edits import BASE, MAX_NEW_TOKENS, TAUGHT, learn_edits
from listener_reward.recipes.lessons import (
    DISTURBED,
    LITTERED,
    Lesson,
    Mixed,
    Shown,
    any_pairs,
    drawn_lessons,
    drawn_pictures,
    voters,
)
from listener_reward.recipes.teaching import (
    FORMAT,
    SCENES,
    Stage,
    run_stages,
    save,
    teach_to_read,
    teach_to_see,
    teach_to_speak,
)
from listener_reward.recipes.variants import (
    LISTENER_SHAPED,
    SPLITS,
    VARIANTS,
    Recipe,
    card_row,
    evaluate_splits,
    train_variant,
)
from listener_reward.recipes.workers import Report, run_side_by_side
from listener_reward.tiny.diffusion import WEIGHTS as DIFFUSION
from listener_reward.tiny.edits import EDIT_SPLITS
from listener_reward.tiny.generated import samples
from listener_reward.tiny.models import build_model, build_processor
from listener_reward.tiny.thoughts import reasoner_example
from listener_reward.tiny.world import Scene, TinyPair

WEIGHTS_DIR = Path(__file__).parents[1] / "tiny" / "weights"


READ = {"steps": 400, "batch": 64, "rate": 2e-3}
SEE = {"steps": 2200, "batch": 64, "rate": 2.5e-3}
SPEAK = {"steps": 400, "batch": 32, "rate": 1e-3}
FINISH = {"steps": 300, "batch": 32, "rate": 7e-4}
"""The four stages, in this order."""

STUDIED = {"prompts": 6000, "seed": 2}
"""Prompts of which the judge studies two generated pictures each."""

LOOK = {"steps": 4000, "batch": 64, "rate": 1.5e-3}
TELL = {"steps": 3000, "batch": 32, "rate": 7e-4}
"""What the judge learns of drawn and generated pictures between the base and GRPO. Some of the thoughts are read there
and not spoken (`lessons.DISTURBED`), so that the answer follows the pictures whatever stands before it."""

JUDGE = {"steps": 80, "drawn": 1500, "generated": 1500}
"""Its GRPO: half the steps of the demo's, because it begins better, and the pairs of each kind that it sees there."""

WEIGH = {"steps": 2500, "batch": 32, "rate": 5e-4}
"""And after GRPO, which rewards an answer for being sure: the same lessons again, in which an answer is "1" as often as
people prefer the first image. How sure the judge is then adds up over pairs, which `Judge.rank` lives on."""

SAMPLING_TEMPERATURE = 0.2
"""Of the judge's thoughts, once it judges: fewer slips than at 1, and several thoughts still differ."""

CALIBRATION: dict[str, Any] = {"data": ("tiny:id", "tiny:edit"), "limit": 6000, "seed": 1}
"""The pairs and edits whose votes calibrate the judge, so many of each. Evaluations draw theirs with seed 0 unless told
otherwise."""


def make(report: Report, kind: str, seed: int, out: str, scratch: str, fraction: float = 1.0) -> str:
    """Pretrains one model, "base" or "listener", and saves it as a checkpoint in half precision.

    A `fraction` below 1 shortens every stage: a model of the same kind that has learnt less.

    After each stage all that the next one needs is kept in `scratch`, so that an interrupted run goes on from there
    and ends with the same weights.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{kind}/{seed}")
    processor = build_processor()
    model = build_model(processor.tokenizer)

    def plain(pair: Shown) -> tuple[str, int]:
        return reasoner_example(pair, rng)

    def finished(pair: Shown) -> tuple[str, int]:
        return reasoner_example(pair, rng, **BASE) if kind == "base" else plain(pair)

    def pairs(n: int) -> list[TinyPair]:
        return any_pairs(rng, n)

    def pictures(n: int) -> tuple[list[Scene], list[Image.Image]]:
        return drawn_pictures(rng, n)

    def lessons(n: int) -> list[Lesson]:
        return drawn_lessons(rng, n)

    read, see, speak, finish = (
        stage | {"steps": max(1, round(stage["steps"] * fraction))} for stage in (READ, SEE, SPEAK, FINISH)
    )
    stages: list[Stage] = [
        (read, lambda tell: teach_to_read(model, processor, plain, pairs, read, tell)),
        (see, lambda tell: teach_to_see(model, processor, pictures, see, tell, SCENES)),
        (speak, lambda tell: teach_to_speak(model, processor, plain, lessons, speak, tell)),
        (
            finish | (BASE if kind == "base" else {}),
            lambda tell: teach_to_speak(model, processor, finished, lessons, finish, tell),
        ),
    ]
    run_stages(report, stages, model, rng, Path(scratch, f"{kind}-{seed}"))
    card = Card(
        format=FORMAT,
        listener=None if kind == "listener" else "tiny-listener",
        listener_grounding=Recipe.grounding,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    save(model, processor, card, out)
    return out


def gather(report: Report, scratch: str) -> str:
    """Generates the pictures that the judge studies, in pairs of one prompt, and keeps them in `scratch`."""
    denoiser = (DIFFUSION / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    kept = Path(scratch, f"generated-{hashlib.sha256(repr(STUDIED).encode() + denoiser).hexdigest()[:8]}.pt")
    if not kept.exists():
        groups = []
        for group in islice(samples(seed=STUDIED["seed"], each=2), STUDIED["prompts"]):
            groups.append(group)
            if len(groups) % 60 == 0:
                report(len(groups), STUDIED["prompts"], "generates")
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(groups, kept)
    return str(kept)


def make_attentive(report: Report, out: str, scratch: str, generated: str) -> str:
    """Trains the base in `out` further, on generated pictures too, and saves it in `scratch` as the judge's start.

    A judge of generated pictures has to see them: on what the tiny diffusion model draws the base mistakes every second
    shape.
    """
    mixed = Mixed(torch.load(generated, weights_only=False), random.Random("attentive"))
    processor = build_processor()
    model = AutoModelForImageTextToText.from_pretrained(Path(out, "base"), dtype=torch.float32, trust_remote_code=False)
    stages: list[Stage] = [
        (LOOK | STUDIED, lambda tell: teach_to_see(model, processor, mixed.pictures, LOOK, tell, SCENES)),
        (
            TELL | DISTURBED | {"prompts": LITTERED},
            lambda tell: teach_to_speak(model, processor, mixed.example, mixed.lessons, TELL, tell, mixed.disturb),
        ),
    ]
    torch.manual_seed(0)
    run_stages(report, stages, model, mixed.rng, Path(scratch, "attentive"))
    attentive = str(Path(scratch, "attentive"))
    save(model, processor, Card.load(Path(out, "base")), attentive)
    return attentive


def make_judge(report: Report, out: str, scratch: str, generated: str) -> str:
    """Trains the attentive reasoner by the demo's listener-shaped recipe, lets it weigh, and saves it in `out`."""
    recipe = replace(_recipe(Path(out)), base=str(Path(scratch, "attentive")), steps=JUDGE["steps"])
    trained = Path(scratch, "judge")
    pairs = concatenate_datasets(
        [
            load_pairs(f"tiny:{split}", limit=JUDGE[kind], seed=1)
            for split, kind in (("train", "drawn"), ("generated", "generated"))
        ]
    )
    train_variant(report, weights=VARIANTS[LISTENER_SHAPED], out=str(trained), seed=0, recipe=recipe, pairs=pairs)
    mixed = Mixed(torch.load(generated, weights_only=False), random.Random("judge"))
    processor = build_processor()
    model = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float32, trust_remote_code=False)

    def weigh(tell: Callable[[int, str], None]) -> None:
        teach_to_speak(model, processor, mixed.example, mixed.lessons, WEIGH, tell, mixed.disturb, voters)

    run_stages(report, [(WEIGH | DISTURBED | {"prompts": LITTERED}, weigh)], model, mixed.rng, Path(scratch, "judge"))
    card = replace(Card.load(trained), listener="tiny-listener", sampling_temperature=SAMPLING_TEMPERATURE)
    save(model, build_processor(), card, Path(out, "judge"))
    return str(Path(out, "judge"))


def calibrate_judge(report: Report, out: str) -> None:
    """Fits how sure the judge in `out` may be, with thoughts and without, and keeps it in its card."""
    limit, seed = CALIBRATION["limit"], CALIBRATION["seed"]
    pairs = concatenate_datasets([load_pairs(spec, limit=limit, seed=seed) for spec in CALIBRATION["data"]])
    folder = Path(out, "judge")
    for done, (field, think) in enumerate({"calibration": True, "fast_calibration": False}.items()):
        report(done, 2, field)
        judge = Judge.from_pretrained(folder, listener=str(Path(out, TAUGHT["listener"])), batch_size=128, think=think)
        Card.amend(folder, **{field: calibrate(judge, pairs, progress=False).calibration})
    report(2, 2, "")


def write_card(out: Path) -> None:
    """Measures base and judge on every split and on generated pictures, and writes `README.md` beside the weights."""
    evaluations = run_side_by_side(
        {
            f"judging with the {name}": (
                evaluate_splits,
                {"model": str(out / name), "splits": splits, "pairs": 400, "listener": str(out / listener)},
            )
            for name, listener, splits in (
                ("base", "listener", CARD_SPLITS),
                (TAUGHT["base"], TAUGHT["listener"], (*CARD_SPLITS, *EDIT_SPLITS[1:])),
                (TAUGHT["judge"], TAUGHT["listener"], (*CARD_SPLITS, *EDIT_SPLITS[1:])),
            )
        }
    )
    rows = []
    for name, table in evaluations.items():
        for split, scores in table.items():
            rows.append(card_row(name.split()[-1], split, scores))
    made = "base", "listener", *TAUGHT.values()
    size = sum(path.stat().st_size for name in made for path in (out / name).iterdir()) / 1e6
    write_text(out / "README.md", CARD_TEXT.format(size=size, rows="\n".join(rows)))


CARD_SPLITS = (*SPLITS, "generated")

CARD_TEXT = """# The embedded tiny models

Five Qwen2.5-VL models of 1.1 million parameters in float16, {size:.1f} MB together, for the tiny world only (one to
three flat coloured shapes, and edits of pictures of them). Made, and this card written, by

```bash
python -m listener_reward.recipes.pretrain
```

which is seeded and takes about two hours on two cores. With `--edits-only` it begins with models that judge pictures
alone.

- `base`: an imperfect reasoner; what GRPO starts from (`"tiny-base"`).
- `listener`: another seed, honest and right (`"tiny-listener"`).
- `edit-base`, `edit-listener`: the same two after lessons in edits, half of them, and in what they could do before
  (`"tiny-edit-base"`, `"tiny-edit-listener"`).
- `judge`: the base after lessons in drawn and in generated pictures, listener-shaped GRPO on votes about both, lessons
  in how sure people are, and lessons in edits as those two had (`"tiny"`); `edit-listener` is its listener.

`relation-base` and `relation-listener` (`"tiny-relation-base"`, `"tiny-relation-listener"`) are not made by this script
and judge other pictures: [relations.md](relations.md) is about them.

Beside them, `diffusion` draws pictures and `editor` edits them: diffusers pipelines with cards of their own.

Accuracy against the majority of fifteen voters on 400 pairs of each split, both orders averaged, with its 95 %
interval; a contradiction is a thought whose listener prefers the other image. Then the accuracy of the listener after
reading that model's thoughts, and the expected calibration error. `generated` are pictures by the tiny diffusion model.
The judge is calibrated, in distribution, on votes about 6,000 other pairs and 6,000 other edits. With 400 pairs an ECE
is too high by chance; docs/judging.md has it for 3,000.

| model | split | accuracy | contradicted | malformed | its listener | ece |
| --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def _recipe(out: Path) -> Recipe:
    return replace(Recipe(), base=str(out / "base"), listener=str(out / "listener"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS_DIR, help="where base, listener and judge go")
    parser.add_argument("--scratch", type=Path, default=Path("tiny-pretraining"), help="where finished stages are kept")
    parser.add_argument("--seed", type=int, default=0, help="the listener's is one more")
    parser.add_argument(
        "--edits-only",
        action="store_true",
        help="begin with base, listener and judge in --out, which judge pictures alone",
    )
    args = parser.parse_args()
    out, scratch = str(args.out), str(args.scratch)
    folders = {"out": out, "scratch": scratch}
    if not args.edits_only:
        run_side_by_side(
            {
                kind: (make, {"kind": kind, "seed": seed, "out": str(args.out / kind), "scratch": scratch})
                for kind, seed in {"base": args.seed, "listener": args.seed + 1}.items()
            }
        )
    folders |= run_side_by_side({"generated": (gather, {"scratch": scratch})})
    if not args.edits_only:
        for name, stage in {"attentive": make_attentive, "judge": make_judge}.items():
            run_side_by_side({name: (stage, folders)})
    run_side_by_side({f"{kind}, edits": (learn_edits, folders | {"kind": kind}) for kind in TAUGHT})
    run_side_by_side({"calibration": (calibrate_judge, {"out": out})})
    write_card(args.out)


if __name__ == "__main__":
    main()
