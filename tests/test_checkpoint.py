"""The card beside the weights, and what is said of a checkpoint that cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from listener_reward.calibration.maps import Calibration, Curve, Platt
from listener_reward.card import CARD, Card
from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.listener import Listener, choose_listener
from listener_reward.models.adapters import base_of, lora_rank
from listener_reward.models.hub import EMBEDDED, find_file, resolve
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.reward import PAPER_CHECKPOINT


@pytest.fixture
def folder(random_judge, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(random_judge, tmp_path / "judge")


# ---------------------------------------------------------------- the card


def test_round_trip(tmp_path):
    card = Card(
        format=ChatFormat(labels=("A", "B"), system="s"),
        listener="tiny-listener",
        calibration=Calibration(Platt(1.5, -0.2), listener_platt=Platt(0.8)),
        listener_temperature=0.7,
        masking="verdict",
        thoughts=3,
        sampling_temperature=0.0,
        max_new_tokens=7,
    )
    card.save(tmp_path)
    assert Card.load(tmp_path) == card


def test_no_card_means_the_defaults(tmp_path):
    assert Card.load(tmp_path) == Card()


def test_an_older_cards_temperature_goes_into_its_calibrations(tmp_path):
    curve, heard = [[1.0, 1.5]], {"temperature": 3.0, "bias": 0.1}
    older = {
        "temperature": 2.0,
        "listener_temperature": 0.7,
        "calibration": {"answer": {"temperature": 1.5, "bias": 0.3}, "verdict": curve, "heard": heard},
    }
    (tmp_path / CARD).write_text(json.dumps(older))
    card = Card.load(tmp_path)
    mode = card.mode()
    assert card.calibration == Calibration(Platt(3.0, 0.3), Curve(((1.0, 1.5),)), Platt(3.0, 0.1), mode=mode)
    assert card.fast_calibration == Calibration(Platt(2.0), mode=card.mode(think=False))
    assert card.listener_temperature == 0.7
    assert Card.amend(tmp_path, thoughts=2) == replace(card, thoughts=2)
    assert "temperature" not in json.loads((tmp_path / CARD).read_text())
    assert Card.load(tmp_path) == replace(card, thoughts=2)


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_temperature_of_one_leaves_an_embedded_card_as_it_is(name, tmp_path):
    now = json.loads(Path(resolve(name), CARD).read_text())
    assert Card.from_dict(now | {"temperature": 1.0}) == Card.from_dict(now)


def test_a_relative_listener_starts_from_the_card(tmp_path):
    Card(listener="../listener").save(tmp_path)
    assert Card.load(tmp_path).listener == str((tmp_path / "../listener").resolve())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[]", "JSON object"),
        ('{"threads": 2}', "threads"),
        ('{"thoughts": 0}', "thoughts"),
        ('{"thoughts": "many"}', "thoughts"),
        ('{"max_new_tokens": 0}', "max_new_tokens"),
        ('{"temperature": 0}', "temperature"),
        ('{"temperature": NaN}', "temperature"),
        ('{"listener_temperature": -1}', "listener_temperature"),
        ('{"sampling_temperature": Infinity}', "sampling_temperature"),
        ('{"masking": "all"}', "masking"),
        ('{"listener": 3}', "listener"),
        ('{"format": 3}', "format"),
        ('{"format": {"labels": ["1", "1"]}}', "labels"),
        ('{"format": {"question": "?"}}', "question"),
    ],
)
def test_an_unusable_card_names_its_field(folder, text, named):
    (folder / CARD).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=named):
        Judge.from_pretrained(folder)


# ---------------------------------------------------------------- the weights


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(sorted(tensors)[5]))


def resize_a_tensor(folder: Path) -> None:
    def narrow(tensors):
        name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
        tensors[name] = tensors[name][:, :-1].contiguous()

    rewrite(folder, narrow)


def other_architecture(folder: Path, kind: str = "bert") -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))


def respell(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


BREAK = {
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights cut short": cut_short,
    "weights are text": lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com"),
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "a weight missing": lose_a_tensor,
    "a weight of another shape": resize_a_tensor,
    "config missing": lambda folder: (folder / "config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config of nothing known": lambda folder: (folder / "config.json").write_text('{"model_type": "qwen99"}'),
    "config without a type": lambda folder: (folder / "config.json").write_text("{}"),
    "another architecture": other_architecture,
    "tokenizer missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer is no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "processor is no JSON": lambda folder: (folder / "processor_config.json").write_text("{"),
    "config of another type": lambda folder: respell(
        folder / "config.json", '"vocab_size": 77', '"vocab_size": "many"'
    ),
    "tokenizer without words": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
    "tokenizer without a model": lambda folder: (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": []}'
    ),
    "tokenizer is a list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "tokenizer's settings are a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "processor is a list": lambda folder: (folder / "processor_config.json").write_text("[]"),
    "decoding is a list": lambda folder: (folder / "generation_config.json").write_text("[]"),
    "all missing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_checkpoint_is_one_clear_error(folder, how):
    BREAK[how](folder)
    with pytest.raises(InputError) as caught:
        Judge.from_pretrained(folder, listener="none")
    message = str(caught.value)
    assert str(folder) in message
    assert '"tiny"' in message
    assert "\n" not in message
    assert len(message) < 700


def test_a_broken_listener_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        Judge.from_pretrained(folder, listener=tmp_path / "nowhere")


def test_weights_that_do_not_fit_are_named(folder):
    resize_a_tensor(folder)
    with pytest.raises(InputError, match="1 of its weights have another shape than its config, among them model"):
        Judge.from_pretrained(folder, listener="none")


def test_who_listens_is_what_is_given_or_else_the_checkpoints_own(tmp_path):
    listener = Listener(None, ChatFormat())  # pyright: ignore[reportArgumentType]
    for given, own, chosen in (
        (None, None, None),
        (None, "own", "own"),
        ("none", "own", None),
        ("other", "own", "other"),
        (tmp_path, None, tmp_path),
        (Path("none"), "own", Path("none")),  # a folder of that name
        (listener, "own", listener),
    ):
        assert choose_listener(given, own) == chosen


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_another_architecture_is_no_vision_language_model(folder, kind):
    other_architecture(folder, kind)
    reason = f"it is a {kind!r} model, which is no vision-language model: it reads text alone"
    with pytest.raises(InputError, match=reason):
        Judge.from_pretrained(folder)


def cache(folder: Path, files: Path) -> None:
    """Makes `folder` a cache of the Hub that holds `files` as org/model."""
    there = folder / "models--org--model"
    shutil.copytree(files, there / "snapshots" / "0123")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("0123")


def test_another_architecture_on_the_hub_is_not_a_bad_connection(folder, tmp_path):
    other_architecture(folder)
    cache(tmp_path / "hub", folder)
    with pytest.raises(InputError) as caught:
        TransformersVLM.from_pretrained("org/model", cache_dir=str(tmp_path / "hub"), local_files_only=True)
    assert "'org/model' cannot be loaded (it is a 'bert' model, which is no vision-language model" in str(caught.value)
    assert "connection" not in str(caught.value)


def test_a_name_that_is_not_in_the_cache_could_not_be_fetched(tmp_path):
    with pytest.raises(InputError, match=r"'org/model' is not a local folder and could not be fetched.*the connection"):
        TransformersVLM.from_pretrained("org/model", cache_dir=str(tmp_path), local_files_only=True)


def test_an_adapters_rank_is_that_of_its_revision(tmp_path):
    there = tmp_path / "hub" / "models--org--adapter"
    for revision, rank in (("main", 4), ("v2", 16)):
        files = there / "snapshots" / revision
        files.mkdir(parents=True)
        (files / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
        (there / "refs").mkdir(exist_ok=True)
        (there / "refs" / revision).write_text(revision)
    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    assert lora_rank("org/adapter", **options) == 4
    assert lora_rank("org/adapter", revision="v2", **options) == 16


def test_the_hub_is_not_asked_for_where_only_the_cache_counts(folder, tmp_path, monkeypatch):
    asked: list[str] = []
    cache(tmp_path / "hub", folder)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: asked.append("head"))  # has no `head`: as no answer
    options = {"cache_dir": str(tmp_path / "hub")}
    for given in ({"local_files_only": True}, {}):
        assert find_file("org/model", "config.json", **options, **given) is not None
        assert asked == ([] if given else ["head"])


@pytest.mark.parametrize("bug", [TypeError("ours"), AttributeError("ours"), RuntimeError("out of memory")])
@pytest.mark.parametrize(
    "place",
    [
        "listener_reward.models.processing._name_special_tokens",
        "listener_reward.models.processing.ClipProcessor.from_pretrained",
        "listener_reward.models.transformers_vlm.load_processor",
        "listener_reward.models.transformers_vlm.AutoModelForImageTextToText.from_pretrained",
        "transformers.utils.cached_file",
    ],
)
def test_a_bug_is_not_told_as_a_broken_checkpoint(folder, tmp_path, monkeypatch, bug, place):
    def fail(*_, **__):
        raise bug

    monkeypatch.setattr(place, fail)
    if place.endswith("cached_file"):
        monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
        with pytest.raises(type(bug), match=str(bug)):
            Card.load("org/model")
        return
    with pytest.raises(type(bug), match=str(bug)):
        TransformersVLM.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["bfloat99", "Tensor"])
def test_a_dtype_that_is_none_is_named(folder, dtype):
    with pytest.raises(InputError, match=f"dtype is {dtype!r}"):
        Judge.from_pretrained(folder, listener="none", dtype=dtype)


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "not a name!", "org/", ""])
def test_a_name_that_is_nothing(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    with pytest.raises(InputError) as caught:
        Judge.from_pretrained(name)
    assert repr(name) in str(caught.value)
    assert '"tiny"' in str(caught.value)


def test_embedded_names(tmp_path, monkeypatch):
    assert resolve("some/where") == "some/where"
    monkeypatch.setattr("listener_reward.models.hub.resources.files", lambda package: tmp_path)
    for name in EMBEDDED:
        with pytest.raises(InputError, match="reinstall the package"):
            resolve(name)


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["told to be offline", "nobody answers"],
)
def test_the_hub_out_of_reach_is_one_error_and_soon(environment, tmp_path):
    """transformers repeats each request for half a minute; this has to be said before anyone gives up."""
    code = (
        "import time, sys; from PIL import Image\n"
        "from listener_reward import InputError, ListenerReward; import listener_reward.judge\n"
        "started = time.time()\n"
        "try: ListenerReward().compare('x', Image.new('RGB', (8, 8)), Image.new('RGB', (8, 8), 'red'))\n"
        "except InputError as error: print(time.time() - started, error, sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "HF_HOME": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    seconds, message = done.stdout.strip().split("\n")
    assert repr(PAPER_CHECKPOINT) in message
    assert '"tiny"' in message
    assert float(seconds) < 15  # 0.1 s on an idle core
    assert "Traceback" not in done.stderr


def test_a_saved_checkpoint_is_one_that_stock_transformers_reads(random_judge):
    config = json.loads((random_judge / "processor_config.json").read_text())
    assert config["processor_class"] == "Qwen2_5_VLProcessor"
    assert config["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapter(random_judge, tmp_path) -> Path:
    """LoRA on the random judge, as PEFT writes it: without a processor and a card."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = AutoModelForImageTextToText.from_pretrained(random_judge, dtype="float32")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def name_base(adapter: Path, base: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("tiny-base", resolve("tiny-base")),
        ("/of/another/site-packages/listener_reward/tiny/weights/base", resolve("tiny-base")),
        ("../base", "{}/base"),
        ("base", "{}/base"),
        ("{}/base", "{}/base"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ],
)
def test_the_base_of_an_adapter_is_found(tmp_path, monkeypatch, written, found):
    for folder in ("adapter", "base"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    name_base(tmp_path / "adapter", written.format(tmp_path))
    assert base_of(tmp_path / "adapter") == found.format(tmp_path)


def test_a_folder_of_weights_is_no_adapter(random_judge):
    assert base_of(random_judge) is None


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("../gone", r"it is an adapter to '\.\./gone', which is not there; set base_model_name_or_path"),
        ("/runs/gone", "it is an adapter to '/runs/gone', which is not there"),
        (None, "base_model_name_or_path in adapter_config.json is None; name the base"),
    ],
)
def test_an_adapter_whose_base_is_not_there_says_so(tmp_path, base, named):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="no readable base_model_name_or_path"):
        Judge.from_pretrained(tmp_path)
    name_base(tmp_path, base)
    with pytest.raises(InputError, match=named):
        Judge.from_pretrained(tmp_path)


