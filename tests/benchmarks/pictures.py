"""The pictures of README and documentation, from real runs of the embedded models: nothing is drawn by hand.

    python tests/benchmarks/pictures.py                   # all, in a minute of one core
    python tests/benchmarks/pictures.py --only pairs best

pairs    two judged pairs: one where the listener agrees with the reasoner, one where the listener contradicts a thought
best     sixteen samples of one prompt by the embedded diffusion model, ordered by the reward
ddpo     samples before and after DDPO on the judge's reward, from `docs/ddpo-grid.png`, which
         `tests/benchmarks/ddpo.py --docs docs` makes
relations  pairs of two groups with the true utility of each picture, one of them out of distribution
study    what judges of the same votes are worth, from the finished runs of `examples/study.yaml` in `docs/studies/tiny`
sweeps   accuracy against the number of votes, their noise and the shortcut's strength, as far as it is there in full
drawn    what generators draw that were trained on those judges; from the folder `study` of a study that was run here
report   two parts of the page that `listener-reward eval --html` writes, the results and the worst mistakes (needs
         Chromium)
"""

from __future__ import annotations

import argparse
import base64
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from listener_reward import Judge, ListenerReward, Verdict
from listener_reward.datasets import load_pairs
from listener_reward.integrations.best_of_n import best_of_n
from listener_reward.integrations.ddpo.log import checkpoints
from listener_reward.recipes.generators import pictures, prompts
from listener_reward.recipes.study.carry_out import GENERATORS
from listener_reward.recipes.study.drawing import figure_of, panels_of
from listener_reward.recipes.study.plans import Question, read_study, runs_of
from listener_reward.recipes.study.results import METRICS, rows_of
from listener_reward.recipes.study.runs import finished
from listener_reward.tiny.diffusion import CALL, load_pipeline
from listener_reward.tiny.drawing import draw_relation
from listener_reward.tiny.relations import split_relations

PAIRS = ("tiny:id", 3), ("tiny:ood", 28)
"""Split and row. The first is an ordinary verdict; the second is one of the few in which a thought is contradicted."""
PROMPT = "three red stars"
ROOT = Path(__file__).parents[2]
GRID = ROOT / "docs/ddpo-grid.png"
PLAN, RUNS = ROOT / "examples/study.yaml", ROOT / "docs/studies/tiny"
STUDY, SEED = Path("study"), 10
"""Where `listener-reward study --config examples/study.yaml` leaves its generators, and whose pictures are shown."""
SHOWN = "listener-shaped GRPO", "accuracy-only GRPO", "SFT", "Bradley-Terry", "gain", "truth"
"""The study's ways to have a judge, in an order that gives each the same colour in every picture."""
SWEPT = {
    "pairs": ("votes", "votes"),
    "flipped": ("noise", "fraction of the votes that are turned round"),
    "cue": ("shortcut", "how often the frame marks the better image"),
}
"""What the study's training votes vary in: name of the picture and of its axis."""
INK, GREY, RED, GREEN = "#1f2328", "#656d76", "#b3261e", "#1a7f37"


def pairs(folder: Path) -> None:
    """Each row: the two images, one thought with what reasoner and listener make of it, the verdict and the votes."""
    judge, spaced = Judge.from_pretrained("tiny"), ConstrainedLayoutEngine(hspace=0.1, h_pad=0.12)
    figure, axes = plt.subplots(len(PAIRS), 3, figsize=(10.4, 5.2), width_ratios=(1, 1, 2.9), layout=spaced)
    for (first, second, text), (data, index) in zip(axes, PAIRS, strict=True):
        row = load_pairs(data)[index]
        images = [Image.open(io.BytesIO(image["bytes"])) for image in row["images"]]
        verdict = judge.compare(row["prompt"], *images)
        for place, (axis, image) in enumerate(zip((first, second), images, strict=True), start=1):
            chosen = verdict.preferred == place
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"image {place}" + ", preferred" * chosen, fontsize=11, weight="bold" if chosen else None)
            axis.spines[:].set(color=GREEN if chosen else GREY, linewidth=3 if chosen else 0.8)
        _write(text, row, verdict)
    save(figure, folder / "pairs.png")


