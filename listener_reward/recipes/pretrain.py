"""Makes the embedded weights: `python -m listener_reward.recipes.pretrain`.

Three models of one architecture, seeded, in about an hour and a half on two cores:

- `base`: the reasoner that GRPO starts from. Imperfect on purpose, as an instruction-tuned VLM is: its descriptions
  err, and its answer follows its own description only most of the time.
- `listener`: another seed, whose thoughts are true and whose answers follow from them. It has never read a false
  thought, and would believe one; that it doubts what it would not have written itself is `Listener.grounding`.
- `judge`: the base, taught to look closely at drawn and at generated pictures, then trained by listener-shaped GRPO on
  votes about both, and last taught to be as sure as people are; `ListenerReward("tiny")` loads it.

Each learns as large VLMs do, in stages: the language model reads text alone, until it can tell whether a description
fits a prompt; the vision tower learns to see with a throw-away classifier, because shapes are slow to be found through
the language model's loss; then both learn together to describe pictures; last, the base learns its imperfection.
When all three are made, the judge is calibrated on votes about pairs that no split's default seed has.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.datasets import load_pairs
from listener_reward.evaluate.calibrate import calibrate
from listener_reward.files import write_text
from listener_reward.judge import Judge
from listener_reward.recipes.lessons import DISTURBED, LITTERED, Lesson, Mixed, any_pairs, drawn_lessons, drawn_pictures
from listener_reward.recipes.variants import LISTENER_SHAPED, SPLITS, VARIANTS, Recipe, evaluate_splits, train_variant
from listener_reward.recipes.workers import Report, run_side_by_side
from listener_reward.tiny.diffusion import WEIGHTS as DIFFUSION
from listener_reward.tiny.generated import samples
from listener_reward.tiny.models import QUESTION, build_model, build_processor
from listener_reward.tiny.thoughts import reasoner_example
from listener_reward.tiny.world import COLORS, COUNTS, QUALITIES, SHAPES, Scene, TinyPair, p_prefers_first

WEIGHTS_DIR = Path(__file__).parents[1] / "tiny" / "weights"

FORMAT = ChatFormat(question=QUESTION)
MAX_NEW_TOKENS = 48

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

KEY_WEIGHT = 4.0
"""Weight of the loss on the words that take a comparison: what is wrong with an image, and the answer."""

KEY_WORDS = ("right", "wrong")

CALIBRATION: dict[str, Any] = {"data": "tiny:id", "limit": 6000, "seed": 1}
"""The pairs whose votes calibrate the judge. Evaluations draw theirs with seed 0 unless told otherwise."""

BASE = {"error": 0.55, "whim": 0.45, "taste": 0.8}


def teach_to_read(model: Any, processor: Any, rng: random.Random, report: Callable[[int, str], None]) -> None:
    """Trains the language model on chats without images: any description, what is wrong with it, the right answer."""
    language = [p for name, p in model.named_parameters() if ".visual." not in name]
    optimizer, schedule = _optimizer(language, READ)
    for step in range(READ["steps"]):
        rows = [(pair, *reasoner_example(pair, rng)) for pair in any_pairs(rng, READ["batch"])]
        asked = [QUESTION.format(first="", second="", prompt=pair.wording) for pair, _, _ in rows]
        chats = [[{"role": "user", "content": text}] for text in asked]
        texts = [_turns(processor, chat, *row[1:]) for chat, row in zip(chats, rows, strict=True)]
        inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
        loss = _speech_loss(model, processor, inputs)
        _update(loss, language, optimizer, schedule)
        if step % 10 == 9:
            report(step + 1, f"reads, loss {loss.item():.2f}")


def teach_to_see(
    model: Any,
    processor: Any,
    pictures: Callable[[int], tuple[list[Scene], list[Image.Image]]],
    stage: dict[str, Any],
    report: Callable[[int, str], None],
) -> None:
    """Trains the vision tower to tell count, quality, colour and shape of single pictures."""
    tower = model.model.visual
    sizes = [len(COUNTS), len(QUALITIES), len(COLORS), len(SHAPES)]
    classify = nn.Linear(model.config.text_config.hidden_size, sum(sizes))
    parameters = [*tower.parameters(), *classify.parameters()]
    optimizer, schedule = _optimizer(parameters, stage)
    for step in range(stage["steps"]):
        scenes, images = pictures(stage["batch"])
        inputs = processor.image_processor(images=images, return_tensors="pt")
        features = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        tokens = (inputs["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).tolist()
        logits = classify(torch.stack([part.mean(0) for part in features.split(tokens)])).split(sizes, -1)
        labels = torch.tensor([_classes(scene) for scene in scenes]).unbind(1)
        loss = sum(F.cross_entropy(guess, label) for guess, label in zip(logits, labels, strict=True))
        _update(loss, parameters, optimizer, schedule)
        if step % 10 == 9:
            right = [float((g.argmax(-1) == y).float().mean()) for g, y in zip(logits, labels, strict=True)]
            report(step + 1, f"sees {sum(right) / len(right):.0%}")


def teach_to_speak(
    model: Any,
    processor: Any,
    example: Callable[[TinyPair], tuple[str, int]],
    lessons: Callable[[int], list[Lesson]],
    stage: dict[str, Any],
    report: Callable[[int, str], None],
    disturb: Callable[[str], str | None] = lambda thought: None,
    voters: Callable[[TinyPair], float] | None = None,
) -> None:
    """Trains the whole model on pictures, thoughts and answers.

    Where `disturb` gives another thought for one, the model reads that and learns the answer only. With `voters`, the
    fraction of people who prefer the first image, it learns to answer "1" as often as they do.
    """
    parameters = list(model.parameters())
    optimizer, schedule = _optimizer(parameters, stage)
    for step in range(stage["steps"]):
        pairs, pictures = zip(*lessons(stage["batch"]), strict=True)
        rows = [example(pair) for pair in pairs]
        others = [disturb(thought) for thought, _ in rows]
        rows = [(thought if other is None else other, n) for (thought, n), other in zip(rows, others, strict=True)]
        chats = [FORMAT.messages(pair.wording) for pair in pairs]
        texts = [_turns(processor, chat, *row) for chat, row in zip(chats, rows, strict=True)]
        images = [image for both in pictures for image in both]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        p_firsts = None if voters is None else [voters(pair) for pair in pairs]
        loss = _speech_loss(model, processor, inputs, spoken=[other is None for other in others], p_firsts=p_firsts)
        _update(loss, parameters, optimizer, schedule)
        if step % 10 == 9:
            report(step + 1, f"speaks, loss {loss.item():.2f}")


def make(report: Report, kind: str, seed: int, out: str, scratch: str) -> str:
    """Pretrains one model, "base" or "listener", and saves it as a checkpoint in half precision.

    After each stage all that the next one needs is kept in `scratch`, so that an interrupted run goes on from there
    and ends with the same weights.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{kind}/{seed}")
    processor = build_processor()
    model = build_model(processor.tokenizer)

    def plain(pair: TinyPair) -> tuple[str, int]:
        return reasoner_example(pair, rng)

    def finished(pair: TinyPair) -> tuple[str, int]:
        return reasoner_example(pair, rng, **BASE) if kind == "base" else plain(pair)

    def pictures(n: int) -> tuple[list[Scene], list[Image.Image]]:
        return drawn_pictures(rng, n)

    def lessons(n: int) -> list[Lesson]:
        return drawn_lessons(rng, n)

    stages: list[Stage] = [
        (READ, lambda tell: teach_to_read(model, processor, rng, tell)),
        (SEE, lambda tell: teach_to_see(model, processor, pictures, SEE, tell)),
        (SPEAK, lambda tell: teach_to_speak(model, processor, plain, lessons, SPEAK, tell)),
        (
            FINISH | (BASE if kind == "base" else {}),
            lambda tell: teach_to_speak(model, processor, finished, lessons, FINISH, tell),
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


Stage = tuple[dict[str, Any], Callable[[Callable[[int, str], None]], None]]
"""A stage's settings, and the stage itself, which is told how to report."""


def run_stages(report: Report, stages: list[Stage], model: Any, rng: random.Random, scratch: Path) -> None:
    """Runs the stages one after the other, or goes on after the last one whose result lies at `scratch`.

    A result belongs to the settings of all stages up to its own, to the weights before them, and to the state of `rng`.
    """
    done, total = 0, sum(settings["steps"] for settings, _ in stages)
    begin = hashlib.sha256(repr(rng.getstate()).encode())
    for weights in model.state_dict().values():
        begin.update(weights.numpy().tobytes())
    for number, (settings, teach) in enumerate(stages):
        told = begin.hexdigest() + repr([stage for stage, _ in stages[: number + 1]])
        kept = scratch.with_name(f"{scratch.name}-{number}-{hashlib.sha256(told.encode()).hexdigest()[:8]}.pt")
        if kept.exists():
            state = torch.load(kept, weights_only=False)  # our own file, and a random state is no tensor
            model.load_state_dict(state["model"])
            rng.setstate(state["rng"])
            torch.set_rng_state(state["torch"])
        else:
            teach(lambda step, note, before=done: report(before + step, total, note))
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.state_dict(), "rng": rng.getstate(), "torch": torch.get_rng_state()}, kept)
        done += settings["steps"]