def test_a_plain_adapter_has_its_bases_card_and_processor_and_is_not_merged(adapter, random_judge):
    judge: Any = Judge.from_pretrained(adapter, listener="none", dtype="bfloat16")
    assert judge.card == Card.load(random_judge)
    base = load_file(random_judge / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    layer = judge.reasoner.model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, base.bfloat16())
    assert layer.lora_B["default"].weight.dtype == torch.float32
    images = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    with_adapter = judge.compare("red", *images, think=False).p_first
    with judge.reasoner.model.disable_adapter():
        without = judge.compare("red", *images, think=False).p_first
    assert abs(with_adapter - without) > 1e-3


def test_an_adapter_that_lacks_weights_is_refused(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="1 of the adapter's weights are missing, among them"):
        Judge.from_pretrained(adapter)


def test_an_adapter_of_the_prompt_is_refused(adapter):
    path = adapter / "adapter_config.json"
    base = json.loads(path.read_text())["base_model_name_or_path"]
    path.write_text(json.dumps({"peft_type": "PREFIX_TUNING", "base_model_name_or_path": base}))
    with pytest.raises(InputError, match="only adapters of layers, such as LoRA, are supported"):
        Judge.from_pretrained(adapter)


@pytest.mark.parametrize("listener", ["base", "by name", None])
def test_a_listener_that_is_the_base_shares_its_weights(adapter, random_judge, listener):
    """None: what the base's card names is the base itself."""
    judge: Any = Judge.from_pretrained(adapter, listener=str(random_judge) if listener == "by name" else listener)
    alone: Any = Judge.from_pretrained(random_judge)
    assert judge.listener is not None and alone.listener is not None
    assert judge.listener.vlm is not judge.reasoner
    assert judge.listener.vlm.model is judge.reasoner.model
    images = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    verdict, base = (each.compare("red", *images, think=False) for each in (judge, alone))
    assert verdict.listener_p_first == pytest.approx(base.listener_p_first, abs=1e-6)
    assert abs(verdict.p_first - base.p_first) > 1e-3


def test_a_listener_that_is_the_reasoner_shares_its_weights(random_judge, tmp_path):
    judge: Any = Judge.from_pretrained(random_judge)
    assert judge.listener is not None and judge.listener.vlm is judge.reasoner
    other: Any = Judge.from_pretrained(random_judge, listener=shutil.copytree(random_judge, tmp_path / "copy"))
    assert other.listener is not None and other.listener.vlm.model is not other.reasoner.model


def test_base_is_no_listener_of_a_judge_without_adapters(random_judge):
    with pytest.raises(InputError, match="the reasoner has no adapters; name a checkpoint as the listener"):
        Judge.from_pretrained(random_judge, listener="base")
