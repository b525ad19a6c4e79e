"""The transformers backend: what it samples, what it reads, and that a batch is only a batch."""

from __future__ import annotations

import contextlib
import pickle
import random
import shutil
import warnings
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from transformers import Qwen2_5_VLForConditionalGeneration

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import InputError, JudgeError, UnknownWordsWarning
from listener_reward.judge import Judge
from listener_reward.models.head import next_token_logprobs
from listener_reward.models.processing import load_processor
from listener_reward.models.transformers_vlm import SeededSampling, TransformersVLM
from listener_reward.models.vlm import LEAST_LOGPROB, check_finite
from listener_reward.pairs import Prompt
from listener_reward.prefix.attention import ATTENTION, Layout
from listener_reward.prefix.rows import fork
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.models import QUESTION, build_model, build_processor
from listener_reward.tiny.world import split_pairs

FORMAT = ChatFormat(question=QUESTION)


@pytest.fixture(scope="module")
def vlm(random_judge) -> TransformersVLM:
    return TransformersVLM.from_pretrained(random_judge, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def chats(vlm) -> list[Chat]:
    """Seven chats of different lengths, with pictures of different sizes and shapes."""
    rng = random.Random(0)
    chats = []
    for pair in split_pairs("train", 7):
        images = [image.resize((rng.randint(30, 90), rng.randint(30, 90))) for image in draw_pair(pair)]
        chats.append(FORMAT.chat(" and ".join([pair.wording] * rng.randint(1, 3)), images[0], images[1], vlm.reserved))
    return chats


# ---------------------------------------------------------------- sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, float("-inf")])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_one_draw_of_many_rows_is_from_the_softmax(temperature):
    rows = 8000
    sampling = SeededSampling(list(range(rows)), temperature)
    drawn = sampling(torch.empty(rows, 0), LOGITS.expand(rows, -1)).argmax(-1)
    assert_drawn_from_softmax(drawn, temperature)


def test_many_draws_of_one_row_are_from_the_softmax():
    sampling = SeededSampling([11], 1.0)
    drawn = torch.cat([sampling(torch.empty(1, 0), LOGITS[None]).argmax(-1) for _ in range(8000)])
    assert_drawn_from_softmax(drawn, 1.0)


def assert_drawn_from_softmax(drawn: torch.Tensor, temperature: float) -> None:
    counts = drawn.bincount(minlength=len(LOGITS)).double()
    expected = torch.softmax(LOGITS.double() / temperature, -1) * len(drawn)
    assert counts[-1] == 0, "a suppressed token was drawn"
    assert chisquare(counts[:-1], expected[:-1]).pvalue > 1e-3
    assert chisquare(counts[:-1], expected[:-1].flip(0)).pvalue < 1e-9, "the test could not have failed"


def test_a_row_draws_the_same_whatever_its_neighbours():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = SeededSampling([1, 2, 3], 1.0)(torch.empty(3, 0), logits)
    alone = SeededSampling([2], 1.0)(torch.empty(1, 0), logits[1:2])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(SeededSampling([4], 1.0)(torch.empty(1, 0), logits[1:2]), alone)


def test_temperature_zero_is_greedy():
    assert torch.equal(SeededSampling([1], 0.0)(torch.empty(1, 0), LOGITS[None]), LOGITS[None])


def test_nan_logits_stop_the_sampling():
    with pytest.raises(JudgeError, match="the reasoner gave NaN logits"):
        SeededSampling([1], 0.0)(torch.empty(1, 0), torch.tensor([[0.0, float("nan")]]))


# ---------------------------------------------------------------- generate


def test_completions_do_not_depend_on_the_batch(vlm, chats):
    seeds = list(range(len(chats)))
    together = vlm.generate(chats, seeds=seeds, max_new_tokens=12, temperature=1.0)  # batches of 4 and 3
    alone = [
        vlm.generate([chat], seeds=[seed], max_new_tokens=12, temperature=1.0)[0]
        for chat, seed in zip(chats, seeds, strict=True)
    ]
    assert together == alone
    assert len(set(together)) > 1


def test_seeds_decide(vlm, chats):
    first, again, other = (
        vlm.generate(chats[:1], seeds=[seed], max_new_tokens=12, temperature=1.0) for seed in (5, 5, 6)
    )
    assert first == again != other
    greedy = [vlm.generate(chats[:1], seeds=[seed], max_new_tokens=6, temperature=0.0) for seed in (5, 6)]
    assert greedy[0] == greedy[1]


def test_vision_tokens_are_never_sampled(vlm, chats, monkeypatch):
    """Each would be followed by an image that is not there, and crash the next forward pass."""
    vision = vlm.vision_tokens()
    assert vlm.tokenizer.convert_ids_to_tokens(vision) == ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]
    seen: list[int] = []
    decode = vlm.tokenizer.batch_decode

    def spy(ids, **options):
        seen.extend(ids.flatten().tolist())
        return decode(ids, **options)

    def wants_vision(module, args, logits):
        logits[..., vision] += 1e4
        return logits

    monkeypatch.setattr(vlm.tokenizer, "batch_decode", spy)
    hook = vlm.model.lm_head.register_forward_hook(wants_vision)
    try:
        vlm.generate(chats[:2], seeds=[0, 1], max_new_tokens=8, temperature=1.0)
    finally:
        hook.remove()
    assert len(seen) >= 2
    assert set(seen).isdisjoint(vision)


