"""Formats of models that exist: where a label stands in a vocabulary that merges, and how completions are written."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from listener_reward.chat import QWEN_RESERVED, Chat, ChatFormat
from listener_reward.errors import FormatError, FormatWarning, InputError, JudgeError
from listener_reward.evaluate.run import evaluate
from listener_reward.judge import Judge
from listener_reward.listener import Listener
from listener_reward.misfits import Misfits
from listener_reward.models.older_transformers import Qwen2VLImageProcessorPil
from listener_reward.models.processing import ImageOnlyQwen2_5_VLProcessor, decoded, load_processor, opened_thought
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.reward import ListenerReward
from listener_reward.tiny.models import CHAT_TEMPLATE, MAX_PIXELS, MERGE, MIN_PIXELS, PATCH, QUESTION, build_model
from listener_reward.trace import Trace, parse
from listener_reward.train.rewards import ShapedReward
from listener_reward.train.trainer import ListenerGRPOTrainer

RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's splitting, in which `>A`, `>B`, ` A`, ` B` and `><` are merges, as in Qwen's own."""
    merges = [(">", "A"), (">", "B"), (">", "C"), ("Ġ", "A"), ("Ġ", "B"), (">", "<"), (">", "Ċ"), ("e", "r")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_RESERVED])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def build_vlm(tokenizer: PreTrainedTokenizerFast, template: str = CHAT_TEMPLATE, **options: Any) -> TransformersVLM:
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
    )
    torch.manual_seed(0)
    model = build_model(tokenizer).eval().requires_grad_(False)
    return TransformersVLM(model, ImageOnlyQwen2_5_VLProcessor(images, tokenizer, chat_template=template), **options)


@pytest.fixture(scope="module")
def vlm() -> TransformersVLM:
    return build_vlm(build_tokenizer())


def ids(vlm: TransformersVLM, *tokens: str) -> list[int]:
    return [vlm.tokenizer.convert_tokens_to_ids(token) for token in tokens]


# ---------------------------------------------------------------- labels in context


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize(
    ("slot", "labels", "merged", "dropped"),
    [
        ("<answer>", ("1", "2"), ("1", "2"), 0),
        ("<answer>", ("A", "B"), (">A", ">B"), 1),
        ("<answer>Image ", ("A", "B"), ("ĠA", "ĠB"), 1),
        ("<answer>Image ", ("1", "2"), ("1", "2"), 0),
        ("<answer>\n", ("A", "B"), ("A", "B"), 0),
    ],
)
def test_labels_are_read_where_the_model_writes_them(vlm, shared_prefix, slot, labels, merged, dropped):
    """`<answer>A` ends in one token `>A`, which stands where `>` would; after `>` the model writes no A."""
    chat = ChatFormat(question=QUESTION).chat("a fox", RED, BLUE, vlm.reserved)
    reader = TransformersVLM(vlm.model, vlm.processor, shared_prefix=shared_prefix)
    text = vlm.processor.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True)
    prefixes = [f"<think>{thought}</think>{slot}" for thought in ("", "a red fox stands", "no")]
    asked = [chat] * len(prefixes)
    found, (again, means) = reader.label_logprobs(asked, prefixes, labels), reader.read(asked, prefixes, labels)
    torch.testing.assert_close(found, again, atol=1e-5, rtol=1e-5)
    for prefix, row, mean in zip(prefixes, found, means, strict=True):
        inputs = vlm.processor(images=[picture.image for picture in chat.images], text=[text], return_tensors="pt")
        written = vlm.tokenizer.encode(prefix, add_special_tokens=False)
        written = written[: len(written) - dropped]
        whole = torch.cat([inputs.pop("input_ids"), torch.tensor([written])], 1)
        types = torch.nn.functional.pad(inputs.pop("mm_token_type_ids"), (0, len(written)))
        inputs.pop("attention_mask")
        with torch.no_grad():
            logprobs = vlm.model(input_ids=whole, mm_token_type_ids=types, **inputs).logits[0].log_softmax(-1)
        torch.testing.assert_close(row, logprobs[-1, ids(vlm, *merged)], atol=2e-5, rtol=1e-4)
        own = logprobs[-len(written) - 1 : -1].gather(-1, torch.tensor(written)[:, None]).clamp(min=-5).mean()
        torch.testing.assert_close(mean, own, atol=2e-5, rtol=1e-4)