def save(model: Any, processor: Any, card: Card, out: str | Path) -> None:
    """Writes a checkpoint in float16: half the bytes, and more exact than bfloat16 for weights of this size."""
    model.to(torch.float16).save_pretrained(out)
    processor.save_pretrained(out)
    card.save(out)


def _turns(processor: Any, chat: list[dict[str, Any]], thought: str, answer: int) -> str:
    """A whole chat as text: the question, the thought, the answer, the end."""
    asked = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return f"{asked}{FORMAT.answer_slot(thought)}{answer}{FORMAT.answer[1]}{processor.tokenizer.eos_token}"


def _speech_loss(
    model: Any,
    processor: Any,
    inputs: Any,
    spoken: Sequence[bool] | None = None,
    p_firsts: Sequence[float] | None = None,
) -> Tensor:
    """Mean negative log-likelihood of thought and answer, weighted towards the words that take a comparison.

    Of rows that are not `spoken` only the answer counts. With `p_firsts` an answer is "1" to that fraction and "2" to
    the rest, whatever stands there.
    """
    tokens = processor.tokenizer.convert_tokens_to_ids
    ids, attended = inputs["input_ids"], inputs["attention_mask"].bool()
    learnt = ((ids == tokens("<think>")).cumsum(1) > 0) & attended
    weights = learnt.float()
    if spoken is not None:
        weights[~torch.tensor(spoken)] = 0
    weights[weights.bool() & torch.isin(ids, torch.tensor(tokens(list(KEY_WORDS))))] = KEY_WEIGHT
    weights[:, 1:][ids[:, :-1] == tokens("<answer>")] = KEY_WEIGHT
    logits = model(**inputs).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    if p_firsts is not None:
        rows, places = torch.nonzero(ids[:, :-1] == tokens("<answer>"), as_tuple=True)
        first, second = (-logits[rows, places].log_softmax(-1)[:, tokens(label)] for label in "12")
        p_first = torch.tensor(p_firsts)[rows]
        nll = nll.index_put((rows, places), p_first * first + (1 - p_first) * second)
    return (nll * weights[:, 1:]).sum() / weights[:, 1:].sum()


