"""How well a few anchors order images: Kendall's tau to the true utility, against the comparisons made.

    python tests/benchmarks/anchors.py --kept rounds                  # minutes on one core; comparisons are kept
    python tests/benchmarks/anchors.py --kept rounds --modes fast     # without thoughts

A prompt of the tiny world has 16 images as a generator makes them, and three pools of 8 other images that anchors are
taken from: "as good", by the same generator; "worse", by one that draws colour, shape and count at random; "noise",
which every image beats. "As good" is the start of a training run; towards its end the images have become better than
the anchors. The embedded judge compares all of them once, and every row is computed from these comparisons:
`anchors.pick` takes the anchors out of their pool, `anchors.meet` has each image meet them. The truth is
`world.utility`.

Comparisons are those of the 16 images. Anchors are compared with one another once in a run, which is not counted.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.progress import track
from scipy.stats import kendalltau

from listener_reward.anchors import Candidate, meet, pick
from listener_reward.media.storyboards import to_visuals
from listener_reward.meetings import log_odds
from listener_reward.ranking import fit_bradley_terry, pairings, rank_images
from listener_reward.tiny.drawing import draw
from listener_reward.tiny.world import sample_candidate, sample_prompt, utility, wording

IMAGES, POOL = 16, 8
MODES: dict[str, dict[str, Any]] = {"thinking": {}, "fast": {"think": False}}
POOLS = {"as good": (0.35, 0.35, 1.0), "worse": (1.0,), "noise": ()}
"""How often a picture's colour, shape and count are each drawn at random; none is a picture of noise."""

Scored = tuple[Sequence[float], int]
"""The 16 scores, and how many comparisons they rest on."""


class World:
    """A prompt, its 16 images and its pools, and the judge's opinion of every pair that a row may need."""

    def __init__(self, number: int):
        rng = random.Random(f"anchors/{number}")
        prompt = sample_prompt(rng, held=False)
        self.words = wording(prompt, rng)
        scenes = [sample_candidate(prompt, rng, rng.choice(POOLS["as good"])) for _ in range(IMAGES)]
        self.truth = [utility(prompt, scene) for scene in scenes]
        for errors in filter(None, POOLS.values()):
            scenes += [sample_candidate(prompt, rng, rng.choice(errors)) for _ in range(POOL)]
        noise = np.random.default_rng(number).integers(0, 256, (POOL, 64, 64, 3), np.uint8)
        self.images = to_visuals([*(draw(scene, rng) for scene in scenes), *noise])
        self.place = {image.digest: place for place, image in enumerate(self.images)}
        self.p = np.full((len(self.images), len(self.images)), 0.5)

    def pool(self, name: str) -> range:
        start = IMAGES + POOL * list(POOLS).index(name)
        return range(start, start + POOL)

    def judged(self, judge: Callable[[], Any], kept: str) -> World:
        """With the judge's opinions, out of files whose names begin with `kept` as far as they are there."""
        own = range(IMAGES)
        parts = {"images": [*combinations(own, 2)]}
        for name in POOLS:
            parts[name] = [*combinations(self.pool(name), 2), *((i, j) for i in own for j in self.pool(name))]
        for name, pairs in parts.items():
            file = Path(f"{kept}-{name.replace(' ', '-')}.npy")
            if not file.exists():
                firsts, seconds = [self.images[i] for i, _ in pairs], [self.images[j] for _, j in pairs]
                verdicts = judge().compare_many([self.words] * len(pairs), firsts, seconds)
                np.save(file, [verdict.p_first for verdict in verdicts])
            for (i, j), p in zip(pairs, np.load(file), strict=True):
                self.p[i, j], self.p[j, i] = p, 1 - p
        return self

    def ask(self, matches: Sequence[tuple[Any, Any, Any]]) -> list[Any]:
        """The kept opinions, as `anchors.meet` asks for them."""
        places = [(self.place[first.digest], self.place[second.digest]) for _, first, second in matches]
        return [SimpleNamespace(p_first=float(self.p[i, j])) for i, j in places]