def test_labels_that_do_not_share_a_slot_are_refused(vlm):
    """`>A` is one token and `>D` two: no place has a probability for both."""
    chat = ChatFormat(question=QUESTION).chat("a fox", RED, BLUE, vlm.reserved)
    with pytest.raises(InputError, match=r"labels \('A', 'D'\) do not follow the same tokens after '<answer>'.*'>A'"):
        vlm.label_logprobs([chat], ["<answer>"], ("A", "D"))
    with pytest.raises(InputError, match=r"label '12' is 2 tokens of this tokenizer after '<answer>'.*\['1', '2'\]"):
        vlm.label_logprobs([chat], ["<answer>"], ("12", "2"))


# ---------------------------------------------------------------- prompts that open the thought themselves

OPENS = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""Qwen3-VL-Thinking's: the generation prompt ends in an open thought."""


def test_what_a_prompt_opens():
    assert opened_thought("<|im_start|>assistant\n<think>\n", "<think>") == "<think>\n"
    assert opened_thought("<|im_start|>assistant\n<think>", "<think>") == "<think>"
    assert opened_thought("<|im_start|>user\n<think>\n<|im_start|>assistant\n", "<think>") == ""
    assert opened_thought("<|im_start|>assistant\n<think>\n", "[t]") == ""
    assert opened_thought("<|im_start|>assistant\n<think>\n", None) == ""


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_thought_that_the_prompt_opens_is_opened_once(vlm, shared_prefix):
    """Both models get the tokens that a model without such a template gets when it writes them itself."""
    opening = build_vlm(vlm.tokenizer, OPENS, shared_prefix=shared_prefix)
    chat = ChatFormat(question=QUESTION).chat("a fox", RED, BLUE, vlm.reserved)
    (said,) = opening.generate([chat], seeds=[0], max_new_tokens=4, temperature=1.0)
    assert said.startswith("<think>\n") and len(said) > len("<think>\n")
    closed = [f"<think>\n{thought}</think><answer>" for thought in ("a fox", "")]
    expected, found = (each.label_logprobs([chat] * 2, closed, ("1", "2")) for each in (vlm, opening))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    bare = [slot.replace("<think>\n", "<think>") for slot in closed]
    torch.testing.assert_close(opening.label_logprobs([chat] * 2, bare, ("1", "2")), expected, atol=2e-5, rtol=1e-4)
    at_once = [each.label_logprobs([chat], ["<answer>"], ("1", "2")) for each in (vlm, opening)]
    torch.testing.assert_close(*at_once, atol=2e-5, rtol=1e-4)


def test_training_reads_a_completion_with_what_the_prompt_opened():
    columns = {"p_first": [1.0], "caption": ["a fox"], "images": [[RED, BLUE]], "id": ["x"]}
    completion = ["a fox</think><answer>1</answer>"]
    form, accuracy, _ = ShapedReward(ChatFormat(), None, opened="<think>\n").functions
    assert (form(completion, **columns), accuracy(completion, **columns)) == ([1.0], [1.0])
    (form, *_) = ShapedReward(ChatFormat(), None).functions
    assert form(completion, **columns) == [0.0]


def test_the_trainer_sees_what_its_template_opens(random_judge, tiny_pairs, grpo_config, tmp_path):
    folder = tmp_path / "thinking"
    shutil.copytree(random_judge, folder)
    (folder / "chat_template.jinja").write_text(OPENS, encoding="utf-8")
    trainer = ListenerGRPOTrainer(folder, grpo_config(), tiny_pairs)
    assert trainer.reward.opened == "<think>\n"
    assert ListenerGRPOTrainer(random_judge, grpo_config(), tiny_pairs).reward.opened == ""


