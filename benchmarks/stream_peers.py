"""What else runs these weights: diffusers' own Wan and its causal AnyFlow-FAR, on the same device in the same run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from stream_measures import median, wait

from millstream.models.transformer import CausalTransformer3DModel
from millstream.streaming.graphs import CudaReplay

STEPS = 4


def one_pass(model: CausalTransformer3DModel, size: tuple[int, int], count: int, compiled: bool) -> dict[str, float]:
    """Milliseconds of one pass over 3 latent frames without context: ours, and diffusers' with the same weights."""
    config, device, dtype = model.config, model.device, model.proj_out.weight.dtype
    theirs = peer_of(model)
    latents = torch.randn(1, 16, 3, size[0] // 8, size[1] // 8, device=device, dtype=dtype)
    timestep = torch.full((1,), 500.0, device=device)
    text = torch.randn(1, 512, config["text_dim"], device=device, dtype=dtype)
    keys = model.embed_text(text)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: model(latents, timestep, text_keys=keys, return_dict=False),
        "diffusers": lambda: theirs(latents, timestep, text, return_dict=False),
    }
    report = {name: repeated(call, device, count) for name, call in calls.items()}
    if device.type == "cuda":
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        replay = CudaReplay(
            lambda x, t: model(x, t, text_keys=keys, return_dict=False)[0], [latents, timestep], device, pool, stream
        )
        report["ours, as a CUDA graph"] = repeated(lambda: replay(latents, timestep), device, count)
    if compiled:
        theirs.compile_repeated_blocks(fullgraph=True)
        report["diffusers, compiled"] = repeated(calls["diffusers"], device, count)
    return report


def repeated(call: Callable[[], object], device: torch.device, count: int) -> float:
    for _ in range(2):
        call()
    return median(call, device, count)


def peer_of(model: CausalTransformer3DModel) -> WanTransformer3DModel:
    """diffusers' class around the same tensors."""
    config = model.config
    names = inspect.signature(WanTransformer3DModel).parameters
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**{name: config[name] for name in names if name in config})
    theirs.load_state_dict(model.state_dict(), assign=True)
    rope = WanRotaryPosEmbed(config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])
    theirs.rope = rope.to(model.device)  # a table, which no checkpoint holds
    return theirs.eval()


def whole_clip(
    model: CausalTransformer3DModel, vae: AutoencoderKLWan, size: tuple[int, int], frames: int
) -> dict[str, Any]:
    """`WanPipeline`: all frames at once, bidirectional, in 4 steps, decoded afterwards."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline(
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=peer_of(model),
    )
    return clip(pipe, model, size, frames, {"guidance_scale": 1.0})


def chunked_clip(
    shape: dict[str, Any], vae: AutoencoderKLWan, size: tuple[int, int], frames: int, make: Callable[..., Any]
) -> dict[str, Any]:
    """`AnyFlowFARPipeline`: chunk by chunk with keys and values kept, the past in coarser tokens; random weights."""
    from diffusers import FlowMapEulerDiscreteScheduler
    from diffusers.models.transformers.transformer_anyflow_far import AnyFlowFARTransformer3DModel
    from diffusers.pipelines.anyflow.pipeline_anyflow_far import AnyFlowFARPipeline

    model = make(AnyFlowFARTransformer3DModel, shape)
    pipe = AnyFlowFARPipeline(
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        vae=vae,
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=model,
    )
    latents = (frames - 1) // 4 + 1
    partition = [1] + [3] * ((latents - 1) // 3) + ([(latents - 1) % 3] if (latents - 1) % 3 else [])
    return clip(pipe, model, size, frames, {"guidance_scale": 1.0, "chunk_partition": partition})


@torch.no_grad()
def clip(pipe: Any, model: Any, size: tuple[int, int], frames: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Frames per second of a second call, with what it takes until the first picture: all of it."""
    pipe.set_progress_bar_config(disable=True)
    dtype = model.proj_out.weight.dtype
    text = torch.randn(1, 512, model.config["text_dim"], device=model.device, dtype=dtype) * 0.1
    taken = []
    for _ in range(2):
        wait(model.device)
        start = time.perf_counter()
        pipe(
            prompt_embeds=text,
            height=size[0],
            width=size[1],
            num_frames=frames,
            num_inference_steps=STEPS,
            output_type="np",
            **settings,
        )
        wait(model.device)
        taken.append(time.perf_counter() - start)
    return {"frames_per_second": frames / taken[-1], "first_frame": 1e3 * taken[-1], "first_call": 1e3 * taken[0]}


def decoders(pipes: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of each pipeline's decoder alone, per chunk of 3 latent frames, and of diffusers' on the same."""
    report = {}
    for name, pipe in pipes.items():
        channels, height, width = pipe.latent_size
        latents = torch.randn(1, channels, 3, height, width, device=device)
        state, whole = pipe.codec.begin(*pipe.size), latents.to(pipe.vae.dtype)
        with pipe._fastest():
            for _ in range(2):
                pipe.codec.decode(latents, state)
            report[name] = median(lambda: pipe.codec.decode(latents, state), device, 5)  # noqa: B023
            if name == "full":
                call = lambda: pipe.vae.decode(whole)  # noqa: B023, E731
                report["diffusers, 3 frames from the first on"] = repeated(call, device, 3)
    return report


def encoder(pipe: Any, device: torch.device) -> dict[str, float]:
    """Milliseconds of the encoder alone, per chunk of 12 pictures."""
    state = pipe._encoder.begin(*pipe.size)
    pictures = torch.rand(1, 12, 3, *pipe.size, device=device)
    pipe._encoder.encode(pictures[:, :1], state)
    return {"12 pictures": repeated(lambda: pipe._encoder.encode(pictures, state), device, 5)}