def _classes(scene: Scene) -> list[int]:
    return [
        scene.count - 1,
        QUALITIES.index(scene.quality),
        COLORS.index(scene.color),
        SHAPES.index(scene.shape),
    ]


def _optimizer(parameters: list[nn.Parameter], stage: dict[str, Any]) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=stage["rate"], weight_decay=0.01, betas=(0.9, 0.98))

    def warm_up_then_decay(step: int) -> float:
        return min(1.0, (step + 1) / 50) * max(0.02, 1 - step / stage["steps"])

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_decay)


def _update(loss: Any, parameters: list[Any], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


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
        (LOOK | STUDIED, lambda tell: teach_to_see(model, processor, mixed.pictures, LOOK, tell)),
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
        def voters(pair: TinyPair) -> float:
            return p_prefers_first(pair.prompt, pair.first, pair.second)

        teach_to_speak(model, processor, mixed.example, mixed.lessons, WEIGH, tell, mixed.disturb, voters)

    run_stages(report, [(WEIGH | DISTURBED | {"prompts": LITTERED}, weigh)], model, mixed.rng, Path(scratch, "judge"))
    card = replace(Card.load(trained), listener="tiny-listener", sampling_temperature=SAMPLING_TEMPERATURE)
    save(model, build_processor(), card, Path(out, "judge"))
    return str(Path(out, "judge"))


def calibrate_judge(report: Report, out: str) -> None:
    """Fits how sure the judge in `out` may be, with thoughts and without, and keeps it in its card."""
    pairs = load_pairs(CALIBRATION["data"], limit=CALIBRATION["limit"], seed=CALIBRATION["seed"])
    folder = Path(out, "judge")
    for done, (field, think) in enumerate({"calibration": True, "fast_calibration": False}.items()):
        report(done, 2, field)
        judge = Judge.from_pretrained(folder, listener=str(Path(out, "listener")), batch_size=128, think=think)
        Card.amend(folder, **{field: calibrate(judge, pairs, progress=False).calibration})
    report(2, 2, "")


def write_card(out: Path) -> None:
    """Measures base and judge on every split and on generated pictures, and writes `README.md` beside the weights."""
    recipe = _recipe(out)
    evaluations = run_side_by_side(
        {
            f"judging with the {name}": (
                evaluate_splits,
                {"model": str(out / name), "splits": CARD_SPLITS, "pairs": 400, "listener": recipe.listener},
            )
            for name in ("base", "judge")
        }
    )
    rows = []
    for name, table in evaluations.items():
        for split in CARD_SPLITS:
            scores = table[split]
            low, high = scores["accuracy_interval"]
            rows.append(
                f"| {name.split()[-1]} | {split} | {scores['accuracy']:.1%} ({low:.1%} to {high:.1%}) | "
                f"{scores['contradiction_rate']:.1%} | {scores['malformed_rate']:.1%} | "
                f"{scores['listener_accuracy']:.1%} | {scores['ece']:.3f} |"
            )
    size = sum(path.stat().st_size for path in out.glob("*/*") if "diffusion" not in path.parts) / 1e6
    write_text(out / "README.md", CARD_TEXT.format(size=size, rows="\n".join(rows)))


CARD_SPLITS = (*SPLITS, "generated")

CARD_TEXT = """# The embedded tiny models

Three Qwen2.5-VL models of 1.1 million parameters in float16, {size:.1f} MB together, for the tiny world only (one to
three flat coloured shapes). Made, and this card written, by

```bash
python -m listener_reward.recipes.pretrain
```

which is seeded and takes about an hour and a half on two cores.

- `base`: an imperfect reasoner; what GRPO starts from (`"tiny-base"`).
- `listener`: another seed, honest and right (`"tiny-listener"`).
- `judge`: the base after lessons in drawn and in generated pictures, listener-shaped GRPO on votes about both, and
  lessons in how sure people are (`"tiny"`).

Accuracy against the majority of fifteen voters on 400 pairs of each split, both orders averaged, with its 95 %
interval; a contradiction is a thought whose listener prefers the other image. Then the accuracy of the listener after
reading that model's thoughts, and the expected calibration error. `generated` are pictures by the tiny diffusion model.
The judge is calibrated, in distribution, on votes about 6,000 other pairs. With 400 pairs an ECE is too high by chance;
docs/judging.md has it for 3,000.

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
    args = parser.parse_args()
    out, scratch = str(args.out), str(args.scratch)
    run_side_by_side(
        {
            kind: (make, {"kind": kind, "seed": seed, "out": str(args.out / kind), "scratch": scratch})
            for kind, seed in {"base": args.seed, "listener": args.seed + 1}.items()
        }
    )
    folders = {"out": out, "scratch": scratch}
    folders |= run_side_by_side({"generated": (gather, {"scratch": scratch})})
    for name, stage in {"attentive": make_attentive, "judge": make_judge}.items():
        run_side_by_side({name: (stage, folders)})
    run_side_by_side({"calibration": (calibrate_judge, {"out": out})})
    write_card(args.out)


if __name__ == "__main__":
    main()