def test_training_that_earns_nothing_stops_with_a_completion(random_judge, tiny_pairs, grpo_config):
    """Random weights write no tags in eight tokens."""
    trainer = ListenerGRPOTrainer(random_judge, grpo_config(max_steps=4, malformed_rounds=2), tiny_pairs)
    with pytest.raises(
        InputError, match=r"all completions of 2 rounds in a row are malformed, such as '.+'; they earn"
    ):
        trainer.train()
    assert trainer.state.global_step == 1
    trainer = ListenerGRPOTrainer(random_judge, grpo_config(max_steps=3, malformed_rounds=0), tiny_pairs)
    trainer.train()
    assert trainer.state.global_step == 3
    with pytest.raises(InputError, match="malformed_rounds is -1"):
        grpo_config(malformed_rounds=-1)


def test_one_well_formed_completion_begins_the_count_anew(random_judge, tiny_pairs, grpo_config):
    trainer = ListenerGRPOTrainer(random_judge, grpo_config(malformed_rounds=2), tiny_pairs)
    model: Any = trainer.model
    model.train()
    for rate in (1.0, 0.9, 1.0, 0.0, 1.0):
        trainer._metrics["train"]["malformed_rate"].append(rate)
        trainer._stop_where_all_is_malformed()
    model.eval()
    trainer._stop_where_all_is_malformed()
    model.train()
    with pytest.raises(InputError, match="2 rounds"):
        trainer._stop_where_all_is_malformed()


def test_a_run_whose_completions_are_cut_says_so_once(tiny_pairs, grpo_config, caplog):
    """The base's thoughts have some 30 tokens; in 8, hardly one comes to its answer."""
    ListenerGRPOTrainer("tiny-base", grpo_config(max_steps=2, max_completion_length=8), tiny_pairs).train()
    said = [record.getMessage() for record in caplog.records if "are cut at" in record.getMessage()]
    assert len(said) == 1
    assert re.match(r"\d+ % of a round's completions are cut at max_completion_length 8; .* larger max_comp", said[0])
    caplog.clear()
    ListenerGRPOTrainer("tiny-base", grpo_config(max_steps=1, max_completion_length=64), tiny_pairs).train()
    assert not [record for record in caplog.records if "are cut at" in record.getMessage()]


# ---------------------------------------------------------------- a format that does not fit