def test_a_checkpoints_sampling_habits_are_not_used(vlm, chats, monkeypatch):
    """Released checkpoints come with a repetition penalty and a temperature of their own."""
    plain = vlm.generate(chats[:2], seeds=[0, 1], max_new_tokens=12, temperature=1.0)
    for name, value in (("repetition_penalty", 1e6), ("do_sample", True), ("temperature", 1e-6), ("top_k", 1)):
        monkeypatch.setattr(vlm.model.generation_config, name, value)
    assert vlm.generate(chats[:2], seeds=[0, 1], max_new_tokens=12, temperature=1.0) == plain


def test_nothing_in_nothing_out(vlm):
    assert vlm.generate([], seeds=[], max_new_tokens=4, temperature=1.0) == []
    assert vlm.label_logprobs([], [], ["1", "2"]).shape == (0, 2)


# ---------------------------------------------------------------- label_logprobs


def test_equals_a_plain_forward(vlm, chats, random_judge):
    """Batched and padded on the left against stock transformers, one unpadded row at a time."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(random_judge, dtype=torch.float32).eval()
    processor = load_processor(random_judge)
    thoughts = ["", "image 1 : two clean red circles .", "so image 2 is better ."] * 3
    prefixes = [FORMAT.answer_slot(thought) for thought in thoughts[: len(chats)]]
    found = vlm.label_logprobs(chats, prefixes, ("1", "2"))
    assert found.shape == (len(chats), 2)
    assert found.dtype == torch.float32
    for chat, prefix, row in zip(chats, prefixes, found, strict=True):
        text = processor.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True) + prefix
        inputs = processor(images=[picture.image for picture in chat.images], text=[text], return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0, -1].log_softmax(-1)
        ids = processor.tokenizer.convert_tokens_to_ids(["1", "2"])
        torch.testing.assert_close(row, expected[ids], atol=2e-5, rtol=1e-4)
    assert found.std(0).max() > 1e-3, "the rows must differ for the comparison to mean something"


class _Float32Head(torch.nn.Module):
    def __init__(self, head: torch.nn.Linear):
        super().__init__()
        self.weight = head.weight.float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), self.weight)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_labels_are_read_in_float32_from_a_bfloat16_model(random_judge, chats, shared_prefix):
    """With logits around 30, where bfloat16 counts in steps of 0.125 and 15 thoughts had a few log-odds between them"""
    vlm = TransformersVLM.from_pretrained(random_judge, device="cpu", dtype="bfloat16", shared_prefix=shared_prefix)
    head = vlm.model.lm_head
    head.weight = torch.nn.Parameter(head.weight * 50, requires_grad=False)  # no longer tied to the embeddings
    words = [word for word in sorted(vlm.tokenizer.get_vocab()) if word.isalpha()][:15]
    slots = [FORMAT.answer_slot(f"The {word} one is better .") for word in words]
    asked = [chats[0]] * len(slots), slots, FORMAT.labels
    logprobs, likelihood = vlm.read(*asked)
    assert torch.equal(vlm.label_logprobs(*asked), logprobs)

    vlm.model.lm_head = _Float32Head(head)
    expected, _ = vlm.read(*asked)
    vlm.model.lm_head = torch.nn.Sequential(head)  # as such a head is run
    rounded, expected_likelihood = vlm.read(*asked)
    assert expected.abs().max() > 10
    assert (logprobs - expected).abs().max() < 0.005
    assert (rounded - expected).abs().max() > 0.02
    assert len(set((logprobs[:, 0] - logprobs[:, 1]).tolist())) == 15
    assert len(set((rounded[:, 0] - rounded[:, 1]).tolist())) < 15
    assert torch.equal(likelihood, expected_likelihood)


@pytest.mark.parametrize("bias", [False, True])
def test_log_probabilities_of_a_vocabulary_in_parts_are_those_of_the_softmax(bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 20_000, bias=bias).requires_grad_(False)
    hidden = torch.randn(3, 16)
    expected = head(hidden).double().log_softmax(-1)[:, [7, 19_999]]
    ids = torch.tensor([[7, 19_999]] * 3)
    torch.testing.assert_close(next_token_logprobs(head, hidden, ids).double(), expected, atol=1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = next_token_logprobs(head, hidden, ids)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside.double(), expected, atol=1e-5, rtol=0)


def test_read_adds_the_mean_logprob_of_the_prefix(vlm, chats, random_judge):
    """Against stock transformers again; the long and short prefixes of a batch must not run into one another."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(random_judge, dtype=torch.float32).eval()
    processor = load_processor(random_judge)
    prefixes = [FORMAT.answer_slot(thought) for thought in ("", "image 1 : two clean red circles .", "so")]
    log_probs, means = vlm.read(chats[:3], prefixes, ("1", "2"))
    torch.testing.assert_close(log_probs, vlm.label_logprobs(chats[:3], prefixes, ("1", "2")), atol=2e-5, rtol=1e-4)
    for chat, prefix, mean in zip(chats[:3], prefixes, means, strict=True):
        text = processor.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True) + prefix
        inputs = processor(images=[picture.image for picture in chat.images], text=[text], return_tensors="pt")
        written = len(processor.tokenizer(prefix, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(**inputs).logits[0].log_softmax(-1)
        tokens = inputs["input_ids"][0, -written:]
        expected = logprobs[-written - 1 : -1].gather(-1, tokens[:, None]).clamp(min=LEAST_LOGPROB).mean()
        torch.testing.assert_close(mean, expected, atol=2e-5, rtol=1e-4)
    assert vlm.read([], [], ("1", "2"))[0].shape == (0, 2)


@contextlib.contextmanager
def counted(vlm: TransformersVLM):
    """The tokens of the language model, pass by pass."""
    passes: list[int] = []

    def count(module, args, kwargs):
        passes.append(kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1])

    hook = vlm.model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


def tokens_of(vlm: TransformersVLM, chat: Chat) -> int:
    """Tokens of a chat as stock transformers reads it, images and all."""
    text = vlm.processor.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True)
    return vlm.processor(images=[picture.image for picture in chat.images], text=[text], return_tensors="pt")[
        "input_ids"
    ].shape[1]


