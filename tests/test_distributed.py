"""Two processes do what one does: the same rewards, metrics, gradients and weights, however the weights are placed.

`distributed_worker.py` has the scenarios. One launch of torchrun runs them all, and this process runs them alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_worker as worker
import pandas
import pytest
import torch
from distributed_worker import GATHERED, GREEDY, LAUNCHES, LORA, OWN, RESUMED, SPANNING, SPLIT, UNEVEN
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from listener_reward.card import Card
from listener_reward.judge import Judge
from listener_reward.train.run import _leave

ROOT = Path(__file__).parents[1]
Results = Callable[[str, str], list[dict[str, Any]]]

TOGETHER = (("ddp", "fsdp2"), ("zero2", "zero3"))
"""Which kinds of launch one launch of torchrun runs."""


def by_launch(*scenarios: str) -> pytest.MarkDecorator:
    """Parametrizes with each launch that runs one of the scenarios."""
    missing = importlib.util.find_spec("deepspeed") is None
    skip = pytest.mark.skipif(missing, reason="DeepSpeed is not installed: pip install deepspeed")
    cases = [(launch, name) for launch in LAUNCHES for name in scenarios if name in LAUNCHES[launch]]
    marks = {"zero2": skip, "zero3": skip}
    return pytest.mark.parametrize(
        ("launch", "name"), [pytest.param(*case, marks=marks.get(case[0], ())) for case in cases]
    )


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """A command of this environment, on one thread a process; its stdout. A deadlock ends in a timeout."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """`two(launch, scenario)` is what each of two processes found."""
    out = tmp_path_factory.mktemp("two")

    @cache
    def launched(*names: str) -> Path:
        program = str(ROOT / "tests" / "distributed_worker.py")
        torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
        run(*torchrun, program, str(out), *names, DS_ACCELERATOR="cpu")
        return out

    def results(launch: str, name: str) -> list[dict[str, Any]]:
        folder = launched(*next(names for names in TOGETHER if launch in names)) / launch
        files = [folder / f"{name}.{rank}.pt" for rank in (0, 1)]
        return [torch.load(file, weights_only=False) | {"folder": folder / name} for file in files]

    return results


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """`one(scenario)` is what a single process found."""
    out = tmp_path_factory.mktemp("one")
    return cache(lambda name: worker.run(name, out, 1) | {"folder": out / name})


def moved(result: dict[str, Any], start: dict[str, torch.Tensor]) -> torch.Tensor:
    """How training changed the weights, all in one vector: with SGD, the gradients."""
    assert result["end"].keys() == start.keys()
    return torch.cat([(result["end"][name] - start[name]).flatten() for name in start])


def assert_same_metrics(found: dict[str, Any], expected: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    assert len(found["metrics"]) == len(expected["metrics"]) > 0
    for entry, wanted in zip(found["metrics"], expected["metrics"], strict=True):
        assert entry.keys() == wanted.keys()
        for name in wanted.keys() - {"step_time", *but}:
            assert entry[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


# --- the same as one process


@by_launch(SPANNING, OWN, LORA, SPLIT)
def test_an_update_is_that_of_one_process(two: Results, one: Any, launch: str, name: str):
    alone, (first, second) = one(name), two(launch, name)
    assert (first["processes"], second["processes"], alone["processes"]) == (2, 2, 1)
    assert first["sharing"] == alone["sharing"] == {"rollout", "logprobs", "groups"}
    whole, found = moved(alone, alone["start"]), moved(first, alone["start"])
    assert whole.norm() > 1e-3
    assert (found - whole).norm() / whole.norm() < 1e-5
    # trl's own entropy is a mean of micro-batches' means over tokens, and one's micro-batches are not two's.
    assert_same_metrics(first, alone, but=("entropy",) if name == LORA else ())


@by_launch(SPLIT)
def test_processes_with_sharded_weights_run_equally_many_passes(two: Results, launch: str, name: str):
    """All gather the weights together. Where each has them whole, a process runs what its own completions need."""
    first, second = (result["passes"] for result in two(launch, name))
    assert first > 2, "two updates, whose longer completions do not fit one pass"
    assert (first == second) == (launch in ("fsdp2", "zero3"))


@by_launch(GREEDY, UNEVEN)
def test_rollouts_are_those_of_one_process(two: Results, one: Any, launch: str, name: str):
    alone, (first, _) = one(name), two(launch, name)
    tables = [sorted((result["folder"] / "completions").glob("*.parquet")) for result in (alone, first)]
    assert len(tables[0]) == len(tables[1]) == 2
    for wanted, found in zip(*(map(pandas.read_parquet, files) for files in tables), strict=True):
        assert len(wanted) == 8
        for column in ("id", "completion", "format", "accuracy"):
            assert list(found[column]) == list(wanted[column])
        assert list(found["listener"]) == pytest.approx(list(wanted["listener"]), abs=1e-6)


def test_both_processes_end_with_the_same_weights(two: Results):
    for name in (SPANNING, LORA, RESUMED):
        first, second = two("ddp", name)
        assert all(torch.equal(first["end"][key], second["end"][key]) for key in first["end"])


# --- what each process does


def test_the_listener_works_on_each_process_for_its_own_thoughts(two: Results, one: Any):
    first, second = two("ddp", SPANNING)
    assert (first["heard"], second["heard"]) == ([3, 3], [1])  # in the first step the second process has none
    assert one(SPANNING)["heard"] == [3, 4]


def test_images_stay_on_their_process_unless_they_are_asked_for(two: Results):
    light, heavy = (two("ddp", name) for name in (GREEDY, GATHERED))
    picture = 48 * 48 * 3
    assert all(result["gathered"] < picture for result in light)
    assert all(result["gathered"] > 2 * 2 * picture for result in heavy)  # two steps, one pair each
    assert_same_metrics(heavy[0], light[0])


def test_fsdp_shards_decoder_layers_and_vision_blocks(two: Results):
    sharded = two("fsdp2", SPANNING)[0]["sharded"]
    assert {"FSDPQwen2_5_VLDecoderLayer", "FSDPQwen2_5_VLVisionBlock"} < sharded


# --- what is left on disk


@by_launch(RESUMED)
def test_resumed_under_two_processes_is_the_same_to_the_last_bit(two: Results, launch: str, name: str):
    first = two(launch, name)[0]
    assert first["resumed"].keys() == first["end"].keys() != set()
    assert all(torch.equal(first["resumed"][key], first["end"][key]) for key in first["end"])
    assert all(entry["grad_norm"] > 0 for entry in first["metrics"][1:])  # else nothing was to be resumed


@by_launch(SPANNING, LORA)
def test_the_judge_is_written_once_and_is_that_of_one_process(two: Results, one: Any, launch: str, name: str):
    folder = two(launch, name)[0]["folder"]
    assert [path.name for path in folder.glob("judge-*")] == ["judge-0"]
    file = "adapter_model.safetensors" if name == LORA else "model.safetensors"
    found = load_file(folder / "judge-0" / file)
    wanted = load_file(one(name)["folder"] / "judge-0" / file)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.allclose(found[key], wanted[key], rtol=0, atol=1e-6), key
    assert (folder / "judge-0" / "adapter_config.json").exists() == (name == LORA)
    assert Card.load(folder / "judge-0") == Card.load(one(name)["folder"] / "judge-0")


# --- the command line


def test_accelerate_launch_trains_on_two_processes(tmp_path: Path):
    """The documented line, with two processes; without a GPU they are on the CPU. G = 8 and 4 rows: it takes both."""
    (tmp_path / "accelerate.yaml").write_text(run("listener_reward.cli", "launch-config", "ddp"), encoding="utf-8")
    (tmp_path / "train.yaml").write_text(
        """
