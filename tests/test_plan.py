"""Plans: what they hold a run to need is what it needs, and the recipes are planned as they say."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import yaml
from benchmarks import plan as measured
from PIL import Image
from typer.testing import CliRunner

from listener_reward.bench.shapes import SHAPES_BY_NAME, Size, build_checkpoint
from listener_reward.card import Card
from listener_reward.cli import app
from listener_reward.errors import InputError
from listener_reward.plan.checkpoints import BUILT_IN, Checkpoint
from listener_reward.plan.judging import plan_judging
from listener_reward.plan.launches import Launch
from listener_reward.plan.meter import metered
from listener_reward.plan.passes import Architecture
from listener_reward.plan.plans import Phase, Plan
from listener_reward.plan.tokens import Pair, Pairs, of_data
from listener_reward.plan.training import plan_training

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
SMALL = (
    {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "vocab_size": 2048}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    {"depth": 4, "hidden_size": 96, "intermediate_size": 288, "num_heads": 4, "fullatt_block_indexes": [3]},
)


# --- memory, held against what torch's allocator gives out


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (measured.LISTENER, Size(model="small", pixels=196, tokens=32)),
        (measured.JUDGE, Size(model="small", pixels=196, tokens=32)),
        (measured.STEP, Size(model="small", pixels=196, tokens=32, groups=2, repeats=2, lora=True)),
    ],
    ids=["listener", "judge", "step"],
)
def test_a_planned_peak_is_the_measured_one(case: Any, size: Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SHAPES_BY_NAME, "small", SMALL)
    measure, plan = case
    build_checkpoint(tmp_path, size)
    weights, over = measure(tmp_path, size)
    assert plan(tmp_path, size) == pytest.approx(weights + over, rel=0.15)


def test_a_meter_counts_bytes_alive_at_once_and_operations():
    one, other = torch.empty(1000, 500, device="meta"), torch.empty(500, 10, device="meta")
    with metered() as meter:
        product = one @ other  # 10,000 numbers
        doubled = (product * 2).relu()  # twice as many more, of which one goes
        assert (meter.live, meter.peak) == (80_000, 120_000)
        del product
        assert meter.live == 40_000
    assert meter.flops == 2 * 1000 * 500 * 10
    assert doubled.shape == (1000, 10)


def test_parameters_are_those_of_the_published_checkpoints():
    sizes = {"2.5-VL-3B": 3.75e9, "2.5-VL-7B": 8.29e9, "3-VL-4B-Instruct": 4.44e9}
    for name, make in BUILT_IN.items():
        for part, size in sizes.items():
            if part in name:
                assert Architecture(make(), torch.bfloat16).parameters == pytest.approx(size, rel=2e-3), name


def test_quantised_weights_take_fewer_bytes():
    config = BUILT_IN["Qwen/Qwen2.5-VL-3B-Instruct"]()
    whole, eight, four = (Architecture(config, torch.bfloat16, bits).weight_bytes for bits in (16, 8, 4))
    assert whole == 2 * 3_754_622_976
    linear = 2 * (whole - eight)  # what is packed, in bytes of bfloat16
    assert 0.9 < linear / (whole - 2 * 151936 * 2048) < 1.0  # all but the embeddings, which are the head, and norms
    assert whole - four == pytest.approx(linear * (1 - 0.516 / 2), rel=1e-6)


# --- tokens


def test_tokens_of_a_pair_are_those_of_the_processor(tmp_path: Path):
    """The embedded judge's own processor, asked the same question."""
    Image.new("RGB", (96, 96), "red").save(tmp_path / "a.png")
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "b.png")
    row = {"prompt": "two red circles", "image_first": "a.png", "image_second": "b.png", "p_first": 1.0}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    checkpoint = Checkpoint.of("tiny")
    chat_format, processor = checkpoint.card.format, checkpoint.processor
    pairs = of_data(checkpoint, chat_format, str(tmp_path / "pairs.jsonl"), None, 0)
    chat = chat_format.chat(row["prompt"], str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    text = processor.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=[picture.image for picture in chat.images], text=[text], return_tensors="pt")
    assert (pairs.number, pairs.longest.total) == (1, inputs["input_ids"].shape[1])
    seen = sorted(tuple(grid) for grid in inputs["image_grid_thw"].tolist())
    assert sorted(pairs.longest.grids) == seen


