"""A judge whose weights are served: the verdict is that of transformers, and what a server lacks is said at the start.

The server runs the embedded judge in transformers (`served`). Against a real vLLM: `test_vllm.py`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from PIL import Image
from served import Served, serving

from listener_reward.chat import Chat, ChatFormat
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError, JudgeError
from listener_reward.judge import Judge
from listener_reward.listener import load_listener
from listener_reward.media.clips import Clip
from listener_reward.media.images import to_picture
from listener_reward.models.endpoint_vlm import EndpointVLM
from listener_reward.models.openai_client import OpenAIClient
from listener_reward.models.options import is_address, split_address

LABELS = ("1", "2")

NO_LOGPROBS: dict[str, Any] = {"logprobs": False}
NO_CONTINUATION: dict[str, Any] = {"continues": False}
AS_SGLANG: dict[str, Any] = {"token_ids": False, "by_id": False, "prompt_logprobs": False, "longest_list": 10**6}
"""Log-probabilities at a continued answer, by the tokens' text, and nothing that only vLLM has."""


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def listener_vlm() -> Any:
    return Judge.from_pretrained("tiny-edit-listener", listener="none", device="cpu").reasoner


@pytest.fixture
def serve(judge) -> Iterator[Callable[..., Served]]:
    """`serve(vlm, **fields)` starts a server of `vlm`, the judge's by default; see `Served` for the fields."""
    with ExitStack() as stack:
        yield lambda vlm=None, **fields: stack.enter_context(serving(Served(vlm or judge.reasoner, **fields)))


def heard_by(judge: Judge) -> Any:
    """The model of a judge's listener."""
    assert judge.listener is not None
    return judge.listener.vlm


def asker(judge: Judge) -> Any:
    """A judge's reasoner, as what it was loaded as."""
    return judge.reasoner


def vlm_at(served: Served, judge: Judge, *, accept_less: bool = False, **options: Any) -> EndpointVLM:
    client = OpenAIClient(served.address, **{"api_key": "", "pause": 0.001, "tries": 3, "workers": 4} | options)
    return EndpointVLM(client, None, asker(judge).processor, judge.card.format, accept_less=accept_less)


def questions(judge: Judge, count: int) -> tuple[list[str], list[Any], list[Any]]:
    rows: list[Any] = list(load_pairs("tiny:id", limit=count))
    return [row["prompt"] for row in rows], [row["images"][0] for row in rows], [row["images"][1] for row in rows]


@pytest.fixture(scope="module")
def asked(judge) -> tuple[list[Chat], list[str]]:
    """Chats, and thoughts to read an answer after."""
    sides = zip(*questions(judge, 4), strict=True)
    chats = [judge.card.format.chat(*side, judge.reasoner.reserved) for side in sides]
    thoughts = ["", "image 1 : two clean red circles .", "so image 2 is better .", "image 2 : one blue square ."]
    return chats, [judge.card.format.answer_slot(thought) for thought in thoughts]


@pytest.mark.parametrize("lesser", [{}, {"by_id": False}, {"token_ids": False}, AS_SGLANG], ids=str)
def test_a_served_model_says_what_it_says_here(serve, judge, asked, lesser):
    chats, prefixes = asked
    vlm = vlm_at(serve(**lesser), judge)
    assert vlm.reserved == judge.reasoner.reserved
    greedy = {"seeds": range(4), "max_new_tokens": 48, "temperature": 0.0}
    assert vlm.generate(chats, **greedy) == judge.reasoner.generate(chats, **greedy)
    found = vlm.label_logprobs(chats, prefixes, LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, judge.reasoner.label_logprobs(chats, prefixes, LABELS), rtol=0, atol=1e-4)
    if vlm.reads_thoughts:
        right = judge.reasoner.read(chats, prefixes, LABELS)
        torch.testing.assert_close(vlm.read(chats, prefixes, LABELS), right, rtol=0, atol=1e-4)