def every_pair(world: World) -> Scored:
    ranking = rank_images(lambda pairs: [float(world.p[i, j]) for i, j in pairs], IMAGES)
    return ranking.scores, ranking.comparisons


def budget(world: World) -> Scored:
    ranking = rank_images(lambda pairs: [float(world.p[i, j]) for i, j in pairs], IMAGES, budget=40)
    return ranking.scores, ranking.comparisons


def ring(world: World) -> Scored:
    pairs = pairings(IMAGES)
    scores, _ = fit_bradley_terry(IMAGES, [(i, j, float(world.p[i, j])) for i, j in pairs])
    return scores.tolist(), len(pairs)


def reference(world: World, pool: str) -> Scored:
    first = world.pool(pool)[0]
    return [log_odds(float(world.p[i, first]))[0] for i in range(IMAGES)], IMAGES


def anchors(world: World, pool: str, count: int, **effort: Any) -> Scored:
    places = world.pool(pool)
    outcomes = [(i, j, float(world.p[places[i], places[j]])) for i, j in combinations(range(POOL), 2)]
    chosen = pick([world.images[place] for place in places], outcomes, count, "tiny")
    candidates = [Candidate(world.words, image, chosen) for image in world.images[:IMAGES]]
    meet(candidates, world.ask, **effort)
    scores = [candidate.score for candidate in candidates]
    return [score.score for score in scores], sum(score.comparisons for score in scores)


EFFORTS: tuple[tuple[int, dict[str, Any]], ...] = (
    *((count, {}) for count in (1, 2, 4, 8)),
    *((4, {"comparisons": k}) for k in (2, 3)),
    *((8, {"comparisons": k}) for k in (2, 3, 4)),
    *((8, {"error": error}) for error in (0.4, 0.3)),
)


def rows() -> dict[str, Callable[[World], Scored]]:
    found: dict[str, Callable[[World], Scored]] = {
        "all pairs": every_pair,
        "40 pairs, chosen (`rank`)": budget,
        "scheme group: ring": ring,
    }
    for pool in POOLS:
        found[f"scheme reference, {pool}"] = lambda world, pool=pool: reference(world, pool)
        for count, effort in EFFORTS:
            how = ", ".join(f"{name} {value:g}" for name, value in effort.items()) or "all met"
            found[f"{count} anchor{'s' * (count > 1)}, {pool}: {how}"] = (
                lambda world, pool=pool, count=count, effort=effort: anchors(world, pool, count, **effort)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, required=True, help="folder that keeps the judge's comparisons")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    args = parser.parse_args()
    args.kept.mkdir(parents=True, exist_ok=True)
    for mode in args.modes:
        loaded: list[Any] = []

        def judge(mode: str = mode, loaded: list[Any] = loaded) -> Any:
            from listener_reward import Judge

            if not loaded:
                loaded.append(Judge.from_pretrained("tiny", listener="none", batch_size=128, **MODES[mode]))
            return loaded[0]

        worlds = [World(n).judged(judge, str(args.kept / f"{mode}-{n}")) for n in track(range(args.prompts), mode)]
        print(f"\n{mode}, {args.prompts} prompts, 16 images each; mean tau to the truth (standard error)\n")
        print("| scores by | comparisons | an image | tau | of all pairs' |\n| --- | --: | --: | --: | --: |")
        whole = None
        for name, score in rows().items():
            found = [score(world) for world in worlds]
            taus = np.array([kendalltau(s, w.truth)[0] for (s, _), w in zip(found, worlds, strict=True)], dtype=float)
            made = np.mean([comparisons for _, comparisons in found])
            whole = taus.mean() if whole is None else whole
            error = taus.std(ddof=1) / len(taus) ** 0.5 if len(taus) > 1 else float("nan")
            cells = f"{made:.0f} | {made / IMAGES:.1f} | {taus.mean():.3f} ({error:.3f}) | {taus.mean() / whole:.2f}"
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