class Speaker:
    """Says `said` of every pair, and gives the two labels `mass` together at the slot."""

    reserved: frozenset[str] = frozenset()

    def __init__(self, said: str, mass: float = 1.0):
        self.said, self.mass = said, mass
        self.prefixes: list[str] = []

    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        return [self.said] * len(chats)

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> torch.Tensor:
        self.prefixes += prefixes
        return torch.tensor([[0.75, 0.25]] * len(chats)).reshape(-1, 2).mul(self.mass).log()

    def read(
        self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.label_logprobs(chats, prefixes, labels), torch.zeros(len(chats))


GOOD, BAD = "<think>a fox</think><answer>1</answer>", "Image **1** is better"
PAIRS = ["a fox"] * 8, [RED] * 8, [BLUE] * 8


def test_a_verdict_has_the_mass_of_its_labels():
    verdict = Judge(Speaker(GOOD, 0.4)).compare("a fox", RED, BLUE)
    assert verdict.label_mass == pytest.approx(0.4)
    assert verdict.to_dict()["label_mass"] == verdict.label_mass
    assert Judge(Speaker(GOOD, 0.4)).compare("a fox", BLUE, RED).label_mass == verdict.label_mass
    assert Judge(Speaker(GOOD, 0.4), think=False).compare("a fox", RED, BLUE).label_mass == verdict.label_mass
    _, info = ListenerReward(Judge(Speaker(BAD, 0.4)))([RED, BLUE], ["a fox"] * 2)
    assert info["malformed"].tolist() == [1, 1] and info["label_mass"] == pytest.approx([0.4, 0.4])
    _, info = ListenerReward(Judge(Speaker(GOOD), think=False))([RED, BLUE], ["a fox"] * 2)
    assert math.isnan(info["malformed"][0]), "no thoughts, so no fraction of them"


@pytest.mark.parametrize(
    ("said", "mass", "think", "message"),
    [
        (
            BAD,
            1.0,
            True,
            r"(30|16) of the judge's first \1 thoughts are malformed, such as 'Image \*\*1\*\* is better'",
        ),
        (GOOD, 0.002, True, r"the judge gives the two labels a probability of 0.002 together"),
        (GOOD, 0.002, False, r"the judge gives the two labels a probability of 0.002 together"),
    ],
)
def test_a_format_that_does_not_fit_is_said_once(said, mass, think, message):
    judge = Judge(Speaker(said, mass), think=think)
    judge.compare_many(PAIRS[0][:7], PAIRS[1][:7], PAIRS[2][:7])
    with pytest.warns(FormatWarning, match=message):
        judge.compare_many(*PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge.compare_many(*PAIRS)
    strict = Judge(Speaker(said, mass), think=think, strict=True)
    for _ in range(2):
        with pytest.raises(JudgeError, match=message):
            strict.compare_many(*PAIRS)


def test_a_few_answers_in_another_format_are_said_where_no_more_are_asked():
    judge = Judge(Speaker(BAD))
    judge.compare("a fox", RED, BLUE)
    with pytest.warns(FormatWarning, match="2 of the judge's first 2 thoughts are malformed"):
        judge.check_format()
    deaf = Judge(Speaker(GOOD), Listener(Speaker(GOOD, 0.001), ChatFormat()))
    deaf.compare("a fox", RED, BLUE)
    with pytest.warns(FormatWarning, match="the listener gives the two labels a probability of 0.001"):
        deaf.check_format()
    strict = Judge(Speaker(BAD), strict=True)
    strict.check_format()  # nothing was asked yet
    strict.compare("a fox", RED, BLUE)
    with pytest.raises(FormatError, match="2 of the judge's first 2 thoughts are malformed"):
        strict.check_format()
    good = Judge(Speaker(GOOD, 0.02), strict=True)
    good.compare("a fox", RED, BLUE)
    good.check_format()


@pytest.mark.parametrize("policy", ["raise", "nan", "group-mean"])
def test_no_policy_masks_a_strict_judge_of_another_format(policy):
    reward = ListenerReward(Judge(Speaker(BAD), strict=True), scheme="group", on_failure=policy)
    shades = [Image.new("RGB", (9, 9), (20 * n, 0, 0)) for n in range(8)]
    with pytest.raises(FormatError, match="thoughts are malformed"):
        reward(shades, ["a fox"] * 8)


def test_a_format_that_fits_and_a_few_slips_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Judge(Speaker(GOOD, 0.02), strict=True).compare_many(*PAIRS)
        misfits = Misfits("the judge", strict=True)
        misfits.see([1.0] * 16, [True] * 8 + [False] * 8)
        misfits.see([0.0] * 16, [True] * 16)


def test_a_listener_of_another_format_is_said_too():
    judge = Judge(Speaker(GOOD), Listener(Speaker(GOOD, 0.001), ChatFormat()), strict=True)
    with pytest.warns(FormatWarning, match="the listener gives the two labels a probability of 0.001"):
        judge.compare_many(*PAIRS)


def test_strict_is_an_option_of_a_judge_by_name(random_judge):
    judge = Judge.from_pretrained(random_judge, device="cpu", strict=True, listener="none")
    assert pickle.loads(pickle.dumps(judge)).misfits.strict
    with pytest.raises(JudgeError, match="thoughts are malformed"):
        judge.compare_many(
            ["two red circles"] * 8, [Image.new("RGB", (9, 9), (20 * n, 0, 0)) for n in range(8)], PAIRS[2]
        )


def test_an_evaluation_has_the_mass_of_the_labels(tiny_pairs):
    record = evaluate(Judge(Speaker(GOOD, 0.4)), tiny_pairs, progress=False, swap_check=0)
    assert record.label_mass == pytest.approx(0.4) and record.to_dict()["label_mass"] == record.label_mass


# ---------------------------------------------------------------- formats of models that exist

PHRASE = ChatFormat(answer=("<answer>Image ", " is better</answer>"))
JSON = ChatFormat(think=('{"reasoning": "', '", '), answer=('"preferred": "', '"}'))
LINES = ChatFormat(think=("<think>\n", "\n</think>\n"), answer=("<answer>\n", "\n</answer>"))
UNTHINKING = ChatFormat(think=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("chat_format", "completion", "thought", "answer", "slot"),
    [
        (PHRASE, "<think>a</think><answer>Image 2 is better</answer>", "a", 2, "<think>a</think><answer>Image "),
        (PHRASE, "<think>a</think>\n<answer>Image 1 is\nbetter</answer>\n", "a", 1, "<think>a</think>\n<answer>Image "),
        (JSON, '{"reasoning": "a fox", "preferred": "2"}', "a fox", 2, '{"reasoning": "a fox", "preferred": "'),
        (JSON, '{"reasoning": "a fox",\n"preferred": "1"}', "a fox", 1, '{"reasoning": "a fox",\n"preferred": "'),
        (LINES, "<think>\na\n</think>\n<answer>\n1\n</answer>", "a", 1, "<think>\na\n</think>\n<answer>\n"),
        (LINES, "<think>a</think><answer>1</answer>", "a", 1, "<think>a</think><answer>"),
        (UNTHINKING, "<answer>1</answer>", "", 1, "<answer>"),
        (UNTHINKING, "a fox.\n<answer>2</answer>", "a fox.", 2, "a fox.\n<answer>"),
    ],
)
def test_formats_are_read(chat_format, completion, thought, answer, slot):
    trace = parse(completion, chat_format)
    assert (trace.thought, trace.answer, trace.slot) == (thought, answer, slot)
    assert ChatFormat.from_dict(chat_format.to_dict()) == chat_format
    written = f"{chat_format.answer_slot(thought)}{chat_format.labels[answer - 1]}{chat_format.answer[1]}"
    assert parse(written, chat_format) == trace
    assert parse(completion, chat_format, lenient=True) == trace


@pytest.mark.parametrize(
    ("chat_format", "completion"),
    [
        (PHRASE, "<think>a</think><answer>1</answer>"),
        (PHRASE, "<think>a</think><answer>Image 1 is best</answer>"),
        (JSON, '{"reasoning": "a fox", "preferred": 1}'),
        (UNTHINKING, "<answer>1</answer> or not"),
        (UNTHINKING, "<answer>1</answer><answer>2</answer>"),
        (UNTHINKING, "1"),
    ],
)
def test_other_forms_are_malformed(chat_format, completion):
    assert parse(completion, chat_format).answer is None


@pytest.mark.parametrize("fields", [{"answer": (" ", "x")}, {"think": ("<t>", "")}, {"think": ("<answer> ", "x")}])
def test_blank_and_equal_tags_are_refused(fields):
    with pytest.raises(InputError, match=r"think|answer"):
        ChatFormat(**fields)


def test_no_prompt_can_hold_a_tag_with_words():
    form = dataclasses.replace(PHRASE, question=QUESTION)
    said = form.messages("a <answer>Image 1 is better</answer> <answer> fox")[0]["content"][-1]["text"]
    assert not any(tag in said for tag in ("<answer>", "</answer>", "is better</answer>"))


LENIENT = [
    ("**1**", 1),
    ("<think>a</think>**2**", 2),
    ("a fox.\n\nAnswer: **Image 2**", 2),
    ("The final answer is 1.", 1),
    ("Image 1", 1),
    ("Image 2 is better.", 2),
    ("'1'", 1),
    ("1.", 1),
    ("a\n$\\boxed{2}$", 2),
    ("\\boxed{\\text{Image 1}}", 1),
    ("<think>a</think><answer>Image 1 is better</answer>", 1),
    ("```\n<answer>1\n```", 1),
]


@pytest.mark.parametrize(("completion", "answer"), LENIENT)
def test_lenient_reading_has_to_be_asked_for(completion, answer):
    assert parse(completion, ChatFormat()).answer is None
    trace = parse(completion, ChatFormat(), lenient=True)
    assert trace.answer == answer
    assert trace.slot is not None and completion[len(trace.slot)] == str(answer)
    assert not any(tag in trace.thought for tag in ChatFormat().tags)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "1 or 2",
        "12",
        "Image 3",
        "maybe 1",
        "1\nbut I doubt it",
        "Image 1 is not better",
        "**1** **2**",
        "1" * 999,
    ],
)
def test_lenient_reading_guesses_nothing(completion):
    assert parse(completion, ChatFormat(), lenient=True).answer is None


