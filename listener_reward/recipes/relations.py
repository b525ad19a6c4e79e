"""How models come about that judge two groups of objects: `python -m listener_reward.recipes.relations`.

They judge nothing else. Both begin as the embedded judge, which sees one group well, and have their first lessons in
common: the language model reads about two groups, the vision tower learns to tell the places apart, then both together
describe pictures. There the ways part.

- `relation-base` learns to err, as `base` does: what training on `tiny:relation-train` starts from.
- `relation-listener` goes on with true lessons. It is of the base's own family, a better pupil and no stranger.

Each stage is kept, so that an interrupted run goes on after the last finished one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from listener_reward.card import Card
from listener_reward.files import write_text
from listener_reward.models.hub import resolve
from listener_reward.recipes.edits import with_new_words
from listener_reward.recipes.lessons import Lesson, Shown, any_relations, relation_lessons, relation_pictures
from listener_reward.recipes.teaching import (
    FORMAT,
    Sight,
    Stage,
    run_stages,
    save,
    teach_to_read,
    teach_to_see,
    teach_to_speak,
)
from listener_reward.recipes.variants import Recipe, card_row, evaluate_splits
from listener_reward.recipes.workers import Report, run_side_by_side
from listener_reward.tiny.models import build_processor
from listener_reward.tiny.relations import AXES, MOST, RELATION_SPLITS, Arrangement
from listener_reward.tiny.thoughts import reasoner_example
from listener_reward.tiny.world import COLORS, QUALITIES, SHAPES

WEIGHTS_DIR = Path(__file__).parents[1] / "tiny" / "weights"

BEGIN = "tiny"
"""The checkpoint that both begin as."""

MAX_NEW_TOKENS = 64
"""A thought about two groups has 44 tokens with its verdict, and its tags and answer seven."""

READ: dict[str, Any] = {"steps": 400, "batch": 64, "rate": 1e-3}
SEE: dict[str, Any] = {"steps": 600, "batch": 64, "rate": 1.5e-3}
SPEAK: dict[str, Any] = {"steps": 500, "batch": 32, "rate": 1e-3, "autocast": True}
"""What both have in common."""

MORE: dict[str, Any] = {"steps": 300, "batch": 32, "rate": 8e-4, "autocast": True}
"""The listener's further lessons."""

ERR: dict[str, Any] = {"steps": 200, "batch": 32, "rate": 7e-4, "autocast": True}
"""The base's last ones."""

BASE = {"error": 0.35, "whim": 0.4, "taste": 0.8, "muddle": 0.4}
"""The base's imperfection: see `thoughts.reasoner_example`. Large models, too, tell what is there better than where."""

KINDS = ("base", "listener")


def _answers(shown: Arrangement) -> list[int]:
    groups = [
        answer
        for group in (shown.first, shown.second)
        for answer in (group.count - 1, COLORS.index(group.color), SHAPES.index(group.shape))
    ]
    return [AXES.index(shown.axis), *groups, QUALITIES.index(shown.quality)]


_GROUP = (MOST, len(COLORS), len(SHAPES))

ARRANGEMENTS = Sight((len(AXES), *_GROUP, *_GROUP, len(QUALITIES)), _answers, places=9)
"""The axis, count, colour and shape of both groups, and the picture's quality."""