def test_a_prompt_is_read_once_for_all_its_thoughts(random_judge, chats):
    """To the token, though there are more thoughts than a batch takes, and they come mixed with another chat's."""
    vlm = TransformersVLM.from_pretrained(random_judge, device="cpu", batch_size=4)
    prefixes = [FORMAT.answer_slot(thought) for thought in ("", "so", "image 1 : two clean red circles .") * 4]
    asked = [chats[row % 2] for row in range(12)]
    written = [len(part) for part in vlm.tokenizer(prefixes, add_special_tokens=False)["input_ids"]]
    prompts = [tokens_of(vlm, chat) for chat in chats[:2]]
    for read in (vlm.label_logprobs, vlm.read):
        with counted(vlm) as passes:
            read(asked, prefixes, ("1", "2"))
        # A prompt's last token opens each of its thoughts.
        expected = [prompts[chat] - 1 + sum(1 + n for n in written[chat::2]) for chat in (0, 1)]
        assert passes == expected, "more than four of a chat are never parted, and two such chats are not one batch"
    vlm.batch_size = 32
    with counted(vlm) as passes:
        vlm.label_logprobs(asked, prefixes, ("1", "2"))
    assert passes == [sum(expected)]


CRITERIA = {"color": "judge by color : red or blue ?", "count": "by count .", "shape": "by shape : circle or square ?"}
LAST = ChatFormat(question=QUESTION, criteria=CRITERIA)
FIRST = ChatFormat(question="{criterion} " + QUESTION, criteria=CRITERIA)