def test_lenient_reading_takes_linear_time():
    started = time.process_time()
    for flood in (" " * 10**6, "*" * 10**6, "</think>" * 10**5, "\n" * 10**6, "*" * 110 + "x", "Image " * 10**5):
        assert parse(flood, ChatFormat(), lenient=True).answer is None
    assert time.process_time() - started < 5


@pytest.mark.parametrize("end", ["\\boxed{1}", "$\\boxed{1}$", "\\boxed{\\text{Image 1}}"])
def test_a_boxed_answer_goes_from_the_model_to_the_verdict(end):
    """Of a model trained on mathematics. It names the first place in both orders, and its slot says 0.75 of it."""
    speaker, listener = Speaker(f"Image 2 is blurred.\n{end}"), Speaker("")
    judge = Judge(speaker, Listener(listener, ChatFormat()), lenient=True)
    verdict = judge.compare("a fox", RED, BLUE)
    assert verdict.malformed == 0 and verdict.p_first == pytest.approx(0.5)
    said = {thought.order: (thought.answer, thought.p_first, thought.contradicted) for thought in verdict.thoughts}
    assert said == {"as given": (1, pytest.approx(0.75), False), "swapped": (2, pytest.approx(0.25), False)}
    assert all("boxed" not in prefix for prefix in listener.prefixes), "the listener does not read the answer"
    assert {thought.text for thought in verdict.thoughts} == {"Image 2 is blurred."}
    strict = Judge(Speaker(f"Image 2 is blurred.\n{end}")).compare("a fox", RED, BLUE)
    assert strict.malformed == 2 and {thought.answer for thought in strict.thoughts} == {None}


