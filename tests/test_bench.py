"""The benchmark: both ways compute the same, and what it reads off is right."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from rich.console import Console
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from listener_reward.bench.meter import Reading, fused_head, matrix_rate, metered
from listener_reward.bench.run import BENCHMARKS, report, run_bench
from listener_reward.bench.shapes import SHAPES_BY_NAME, Size
from listener_reward.cli import app
from listener_reward.errors import InputError, MissingExtraError

TINY = (
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]},
)


def in_this_process(monkeypatch):
    """Runs workloads here: spawned processes would each import torch, and not know the small shape."""
    from listener_reward.bench import run

    class Pipe:
        def send(self, message):
            self.message = message

    def here(*arguments):
        pipe = Pipe()
        run._work(pipe, *arguments)
        kind, content = pipe.message
        if kind == "no room":
            raise run.NoRoom(content)
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
    "fraction of the machine's matrix rate": "share_of_matrix_rate",
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
    for workload in BENCHMARKS[name]:
        found = results["workloads"][workload]
        for quantity, difference in found["largest_difference"].items():
            assert difference < 1e-5, (workload, quantity)
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
        ways = ("", "_last_logit") if workload == "listener" else ("",)
        for suffix in ways:
            assert set(found["largest_difference" + suffix]) == COMPARED[workload]
            assert max(found["largest_difference" + suffix].values()) < 1e-5
        expected = len(ways) * sum(len(COMPARED[each]) for each in BENCHMARKS[name])
        assert sum("largest difference, " in line for line in lines) == expected
    if name == "listener":
        workload = results["workloads"]["listener"]
        assert workload["plain"]["tokens"] == workload["last_logit"]["tokens"]
        head = TINY[0]["hidden_size"] * TINY[0]["vocab_size"]
        positions = workload["plain"]["tokens"] - SIZE.group  # of which plain code computes the logits in vain
        assert workload["plain"]["weight_flops"] - workload["last_logit"]["weight_flops"] == 2 * head * positions
        assert workload["limit_last_logit"] < workload["limit"]
    if name == "rank":
        assert results["workloads"]["rank"]["shared"]["patches"] == 3 * 36, "three images, encoded once each"
        assert results["workloads"]["rank"]["plain"]["patches"] == 2 * 3 * 2 * 36
    if name == "grpo":
        found = results["workloads"]["step"]
        images = 3 * 2 * 2 * 36, 3 * 2 * 2 * 36 * 3  # rollout, loss and listener each see two groups of two images
        assert (found["shared"]["patches"], found["plain"]["patches"]) == images, "the listener's count too"
        assert results["workloads"]["loss"]["plain"]["patches"] == 3 * results["workloads"]["loss"]["shared"]["patches"]


@pytest.mark.filterwarnings("ignore")
def test_adapters_checkpointing_and_a_warm_up(monkeypatch):
    in_this_process(monkeypatch)
    size = replace(SIZE, groups=1, repeats=2, lora=True, gradient_checkpointing=True)
    results = run_bench("grpo", size, Console(stderr=True))
    for found in results["workloads"].values():
        assert len(found["shared"]["seconds"]) == 2, "the warm-up does not count"
        assert max(found["largest_difference"].values()) < 1e-5
        assert found["largest_difference"]["gradient, relative"] > 0
    monkeypatch.setitem(BENCHMARKS, "loss", ("loss",))
    kept = run_bench("loss", replace(size, repeats=1, gradient_checkpointing=False), Console(stderr=True))
    again, once = (r["workloads"]["loss"]["shared"]["weight_flops"] for r in (results, kept))
    assert again > once


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_said_and_the_rest_is_kept(monkeypatch):
    from listener_reward.bench import workloads

    in_this_process(monkeypatch)
    stock = workloads.WORKLOADS["listener"]

    def full(folder, size, way):
        if way == "plain":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(folder, size, way)

    monkeypatch.setitem(workloads.WORKLOADS, "listener", full)
    results = run_bench("listener", SIZE, Console(stderr=True))
    found = results["workloads"]["listener"]
    assert found["plain"] is found["ratio"] is found["limit"] is None
    assert found["shared"]["tokens"] > 0 and found["ratio_last_logit"] > 0
    printed = Console(record=True, width=140, file=io.StringIO())
    report(results, printed)
    assert "no room" in printed.export_text()
    json.dumps(results)


def test_the_meter_counts_products_with_weights():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    reading = Reading()
    with metered([model], reading):
        model(torch.zeros(5, 3, 8))
    assert reading.weight_flops == 2 * 15 * (8 * 4 + 4 * 2)
    with metered([model], reading, backward=True):
        model(torch.zeros(1, 8)).sum().backward()
    assert reading.weight_flops == 2 * (2 * 8 * 4 + 3 * 4 * 2), "what the first layer gets has no gradient"
    model[0].weight.requires_grad_(False)
    with metered([model, torch.nn.Linear(1, 1)], reading, backward=True):
        model(torch.zeros(1, 8)).sum().backward()
    assert reading.weight_flops == 2 * (1 * 8 * 4 + 2 * 4 * 2)
    with metered([model], reading, backward=True):
        checkpoint(model, torch.zeros(1, 8, requires_grad=True), use_reentrant=False).sum().backward()
    assert reading.weight_flops == 2 * ((2 + 1) * 8 * 4 + 3 * 4 * 2), "the first once more, for the last's input"
    assert len(reading.seconds) == len(reading.cpu_seconds) == 4
    with metered([model], reading, backward=True):
        checkpoint(model, torch.zeros(1, 8, requires_grad=True), use_reentrant=True).sum().backward()
    assert reading.weight_flops == 2 * ((2 + 1) * 8 * 4 + (3 + 1) * 4 * 2), "computes all of it again"
    assert not model[0]._forward_hooks


def test_the_meter_counts_trls_fused_head():
    """Which multiplies by the head's weight without calling its layer, and in the backward pass once more."""
    from trl.trainer import utils

    assert utils._ChunkedLogProbFunction is fused_head(), "what trl's models call"
    weight, hidden = torch.randn(16, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets, stock = torch.arange(5), (fused_head().forward, fused_head().backward)
    gradients = []
    for backward, grad, times in ((True, False, 1), (True, True, 4), (False, True, 1)):
        reading = Reading()
        with metered([], reading, backward=backward), torch.set_grad_enabled(grad):
            logprobs, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768)
            if grad:
                gradients.append(torch.autograd.grad(logprobs.sum(), [hidden, weight]))
        assert reading.weight_flops == 2 * times * 16 * 8 * 5
    frozen = weight.detach()
    with metered([], reading := Reading(), backward=True):
        utils._ChunkedLogProbFunction.apply(hidden, frozen, None, targets, 1.0, 32768)[0].sum().backward()
    assert reading.weight_flops == 2 * 3 * 16 * 8 * 5, "its weight gets no gradient"
    assert (fused_head().forward, fused_head().backward) == stock
    expected = torch.autograd.grad((hidden @ weight.T).log_softmax(-1)[range(5), targets].sum(), [hidden, weight])
    for found in gradients:
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("renamed", "has no trl.kernels.ChunkedLogProbFunction"),
        ("gone", "has no trl.kernels.ChunkedLogProbFunction"),
        ("forward", "has ChunkedLogProbFunction.forward(ctx, weight, hidden), and listener-reward expects (ctx, hid"),
        ("backward", "has ChunkedLogProbFunction.backward(ctx, grad_outputs), and listener-reward expects (ctx, gra"),
    ],
)
def test_a_fused_head_that_is_another_is_refused_before_the_work(monkeypatch, change, said):
    """Uncounted, it would make the fraction of the machine's rate and the limit too low, and nobody would know."""
    from trl import kernels

    if change == "renamed":
        monkeypatch.delattr(kernels, "ChunkedLogProbFunction")
    elif change == "gone":
        monkeypatch.setitem(sys.modules, "trl.kernels", None)
    else:
        forward = fused_head().forward if change == "backward" else lambda ctx, weight, hidden: None
        other = type("ChunkedLogProbFunction", (torch.autograd.Function,), {"forward": staticmethod(forward)})
        monkeypatch.setattr(kernels, "ChunkedLogProbFunction", other)
    with pytest.raises(MissingExtraError) as error:
        run_bench("grpo", Size(), Console(stderr=True))
    assert f"trl {version('trl')} {said}" in str(error.value)
    assert str(error.value).endswith('It is tested with trl 1.16: pip install "trl==1.16"')
    with pytest.raises(MissingExtraError), metered([], Reading()):
        raise AssertionError("nothing runs that is not counted")


def test_a_loss_that_is_called_otherwise_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("trl.GRPOTrainer._compute_loss", lambda self, inputs: None)
    with pytest.raises(
        MissingExtraError, match=r"GRPOTrainer._compute_loss\(self, inputs\), .* expects \(self, model, in"
    ):
        run_bench("grpo", Size(), Console(stderr=True))


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


def test_a_failed_workload_says_why(tmp_path):
    from listener_reward.bench.run import NoRoom, _in_a_process

    with pytest.raises(RuntimeError, match=r"rank \(plain\)") as error:
        _in_a_process("rank", tmp_path / "nothing", Size(), "plain", tmp_path / "out.pt")
    assert not isinstance(error.value, NoRoom)


def test_sizes_are_checked_before_anything_is_made():
    with pytest.raises(InputError, match="tokens is 1"):
        run_bench("rank", Size(tokens=1), Console(stderr=True))