def test_a_verdict_does_not_depend_on_the_backend(serve, judge, listener_vlm):
    reasoner, listener = serve(), serve(listener_vlm, name="listener")
    served = Judge.from_pretrained(
        "tiny", backend=reasoner.address, listener_options={"backend": f"listener@{listener.address}"}
    )
    assert served.limits == ()
    prompts, firsts, seconds = questions(judge, 4)
    right = judge.compare_many(prompts, firsts, seconds)
    found = served.compare_many(prompts, firsts, seconds)
    assert [v.p_first for v in found] == pytest.approx([v.p_first for v in right], abs=1e-4)
    assert [v.listener_p_first for v in found] == pytest.approx([v.listener_p_first for v in right], abs=1e-4)
    swapped = served.compare_many(prompts, seconds, firsts)
    assert [one.p_first + other.p_first for one, other in zip(found, swapped, strict=True)] == [1.0] * 4
    assert reasoner.requests and listener.requests
    assert {request["model"] for request in listener.requests} == {"listener"}


def test_an_address_in_the_listeners_place_is_the_judges_own_listener_there(serve, judge, listener_vlm):
    served = serve(listener_vlm, name="any")
    heard = Judge.from_pretrained("tiny", listener=served.address)
    assert asker(heard).backend == "transformers"
    assert heard_by(heard).backend == f"any@{served.address}"
    prompts, firsts, seconds = questions(judge, 2)
    found, right = (one.compare_many(prompts, firsts, seconds) for one in (heard, judge))
    assert [v.listener_p_first for v in found] == pytest.approx([v.listener_p_first for v in right], abs=1e-4)
    again = pickle.loads(pickle.dumps(heard))
    assert heard_by(again).backend == heard_by(heard).backend


def test_a_listener_of_the_same_checkpoint_shares_the_address(serve):
    served = Judge.from_pretrained("tiny", backend=serve().address, listener="tiny")
    assert heard_by(served) is served.reasoner


def test_a_listener_of_its_own_runs_here_unless_it_has_an_address(serve, judge):
    served = Judge.from_pretrained("tiny", backend=serve().address)
    assert heard_by(served).backend == "transformers"


def test_an_adapters_base_is_behind_the_same_address(serve, judge):
    models = [{"id": "base", "parent": None}, {"id": "adapter", "parent": "base"}]
    served = serve(models=models)
    client = OpenAIClient(served.address, api_key="")
    vlm = EndpointVLM(client, "adapter", asker(judge).processor, judge.card.format)
    assert vlm.served == "adapter" and vlm.without_adapters(judge.card.format).served == "base"
    with pytest.raises(InputError, match="does not name the base of 'base'"):
        vlm.without_adapters(judge.card.format).without_adapters(judge.card.format)


def test_a_checkpoints_own_sampling_habits_are_undone(serve, judge, asked):
    served = serve()
    vlm_at(served, judge).generate(asked[0][:1], seeds=[2**63 + 5], max_new_tokens=2, temperature=0.7)
    request = served.requests[-1]
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 0.7, "seed": 5}
    assert request | neutral == request
    assert set(request["logit_bias"]) == {str(token) for token in asker(judge).vision_tokens()}


def test_pictures_are_sent_as_the_processor_resizes_them(serve, judge):
    """An engine that resizes by another library would round pixels differently."""
    served = serve()
    vlm = EndpointVLM.from_pretrained(asker(judge).checkpoint, served.address, judge.card.format)
    served.requests.clear()
    image = Image.effect_noise((300, 300), 80).convert("RGB")
    chat = judge.card.format.chat("a red circle", image, image, judge.reasoner.reserved)
    prefixes = [judge.card.format.answer_slot("")]
    found = vlm.label_logprobs([chat], prefixes, LABELS)
    torch.testing.assert_close(found, judge.reasoner.label_logprobs([chat], prefixes, LABELS), rtol=0, atol=1e-5)
    from served import _chat

    sent = _chat(served.requests[0]["messages"][:1]).images[0].image
    assert sent.size == (48, 48)


