"""The variants that the demo compares in the tiny world, each a way to train a judge, and how each is evaluated.

How fast training and judging are is measured elsewhere, by the workloads of `bench`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np

from listener_reward.errors import InputError, meant
from listener_reward.recipes.workers import Report
from listener_reward.shaping import WEIGHTS
from listener_reward.tiny.world import TRAIN_CUE
from listener_reward.trace import Masking
from listener_reward.verdict import PairJudge, Verdict

C = TypeVar("C")

ACCURACY_ONLY, LISTENER_SHAPED = "accuracy-only GRPO", "listener-shaped GRPO"

VARIANTS = {ACCURACY_ONLY: (1.0, 1.0, 0.0), LISTENER_SHAPED: WEIGHTS}
"""Weights of format, accuracy and listener. Both variants can earn at most 2."""

SPLITS = ("id", "ood", "wrong")

CURVES = {
    "reward": "reward",
    "accuracy": "accuracy",
    "listener": "listener_confidence",
    "contradiction": "contradiction_rate",
    "malformed": "malformed_rate",
}
"""The report's names of the learning curves, and the trainer's."""


@dataclass(frozen=True)
class Recipe:
    """How the demo trains."""

    steps: int = 160
    data: str = "tiny:train"
    """Any data that `load_pairs` reads."""
    pairs: int = 1000
    flipped: float = 0.0
    """Fraction of the training pairs whose vote is turned round, drawn once for all seeds."""
    cue: float | None = None
    """Of tiny:train: in which fraction of the pairs the frame marks the better image; None is the world's own."""
    groups: int = 12
    """Prompts in a step; each is answered by a group of `generations`."""
    generations: int = 8
    learning_rate: float = 1e-4
    sft_steps: int = 200
    test_pairs: int = 300
    """Test pairs of each split."""
    base: str = "tiny-base"
    listener: str = "tiny-listener"
    grounding: float = 2.0
    masking: Masking = "answer"
    share_prompt: bool = True
    """Whether a group shares its prompt. The results in docs/log.md were made as copies, which differ by rounding:
    after 160 steps that is another run of the same kind, and not the same numbers."""

    def __post_init__(self) -> None:
        if self.data == "tiny:train" and self.cue == TRAIN_CUE:
            object.__setattr__(self, "cue", None)  # the same pairs under one name: a study then trains on them once