def test_a_family_that_no_plan_knows_is_refused(tmp_path: Path):
    tiny_families.build("gemma3", tmp_path)
    with pytest.raises(InputError, match="is a gemma3 model, which no plan knows: only Qwen's families are counted"):
        Checkpoint.of(str(tmp_path))


def test_data_without_a_readable_image_is_refused(tmp_path: Path):
    row = {"prompt": "two red circles", "image_first": "a.png", "image_second": "b.png", "p_first": 1.0}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    checkpoint = Checkpoint.of("tiny")
    with pytest.raises(InputError, match="no image among those looked at can be read; give --image-size"):
        of_data(checkpoint, checkpoint.card.format, str(tmp_path / "pairs.jsonl"), None, 0)


def test_pairs_that_cannot_be_read_are_noted(tmp_path: Path):
    Image.new("RGB", (96, 96), "red").save(tmp_path / "a.png")
    row = {"prompt": "two red circles", "image_first": "a.png", "image_second": "a.png", "p_first": 1.0}
    rows = [row, row | {"image_first": "b.png", "image_second": "c.png"}, row]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    note = "1 of 3 pairs looked at have an image that cannot be read, and are left out"
    data = str(tmp_path / "pairs.jsonl")
    checkpoint = Checkpoint.of("tiny")
    pairs = of_data(checkpoint, checkpoint.card.format, data, None, 0)
    assert (pairs.number, len(pairs.seen), pairs.unread) == (3, 2, 1)
    assert plan_judging("eval", checkpoint, pairs).notes == [note]
    argv = ["--model_name_or_path", "tiny-base", "--listener", "base", "--data", data, "--output_dir", "x"]
    assert plan_training(argv).notes == [note]


# --- several GPUs, hours, advice


@pytest.mark.parametrize(
    ("name", "gpus", "launch"),
    [
        (None, None, Launch()),
        (None, 4, Launch(4, "ddp")),
        ("one_gpu", None, Launch(1, "none")),
        ("ddp", None, Launch(8, "ddp")),
        ("fsdp2", 2, Launch(2, "fsdp")),
        ("zero2", None, Launch(8, "zero2")),
        ("zero3", 16, Launch(16, "zero3")),
        ("multi_node", None, Launch(16, "fsdp")),
    ],
)
def test_a_launch_says_what_is_sharded(name: str | None, gpus: int | None, launch: Launch):
    assert Launch.of(name, gpus) == launch


def test_a_launch_that_is_none_is_refused():
    with pytest.raises(InputError, match="launch is 'fsdp9', neither a name of launch-config nor a readable file"):
        Launch.of("fsdp9", None)


@pytest.mark.parametrize("content", ["", "- ddp\n", "ddp"])
def test_a_launch_without_settings_is_refused(content: str, tmp_path: Path):
    file = tmp_path / "launch.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="neither a name of launch-config nor a readable file"):
        Launch.of(str(file), None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("deepspeed_config: 3", "whose deepspeed_config is 3; it holds settings"),
        ("deepspeed_config: [zero_stage]", r"whose deepspeed_config is \['zero_stage'\]; it holds settings"),
        ("fsdp_config: 'yes'", "whose fsdp_config is 'yes'; it holds settings"),
        ("deepspeed_config: {zero_stage: three}", "whose zero_stage is 'three'; give a whole number of at least 0"),
        ("num_processes: many", "whose num_processes is 'many'; give a whole number of at least 1"),
        ("num_processes: [8]", r"whose num_processes is \[8\]; give a whole number"),
        ("num_processes: {a: 8}", r"whose num_processes is {'a': 8}; give a whole number"),
        ("num_processes: 1.5", "whose num_processes is 1.5; give a whole number"),
        ("num_processes: .inf", "whose num_processes is inf; give a whole number"),
        ("num_processes: true", "whose num_processes is True; give a whole number"),
        ("num_processes: 0", "whose num_processes is 0; give a whole number of at least 1"),
    ],
)
def test_a_launch_with_settings_of_another_type_is_refused(content: str, said: str, tmp_path: Path):
    file = tmp_path / "launch.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        Launch.of(str(file), None)