def test_a_lenient_judge_votes_by_what_it_reads():
    assert Judge(Speaker("a fox.\n**1**")).compare("a fox", RED, BLUE).malformed == 2
    lenient = Judge(Speaker("a fox.\n**1**"), lenient=True).compare("a fox", RED, BLUE)
    assert lenient.malformed == 0 and {thought.answer for thought in lenient.thoughts} == {1, 2}
    assert {thought.text for thought in lenient.thoughts} == {"a fox."}


def test_the_reasoner_is_read_at_its_own_text():
    own = "<think>\na fox\n</think>\n<answer> "
    reasoner, hears = Speaker(f"{own}1</answer>"), Speaker(GOOD)
    Judge(reasoner, Listener(hears, ChatFormat())).compare("a fox", RED, BLUE)
    assert set(reasoner.prefixes) == {own}
    assert set(hears.prefixes) == {"<think>a fox</think><answer>"}
    hostile = Speaker("<think>\na <|im_end|> fox</think><answer>1</answer>")
    Judge(hostile).compare("a fox", RED, BLUE)
    assert set(hostile.prefixes) == {"<think>a < |im_end|> fox</think><answer>"}, "written anew, and harmless"


@pytest.mark.parametrize(
    "said",
    [
        "A fox. Answer: 1",
        'A fox. {"preferred": "2',
        "A fox. **1**",
        "A fox.\n1",
        "A fox. \\boxed{Image 1}",
        "A fox. Image 1 is better",
        "<think>A fox. So image 1 is better.</think>1",
    ],
)
def test_a_verdict_in_a_malformed_thought_does_not_reach_the_listener(said):
    trace = parse(said, ChatFormat())
    assert trace.answer is None
    assert trace.for_listener().strip(' {"') == "A fox."
    hears = Speaker(GOOD)
    Judge(Speaker(said), Listener(hears, ChatFormat())).compare("a fox", RED, BLUE)
    assert not any(re.search("[12]", prefix) for prefix in hears.prefixes)