def _write(axis: Axes, row: dict[str, Any], verdict: Verdict) -> None:
    """One thought of the verdict, line by line; all lines are as far apart in every row."""
    thought = next(one for one in verdict.thoughts if one.order == "as given")
    listener = thought.listener_p_first
    assert listener is not None
    believed, sure = (1, listener) if listener > 0.5 else (2, 1 - listener)
    check = f"listener, having read the thought: image {believed} ({sure:.2f})"
    lines = [
        (f"prompt: “{row['prompt']}”", {"weight": "bold", "fontsize": 12}),
        *(
            (line, {"family": "monospace", "style": "italic"})
            for line in thought.text.replace(" . image", " .|image").split("|")
        ),
        (f"reasoner, after its thought: image {thought.answer}", {}),
        (f"{check}: contradicted", {"color": RED, "weight": "bold"})
        if thought.contradicted
        else (f"{check}: agrees", {"color": GREEN, "weight": "bold"}),
        (f"verdict, over both orders: p(image 1) = {verdict.p_first:.2f}", {"weight": "bold", "fontsize": 12}),
        (f"people: {15 * row['p_first']:.0f} of 15 prefer image 1", {"color": GREY}),
    ]
    axis.axis("off")
    for place, (line, style) in enumerate(lines):
        axis.text(0.02, 1 - 0.15 * place, line, transform=axis.transAxes, va="top", **{"color": INK, **style})


def best(folder: Path) -> None:
    """Sixteen samples of one prompt, best first."""
    reward = ListenerReward("tiny", batch_size=64)
    made = best_of_n(load_pipeline(), PROMPT, 16, reward=reward, batch_size=16, **CALL)
    _shrink(made.contact_sheet(columns=8, width=150)).save(folder / "best-of-16.png", optimize=True)


def ddpo(folder: Path) -> None:
    """The grid of held-out prompts, with a name for each row."""
    grid = Image.open(GRID).convert("RGB")
    figure, axis = plt.subplots(figsize=(8.6, 5.6), layout="constrained")
    axis.imshow(grid, interpolation="nearest")
    row, prompts = grid.height / 6, ("one red circle", "two yellow stars", "three purple triangles")
    axis.set_xticks([])
    axis.set_yticks(
        [row * (k + 0.5) for k in range(6)],
        [label for prompt in prompts for label in (f"{prompt}\nbefore", "after")],
        fontsize=11,
    )
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for k in (1, 2):
        axis.axhline(2 * k * row - 0.5, color="white", linewidth=8)
    save(figure, folder / "ddpo.png")


def relations(folder: Path) -> None:
    """Six pairs, two in a row: the prompt, both pictures, and what each is worth."""
    chosen = [pair for split in ("relation-train", "relation-ood") for pair in split_relations(split, 3)]
    figure = plt.figure(figsize=(9.6, 6.6), layout="constrained")
    parts: Any = figure.subfigures(3, 2)
    for part, pair in zip(parts.T.flat, chosen, strict=True):
        part.suptitle(f"“{pair.wording}”", fontsize=10)
        for axis, image, shown in zip(part.subplots(1, 2), draw_relation(pair), (pair.first, pair.second), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"worth {pair.utility(shown):.1f}" + ", signed" * shown.signed)
    save(figure, folder / "relations.png")


def study(folder: Path) -> None:
    """Three panels: accuracy by split, true utility of the best of n, and true utility in DDPO."""
    records = finished(RUNS)
    panels: dict[str, Any] = {}
    for begins, metric, title in (
        ("Which way", "accuracy", "accuracy (%) on each split"),
        ("Where does the best", "true utility", "true utility of the best of n"),
        ("When does", "true utility", "true utility after epochs of DDPO"),
    ):
        lines = panels_of(_question(begins), records)[METRICS[metric].title]
        panels[title] = _shown(lines)
    save(figure_of(panels), folder / "study.png")


def sweeps(folder: Path) -> None:
    """Accuracy on each split along what the training votes vary in, a picture for each question that is answered."""
    records = finished(RUNS)
    for question in read_study(PLAN).questions:
        answered = all(run.key in records for runs in rows_of(question).values() for run in runs)
        if answered and question.vary is not None:
            name, axis = SWEPT[question.vary]
            panels = {title: _shown(lines) for title, lines in panels_of(question, records).items()}
            save(figure_of(panels, axis), folder / f"{name}.png")


