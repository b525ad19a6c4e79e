"""Diffusers pipelines of eleven families with tiny random weights, built in the process: nothing is downloaded.

Each builder gives a pipeline in float32 with the scheduler that its released checkpoints have. `FAMILIES` adds the
options of a call, without guidance and with it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers as released
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from listener_reward.models.older_transformers import Qwen2VLImageProcessorPil
from listener_reward.models.processing import ImageOnlyQwen2_5_VLProcessor

diffusers: Any = released
"""As `Any`: diffusers' annotations refuse what its own checkpoints hold, such as two sizes of block."""

WORDS = "a an the red green blue yellow circle square triangle left right of above on and photo cat dog moving".split()


def tokenizer(max_length: int = 16, special: Sequence[str] = ()) -> Any:
    words_of_it = "<pad> <bos> <eos> <unk>".split() + WORDS + [*special]
    vocabulary = {word: number for number, word in enumerate(words_of_it)}
    words: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_length,
        additional_special_tokens=[*special],
    )


def clip(cls: Any = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        hidden_act="gelu",
    )
    return cls(config).eval()


def t5() -> T5EncoderModel:
    make: Any = T5Config
    config = make(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval()


def vae(**options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **options,
    ).eval()


FLOW_VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "scaling_factor": 1.5}
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd15(prediction_type: str = "epsilon") -> Any:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, prediction_type=prediction_type, **SCALED_LINEAR)
    return _of_first_kind(diffusers.StableDiffusionPipeline, scheduler)


def instruct_pix2pix() -> Any:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SCALED_LINEAR)
    return _of_first_kind(diffusers.StableDiffusionInstructPix2PixPipeline, scheduler, seen=8)


def _of_first_kind(cls: Any, scheduler: Any, seen: int = 4) -> Any:
    """A pipeline of Stable Diffusion 1.5's parts. Its denoiser sees `seen` channels: the noise, and what stands beside
    it."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=seen,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return cls(
        unet=unet.eval(),
        scheduler=scheduler,
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=8 * 6 + 32,
        cross_attention_dim=64,
        norm_num_groups=4,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SCALED_LINEAR),
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(**FLOW_VAE),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(),
    )


def flux(kind: str = "FluxPipeline") -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return getattr(diffusers, kind)(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(**FLOW_VAE),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


def flux2() -> Any:
    """Flux 2 Klein, which draws with images or without."""
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    reader = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    words = tokenizer(512)
    words.chat_template = "{{ messages[0]['content'] }}"
    pipeline = diffusers.Flux2KleinPipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder.eval(),
        text_encoder=Qwen3ForCausalLM(reader).eval(),
        tokenizer=words,
    )
    pipeline.image_processor.check_image_input = lambda image: image  # it takes no image below 64 x 64
    return pipeline


VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_image(kind: str = "QwenImagePipeline") -> Any:
    words, looks = tokenizer(1024, VISION_TOKENS), kind != "QwenImagePipeline"
    starts, ends, image, video = words.convert_tokens_to_ids([*VISION_TOKENS])
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False] if looks else [False, True],  # its length says how much smaller latents are
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    reader = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=starts,
        vision_end_token_id=ends,
        image_token_id=image,
        video_token_id=video,
    )
    pipeline = getattr(diffusers, kind)(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02),
        vae=autoencoder.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(reader).eval(),
        tokenizer=words,
        **({"processor": _reader_of(words)} if looks else {}),
    )
    before = "".join((VISION_TOKENS[0], VISION_TOKENS[2], VISION_TOKENS[1])) if kind == "QwenImageEditPipeline" else ""
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = before + "{}", 0
    if looks:
        _shrink(kind)
    return pipeline


def _reader_of(words: Any) -> Any:
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return ImageOnlyQwen2_5_VLProcessor(Qwen2VLImageProcessorPil(size=size), words)


def _shrink(kind: str) -> None:
    """Has the Qwen editors work on 32 x 32 pixels: their area, 1024 x 1024, is a constant of the module."""
    name = "pipeline_qwenimage_edit_plus" if "Plus" in kind else "pipeline_qwenimage_edit"
    module: Any = importlib.import_module(f"diffusers.pipelines.qwenimage.{name}")
    calculate = inspect.unwrap(module.calculate_dimensions)

    @functools.wraps(calculate)
    def small(area: int, ratio: float) -> Any:
        return calculate(32 * 32, ratio)

    module.calculate_dimensions = small


def pixart_sigma() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,  # noise and a learned variance, which the pipeline drops
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    reader = Gemma2Config(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return diffusers.SanaPipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=autoencoder.eval(),
        text_encoder=Gemma2Model(reader).eval(),
        tokenizer=tokenizer(300),
    )


def wan(boundary: bool = False, image: bool = False) -> Any:
    """With `image`, Wan 2.1's image to video, which looks at the first frame by CLIP too, and Wan 2.2's, which does
    not."""
    looks = image and not boundary

    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36 if image else 16,  # with the first frame's latents and a mask
            out_channels=16,
            image_dim=4 if looks else None,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ).eval()

    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    encoder = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=1,
    )
    if image:
        _without_ftfy()
    eyes = {
        "image_encoder": CLIPVisionModelWithProjection(encoder).eval() if looks else None,
        "image_processor": CLIPImageProcessor(crop_size=32, size=32) if looks else None,
    }
    return (diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline)(
        **(eyes if image else {}),
        transformer=transformer(),
        transformer_2=transformer() if boundary else None,
        boundary_ratio=0.8 if boundary else None,
        vae=autoencoder.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def _without_ftfy() -> None:
    """Wan's image to video repairs its prompts by ftfy, which is of no use to these."""
    module: Any = importlib.import_module("diffusers.pipelines.wan.pipeline_wan_i2v")
    if not hasattr(module, "ftfy"):
        module.ftfy = types.SimpleNamespace(fix_text=lambda text: text)