def test_a_launch_that_leaves_settings_empty_has_the_defaults(tmp_path: Path):
    file = tmp_path / "launch.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: '8'\nfsdp_config:\n", encoding="utf-8")
    assert Launch.of(str(file), None) == Launch(8, "ddp")
    file.write_text("num_processes:\n", encoding="utf-8")
    assert Launch.of(str(file), None) == Launch()


def test_sharding_divides_what_it_shards():
    """The tiny base, every weight: 4 bytes of weights and gradients and 8 of moments for each of its parameters."""
    argv = "--model_name_or_path tiny-base --listener tiny-listener --data tiny:train --data_limit 8 --output_dir x"
    argv += " --gradient_accumulation_steps 2 --max_completion_length 16 --gradient_checkpointing false --bf16 false"
    held = {}
    for launch in (Launch(), Launch(4, "ddp"), Launch(4, "fsdp")):
        plan = plan_training([*argv.split()], launch=launch)
        parameters = plan.parameters["policy"]
        assert plan.parameters["trained"] == parameters
        held[launch.sharding] = {part: size / parameters for part, size in plan.phases[-1].parts.items()}
    for sharding, expected in {"none": (4, 4, 8), "ddp": (4, 8, 8), "fsdp": (1, 1, 2)}.items():
        found = [held[sharding][part] for part in ("weights", "gradients", "optimizer")]
        assert found == pytest.approx(expected, rel=1e-3), sharding
    assert held["none"]["listener"] == held["fsdp"]["listener"]  # which every process holds whole


def test_hours_and_what_to_change():
    pairs = Pairs(10, [Pair(1, 1, ((1, 4, 4),) * 2, (4, 4), ((8, 8),) * 2)], "made up")
    phases = [Phase("loss", {"weights": 30, "activations": 60}, 7.2e15), Phase("rollout", {"weights": 30}, 0.0, 3.6e12)]
    changes = {"activations": "gradient_checkpointing: true", "weights": "dtype: bfloat16"}
    plan = Plan("train", pairs, 5, phases, 1, "step", 100, changes=changes)
    assert plan.hours(1e14, None) == pytest.approx(100 * 72 / 3600)
    assert plan.hours(1e14, 1e12) == pytest.approx(100 * (72 + 3.6) / 3600)
    assert plan.advice(90) == []
    small = [line.partition(":")[0] for line in plan.advice(80)]
    assert small == ["activations (0.0 GB)", "weights (0.0 GB)"]  # the larger first


FOUR = {"quantization": "4bit", "device": "cuda:1"}
TRAINING = ["--model_name_or_path", "tiny-base", "--listener", "tiny-listener", "--data", "tiny:id"]
TRAINING += ["--output_dir", "no", "--data_limit", "4"]


def test_a_plan_asks_as_the_card_of_the_training_file(tmp_path: Path):
    card = tmp_path / "card.json"
    question = "{first} {second} {prompt} two red circles and two red circles"
    card.write_text(json.dumps({"format": {"question": question}}), encoding="utf-8")
    own = Checkpoint.of("tiny-base")
    asked = own.question_tokens(Card.read(card).format)
    assert asked != own.question_tokens(own.card.format)
    plan = plan_training([*TRAINING, "--card", str(card)])
    assert plan.pairs.longest.question == asked