# --- a label that is not among the likeliest tokens


def rare(judge: Judge, asked: Any) -> tuple[Chat, str]:
    """A question after whose beginning neither label is likely."""
    return asked[0][1], "<think>"


def slot_of(judge: Judge, chat: Chat, prefix: str) -> torch.Tensor:
    found = judge.reasoner.label_logprobs([chat], [prefix], LABELS)
    assert found.max() < -5
    return found


@pytest.mark.parametrize("fields", [{"by_id": False, "longest_list": 20}, AS_SGLANG], ids=["by prompt", "by list"])
def test_a_label_that_is_missing_is_asked_for_again(serve, judge, asked, monkeypatch, fields):
    chat, prefix = rare(judge, asked)
    monkeypatch.setattr("listener_reward.models.endpoint_vlm._TOP", 2)
    served = serve(**fields)
    vlm = vlm_at(served, judge)
    before = len(served.requests)
    found = vlm.label_logprobs([chat], [prefix], LABELS)
    torch.testing.assert_close(found, slot_of(judge, chat, prefix), rtol=0, atol=1e-4)
    assert len(served.requests) - before > 1


def test_a_label_that_no_list_has_is_no_zero(serve, judge, asked, monkeypatch):
    chat, prefix = rare(judge, asked)
    monkeypatch.setattr("listener_reward.models.endpoint_vlm._TOP", 2)
    served = serve(**AS_SGLANG | {"longest_list": 2})
    vlm = vlm_at(served, judge)
    with pytest.raises(JudgeError, match=r"does not list '1'.* among the likeliest tokens .*--max-logprobs"):
        vlm.label_logprobs([chat], [prefix], LABELS)


# --- failures


def test_a_busy_server_is_asked_again(serve, judge, asked):
    chats, prefixes = asked
    served = serve()
    vlm = vlm_at(served, judge, tries=4)
    failures = iter([(429, {"error": "slow down"}, {"Retry-After": "0"}), (500, b"oops"), (200, b"not json")])
    served.before = lambda body: next(failures, None)
    found = vlm.label_logprobs(chats[:1], prefixes[:1], LABELS)
    assert torch.isfinite(found).all() and next(failures, None) is None


def test_a_server_that_keeps_failing_is_a_broken_judge(serve, judge, asked):
    chats, prefixes = asked
    served = serve()
    vlm = vlm_at(served, judge)
    served.before = lambda body: (500, {"error": {"message": "CUDA out of memory"}})
    with pytest.raises(JudgeError, match=r"no response in 3 tries; the last time, HTTP 500: .*CUDA out of memory"):
        vlm.generate(chats, seeds=range(4), max_new_tokens=4, temperature=0.0)
    with pytest.raises(JudgeError, match="out of memory"):
        vlm.label_logprobs(chats, prefixes, LABELS)


def test_a_slow_server_is_given_up(serve, judge, asked):
    served = serve()
    vlm = vlm_at(served, judge, tries=1)
    vlm.client._timeout = 0.1
    served.before = lambda body: (200, 0.5)
    with pytest.raises(JudgeError, match="timed out"):
        vlm.generate(asked[0][:1], seeds=[0], max_new_tokens=4, temperature=0.0)


def test_a_refused_thought_is_malformed_and_a_refused_reading_an_error(serve, judge, asked):
    chats, prefixes = asked
    served = serve()
    vlm = vlm_at(served, judge)
    served.before = lambda body: (400, {"error": {"code": "content_policy_violation"}})
    assert vlm.generate(chats[:1], seeds=[0], max_new_tokens=4, temperature=0.0) == [""]
    with pytest.raises(JudgeError, match="refuses the content"):
        vlm.label_logprobs(chats[:1], prefixes[:1], LABELS)
    refusal = {"message": {"content": None, "refusal": "red"}}
    served.before = lambda body: (200, {"choices": [refusal]})
    assert vlm.generate(chats[:1], seeds=[0], max_new_tokens=4, temperature=0.0) == ["red"]


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf")])
def test_nan_is_a_broken_judge(serve, judge, value):
    served = serve()
    broken = Judge(vlm_at(served, judge), card=judge.card, think=False)

    def nan(body: dict[str, Any]) -> Any:
        status, said = served.answer(body)
        for token in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            token["logprob"] = value
        return status, said

    served.before = nan
    prompts, firsts, seconds = questions(judge, 1)
    with pytest.raises(JudgeError, match="the reasoner gave NaN or infinite probabilities"):
        broken.compare_many(prompts, firsts, seconds)