def train_variant(
    report: Report,
    weights: Sequence[float],
    out: str,
    seed: int,
    recipe: Recipe,
    pairs: Any = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, list[Any]]:
    """Trains one variant by GRPO, writes its judge into `out`, and returns its learning curves.

    `pairs` are those of the recipe unless others are given, and so is a field of the configuration that `options` has.
    Fields of LoRA are among them, as in `listener-reward train`.
    """
    from transformers import TrainerCallback

    from listener_reward.train.config import AS_COPIES, ListenerGRPOConfig
    from listener_reward.train.trainer import ListenerGRPOTrainer

    settings: dict[str, Any] = dict(
        output_dir=out,
        listener=recipe.listener,
        listener_batch_size=128,
        listener_grounding=recipe.grounding,
        masking=recipe.masking,
        log_completions=False,
        reward_weights=list(weights),
        per_device_train_batch_size=recipe.groups * recipe.generations,
        num_generations=recipe.generations,
        max_completion_length=40,
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **({} if recipe.share_prompt else AS_COPIES),
    )
    args, lora = _configured(ListenerGRPOConfig, settings, options)
    curves: dict[str, list[Any]] = {name: [] for name in ("step", *CURVES)}

    class Curves(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if logs and "reward" in logs:
                curves["step"].append(state.global_step)
                for name, key in CURVES.items():
                    curves[name].append(logs.get(key))
                reward = logs["reward"]  # None where the listener failed on the whole batch
                report(state.global_step, state.max_steps, "no reward" if reward is None else f"reward {reward:.2f}")

    pairs = training_pairs(recipe) if pairs is None else pairs
    trainer = ListenerGRPOTrainer(recipe.base, args, pairs, peft_config=lora, callbacks=[Curves()])
    trainer.train()
    trainer.save_judge(out)
    return curves


def train_sft_variant(
    report: Report, out: str, seed: int, recipe: Recipe, options: Mapping[str, Any] | None = None
) -> None:
    """Trains the supervised baseline on the same pairs; `out` then holds its judge. `options` are further fields of
    `SFTConfig`, and of LoRA."""
    from trl import SFTConfig

    from listener_reward.train.sft import train_sft

    settings = _of_baseline(out, seed, recipe) | {"gradient_checkpointing": False, "max_length": None}
    args, lora = _configured(SFTConfig, settings, options)
    train_sft(recipe.base, training_pairs(recipe), args, peft_config=lora, callbacks=[_losses(report)])


def train_bradley_terry_variant(
    report: Report, out: str, seed: int, recipe: Recipe, options: Mapping[str, Any] | None = None
) -> None:
    """Trains the Bradley-Terry baseline on the same pairs, for as many steps as SFT; `out` then holds its model.
    `options` are further fields of `TrainingArguments`, and of LoRA."""
    from transformers import TrainingArguments

    from listener_reward.train.bradley_terry import train_bradley_terry

    args, lora = _configured(TrainingArguments, _of_baseline(out, seed, recipe), options)
    train_bradley_terry(recipe.base, training_pairs(recipe), args, peft_config=lora, callbacks=[_losses(report)])


def _configured(kind: type[C], settings: dict[str, Any], options: Mapping[str, Any] | None) -> tuple[C, Any]:
    """The trainer's configuration, with `options` over the recipe's settings, and the LoRA that `options` asks for;
    None where every weight is trained.

    Raises:
        InputError: an option is no field of either, or text where a number belongs, which a trainer would notice only
            once its models are loaded; or a field of LoRA is there without `use_peft`.
    """
    from trl import ModelConfig

    from listener_reward.train.lora import LORA_FIELDS, lora_of

    known = _hints(kind) | {name: hint for name, hint in _hints(ModelConfig).items() if name in LORA_FIELDS}
    given = dict(options or {})
    for name, value in given.items():
        if name not in known:
            raise InputError(f"options has {name!r}, which {kind.__name__} does not have{meant(name, known)}")
        if isinstance(value, str) and _NUMBERS.issuperset(get_args(known[name]) or (known[name],)):
            raise InputError(f"options.{name} is {value!r}; it takes no text. {AS_YAML_READS}")
    lora = {name: given.pop(name) for name in LORA_FIELDS if name in given}
    if lora and "use_peft" not in lora:
        raise InputError(f"options has {next(iter(lora))!r} without use_peft; add use_peft: true, or leave it out")
    return kind(**settings | given), lora_of(ModelConfig(**lora))


AS_YAML_READS = "YAML reads 1e-4 as text, write 1.0e-4"
_NUMBERS = frozenset({int, float, bool, type(None)})


def _hints(kind: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind) if one.init}


