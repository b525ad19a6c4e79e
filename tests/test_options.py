"""What can be chosen of a model that runs here: where it lies, in how many bits, how large its pictures are."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from PIL import Image

from listener_reward import errors
from listener_reward.cli.options import _named_value
from listener_reward.errors import InputError, MissingExtraError
from listener_reward.judge import Judge
from listener_reward.listener import options_of_listener
from listener_reward.models.adapters import options_of_base
from listener_reward.models.options import MODEL_OPTIONS
from listener_reward.models.placement import attention_of, chosen_device
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.reward import ListenerReward
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.world import split_pairs
from listener_reward.verdict import Verdict

Pairs = tuple[list[str], list[Image.Image], list[Image.Image]]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    pairs = list(split_pairs("id", 4))
    firsts, seconds = zip(*map(draw_pair, pairs), strict=True)
    return [pair.wording for pair in pairs], list(firsts), list(seconds)


@pytest.fixture(scope="module")
def plain(pairs: Pairs) -> list[Verdict]:
    return Judge.from_pretrained("tiny", device="cpu").compare_many(*pairs)


def projection(judge: Judge) -> Any:
    """One of the reasoner's layers that quantisation changes."""
    return reasoner(judge).model.model.language_model.layers[0].mlp.down_proj


def reasoner(judge: Judge) -> Any:
    assert isinstance(judge.reasoner, TransformersVLM)
    return judge.reasoner


def heard(judge: Judge) -> Any:
    assert judge.listener is not None
    return judge.listener.vlm


# --- in 4 and 8 bit


@pytest.mark.parametrize(("bits", "layer", "bound"), [("4bit", "Linear4bit", 0.15), ("8bit", "Linear8bitLt", 0.1)])
def test_a_quantised_judge_is_close_to_the_whole_one_and_symmetric(pairs: Pairs, bits: Any, layer: str, bound: float):
    whole = Judge.from_pretrained("tiny", device="cpu", think=False)
    judge = Judge.from_pretrained("tiny", device="cpu", quantization=bits, think=False)
    assert type(projection(judge)).__name__ == layer
    assert type(reasoner(judge).model.lm_head) is torch.nn.Linear, "the head stays whole"
    assert type(reasoner(judge).model.model.visual.blocks[0].attn.qkv) is torch.nn.Linear, "and so does what sees"
    assert reasoner(judge).shared_prefix
    prompts, firsts, seconds = pairs
    verdicts, swapped = judge.compare_many(*pairs), judge.compare_many(prompts, seconds, firsts)
    assert [verdict.p_first for verdict in verdicts] == [1 - verdict.p_first for verdict in swapped]
    gaps = [abs(a.p_first - b.p_first) for a, b in zip(verdicts, whole.compare_many(*pairs), strict=True)]
    assert 0 < max(gaps) < bound, "rounded, and not far off"


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_judge_thinks(pairs: Pairs, bits: Any):
    judge = Judge.from_pretrained("tiny", device="cpu", quantization=bits)
    prompt, one, other = pairs[0][0], pairs[1][0], pairs[2][0]
    verdict = judge.compare(prompt, one, other)
    assert verdict == judge.compare(prompt, one, other) and verdict.malformed == 0
    assert judge.compare(prompt, other, one).p_first == 1 - verdict.p_first


def test_a_quantised_listener_hears_a_whole_reasoner(pairs: Pairs, plain: list[Verdict]):
    judge = Judge.from_pretrained("tiny", device="cpu", listener_options={"quantization": "4bit", "batch_size": 3})
    assert type(projection(judge)) is torch.nn.Linear
    assert type(heard(judge).model.model.language_model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert (reasoner(judge).batch_size, heard(judge).batch_size) == (32, 3)
    verdicts = judge.compare_many(*pairs)
    for verdict, other in zip(verdicts, plain, strict=True):
        assert [thought.text for thought in verdict.thoughts] == [thought.text for thought in other.thoughts]
        assert 0 < abs((verdict.listener_p_first or 0) - (other.listener_p_first or 0)) < 0.2


def test_a_listener_of_the_same_checkpoint_in_other_bits_has_weights_of_its_own(random_judge: Path):
    shared = Judge.from_pretrained(random_judge, device="cpu")
    apart = Judge.from_pretrained(random_judge, device="cpu", listener_options={"quantization": "8bit"})
    assert heard(shared).model is reasoner(shared).model
    assert heard(apart).model is not reasoner(apart).model
    assert type(heard(apart).model.model.language_model.layers[0].mlp.down_proj).__name__ == "Linear8bitLt"
    assert pickle.loads(pickle.dumps(apart)).listener.vlm.model is not None


def test_quantisation_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    found = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name in hidden else found(name))
    hidden = {"bitsandbytes"}
    with pytest.raises(MissingExtraError, match=r"'4bit' needs bitsandbytes: pip install \"listener-reward\[large\]\""):
        Judge.from_pretrained("tiny", device="cpu", quantization="4bit")
    assert Judge.from_pretrained("tiny", device_map={"": "cpu"}), "which needs accelerate alone"
    hidden = {"accelerate"}
    with pytest.raises(MissingExtraError, match="device_map needs accelerate"):
        Judge.from_pretrained("tiny", device_map="auto")