def by_criteria(chat_format: ChatFormat, reserved) -> list[Chat]:
    """The general question and each criterion, about a pair in both orders."""
    red, blue = Image.new("RGB", (80, 56), "red"), Image.new("RGB", (56, 90), "blue")
    names = (None, *CRITERIA) if chat_format is LAST else CRITERIA
    orders = ((red, blue), (blue, red))
    return [chat_format.chat(Prompt("a red circle", (), n), *order, reserved) for order in orders for n in names]


@pytest.mark.parametrize("chat_format", [LAST, FIRST], ids=["last", "first"])
def test_criteria_of_a_pair_are_read_as_if_each_were_alone(random_judge, chats, chat_format):
    """With several thoughts about some, another chat between them, whether or not they can share their beginning."""
    shared, plain = (
        TransformersVLM.from_pretrained(random_judge, device="cpu", shared_prefix=on) for on in (True, False)
    )
    thoughts = ["", "image 1 : two clean red circles ."]
    asked = [(chat, thought) for chat in by_criteria(chat_format, shared.reserved) for thought in thoughts]
    asked.insert(3, (chats[0], "so"))
    some, prefixes = [chat for chat, _ in asked], [chat_format.answer_slot(thought) for _, thought in asked]
    log_probs, means = shared.read(some, prefixes, ("1", "2"))
    alone = [shared.read([chat], [prefix], ("1", "2")) for chat, prefix in zip(some, prefixes, strict=True)]
    for expected in ([torch.cat(parts) for parts in zip(*alone, strict=True)], plain.read(some, prefixes, ("1", "2"))):
        torch.testing.assert_close(log_probs, expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(means, expected[1], atol=1e-5, rtol=1e-5)
    assert (log_probs[:2] - log_probs[4:6]).abs().min() > 1e-4, "each criterion is another question"
    torch.testing.assert_close(shared.label_logprobs(some, prefixes, ("1", "2")), log_probs, atol=1e-5, rtol=1e-5)


def test_criteria_of_a_pair_share_images_and_prompt(vlm):
    """To the token: their beginning once, then what each asks. In a pass of its own where images come after it."""
    chats = by_criteria(LAST, vlm.reserved)
    texts = [vlm.tokenizer(text)["input_ids"] for text in vlm.turns.texts(chats[:4])]
    common = next(place for place, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1)
    ends = [len(text) - common for text in texts]
    images = tokens_of(vlm, chats[0]) - len(texts[0])
    answer = len(vlm.tokenizer(LAST.answer_slot(""), add_special_tokens=False)["input_ids"])
    with counted(vlm) as passes:
        vlm.label_logprobs(chats, [LAST.answer_slot("")] * 8, ("1", "2"))
    assert passes == [common + images - 1 + sum(1 + end + answer for end in ends)] * 2, "one for each order"
    first = by_criteria(FIRST, vlm.reserved)[:3]
    with counted(vlm) as passes:
        vlm.label_logprobs(first, [LAST.answer_slot("")] * 3, ("1", "2"))
    assert passes == [sum(tokens_of(vlm, chat) + answer for chat in first)]


@pytest.mark.parametrize("token_budget", [16384, 150])
def test_criteria_of_a_pair_are_thought_about_as_if_each_were_alone(random_judge, chats, token_budget):
    vlm = TransformersVLM.from_pretrained(random_judge, device="cpu", token_budget=token_budget)
    asked = by_criteria(LAST, vlm.reserved)
    asked.insert(2, chats[0])  # a pair of its own, with a longer prompt
    asked *= 2
    seeds, options = list(range(len(asked))), {"max_new_tokens": 12, "temperature": 1.0}
    with counted(vlm) as passes:
        together = vlm.generate(asked, seeds=seeds, **options)
    alone = [vlm.generate([chat], seeds=[seed], **options)[0] for chat, seed in zip(asked, seeds, strict=True)]
    assert together == alone and len(set(together)) > 9
    if token_budget > 1000:
        texts = [vlm.tokenizer(text)["input_ids"] for text in vlm.turns.texts(asked[:2])]
        common = next(place for place, pair in enumerate(zip(*texts, strict=False)) if len(set(pair)) > 1)
        images = tokens_of(vlm, asked[0]) - len(texts[0])
        others = [len(vlm.tokenizer(text)["input_ids"]) for text in vlm.turns.texts([asked[i] for i in (0, 1, 3, 4)])]
        pair = common + images - 1 + sum(length - common for length in others)
        assert passes[0] == 2 * pair + tokens_of(vlm, chats[0]) - 1, "all but the last token of each"


def test_prompts_part_where_sharing_would_repeat_more_than_it_saves(vlm):
    model = vlm.model
    prompts = [torch.tensor([5, 6, 7, *end]) for end in ([8, 9, 10], [11, 12], [8])]
    assert fork(model, prompts, [1, 1, 1]) == 3
    assert fork(model, prompts, [2, 2, 1]) == 3, "six saved for five repeated"
    assert fork(model, prompts, [2, 2, 2]) is None, "six saved for six repeated"
    assert fork(model, prompts[:1] * 2, [1, 1]) == 5, "the last token is each prompt's own"
    assert fork(model, prompts[:1], [1]) is None and fork(model, [prompts[0][:2], prompts[1][:2]], [1, 1]) is None
    image = torch.tensor([5, 6, 7, model.config.image_token_id])
    assert fork(model, [prompts[0], image], [1, 1]) is None


def test_a_prompt_is_prefilled_once_for_all_its_completions(random_judge, chats):
    vlm = TransformersVLM.from_pretrained(random_judge, device="cpu", batch_size=4)
    with counted(vlm) as passes:
        together = vlm.generate([chats[0]] * 10, seeds=list(range(10)), max_new_tokens=3, temperature=1.0)
    assert passes[0] == tokens_of(vlm, chats[0]) - 1
    drawn = passes[1:]
    assert max(drawn) == 4 and sum(drawn) <= 3 * 10, "four at a time, as asked"
    alone = [vlm.generate(chats[:1], seeds=[seed], max_new_tokens=3, temperature=1.0)[0] for seed in range(10)]
    assert together == alone


def test_the_budget_of_tokens_splits_thoughts_and_prompts(random_judge, chats):
    vlm = TransformersVLM.from_pretrained(random_judge, device="cpu", token_budget=1)
    prefixes = [FORMAT.answer_slot("so")] * 6
    with counted(vlm) as passes:
        split = vlm.label_logprobs([chats[0]] * 3 + [chats[1]] * 3, prefixes, ("1", "2"))
    assert len(passes) == 6
    with counted(vlm) as passes:
        vlm.generate(chats[:3], seeds=[0, 1, 2], max_new_tokens=1, temperature=1.0)
    assert passes[:3] == [tokens_of(vlm, chat) - 1 for chat in chats[:3]]
    vlm.token_budget = 16384
    with counted(vlm) as passes:
        whole = vlm.label_logprobs([chats[0]] * 3 + [chats[1]] * 3, prefixes, ("1", "2"))
    assert len(passes) == 1
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-5)