def learn_relations(report: Report, kind: str | None, out: str, scratch: str) -> None:
    """Teaches one of `KINDS` and saves it in `out`; with None, what both have in common, which is kept in `scratch`."""
    torch.manual_seed(0)
    rng = random.Random("relations")
    processor = build_processor(relations=True)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        resolve(BEGIN), dtype=torch.float32, trust_remote_code=False, attn_implementation="eager"
    )
    with_new_words(model, processor)

    def plain(pair: Shown) -> tuple[str, int]:
        return reasoner_example(pair, rng)

    def erring(pair: Shown) -> tuple[str, int]:
        return reasoner_example(pair, rng, **BASE)

    def pairs(n: int) -> list[Shown]:
        return [*any_relations(rng, n)]

    def pictures(n: int) -> tuple[list[Arrangement], list[Image.Image]]:
        return relation_pictures(rng, n)

    def lessons(n: int) -> list[Lesson]:
        return [*relation_lessons(rng, n)]

    def speak(stage: dict[str, Any], example: Callable[[Shown], tuple[str, int]] = plain) -> Stage:
        return stage, lambda tell: teach_to_speak(model, processor, example, lessons, stage, tell)

    stages: list[Stage] = [
        (READ, lambda tell: teach_to_read(model, processor, plain, pairs, READ, tell)),
        (SEE, lambda tell: teach_to_see(model, processor, pictures, SEE, tell, ARRANGEMENTS)),
        speak(SPEAK),
    ]
    if kind == "base":
        _, err = speak(ERR, erring)
        stages.append((ERR | BASE, err))
    elif kind == "listener":
        stages.append(speak(MORE))
    run_stages(report, stages, model, rng, Path(scratch, "relations"))
    if kind is None:
        return
    card = Card(
        format=FORMAT,
        listener=None if kind == "listener" else "tiny-relation-listener",
        listener_grounding=Recipe.grounding,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    fewer = build_processor(edits=False, relations=True)
    without_idle_words(model, processor.tokenizer, fewer.tokenizer)  # no lesson has had a word of edits
    save(model, fewer, card, Path(out, f"relation-{kind}"))


def without_idle_words(model: Any, before: Any, after: Any) -> None:
    """Leaves `model` the rows of its embeddings, which are its head's too, for the words that the tokenizer `after` has
    of those of `before`. What it says of these words to one another is what it was."""
    kept = before.convert_tokens_to_ids(after.convert_ids_to_tokens(list(range(len(after)))))
    rows = model.get_input_embeddings().weight.detach()[kept].clone()
    model.resize_token_embeddings(len(kept))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)


def write_card(out: Path) -> None:
    """Measures both, and the embedded judge, on every split of relations, and writes `relations.md` beside them."""
    listener = str(out / "relation-listener")
    measured = run_side_by_side(
        {
            name: (evaluate_splits, {"model": model, "splits": SPLITS, "pairs": PAIRS, "listener": listener})
            for name, model in {
                "relation-base": str(out / "relation-base"),
                "relation-listener": listener,
                "judge": BEGIN,
            }.items()
        },
        at_once=1,
    )
    rows = [card_row(name, split, scores) for name, table in measured.items() for split, scores in table.items()]
    size = sum(path.stat().st_size for path in out.glob("relation-*/*")) / 1e6
    write_text(out / "relations.md", CARD_TEXT.format(size=size, pairs=PAIRS, rows="\n".join(rows)))


SPLITS, PAIRS = RELATION_SPLITS[1:], 300

CARD_TEXT = """# A base and a listener of two groups

Two more Qwen2.5-VL models of 1.1 million parameters in float16, {size:.1f} MB together, which judge pictures of two
groups alone (`tiny:relation`). Made, and this card written, by

```bash
python -m listener_reward.recipes.relations
```

which is seeded and takes about ten minutes of one core. Both begin as `judge` and have their first lessons in
common.

- `relation-base`: an imperfect reasoner; what training on `tiny:relation-train` starts from (`"tiny-relation-base"`).
- `relation-listener`: more lessons, honest as far as it sees (`"tiny-relation-listener"`). It is of the base's family.

Accuracy against the majority of fifteen voters on {pairs} pairs of each split, both orders averaged, with its 95 %
interval; a judge that knows the true utility has 98 %. A contradiction is a thought whose listener prefers the other
image. Then the accuracy of the listener after reading that model's thoughts, and the expected calibration error.
`judge` is the embedded judge, which was never taught two groups.

| model | split | accuracy | contradicted | malformed | its listener | ece |
| --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS_DIR, help="where relation-base and relation-listener go")
    parser.add_argument("--scratch", type=Path, default=Path("tiny-relations"), help="where finished stages are kept")
    parser.add_argument("--at-once", type=int, default=2, help="models that learn side by side, a core each")
    args = parser.parse_args()
    folders = {"out": str(args.out), "scratch": str(args.scratch)}
    run_side_by_side({"both": (learn_relations, folders | {"kind": None})})
    run_side_by_side({kind: (learn_relations, folders | {"kind": kind}) for kind in KINDS}, at_once=args.at_once)
    write_card(args.out)


if __name__ == "__main__":
    main()