def _of_baseline(out: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """The settings that both baselines train with."""
    return dict(
        output_dir=out,
        per_device_train_batch_size=32,
        max_steps=recipe.sft_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=seed,
    )


def _losses(report: Report) -> Any:
    """A callback that reports a baseline's loss."""
    from transformers import TrainerCallback

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                report(state.global_step, state.max_steps, f"loss {float(logs['loss']):.2f}")

    return Losses()


def training_pairs(recipe: Recipe) -> Any:
    """The pairs that a recipe trains on: the same for every seed and every way to train."""
    from listener_reward.datasets import load_pairs

    if recipe.cue is None:
        pairs = load_pairs(recipe.data, limit=recipe.pairs)
    else:
        pairs = _pairs_with_cue(recipe)
    if recipe.flipped:
        turned = random.Random("flipped").sample(range(len(pairs)), round(recipe.flipped * len(pairs)))
        p_first = np.array(pairs["p_first"])
        p_first[turned] = 1 - p_first[turned]
        feature = pairs.features["p_first"]
        pairs = pairs.remove_columns("p_first").add_column("p_first", p_first.tolist(), feature=feature)
    return pairs


def _pairs_with_cue(recipe: Recipe) -> Any:
    """The training pairs of the tiny world where the frame says more or less than it does there."""
    from datasets import Dataset

    from listener_reward.datasets import FEATURES
    from listener_reward.media.images import png_of
    from listener_reward.tiny.drawing import draw_pair
    from listener_reward.tiny.world import split_pairs

    if recipe.data != "tiny:train" or recipe.cue is None:
        raise InputError(f"cue is {recipe.cue}, and data is {recipe.data!r}; only tiny:train has such a cue")
    rows = [
        {
            "prompt": pair.wording,
            "images": [{"bytes": png_of(image), "path": None} for image in draw_pair(pair)],
            "p_first": pair.p_first,
            "id": f"train-cue-{recipe.cue}-{index}",
            "dataset": "tiny:train",
            "swapped": False,
        }
        for index, pair in enumerate(split_pairs("train", recipe.pairs, cue=recipe.cue))
    ]
    return Dataset.from_list(rows, features=FEATURES)


def evaluate_splits(
    report: Report,
    model: str,
    splits: Sequence[str],
    pairs: int,
    listener: str | None = None,
    think: bool = True,
    options: Mapping[str, Any] | None = None,
    diagnostics: bool = True,
    thoughts: str = "whole",
) -> dict[str, dict[str, Any]]:
    """Evaluates one judge on splits; `Evaluation.to_dict()` by split, with its diagnostics where they are wanted.

    Args:
        report: told of every split.
        model: the judge's checkpoint.
        splits: of the tiny world, or any data that `load_pairs` reads, which has a colon or a slash in its name.
        pairs: of each split.
        listener: who counts contradictions; None for the checkpoint's own.
        think: whether the judge thinks.
        options: further arguments of `Judge.from_pretrained`.
        diagnostics: whether to add `diagnose`.
        thoughts: what is left of a thought before anybody reads it, one of `study.thoughts.CHANGES`.
    """
    from listener_reward.judge import Judge

    asked: dict[str, Any] = {"listener": listener, "batch_size": 128, "think": think, **(options or {})}
    judge: Any = Judge.from_pretrained(model, **asked)
    if thoughts != "whole":
        from listener_reward.recipes.study.thoughts import ChangedThoughts

        judge.reasoner = ChangedThoughts(judge.reasoner, judge.card.format, thoughts)
    return evaluate_judge(report, judge, splits, pairs, diagnostics)


def evaluate_judge(
    report: Report, judge: PairJudge, splits: Sequence[str], pairs: int, diagnostics: bool = True
) -> dict[str, dict[str, Any]]:
    """`evaluate_splits` of a judge that is loaded. `tokens` is the mean number in all thoughts about a pair."""
    from listener_reward.datasets import load_pairs
    from listener_reward.evaluate import evaluate
    from listener_reward.evaluate.diagnostics import diagnose

    tokenizer: Any = getattr(getattr(judge, "reasoner", None), "tokenizer", None)
    table = {}
    for done, split in enumerate(splits):
        report(done, len(splits), split)
        data = as_spec(split)
        said: list[int] = []

        def count(rows: Any, verdicts: Sequence[Verdict], said: list[int] = said) -> None:
            texts = [[thought.text for thought in verdict.thoughts] for verdict in verdicts]
            said.extend(sum(len(tokenizer(text).input_ids) for text in some) if some else 0 for some in texts)

        evaluation = evaluate(judge, load_pairs(data, limit=pairs), progress=False, watch=count)
        table[split] = evaluation.to_dict() | {"tokens": float(np.mean(said))}
        if diagnostics:
            table[split]["diagnostics"] = diagnose(evaluation)
    report(len(splits), len(splits), "")
    return table


def as_spec(split: str) -> str:
    """What `load_pairs` calls a split of the tiny world, or other data, which has a colon or a slash in its name."""
    return split if ":" in split or "/" in split else f"tiny:{split}"


def card_row(model: str, split: str, scores: Mapping[str, Any]) -> str:
    """A row of a model's card: accuracy, contradictions, malformed answers, its listener's accuracy, calibration."""
    low, high = scores["accuracy_interval"]
    return (
        f"| {model} | {split} | {scores['accuracy']:.1%} ({low:.1%} to {high:.1%}) | "
        f"{scores['contradiction_rate']:.1%} | {scores['malformed_rate']:.1%} | "
        f"{scores['listener_accuracy']:.1%} | {scores['ece']:.3f} |"
    )