def test_the_judge_hands_on_how_its_models_run(random_judge):
    options = {"batch_size": 3, "shared_prefix": False, "token_budget": 77, "vision_bytes": 1000}
    judge: Any = Judge.from_pretrained(random_judge, device="cpu", **options)
    for vlm in (judge.reasoner, judge.listener.vlm):
        assert (vlm.batch_size, vlm.shared_prefix, vlm.token_budget, vlm.features.max_bytes) == (3, False, 77, 1000)
    again = pickle.loads(pickle.dumps(judge))
    assert again.reasoner.token_budget == 77 and not again.listener.vlm.shared_prefix


def test_attention_of_a_row_is_the_models_own_choice(random_judge, chats, monkeypatch):
    calls: list[int] = []
    stock = Layout._flex
    monkeypatch.setattr(Layout, "_flex", lambda *args: (calls.append(1), stock(*args))[1])
    prefixes = [FORMAT.answer_slot("so")] * 2
    sdpa, flex = (TransformersVLM.from_pretrained(random_judge, device="cpu", attention=a) for a in ("sdpa", "flex"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention is slow uncompiled
        found = flex.label_logprobs(chats[:2], prefixes, ("1", "2"))
    assert len(calls) == 3, "layers"
    expected = sdpa.label_logprobs(chats[:2], prefixes, ("1", "2"))
    assert len(calls) == 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_labels_must_be_one_known_token_each(vlm, chats):
    with pytest.raises(InputError, match="label 'image 1' is 2 tokens"):
        vlm.label_logprobs(chats[:1], [""], ("image 1", "2"))
    with pytest.raises(InputError, match=r"labels .* are one token"):
        vlm.label_logprobs(chats[:1], [""], ("dragon", "castle"))


def test_check_finite():
    good = torch.tensor([[-1.0, -2.0]])
    assert check_finite(good, "x") is good
    with pytest.raises(JudgeError, match="x gave NaN or infinite probabilities for 2 of 3 inputs"):
        check_finite(torch.tensor([[0.0, float("nan")], [float("-inf"), float("nan")], [0.0, 0.0]]), "x")


# ---------------------------------------------------------------- words it does not know


def ask(vlm: TransformersVLM, *prompts: str) -> torch.Tensor:
    image = Image.new("RGB", (48, 48), "red")
    asked = [FORMAT.chat(prompt, image, image, vlm.reserved) for prompt in prompts]
    return vlm.label_logprobs(asked, [FORMAT.answer_slot("")] * len(asked), ("1", "2"))


def afresh(vlm: TransformersVLM) -> TransformersVLM:
    return TransformersVLM(vlm.model, vlm.processor)


def test_unknown_words_are_named_once(vlm):
    vlm = afresh(vlm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.isfinite(ask(vlm, "two red circles", "a Dragon and a castle and a dragon", "🦊 d e f g")).all()
        ask(vlm, "an elephant")
    (warning,) = caught
    assert str(warning.message).startswith(
        "the judge's tokenizer does not know 'Dragon', 'castle', 'dragon', '🦊', 'd', ... and reads <unk> instead. The "
        "tiny judge knows only its world"
    )
    assert warning.category is UnknownWordsWarning


def test_each_model_names_the_words_that_it_does_not_know_and_python_shows_it_once(vlm):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for each in (afresh(vlm), afresh(vlm)):  # as a reasoner and its listener
            ask(each, "a griffin")
        ask(afresh(vlm), "a phoenix")
    assert [str(warning.message).split()[6] for warning in caught] == ["'griffin'", "'phoenix'"]


@pytest.mark.parametrize("prompt", ["two red circles", "A picture of one BLUE square!", "", "(three) green stars."])
def test_known_words_and_the_template_do_not_warn(vlm, prompt):
    vlm = afresh(vlm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(vlm, prompt)


# ---------------------------------------------------------------- what making one changes


@pytest.mark.parametrize(
    ("options", "asked"), [({}, 1), ({"keep_memory": False}, 0), ({"shared_prefix": False}, 0)], ids=str
)
def test_glibc_is_asked_only_by_a_model_that_shares_prefixes_and_may(random_judge, monkeypatch, options, asked):
    calls = []
    monkeypatch.setattr("listener_reward.models.transformers_vlm.keep_freed_memory", lambda: calls.append(1))
    TransformersVLM.from_pretrained(random_judge, device="cpu", **options)
    assert len(calls) == asked


def test_a_model_that_shares_no_prefixes_is_left_as_it_was(random_judge):
    for shared, name in ((True, ATTENTION), (False, "sdpa")):
        model = TransformersVLM.from_pretrained(random_judge, device="cpu", shared_prefix=shared).model
        assert model.config.get_text_config()._attn_implementation == name
        assert model.config.vision_config._attn_implementation == "sdpa"


# ---------------------------------------------------------------- loading


def test_padding_on_the_right_is_refused():
    processor = build_processor()
    processor.tokenizer.padding_side = "right"
    with pytest.raises(InputError, match="padding_side"):
        TransformersVLM(build_model(processor.tokenizer), processor)


def test_no_chat_template_is_refused(random_judge, tmp_path):
    folder = shutil.copytree(random_judge, tmp_path / "judge")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"chat_template.jinja"):
        TransformersVLM.from_pretrained(folder)


def test_loaded_model_is_frozen(vlm):
    assert not vlm.model.training
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())
