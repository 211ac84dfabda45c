"""Every family of networks, live, against the plain image-to-image call of the same parts with the same noise."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    SanaSprintImg2ImgPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

import millstream as ms
from millstream.kernels import philox_normal
from millstream.pipelines.live_image import LiveImagePipeline

SEED = 11
WORDS = 8


def told(*sizes: tuple[int, ...]) -> list[Tensor]:
    """What a text encoder might say."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) for size in sizes]


def tiny(channels: int) -> AutoencoderTiny:
    torch.manual_seed(1)
    sides, blocks = (8, 8, 8, 8), (1, 1, 1, 1)
    shift = 0.1 if channels == 16 else 0.0  # newer autoencoders' latents are not centred
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=sides,
        decoder_block_out_channels=sides,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        shift_factor=shift,
    ).eval()


def small_unet(**given: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**settings, **given}).eval()


def nothing(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


def sdxl() -> Any:
    torch.manual_seed(0)
    unet = small_unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    pipe: Any = StableDiffusionXLImg2ImgPipeline(
        vae=tiny(4),  # pyright: ignore[reportArgumentType]
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
        **nothing("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    )
    text, silence, pooled, pooled_silence = told((1, WORDS, 16), (1, WORDS, 16), (1, 16), (1, 16))
    pipe.encode_prompt = lambda *args, **kwargs: (text, silence, pooled, pooled_silence)
    return pipe


def lcm() -> Any:
    torch.manual_seed(0)
    unet = small_unet(time_cond_proj_dim=8)
    pipe: Any = LatentConsistencyModelImg2ImgPipeline(
        vae=tiny(4),  # pyright: ignore[reportArgumentType]
        unet=unet,
        scheduler=LCMScheduler(beta_schedule="scaled_linear"),
        requires_safety_checker=False,
        **nothing("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
    )
    text, silence = told((1, WORDS, 16), (1, WORDS, 16))
    pipe.encode_prompt = lambda *args, **kwargs: (text, silence)
    return pipe


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    ).eval()
    pipe: Any = StableDiffusion3Img2ImgPipeline(
        vae=tiny(16),  # pyright: ignore[reportArgumentType]
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **nothing("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    )
    text, silence, pooled, pooled_silence = told((1, WORDS, 16), (1, WORDS, 16), (1, 16), (1, 16))
    pipe.encode_prompt = lambda *args, **kwargs: (text, silence, pooled, pooled_silence)
    return pipe


def flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    pipe: Any = FluxImg2ImgPipeline(
        vae=tiny(16),  # pyright: ignore[reportArgumentType]
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        **nothing("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    )
    text, pooled = told((1, WORDS, 16), (1, 16))
    pipe.encode_prompt = lambda *args, **kwargs: (text, pooled, torch.zeros(WORDS, 3))
    return pipe


def sana() -> Any:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=2,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
        timestep_scale=1000.0,
    ).eval()
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 4, 4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4, 4, 4),
        encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (), (), ()),
        decoder_qkv_multiscales=((), (), (), (), (), ()),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    ).eval()
    pipe: Any = SanaSprintImg2ImgPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5),  # pyright: ignore[reportArgumentType]
        **nothing("text_encoder", "tokenizer"),
    )
    (text,) = told((1, WORDS, 16))
    pipe.encode_prompt = lambda *args, **kwargs: (text, torch.ones(1, WORDS))
    return pipe


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # how it is made, what the live control says, what the plain call is told beside it
    "sdxl": (sdxl, {"strength": 0.5, "num_inference_steps": 4}, {"guidance_scale": 1.0}),
    "sdxl, guided": (
        sdxl,
        {"strength": 0.75, "num_inference_steps": 4, "guidance": "full", "guidance_scale": 3.0},
        {"guidance_scale": 3.0},
    ),
    "lcm": (lcm, {"strength": 0.6, "num_inference_steps": 4, "guidance_scale": 5.0}, {"guidance_scale": 5.0}),
    "sd3": (sd3, {"strength": 0.6, "num_inference_steps": 4}, {"guidance_scale": 1.0}),
    "sd3, guided": (
        sd3,
        {"strength": 1.0, "num_inference_steps": 2, "guidance": "full", "guidance_scale": 3.0},
        {"guidance_scale": 3.0},
    ),
    "flux": (flux, {"strength": 0.6, "num_inference_steps": 4, "guidance_scale": 2.0}, {"guidance_scale": 2.0}),
    "sana": (
        sana,
        {"strength": 1.0, "num_inference_steps": 2, "guidance_scale": 3.0},
        {"guidance_scale": 3.0, "use_resolution_binning": False},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_frame_equals_the_plain_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, control, beside = CASES[name]
    pipe = make()
    live = LiveImagePipeline.from_diffusers(pipe, size=(64, 64))
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2))
    drawn = last(live, [picture] * 2, control)

    draws = iter(range(99))

    def noise(shape: Any, **kwargs: Any) -> Tensor:
        return philox_normal(torch.tensor([SEED]), torch.tensor([1]), next(draws), tuple(shape)[1:])

    for module in [module for name, module in sys.modules.items() if name.startswith("diffusers.")]:
        if "randn_tensor" in vars(module):
            monkeypatch.setattr(module, "randn_tensor", noise)
    given = {"strength": control["strength"], "num_inference_steps": control["num_inference_steps"], **beside}
    if "sdxl" not in name and "lcm" not in name:
        given |= {"height": 64, "width": 64}
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("a fox", image=picture[None], output_type="pt", **given).images
    assert plain.std() > 1e-3
    torch.testing.assert_close(drawn, plain, rtol=0, atol=3e-5)


def last(live: LiveImagePipeline, pictures: list[Tensor], control: dict[str, Any]) -> Tensor:
    """The last picture of a stream of a known seed."""
    chunks = []
    with live.stream("a fox", **control) as session:
        for picture in pictures:
            state = session._begun()
            state.seed = SEED
            chunks += session.step(ms.Frame(picture, 0.0))
        chunks += session.flush()
    assert len(chunks) == len(pictures)
    return chunks[-1].data


@pytest.mark.parametrize("make", [sdxl, sd3, flux, sana])
def test_a_stream_batch_equals_separate_calls(make: Any) -> None:
    live = LiveImagePipeline.from_diffusers(make(), size=(64, 64))
    pictures = list(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)))
    control = {"strength": 1.0, "num_inference_steps": 2}
    both = [last(live, pictures, {**control, "stream_batch": batch}) for batch in (True, False)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("make", "scale"), [(flux, 3.5), (sana, 4.5), (lcm, 8.5)])
def test_a_model_that_is_told_its_guidance_takes_no_second_pass(make: Any, scale: float) -> None:
    live = LiveImagePipeline.from_diffusers(make(), size=(64, 64))
    assert live.scale_of(ms.ImageControl()) == scale
    picture = torch.rand(3, 64, 64)
    control = {"strength": 1.0, "num_inference_steps": 2}
    weak, strong = (last(live, [picture], {**control, "guidance_scale": each}) for each in (1.0, 50.0))
    assert (weak - strong).abs().max() > 1e-5
    with pytest.raises(ValueError, match=r'is told its guidance scale.*take guidance="none"'):
        live.stream("a fox", guidance="self", **control)


def test_sana_without_its_scheduler_is_another_model() -> None:
    pipe = sana()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="runs SANA-Sprint, whose scheduler is SCM"):
        LiveImagePipeline.from_diffusers(pipe)