def _shown(lines: dict[str, Any]) -> dict[str, Any]:
    """The arms of `SHOWN`, in its order."""
    return {name: lines[name] for name in SHOWN if name in lines}


def _question(begins: str) -> Question:
    """The question of the package's study that begins so."""
    return next(one for one in read_study(PLAN).questions if one.question.startswith(begins))


def drawn(folder: Path) -> None:
    """A row for each judge of the study: held-out prompts after the last epoch of DDPO, from equal seeds."""
    records, texts = finished(STUDY), prompts(held=True)[::2]
    runs = {run.arm_name: run.key for run in runs_of(_question("When does"), SEED) if run.key in records}
    worth = {name: [*records[key]["results"]["true utility"].values()] for name, key in runs.items()}
    rows: dict[str, Path | None] = {f"before: {next(iter(worth.values()))[0]:.2f}": None}
    for name in (name for name in SHOWN if name in runs):
        label = f"{name.replace(' GRPO', '')}: {worth[name][-1]:.2f}"
        rows[label] = max(checkpoints(STUDY / GENERATORS / runs[name] / "checkpoints").items())[1]
    size = 1.4 * len(texts) + 1.8, 1.4 * len(rows) + 0.2
    figure, axes = plt.subplots(len(rows), len(texts), figsize=size, layout="constrained")
    for (label, checkpoint), line in zip(rows.items(), axes, strict=True):
        pipeline = load_pipeline()
        if checkpoint is not None:
            pipeline.load_lora_weights(str(checkpoint))
        for axis, text in zip(line, texts, strict=True):
            axis.imshow(pictures(pipeline, text, 1)[0], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    for axis, text in zip(axes[0], texts, strict=True):
        axis.set_title(text, fontsize=8.5)
    save(figure, folder / "drawn.png")


def report(folder: Path) -> None:
    """The page of a short evaluation, as Chromium draws it: its top beside its worst mistakes."""
    sys.path.append(str(Path(__file__).parents[1]))
    from browser import Browser

    width, height, gap = 1060, 1215, 24
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        page = Path(scratch, "page.html")
        command = "-m listener_reward.cli eval --judge tiny --data tiny:ood --html".split()
        subprocess.run([sys.executable, *command, str(page)], check=True, stdout=subprocess.DEVNULL)
        both = Image.new("RGB", (2 * width + gap, height), "white")
        with Browser(Path(scratch, "profile")) as browser:
            browser.open(page, width=width)
            top = browser.run("document.getElementById('pairs').getBoundingClientRect().top + scrollY - 24")
            for left, y in ((0, 0), (width + gap, top)):
                area = {"x": 0, "y": y, "width": width, "height": height, "scale": 1}
                shot = browser.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=area)["data"]
                both.paste(Image.open(io.BytesIO(base64.b64decode(shot))), (left, 0))
    both = both.resize((both.width * 7 // 10, both.height * 7 // 10), Image.Resampling.LANCZOS)
    _shrink(both).save(folder / "report.png", optimize=True)


def save(figure: Figure, path: Path) -> None:
    """A figure as a small PNG without a margin."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, facecolor="white", bbox_inches="tight")
    plt.close(figure)
    _shrink(Image.open(drawn)).save(path, optimize=True)


def _shrink(picture: Image.Image) -> Image.Image:
    """The picture with a palette of 256 colours: a third of the bytes."""
    return picture.convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {maker.__name__: maker for maker in (pairs, best, ddpo, relations, study, sweeps, drawn, report)}
    usual = [name for name in makers if name != "drawn" or STUDY.is_dir()]
    parser.add_argument("--only", nargs="+", choices=list(makers), default=usual)
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    args = parser.parse_args()
    if "drawn" in args.only and not STUDY.is_dir():
        parser.error(f"drawn needs the folder {STUDY}: listener-reward study --config examples/study.yaml")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        makers[name](args.out)


if __name__ == "__main__":
    main()
