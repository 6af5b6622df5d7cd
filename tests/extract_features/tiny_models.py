"""Real models of each family, of a few thousand random weights, saved as diffusers pipeline directories."""

import json

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def save(path, seed=0, **parts):
    """Build each part with seeded weights, write the directory, and return its path."""
    index = {"_class_name": "Pipeline", "_diffusers_version": "0.42.1", **parts.pop("extra", {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, build in parts.items():
            part = build()
            part.save_pretrained(path / name)
            library = "transformers" if type(part).__module__.startswith("transformers") else "diffusers"
            index[name] = [library, type(part).__name__]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def vae(channels=4, **config):
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        **config,
    )  # fmt: skip


def clip_tokenizer(length=48):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=length)


def clip_text(width=16, projection=None, length=48):
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=projection or width, bos_token_id=512, eos_token_id=513,
        pad_token_id=513,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def clip_vision(projection=16):
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=projection,
        )  # fmt: skip
    )


def t5_tokenizer():
    return T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
        + [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"],
        extra_ids=0,
    )


def t5_text(width=16):
    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def unet(channels=(16, 16, 24, 32), **config):
    down = ("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=channels, down_block_types=down, layers_per_block=1, norm_num_groups=8,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1), attention_head_dim=8,
        **{"cross_attention_dim": 16, **config},
    )  # fmt: skip


def sd(path, scheduler=PNDMScheduler, prediction_type="epsilon", **unet_config):
    return save(
        path,
        unet=lambda: unet(**unet_config),
        vae=vae,
        text_encoder=clip_text,
        tokenizer=clip_tokenizer,
        scheduler=lambda: scheduler(**SD_BETAS, prediction_type=prediction_type, steps_offset=1),
    )


def sdxl(path):
    config = dict(
        channels=(16, 24, 32), cross_attention_dim=16 + 24, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20, transformer_layers_per_block=(1, 2, 2),
    )  # fmt: skip
    return save(
        path,
        unet=lambda: unet(**config),
        vae=vae,
        text_encoder=clip_text,
        text_encoder_2=lambda: clip_text(24, projection=20),
        tokenizer=clip_tokenizer,
        tokenizer_2=clip_tokenizer,
        scheduler=lambda: EulerDiscreteScheduler(**SD_BETAS),
    )


def pixart(path, **config):
    return save(
        path,
        transformer=lambda: PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=6,
            cross_attention_dim=24,
            caption_channels=16,
            norm_num_groups=4,
            **{"sample_size": 32, **config},
        ),  # fmt: skip
        vae=vae,
        text_encoder=t5_text,
        tokenizer=t5_tokenizer,
        scheduler=DPMSolverMultistepScheduler,
    )


def dit(path):
    return save(
        path,
        extra={"id2label": {"0": "tench, Tinca tinca", "1": "goldfish", "2": "cock"}},
        transformer=lambda: DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=6, norm_num_groups=4, num_embeds_ada_norm=3
        ),
        vae=vae,
        scheduler=DDIMScheduler,
    )


def sd3(path, t5=True):
    optional = {"text_encoder_3": lambda: t5_text(64), "tokenizer_3": t5_tokenizer} if t5 else {}
    return save(
        path,
        transformer=lambda: SD3Transformer2DModel(
            sample_size=32,
            num_layers=6,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=64,
            caption_projection_dim=24,
            pooled_projection_dim=16 + 20,
            pos_embed_max_size=32,
        ),  # fmt: skip
        vae=lambda: vae(16, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False),
        text_encoder=lambda: clip_text(16, projection=16),
        text_encoder_2=lambda: clip_text(24, projection=20),
        tokenizer=clip_tokenizer,
        tokenizer_2=clip_tokenizer,
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        **optional,
    )


def flux(path, guidance=True, **config):
    return save(
        path,
        transformer=lambda: FluxTransformer2DModel(
            **{"in_channels": 64, **config},
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 4, 4),
        ),  # fmt: skip
        vae=lambda: vae(16, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False),
        text_encoder=clip_text,
        text_encoder_2=lambda: t5_text(24),
        tokenizer=clip_tokenizer,
        tokenizer_2=t5_tokenizer,
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def gemma_tokenizer():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    return GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def gemma_text(width=16):
    return Gemma2Model(
        Gemma2Config(
            vocab_size=64, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        )
    )  # fmt: skip


def sana(path, **config):
    return save(
        path,
        transformer=lambda: SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=6,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=8,
            **config,
        ),  # fmt: skip
        vae=lambda: AutoencoderDC(
            latent_channels=8,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            encoder_layers_per_block=(1,) * 4,
            decoder_layers_per_block=(1,) * 4,
            encoder_qkv_multiscales=((),) * 4,
            decoder_qkv_multiscales=((),) * 4,
            scaling_factor=0.41407,
        ),  # fmt: skip
        text_encoder=gemma_text,
        tokenizer=gemma_tokenizer,
        scheduler=lambda: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


FAMILIES = {"sd": sd, "sdxl": sdxl, "pixart": pixart, "dit": dit, "sd3": sd3, "flux": flux, "sana": sana}