def test_an_answer_without_log_probabilities_in_the_middle(serve, judge, asked):
    chats, prefixes = asked
    served = serve()
    vlm = vlm_at(served, judge)
    served.before = lambda body: (200, {"choices": [{"message": {"content": "1"}, "logprobs": None}]})
    with pytest.raises(JudgeError, match="gave no log-probabilities"):
        vlm.label_logprobs(chats, prefixes, LABELS)
    served.before = lambda body: (200, {"object": "error", "message": "model is loading"})
    with pytest.raises(JudgeError, match="model is loading"):
        vlm.generate(chats, seeds=range(4), max_new_tokens=4, temperature=0.0)


def test_a_thought_that_is_read_as_other_tokens(serve, judge, asked):
    chats, prefixes = asked
    served = serve()
    vlm = vlm_at(served, judge)

    def shifted(body: dict[str, Any]) -> Any:
        status, said = served.answer(body)
        said["prompt_logprobs"].pop()
        return status, said

    served.before = shifted
    with pytest.raises(JudgeError, match="reads a thought as other tokens"):
        vlm.read(chats[1:2], prefixes[1:2], LABELS)


# --- the start


@pytest.mark.parametrize(
    ("lesser", "words"),
    [
        (NO_LOGPROBS, "gives no log-probabilities"),
        (NO_CONTINUATION, "does not continue a message"),
        ({"refuses": ("continue_final_message",)}, "continues no message"),
        ({"refuses": ("logprobs",)}, "continues no message"),
    ],
    ids=str,
)
def test_what_a_server_cannot_give_is_said_at_the_start(serve, judge, lesser, words):
    served = serve(**lesser)
    with pytest.raises(InputError, match=rf"'tiny' at {served.address} {words}.*--accept-less") as refused:
        vlm_at(served, judge)
    assert "\n" not in str(refused.value)
    assert len(served.requests) <= 4


@pytest.mark.parametrize("lesser", [NO_LOGPROBS, NO_CONTINUATION], ids=str)
def test_who_accepts_less_is_judged_by_written_answers_and_told_so(serve, judge, lesser):
    served = serve(**lesser)
    with pytest.warns(UserWarning, match="judged by written answers alone"):
        less = Judge.from_pretrained("tiny", backend=served.address, listener="none", accept_less=True)
    assert "judged by written answers alone" in less.limits[0]
    prompts, firsts, seconds = questions(judge, 3)
    found = less.compare_many(prompts, firsts, seconds)
    for verdict, right in zip(found, judge.compare_many(prompts, firsts, seconds), strict=True):
        assert [t.answer for t in verdict.thoughts] == [t.answer for t in right.thoughts]
        for thought in verdict.thoughts:
            assert thought.p_first is not None and (thought.p_first > 0.9) == (thought.answer == 1)
    with pytest.raises(InputError, match="a listener writes none"):
        Judge.from_pretrained("tiny", backend=served.address, listener="tiny", accept_less=True)


def test_without_a_written_answer_such_a_server_has_none(serve, judge):
    vlm = vlm_at(serve(**NO_LOGPROBS), judge, accept_less=True)
    with pytest.raises(InputError, match="judged by written answers alone; it has to write one first"):
        Judge(vlm, card=judge.card, think=False).compare_many(*questions(judge, 1))