# --- on several devices


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", *([] if torch.cuda.is_available() else ["auto"])])
def test_a_map_to_one_device_shares_prefixes(pairs: Pairs, plain: list[Verdict], device_map: Any):
    judge = Judge.from_pretrained("tiny", device_map=device_map, dtype="float32")
    assert reasoner(judge).shared_prefix
    assert judge.compare_many(*pairs) == plain


def test_layers_on_several_devices_do_without_a_shared_prefix(
    pairs: Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Half of the layers are on disk until they are called: the only second place that there is without a GPU."""
    whole = Judge.from_pretrained("tiny", device="cpu", listener="none", shared_prefix=False)
    model = reasoner(whole).model
    named = ["lm_head", "model.visual", *(f"model.language_model.{name}" for name in ("embed_tokens", "norm"))]
    places = dict.fromkeys([*named, "model.language_model.rotary_emb"], "cpu")
    for number in range(len(model.model.language_model.layers)):
        places[f"model.language_model.layers.{number}"] = "disk" if number < 2 else "cpu"
    vlm = TransformersVLM.from_pretrained(
        reasoner(whole).checkpoint,
        dtype="float32",
        device_map=places,
        offload_folder=str(tmp_path),
    )
    assert not vlm.shared_prefix
    assert "its layers lie on several devices (cpu, disk)" in caplog.text
    apart = Judge(vlm, None, whole.card)
    assert apart.compare_many(*pairs, think=False) == whole.compare_many(*pairs, think=False)


def test_a_map_and_a_device_are_one_too_many():
    with pytest.raises(InputError, match="device is 'cuda:1' and device_map is 'auto'"):
        Judge.from_pretrained("tiny", device="cuda:1", device_map="auto")
    with pytest.raises(InputError, match=r"^listener_options: device is 'cpu' and"):
        Judge.from_pretrained("tiny", listener_options={"device": "cpu", "device_map": "auto"})


def test_a_listener_goes_where_it_is_told():
    options = {"device": "cuda:0", "dtype": "bfloat16", "revision": "v2"}
    assert options_of_listener(options, None) == {"device": "cuda:0", "dtype": "bfloat16"}
    assert options_of_listener(options, {"device_map": "auto"}) == {"device_map": "auto", "dtype": "bfloat16"}
    other = {"device": "cuda:1", "dtype": None, "revision": "main"}
    assert options_of_listener(options, other) == {"device": "cuda:1", "dtype": "bfloat16", "revision": "main"}


def test_a_listener_has_a_limit_of_its_own_or_none(tmp_path: Path):
    """Qwen's processors have a limit in pixels, and Gemma 3 has none."""
    assert options_of_listener({"max_pixels": 9}, None) == {"max_pixels": 9}
    assert options_of_listener({"max_pixels": 9}, {"max_pixels": None}) == {}
    assert options_of_listener({"max_pixels": 9}, {"max_pixels": 7}) == {"max_pixels": 7}
    tiny_families.build("gemma3", tmp_path)
    listener = str(tmp_path)
    pixels: dict[str, Any] = {"max_pixels": 64 * 64}
    with pytest.raises(InputError, match=r"Gemma3Processor has no such limit; .*listener_options={'max_pixels': None}"):
        Judge.from_pretrained("tiny", device="cpu", listener=listener, **pixels)
    own = Judge.from_pretrained(
        "tiny", device="cpu", listener=listener, listener_options={"max_pixels": None}, **pixels
    )
    assert own.listener is not None
    vlm: Any = own.reasoner
    assert vlm.processor.image_processor.size["longest_edge"] == 64 * 64
    assert _named_value("max-pixels=none") == ("max_pixels", None)
    assert _named_value("max-pixels=4096") == ("max_pixels", 4096)


# --- pictures, thoughts, attention


def test_large_pictures_are_scaled_down(pairs: Pairs):
    """The tiny judge's own limit is 3071 pixels in steps of 16 a side: 48 x 48, nine tokens of 16 x 16."""
    prompt, first, second = pairs[0][0], pairs[1][0], pairs[2][0]
    sizes: list[int] = []
    for pixels in (None, 64 * 64):
        judge = Judge.from_pretrained("tiny", device="cpu", listener="none", max_pixels=pixels)
        images = [image.resize((128, 128)) for image in (first, second)]
        judge.compare(prompt, *images, think=False)
        sizes.append(max(len(each.features) for each in reasoner(judge).features._kept.values()))
    assert sizes == [9, 16]
    with pytest.raises(InputError, match="max_pixels is 100, less than the processor's least, 2304"):
        Judge.from_pretrained("tiny", max_pixels=100)


def test_thoughts_are_sampled_and_masked_as_asked(pairs: Pairs, plain: list[Verdict]):
    judge = Judge.from_pretrained("tiny", device="cpu", sampling_temperature=0, masking="verdict", max_new_tokens=60)
    assert (judge.card.sampling_temperature, judge.card.masking, judge.card.max_new_tokens) == (0, "verdict", 60)
    assert judge.listener is not None and judge.listener.masking == "verdict"
    greedy = judge.compare_many(*pairs)
    judge.seed += 1
    assert judge.compare_many(*pairs) == greedy, "the likeliest token needs no seed"
    assert greedy != plain
    with pytest.raises(InputError, match="masking is 'all'"):
        Judge.from_pretrained("tiny", masking="all")  # pyright: ignore[reportArgumentType]


def test_another_attention_does_without_a_shared_prefix(caplog: pytest.LogCaptureFixture):
    judge = Judge.from_pretrained("tiny", device="cpu", listener="none", attn_implementation="eager")
    assert not reasoner(judge).shared_prefix
    assert "attn_implementation='eager'; it has to be 'sdpa'" in caplog.text


def test_a_revision_is_of_the_reasoner_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What is asked of the Hub, up to the first answer."""
    asked: list[tuple[str, Any]] = []

    def find(name: Any, file: str, **options: Any) -> None:
        asked.append((file, options.get("revision")))

    monkeypatch.setattr("listener_reward.card.find_file", find)
    monkeypatch.setattr("listener_reward.models.adapters.find_file", find)
    with pytest.raises(InputError):
        Judge.from_pretrained("org/judge", revision="v2")
    assert {file for file, _ in asked} == {"listener_reward.json", "adapter_config.json"}
    assert {revision for _, revision in asked} == {"v2"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantization": "3bit"}, "quantization is '3bit'; choose '4bit' or '8bit'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_pixels": 0.5}, "max_pixels is 0.5"),
        ({"quantisation": "4bit"}, "quantisation: no option of a model"),
        ({"listener_options": {"bits": 4}}, "listener_options: bits: no option of a model"),
    ],
)
def test_unusable_options_are_refused_before_anything_is_loaded(options: dict[str, Any], named: str):
    with pytest.raises(InputError, match=named):
        Judge.from_pretrained("org/there-is-no-such-judge", **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "gpu"}, "device is 'gpu', which is none; give 'cpu', 'cuda' or 'cuda:1'"),
        ({"device": "cuda:1"}, "device is 'cuda:1', and this machine has no GPU that torch can use"),
        ({"device": torch.device("cuda", 0)}, "device is 'cuda:0', and this machine has no GPU"),
        ({"attn_implementation": "sdp"}, "attn_implementation is 'sdp', which transformers does not know; choose 'sd"),
        ({"revision": "v2"}, "revision is 'v2', and .* is a folder; only a checkpoint on the Hub has revisions"),
        ({"listener": "none", "listener_options": {"dtype": "float16"}}, "and there is no listener; leave them out"),
    ],
)
def test_options_without_an_effect_here_are_refused(
    options: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=named):
        Judge.from_pretrained("tiny", **options)


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="device is 'cuda:2', and this machine has 2 GPUs, from 'cuda:0' on"):
        chosen_device("cuda:2")


def test_an_attention_whose_package_is_missing_is_one_line():
    fault = pytest.raises(MissingExtraError, match=r"attn_implementation is 'flash_attention_2', .* leave attn_imp")
    with fault, attention_of("flash_attention_2"):
        raise ImportError("the package flash_attn doesn't seem to be installed")
    with pytest.raises(ImportError, match="torchaudio"), attention_of(None):
        raise ImportError("torchaudio")


def test_the_base_of_an_adapter_has_the_revision_that_the_adapter_names(tmp_path: Path):
    file = tmp_path / "adapter_config.json"
    for named in (None, "v1"):
        file.write_text(json.dumps({"base_model_name_or_path": "org/base", "revision": named}), encoding="utf-8")
        given = options_of_base("org/base", {"revision": "v2", "attn_implementation": "sdpa"}, tmp_path)
        assert given.get("revision") == named
        assert given["attn_implementation"] == "sdpa"


def test_the_defaults_in_the_signature_are_those_of_the_backend():
    ours = inspect.signature(Judge.from_pretrained).parameters
    backend = inspect.signature(TransformersVLM.from_pretrained).parameters
    others = {
        "attn_implementation",
        "revision",
        "backend",
        "engine",
        "accept_less",
    }  # transformers', or of other backends
    for name in MODEL_OPTIONS:
        assert name in others or ours[name].default == backend[name].default, name


def test_a_reward_passes_them_on(pairs: Pairs):
    reward = ListenerReward("tiny", quantization="8bit", listener="none", think=False, device="cpu")
    reward([pairs[1][0], pairs[2][0]], ["two red circles"] * 2)
    assert reward._loaded is not None
    loaded = reward._loaded.judge
    assert isinstance(loaded, Judge) and type(projection(loaded)).__name__ == "Linear8bitLt"
    assert json.dumps(reward.judge_options)