model_name_or_path: tiny-base
listener: tiny-listener
data: tiny:train
data_limit: 8
output_dir: judge
per_device_train_batch_size: 4
num_generations: 8
max_completion_length: 40
max_steps: 1
logging_steps: 1
save_strategy: "no"
report_to: none
gradient_checkpointing: false
use_cpu: true
bf16: false
""",
        encoding="utf-8",
    )
    launch = ["--config_file", "accelerate.yaml", "--num_processes", "2", "--main_process_port", "0"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    said = run(
        *("accelerate.commands.launch", *launch, "-m", "listener_reward.cli", "train", "--config", "train.yaml"),
        cwd=tmp_path,
        PYTHONPATH=path,
    )
    assert said.count("The judge is in judge") == 1
    assert len(pandas.read_parquet(tmp_path / "judge" / "completions" / "completions_00001.parquet")) == 8
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "judge", dtype="float32")
    assert Judge.from_pretrained(tmp_path / "judge").card.listener == "tiny-listener"
    assert all(weight.isfinite().all() for weight in plain.parameters())


def test_the_wrapped_model_goes_before_the_process_group():
    """Else its destructor takes the group along while it holds the interpreter's lock, and may wait for ever."""

    class Wrapper:
        pass

    wrapper = Wrapper()
    alive, kept, freed = weakref.ref(wrapper), [wrapper], []
    accelerator = SimpleNamespace(free_memory=kept.clear, end_training=lambda: freed.append(alive() is None))
    trainer: Any = SimpleNamespace(model="model", model_wrapped=wrapper, accelerator=accelerator)
    del wrapper
    _leave(trainer)
    assert freed == [True]
