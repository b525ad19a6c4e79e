"""A real vLLM: an engine in this process, and a server. Verdicts are those of transformers, on 200 pairs.

Needs vLLM, which is not among the test's own packages; `.ci/run` makes an environment with the build for CPUs.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("vllm") is None:
    pytest.skip("needs vLLM", allow_module_level=True)

from listener_reward.chat import Chat
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.evaluate.intervals import wilson
from listener_reward.judge import Judge
from listener_reward.models.hub import resolve
from listener_reward.models.resizing import resized
from listener_reward.trace import parse

LABELS = ("1", "2")
PAIRS = 200
ENGINE = {"enforce_eager": True, "max_model_len": 512}
SAMPLED = {"max_new_tokens": 48, "temperature": 0.0}


@pytest.fixture(scope="module", autouse=True)
def small_engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def pairs() -> list[Any]:
    return list(load_pairs("tiny:id", limit=PAIRS))


@pytest.fixture(scope="module")
def here() -> Judge:
    return Judge.from_pretrained("tiny", listener="none", device="cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter to the embedded judge, with weights that change what it says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(resolve("tiny"))
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules=r".*language_model.*(q_proj|v_proj)"))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    wrapped.save_pretrained(str(folder))
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    saved["base_model_name_or_path"] = "tiny"
    (folder / "adapter_config.json").write_text(json.dumps(saved), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def engine(adapter: Path) -> Any:
    """The adapter in an engine of this process, with its base as the listener on the same weights."""
    return Judge.from_pretrained(adapter, listener="base", backend="vllm", engine=ENGINE)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the embedded judge."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--served-model-name", "tiny"]
    options.append("--no-enable-chunked-prefill")  # with which vLLM 0.32 dies of seeds on a CPU
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", resolve("tiny"), "--port", str(port)]
    with log.open("wb") as out:
        server = subprocess.Popen([*command, *options], stdout=out, stderr=out, env=os.environ)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text(encoding="utf-8")[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def chats_of(judge: Judge, pairs: list[Any]) -> list[Chat]:
    reserved = judge.reasoner.reserved
    return [judge.card.format.chat(pair["prompt"], pair["images"][0], pair["images"][1], reserved) for pair in pairs]


def assert_says_the_same(vlm: Any, here: Judge, pairs: list[Any]) -> None:
    """Greedy texts are equal; log-probabilities of answers and of thoughts differ by less than 1e-4."""
    chats = chats_of(here, pairs)
    right = here.reasoner.generate(chats, seeds=range(len(chats)), **SAMPLED)
    assert vlm.generate(chats, seeds=range(len(chats)), **SAMPLED) == right
    prefixes = [here.card.format.answer_slot(parse(text, here.card.format).thought) for text in right]
    expected = here.reasoner.read(chats, prefixes, LABELS)
    torch.testing.assert_close(vlm.read(chats, prefixes, LABELS), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(vlm.label_logprobs(chats, prefixes, LABELS), expected[0], rtol=0, atol=1e-4)


def assert_judges_as_well(judge: Judge, here: Judge, pairs: list[Any]) -> None:
    """The accuracy lies in the interval of transformers', and swapping the sides gives exactly 1 - p."""
    sides = [[pair["prompt"] for pair in pairs], *([pair["images"][k] for pair in pairs] for k in (0, 1))]
    found, swapped = judge.compare_many(*sides), judge.compare_many(sides[0], sides[2], sides[1])
    assert [one.p_first + other.p_first for one, other in zip(found, swapped, strict=True)] == [1.0] * len(pairs)
    right = [
        sum((verdict.p_first > 0.5) == (pair["p_first"] > 0.5) for verdict, pair in zip(verdicts, pairs, strict=True))
        for verdicts in (found, here.compare_many(*sides))
    ]
    interval = wilson(right[1], len(pairs))
    assert interval is not None
    reasoner: Any = judge.reasoner
    print(f"{judge.name} in {reasoner.backend}: right {right[0]}, in transformers {right[1]}")
    assert interval[0] <= right[0] / len(pairs) <= interval[1]


def test_an_engine_says_what_transformers_says(engine, here, pairs):
    assert_says_the_same(engine.listener.vlm, here, pairs)


def test_an_engine_judges_as_well(engine, here, pairs):
    judge = Judge(engine.listener.vlm, card=here.card, name="tiny")
    assert_judges_as_well(judge, here, pairs)


def test_an_adapter_and_its_base_share_an_engine(engine, here, adapter, pairs):
    assert engine.reasoner.engine is engine.listener.vlm.engine
    plain = Judge.from_pretrained(adapter, listener="none", device="cpu")
    assert_says_the_same(engine.reasoner, plain, pairs[:20])
    chats = chats_of(here, pairs[:20])
    prefixes = [here.card.format.answer_slot("")] * 20
    with_adapter, without = (
        vlm.label_logprobs(chats, prefixes, LABELS) for vlm in (engine.reasoner, engine.listener.vlm)
    )
    assert (with_adapter - without).abs().max() > 1e-2


def test_thoughts_depend_on_their_seed_alone(engine, here, pairs):
    chats = chats_of(here, pairs[:1]) * 8
    options = {"max_new_tokens": 48, "temperature": 1.0}
    drawn = engine.reasoner.generate(chats, seeds=range(8), **options)
    assert len(set(drawn)) > 4
    assert engine.reasoner.generate(chats[:1], seeds=[5], **options) == drawn[5:6]


def test_a_picture_is_resized_once_however_many_requests_show_it(engine, here, pairs, monkeypatch):
    shown: list[Any] = []

    def counted(image: Any, processor: Any) -> Any:
        shown.append(image)
        return resized(image, processor)

    monkeypatch.setattr("listener_reward.models.vllm_vlm.resized", counted)
    chats, prefixes = chats_of(here, pairs[:1]) * 4, [here.card.format.answer_slot("")] * 4
    engine.reasoner.generate(chats, seeds=range(4), **SAMPLED)
    assert len(shown) == 2
    engine.reasoner.label_logprobs(chats, prefixes, LABELS)
    assert len(shown) == 4


def test_an_engine_sleeps_and_wakes(engine, here, pairs):
    """On a CPU there is no memory to free; that it answers as before is all that can be seen."""
    chats, prefixes = chats_of(here, pairs[:4]), [here.card.format.answer_slot("")] * 4
    before = engine.reasoner.label_logprobs(chats, prefixes, LABELS)
    engine.sleep()
    engine.wake()
    torch.testing.assert_close(engine.reasoner.label_logprobs(chats, prefixes, LABELS), before, rtol=0, atol=1e-5)


def test_what_an_engine_refuses_is_the_callers_to_mend(engine, here, pairs):
    words = random.Random(0).choices("two three red blue purple circles squares".split(), k=600)
    chat = here.card.format.chat(" ".join(words), *pairs[0]["images"], here.reasoner.reserved)
    with pytest.raises(InputError, match="vLLM refuses a question"):
        engine.reasoner.generate([chat], seeds=[0], **SAMPLED)
    assert engine.reasoner.generate([], seeds=[], **SAMPLED) == []


def test_a_server_says_what_transformers_says(served, here, pairs):
    vlm = Judge.from_pretrained("tiny", listener="none", backend=served).reasoner
    assert_says_the_same(vlm, here, pairs)


def test_a_server_judges_as_well(served, here, pairs):
    judge = Judge.from_pretrained("tiny", listener="none", backend=served)
    assert judge.limits == ()
    assert_judges_as_well(judge, here, pairs)
