"""The tiny judge's architecture: a real Qwen2.5-VL of one million parameters and a tokenizer of whole words."""

from __future__ import annotations

from listener_reward.errors import missing

if fault := missing("judge", "the tiny judge"):
    raise fault

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from listener_reward.models.older_transformers import Qwen2VLImageProcessorPil
from listener_reward.models.processing import ImageOnlyQwen2_5_VLProcessor
from listener_reward.tiny.world import COLORS, COUNTS, QUALITIES, SHAPES

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WORDS = (
    "<unk> user assistant system 1 2 : . , ? image prompt better which is so a an the of with and on "
    "picture drawing photo right wrong"
).split()

EDIT_WORDS = (
    "source goal plain make paint turn change add remove repair restore put to into it them around frame"
).split()
"""What instructions and thoughts about edits need beside these. Their tokens come after all others, so that a model
that was made before them keeps its own (`pretrain.with_new_words`)."""

RELATION_WORDS = ("left", "above", "below")
"""And what prompts and thoughts about two groups need, of the models that know those alone."""

PATCH, MERGE = 8, 2
MIN_PIXELS, MAX_PIXELS = 48 * 48, 64 * 48 - 1
"""Areas between which an image is resized. A square becomes 48 by 48 pixels, nine visual tokens; the slack above lets
an image that is a little off square keep its nine."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif block['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ block['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's chat template without its default system message, whose words this tokenizer does not have."""

QUESTION = "image 1 {first} image 2 {second} prompt : {prompt} . which is better ?"
"""The tiny judge's question; a large model's is in `prompts/`."""

EDIT_QUESTION = "source {source} image 1 {first} image 2 {second} prompt : {prompt} . which is better ?"
"""And its question about an edit."""


def build_tokenizer(*, edits: bool = True, relations: bool = False) -> PreTrainedTokenizerFast:
    """Lower-cased whole words; a word of any other world becomes `<unk>`.

    Without `edits` it has only the words of pairs, and with `relations` those of two groups too; words that several of
    these tokenizers have are of the same number in all.
    """
    more = (*(EDIT_WORDS if edits else ()), *(RELATION_WORDS if relations else ()))
    words = dict.fromkeys([*WORDS, *COLORS, *COUNTS, *QUALITIES, *SHAPES, *(shape + "s" for shape in SHAPES)])
    vocabulary = {word: index for index, word in enumerate([*words, *SPECIAL, *TAGS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=4096,
    )


def build_processor(*, edits: bool = True, relations: bool = False) -> ImageOnlyQwen2_5_VLProcessor:
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
    )
    return ImageOnlyQwen2_5_VLProcessor(
        images, build_tokenizer(edits=edits, relations=relations), chat_template=CHAT_TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised model in float32; seed torch before the call."""
    token = tokenizer.get_vocab()
    hidden, vision = 128, 96
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": vision,
            "intermediate_size": 3 * vision,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [0, 1],
            "in_channels": 3,
        },
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