def ltx(kind: str = "LTXPipeline") -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return getattr(diffusers, kind)(
        transformer=transformer.eval(),
        vae=autoencoder.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def cogvideox(image: bool = False) -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=8 if image else 4,  # with the first frame's latents
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return (diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline)(
        transformer=transformer.eval(),
        vae=autoencoder.eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=1.0,
        ),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    size: dict[str, int]
    """Height, width and frames."""
    guidance: dict[str, Any]
    no_guidance: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    """What every call is given beside."""
    batch: int = 2
    """Prompts in a call."""

    def call(self, guided: bool) -> dict[str, Any]:
        return self.size | self.options | (self.guidance if guided else self.no_guidance)


SMALL = {"height": 16, "width": 16}
SHORT = {"max_sequence_length": 16}
CFG, NO_CFG = {"guidance_scale": 5.0}, {"guidance_scale": 1.0}
TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "green"}

FAMILIES = {
    "sd15": Family(sd15, SMALL, CFG | {"guidance_rescale": 0.7}, NO_CFG),
    "sd15-v": Family(functools.partial(sd15, "v_prediction"), SMALL, CFG, NO_CFG),
    "sdxl": Family(sdxl, SMALL, CFG, NO_CFG),
    "sd3": Family(sd3, SMALL, CFG, NO_CFG, SHORT),
    "flux": Family(flux, SMALL, TRUE_CFG, {"guidance_scale": 3.5}, SHORT),
    "flux2": Family(flux2, SMALL, CFG, NO_CFG, SHORT | {"text_encoder_out_layers": (1,)}),
    "qwen-image": Family(qwen_image, SMALL, TRUE_CFG, {}, SHORT),
    "pixart-sigma": Family(
        pixart_sigma, SMALL, CFG, NO_CFG, SHORT | {"use_resolution_binning": False, "clean_caption": False}
    ),
    "sana": Family(
        sana,
        {"height": 32, "width": 32},
        CFG,
        NO_CFG,
        SHORT | {"use_resolution_binning": False, "clean_caption": False, "complex_human_instruction": None},
    ),
    "wan": Family(wan, SMALL | {"num_frames": 5}, CFG, NO_CFG, SHORT),
    "wan2.2": Family(
        functools.partial(wan, boundary=True), SMALL | {"num_frames": 5}, CFG | {"guidance_scale_2": 3.0}, NO_CFG, SHORT
    ),
    "ltx": Family(ltx, {"height": 32, "width": 32, "num_frames": 9}, CFG, NO_CFG, SHORT),
    "cogvideox": Family(cogvideox, SMALL | {"num_frames": 9}, CFG | {"use_dynamic_cfg": True}, NO_CFG, SHORT),
}
"""The eleven families, with SD 1.5 for v-prediction too and Wan 2.2's two experts."""


EDITORS = {
    "instruct-pix2pix": Family(instruct_pix2pix, {}, CFG | {"image_guidance_scale": 1.5}, NO_CFG),
    "flux-kontext": Family(
        functools.partial(flux, "FluxKontextPipeline"),
        SMALL,
        TRUE_CFG,
        {"guidance_scale": 3.5},
        SHORT | {"max_area": 16 * 16, "_auto_resize": False},
    ),
    "flux2-edit": Family(flux2, SMALL, CFG, NO_CFG, SHORT | {"text_encoder_out_layers": (1,)}),
    "qwen-image-edit": Family(
        functools.partial(qwen_image, "QwenImageEditPipeline"), SMALL, TRUE_CFG, {"true_cfg_scale": 1.0}, SHORT, batch=1
    ),
    "qwen-image-edit-plus": Family(
        functools.partial(qwen_image, "QwenImageEditPlusPipeline"),
        SMALL,
        TRUE_CFG,
        {"true_cfg_scale": 1.0},
        SHORT,
        batch=1,
    ),
    "wan-i2v": Family(functools.partial(wan, image=True), SMALL | {"num_frames": 5}, CFG, NO_CFG, SHORT),
    "wan2.2-i2v": Family(
        functools.partial(wan, boundary=True, image=True),
        SMALL | {"num_frames": 5},
        CFG | {"guidance_scale_2": 3.0},
        NO_CFG,
        SHORT,
    ),
    "ltx-i2v": Family(
        functools.partial(ltx, "LTXImageToVideoPipeline"),
        {"height": 32, "width": 32, "num_frames": 9},
        CFG,
        NO_CFG,
        SHORT,
    ),
    "cogvideox-i2v": Family(functools.partial(cogvideox, image=True), SMALL | {"num_frames": 9}, CFG, NO_CFG, SHORT),
}
"""Pipelines that are given an image, and the options of their calls beside it."""

ALL = FAMILIES | EDITORS


def short_run(name: str, guided: bool = False) -> dict[str, Any]:
    """Fields of a `DDPOConfig` for a family: one epoch of one group of four, in two batches of three steps."""
    return {
        "epochs": 1,
        "num_inference_steps": 3,
        "call": ALL[name].call(guided),
        "window": (0.0, 1.0),
        "prompts_per_epoch": 1,
        "images_per_prompt": 4,
        "batch_size": ALL[name].batch,
        "lora_rank": 2,
        "sample_every": 0,
    }


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The pipeline of a family, silent, with weights that `seed` determines."""
    with _quiet():
        torch.manual_seed(seed)
        pipeline = ALL[name].make().to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _quiet() -> Any:
    """diffusers tells at length of whatever a tiny model lacks."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
