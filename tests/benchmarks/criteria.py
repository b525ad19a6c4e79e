"""What several criteria of a pair cost: one, three, and three without a shared prefix, in one run.

    python tests/benchmarks/criteria.py

Prints the Markdown table of docs/criteria.md; about three minutes of one core. "general" is the question without a
criterion. Each row judges the same pairs, in both orders, in one call. Ways take turns, and each one's least time
counts, of the processor and not of the clock, beside the tokens that the language models read in it. Images are not
cached from run to run. The shape "60m" has random weights and no listener, 392 pixels and the default questions; its
thoughts are cut at 32 tokens. "tiny" is the embedded judge with three short criteria in its card, and its listener.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from listener_reward import Judge, Prompt
from listener_reward.bench.shapes import Size, build_checkpoint, pictures
from listener_reward.card import Card
from listener_reward.chat import CRITERIA
from listener_reward.errors import FormatWarning, UnknownWordsWarning
from listener_reward.models.hub import resolve
from listener_reward.prefix.attention import base_model
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.world import split_pairs

Ask = Callable[[Judge, int], None]
SHORT = {"color": "which color is right ?", "count": "which count is right ?", "shape": "which shape is right ?"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="Times each way is run.")
    parser.add_argument("--pixels", type=int, default=392, help='Edge of the images of "60m".')
    args = parser.parse_args()
    warnings.simplefilter("ignore", FormatWarning)
    warnings.simplefilter("ignore", UnknownWordsWarning)
    print("| judge | mode | asked | s a pair | times | tokens read a pair | times |")
    print("| --- | --- | --- | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as folder:
        size = Size(pixels=args.pixels, tokens=32)
        build_checkpoint(Path(folder), size)
        shape: dict[str, Any] = {"device": "cpu", "listener": "none"}
        first, second = pictures(2, size)
        pairs = [("two red circles beside a blue square", first, second)]
        for mode, think in (("fast", False), ("thinking", True)):
            judges = load(folder, think=think, **shape)
            measure("60m", mode, judges, pairs, CRITERIA[:3], args.repeats)
    card = Card.load(resolve("tiny")).format.to_dict() | {"criteria": SHORT}
    drawn = [(pair.wording, *draw_pair(pair)) for pair in split_pairs("id", 8)]
    for mode, think in (("fast", False), ("thinking", True)):
        judges = load("tiny", think=think, device="cpu", card={"format": card, "listener": "tiny-listener"})
        measure("tiny", mode, judges, drawn, tuple(SHORT), args.repeats)


def load(name: Any, **options: Any) -> dict[bool, Judge]:
    """A judge with a shared prefix, and one without."""
    given = {"batch_size": 64, **options}  # what is asked in one call is one batch
    return {shared: Judge.from_pretrained(name, shared_prefix=shared, **given) for shared in (True, False)}


def measure(
    name: str, mode: str, judges: dict[bool, Judge], pairs: list[Any], criteria: tuple[str, ...], repeats: int
) -> None:
    ways = {
        "general": (True, (None,)),
        "one criterion": (True, criteria[:1]),
        "three criteria": (True, criteria),
        "three, no shared prefix": (False, criteria),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens: dict[str, int] = {}
    for _ in range(repeats):
        for way, (shared, asked) in ways.items():
            took, read = once(judges[shared], pairs, asked)
            seconds[way].append(took)
            tokens[way] = read
    one, few = min(seconds["one criterion"]), tokens["one criterion"]
    for way in ways:
        took, read = min(seconds[way]), tokens[way]
        print(
            f"| {name} | {mode} | {way} | {took / len(pairs):.3f} | {took / one:.2f} "
            f"| {read / len(pairs):,.0f} | {read / few:.2f} |",
            flush=True,
        )


def once(judge: Judge, pairs: list[Any], asked: tuple[str | None, ...]) -> tuple[float, int]:
    """Seconds of the processor, and tokens of the language models, of judging all pairs by all that is asked."""
    vlms: list[Any] = [judge.reasoner, *([] if judge.listener is None else [judge.listener.vlm])]
    counts: list[int] = []
    hooks = []
    for vlm in {id(vlm.model): vlm for vlm in vlms}.values():
        vlm.features.clear()
        layer = base_model(vlm.model).model.language_model.layers[0]
        hooks.append(layer.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[:2].numel())))
    prompts = [Prompt(text, (), criterion) for text, _, _ in pairs for criterion in asked]
    firsts, seconds = ([pair[side] for pair in pairs for _ in asked] for side in (1, 2))
    start = time.process_time()
    judge.compare_many(prompts, firsts, seconds)
    took = time.process_time() - start
    for hook in hooks:
        hook.remove()
    return took, sum(counts)


if __name__ == "__main__":
    main()
