"""The benchmark: both ways compute the same, and what it reads off is right."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from listener_reward.bench.meter import Reading, matrix_rate, metered
from listener_reward.bench.run import BENCHMARKS, report, run_bench
from listener_reward.bench.shapes import SHAPES_BY_NAME, Size
from listener_reward.cli import app
from listener_reward.errors import InputError

TINY = (
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]},
)


def in_this_process(monkeypatch):
    """Runs arms here: spawned processes would each import torch, and not know the small shape."""
    from listener_reward.bench import run

    class Pipe:
        def send(self, message):
            self.message = message

    def here(*arguments):
        pipe = Pipe()
        run._work(pipe, *arguments)
        kind, content = pipe.message
        assert kind == "done", content
        return content

    monkeypatch.setattr(run, "_in_a_process", here)
    monkeypatch.setitem(SHAPES_BY_NAME, "tiny", TINY)


PRINTED = {
    "seconds": "median_seconds",
    "language-model tokens": "tokens",
    "vision patches": "patches",
    "peak memory over the start, MB": "peak_mb",
    "language-model tokens a second": "tokens_per_second",
    "share of the machine's matrix rate": "share_of_matrix_rate",
}
COMPARED = {
    "listener": {"log-probability"},
    "rank": {"score"},
    "loss": {"log-probability", "loss", "gradient, relative"},
    "step": {"sampled token", "reward", "loss", "gradient, relative"},
}
SIZE = Size(model="tiny", pixels=84, group=3, groups=2, tokens=6, images=3, prompt_words=4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_ways_compute_the_same_and_one_computes_less(name, monkeypatch, capfd):
    in_this_process(monkeypatch)
    results = run_bench(name, SIZE, Console(stderr=True))
    assert json.loads(json.dumps(results)) == results
    for arm in BENCHMARKS[name]:
        found = results["arms"][arm]
        for quantity, difference in found["largest_difference"].items():
            assert difference < 1e-5, (arm, quantity)
        assert found["plain"]["patches"] > found["shared"]["patches"] > 0
        assert found["plain"]["tokens"] >= found["shared"]["tokens"] > 0
        assert found["plain"]["weight_flops"] > found["shared"]["weight_flops"]
        printed = Console(record=True, width=120, file=io.StringIO())
        report(results, printed)
        lines = printed.export_text().splitlines()
        for label, key in PRINTED.items():
            for way in ("shared", "plain"):
                assert found[way][key] >= 0
            assert any(label in line for line in lines), label
        assert any(f"{found['ratio']:.2f}" in line for line in lines if "seconds" in line)
        assert set(found["largest_difference"]) == COMPARED[arm]
        assert sum("largest difference, " in line for line in lines) >= len(COMPARED[arm])
    if name == "rank":
        assert results["arms"]["rank"]["shared"]["patches"] == 3 * 36, "three images, encoded once each"
        assert results["arms"]["rank"]["plain"]["patches"] == 2 * 3 * 2 * 36
    if name == "grpo":
        assert results["arms"]["loss"]["plain"]["patches"] == 3 * results["arms"]["loss"]["shared"]["patches"]


def test_the_meter_counts_products_with_weights():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    reading = Reading()
    with metered(model, reading):
        model(torch.zeros(5, 3, 8))
    assert reading.weight_flops == 2 * 15 * (8 * 4 + 4 * 2)
    with metered(model, reading, backward=True):
        model(torch.zeros(1, 8)).sum().backward()
    assert reading.weight_flops == 3 * 2 * (8 * 4 + 4 * 2)
    assert len(reading.seconds) == len(reading.cpu_seconds) == 2
    assert not model[0]._forward_hooks


def test_the_machine_has_a_rate():
    assert matrix_rate("float32", size=64, repeats=1) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "benchmark is 'nothing'; choose one of 'listener', 'grpo', 'rank'"),
        (["rank", "--model", "70b"], "model is '70b'; choose one of '60m', 'qwen2.5-vl-3b', 'qwen2.5-vl-7b'"),
        (["listener", "--group", "1"], "group is 1; it must be at least 2"),
        (["rank", "--dtype", "int8"], "dtype is 'int8'; choose one of 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_a_size_that_cannot_be_is_refused(options, message):
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_failed_arm_says_why(tmp_path):
    from listener_reward.bench.run import _in_a_process

    with pytest.raises(RuntimeError, match=r"rank \(plain\)"):
        _in_a_process("rank", tmp_path / "nothing", Size(), False, tmp_path / "out.pt")


def test_sizes_are_checked_before_anything_is_made():
    with pytest.raises(InputError, match="tokens is 1"):
        run_bench("rank", Size(tokens=1), Console(stderr=True))