def test_a_malformed_answer_of_such_a_server_is_undecided(serve, judge):
    served = serve(**NO_LOGPROBS)
    with pytest.warns(UserWarning, match="written answers"):
        less = Judge.from_pretrained("tiny", backend=served.address, listener="none", accept_less=True)
    served.before = lambda body: (200, {"choices": [{"message": {"content": "red"}}]})
    prompts, firsts, seconds = questions(judge, 1)
    (verdict,) = less.compare_many(prompts, firsts, seconds)
    assert (verdict.malformed, verdict.preferred) == (2, None)


def test_a_listeners_grounding_needs_the_prompts_log_probabilities(serve, judge, listener_vlm):
    served = serve(listener_vlm, **AS_SGLANG)
    assert judge.card.listener_grounding == 2
    with pytest.raises(InputError, match=r"grounding of 2 is made of; accept_less=True"):
        Judge.from_pretrained("tiny", listener=served.address)
    with pytest.warns(UserWarning, match="grounding of 2 is 0"):
        less = Judge.from_pretrained("tiny", listener=served.address, accept_less=True)
    assert less.listener is not None and less.listener.grounding == 0 and len(less.limits) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heard = load_listener("tiny-listener", judge.card.__class__(format=judge.card.format), backend=served.address)
    listened: Any = heard.vlm
    assert heard.grounding == 0 and listened.limits == ()


def test_another_checkpoint_behind_the_address_is_noticed(serve, judge):
    served = serve()
    other = ChatFormat(question="{first}{second}{prompt}")
    client = OpenAIClient(served.address, api_key="")

    def longer(body: dict[str, Any]) -> Any:
        body["messages"][0]["content"].append({"type": "text", "text": "red"})
        return None

    served.before = longer
    with pytest.raises(InputError, match=r"reads a question as \d+ tokens and the checkpoint as \d+"):
        EndpointVLM(client, None, asker(judge).processor, other)


def test_a_template_that_rewrites_the_assistant_cannot_be_continued(serve, judge, monkeypatch):
    processor = asker(judge).processor
    template = processor.chat_template.replace("block['text'] }}", "block['text'] | upper }}")
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(InputError, match=r"rewrites what the assistant has written.*backend='transformers'"):
        vlm_at(serve(), judge)


def test_which_model_is_meant(serve, judge):
    several = serve(models=[{"id": "a"}, {"id": "b"}])
    with pytest.raises(InputError, match=rf"serves 2 models; choose one of: a@{several.address}, b@"):
        vlm_at(several, judge)
    with pytest.raises(InputError, match="does not serve 'x'; it serves 'a', 'b'"):
        EndpointVLM(OpenAIClient(several.address), "x", asker(judge).processor, judge.card.format)
    assert asker(Judge.from_pretrained("tiny", backend=f"b@{several.address}", listener="none")).served == "b"


def test_nobody_is_there(judge):
    client = OpenAIClient("http://127.0.0.1:9/v1", tries=1)
    with pytest.raises(JudgeError, match="gave no response"):
        EndpointVLM(client, None, asker(judge).processor, judge.card.format)


def test_a_video_is_not_sent(serve):
    served = Judge.from_pretrained("tiny", backend=serve().address, listener="none", clips="video")
    frames = tuple(to_picture(Image.new("RGB", (48, 48), shade)) for shade in ("red", "blue"))
    with pytest.raises(InputError, match="clips='video' needs the model in this process"):
        served.compare("a red circle", Clip(frames), Clip(frames[::-1]))


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("http://h:1/v1", (None, "http://h:1/v1")),
        ("org/m@1@https://h/v1", ("org/m@1", "https://h/v1")),
    ],
)
def test_addresses(address, found):
    assert split_address(address) == found and is_address(address)
    assert not any(map(is_address, ("tiny", "transformers", "", None, "folder/http")))


def test_a_backend_that_is_none():
    with pytest.raises(InputError, match="backend is 'tensorrt'; choose 'transformers', 'vllm', or an address"):
        Judge.from_pretrained("tiny", backend="tensorrt")