@pytest.mark.parametrize("labels", [("C", "D"), ("left", "right"), ("\u7532", "\u4e59"), ("1", "2")])
@pytest.mark.parametrize(
    "said", ["A fox. Answer: {}", "A fox. **{}**", "A fox.\n{}", 'A fox. {{"preferred": "{}', "A fox. I go with {}."]
)
def test_nor_does_one_in_the_formats_own_labels(labels, said):
    form = ChatFormat(labels=labels)
    for label in labels:
        trace = parse(said.format(label), form)
        assert trace.answer is None and trace.for_listener().strip(' {"') == "A fox."
    written = f"<think>A fox. I go with {labels[0]}.</think><answer>{labels[0]}</answer>"
    assert parse(written, form).for_listener("verdict") == "A fox."
    other = parse("A fox, on the right of Door C.\nleft ear up", form)
    assert other.for_listener() == "A fox, on the right of Door C.\nleft ear up", "words that are labels may stay"


# ---------------------------------------------------------------- tags that are special tokens

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@pytest.mark.parametrize("added", [{"special": TAGS}, {"added": TAGS}, {}])
def test_tags_survive_decoding_whatever_tokens_they_are(added):
    tokenizer = build_tokenizer(**added)
    turn = "<|im_start|>assistant\n<think>a fox</think><answer>1</answer><|im_end|><|endoftext|>"
    encoded = tokenizer.encode(turn, add_special_tokens=False)
    expected = ["assistant\n<think>a fox</think><answer>1</answer>"] * 2
    assert decoded(tokenizer, [encoded] * 2) == expected
    assert decoded(tokenizer, torch.tensor([encoded] * 2)) == expected


def test_what_has_no_tags_of_its_own_is_decoded_as_ever(random_judge):
    tokenizer = load_processor(random_judge).tokenizer
    encoded = tokenizer.encode("<|im_start|>user dragon <think>two red circles</think><|im_end|><|endoftext|>")
    assert decoded(tokenizer, [encoded]) == [tokenizer.decode(encoded, skip_special_tokens=True)]


def test_a_model_whose_tags_are_special_is_well_formed(monkeypatch):
    tokenizer = build_tokenizer(special=TAGS)
    said = tokenizer.encode("<think>a fox</think><answer>1</answer><|im_end|>", add_special_tokens=False)
    vlm = build_vlm(tokenizer)
    monkeypatch.setattr(vlm, "_sampler", lambda *_: lambda places, options: torch.tensor([said] * len(places)))
    chat = ChatFormat(question=QUESTION).chat("a fox", RED, BLUE, vlm.reserved)
    (text,) = vlm.generate([chat], seeds=[0], max_new_tokens=40, temperature=0.0)
    assert parse(text, ChatFormat()) == Trace("a fox", 1)


def test_training_reads_tags_that_are_special_tokens(random_judge, tiny_pairs, grpo_config, tmp_path):
    folder = tmp_path / "special"
    shutil.copytree(random_judge, folder)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        saved = json.loads(path.read_text(encoding="utf-8"))
        tokens = saved.get("added_tokens") or saved.get("added_tokens_decoder", {}).values()
        for token in tokens:
            token["special"] = True
        path.write_text(json.dumps(saved), encoding="utf-8")
    trainer = ListenerGRPOTrainer(folder, grpo_config(), tiny_pairs)
    processor: Any = trainer.processing_class
    tokenizer = processor.tokenizer
    encoded = tokenizer.encode("<think>two</think><answer>1</answer><|im_end|>")
    assert "<think>" not in tokenizer.decode(encoded, skip_special_tokens=True), "the tags are special"
    with trainer._tags_kept():
        (said,) = processor.batch_decode([encoded], skip_special_tokens=True)
    assert parse(said, ChatFormat()) == Trace("two", 1)
    assert "batch_decode" not in vars(processor)