def test_a_plan_loads_the_listener_as_the_training_file_says(tmp_path: Path):
    file = tmp_path / "train.yaml"
    held: dict[str, int] = {}
    for name, options in {
        "as it is": {},
        "half": {"dtype": "float16"},
        "whole": {"dtype": "float32"},
        "4": FOUR,
    }.items():
        file.write_text(yaml.safe_dump({"listener_options": options}), encoding="utf-8")
        plan = plan_training(["--config", str(file), *TRAINING])
        held[name] = plan.phases[0].parts["listener"]
        assert [note for note in plan.notes if "cuda:1" in note] == (
            ["the listener is counted on the policy's GPU; listener_options put it on cuda:1"]
            if options is FOUR
            else []
        )
    assert held["as it is"] == held["half"] == held["whole"] // 2 > held["4"]


# --- the command


def run(*argv: str) -> Any:
    return CliRunner().invoke(app, ["plan", *argv])


def test_a_judge_is_planned_for_people():
    done = run("eval", "--judge", "tiny", "--data", "tiny:id", "--pairs", "4", "--memory", "1MB", "--tflops", "1")
    assert done.exit_code == 0, done.output
    for said in ("question and chat template", "GB on each GPU", "listener", "hours for 4 pairs", "It does not fit"):
        assert said in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--", "--no_such_field", "1"], "no_such_field"),
        (["serve", "--judge", "tiny", "--quantization", "5bit"], "quantization is '5bit'; choose '4bit' or '8bit'"),
        (["boil"], "what is 'boil'; choose train, eval or serve"),
        (["eval", "--judge", "tiny"], "--data is not given"),
        (["serve", "--judge", "tiny", "--gpu", "abacus"], "gpu is 'abacus'; choose one of 3090"),
        (["serve", "--judge", "tiny", "--memory", "much"], "memory is 'much'"),
        (["serve", "--judge", "tiny", "--image-size", "big"], "image-size is 'big'"),
        (["serve", "--judge", "no/such-checkpoint"], "could not be fetched"),
        (["serve", "--judge", "tiny", "--card", "no.json"], "there is no file 'no.json'"),
        (["serve", "--judge", "tiny", "--launch", "ddp", "--gpus", "8"], "--launch, --gpus: no option of `plan serve`"),
        (
            ["eval", "--judge", "tiny", "--data", "tiny:id", "--", "--seed", "1"],
            "--seed 1: fields after `--` are those",
        ),
        (["--max-pixels", "10", "--", "--data", "tiny:id"], "--max-pixels: no option of `plan train`; for train"),
    ],
)
def test_what_cannot_be_planned_is_one_line(argv: list[str], said: str):
    done = run(*argv)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


# --- recipes


@pytest.mark.parametrize("recipe", measured.RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_planned_and_fits_as_its_header_says(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, found = recipe.read_text(encoding="utf-8"), measured.planned(recipe)
    assert found["fits"]
    assert f"# expected: {measured.expected(found)}\n" in text
    assert "Not run on a GPU." in " ".join(line.lstrip("# ") for line in text.splitlines())
    fields = yaml.safe_load(text)
    if found["what"] == "train":
        assert fields["dtype"] == ("bfloat16" if fields.get("use_peft") else "float32")
        assert fields["learning_rate"] == (1e-5 if fields.get("use_peft") else 1e-6)


def test_the_settings_of_the_ddpo_recipe_are_the_trainers():
    recipe = ROOT / "examples/recipes/sd35_ddpo.yaml"
    read = runpy.run_path(str(recipe.with_suffix(".py")))["read"]
    fields, config = read(str(recipe))
    assert (config.batches, config.images_per_prompt) == (16, 16)
    assert f"serve --judge runs/paper-lora --scheme {fields['scheme']}" in recipe.read_text(encoding="utf-8")


def test_the_page_has_the_table_that_the_recipes_plans_make(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    table = re.search(r"<!-- recipes -->\n(.*?)\n<!-- /recipes -->", PAGE, re.S)
    assert table is not None
    assert table[1] == measured.recipes_table()


def test_no_thoughts_are_counted_in_a_plan_of_none(random_judge):
    options = ["--judge", str(random_judge), "--no-think", "--thoughts", "4"]
    result = CliRunner().invoke(app, ["plan", "eval", "--image-size", "64x64", *options])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert re.search(r"thoughts is 4 \(--thoughts\), and think is False \(--no-think\)", result.stderr)
