"""Live pictures by a network of SD-Turbo's size, one step at 512 x 512, against diffusers' own parts in the same run.

    python benchmarks/live_image.py [--out live_image.json] [--quick] [--seconds 500] [--only "NAME;NAME"]

Prints one JSON object. Random weights in float16, `AutoencoderTiny`, one prompt. Every frame starts as uint8 pixels on
the host and ends as pixels on the host. Variants:

- `diffusers, compiled parts`: `unet`, `vae.encoder` and `vae.decoder` under torch.compile(mode="max-autotune"), the
  rest as the img2img call does it.
- `diffusers, compiled whole`: the strongest that a careful user writes: one compiled function from bytes to bytes
  around the same parts, channels-last, pinned memory.
- `millstream ...`: `LiveImagePipeline` as it is, compiled without tuning or with it, overlapped or one
  frame after the other.

`frames_per_second` counts pictures on the host; `seconds_to_picture_p50` is how long one frame's picture takes from the
call that gives the frame to the return of the call that has its picture: two calls where they overlap. `--quick` leaves
out all that is tuned; diffusers is then compiled whole in mode "reduce-overhead". Tuning tries about
1,300 kernels for 62 shapes, which takes 20 minutes where each compiles in a second; TORCHINDUCTOR_CACHE_DIR keeps what
was found for the next run.
Before anything is timed the picture of every variant is compared with the eager one; `error` is the mean difference in
steps of a byte, `spread` the deviation of the picture itself. A variant that is off by more than a twentieth of the
spread is not timed. What is measured is written to `--out` after every variant, so a run may be cut off.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from torch import Tensor
from variants import describe, measure_all, publish

from millstream import Frame, ImageControl, LiveImagePipeline
from millstream.kernels import philox_normal

SEED, STRENGTH, STEPS = 7, 0.5, 2  # half of two steps is one, from timestep 499
WIDE = 1024  # of the text
TUNED = "max-autotune-no-cudagraphs"
TURBO = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": WIDE,
    "use_linear_projection": True,
}
SMALL = {**TURBO, "sample_size": 8, "block_out_channels": (32, 32, 64, 64), "attention_head_dim": (1, 1, 2, 2)}

Draw = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--quick", action="store_true", help="compile without tuning")
    parser.add_argument("--seconds", type=float, default=500, help="start no variant after this time")
    parser.add_argument("--only", help="variants whose name is one of these, separated by semicolons")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    report: dict[str, Any] = {"command": " ".join(sys.argv), "device": describe(device)}

    def keep(variants: dict[str, dict[str, Any]], *, printed: bool = False) -> None:
        publish({**report, "variants": variants, "goal": goal(variants)}, arguments.out, printed=printed)

    variants = plan(device, quick=arguments.quick)
    if arguments.only:
        if strange := set(arguments.only.split(";")) - variants.keys():
            parser.error(f"there is no variant {', '.join(strange)}; there are {'; '.join(variants)}")
        variants = {name: variants[name] for name in arguments.only.split(";")}
    variants = measure_all(variants, arguments.seconds, after=forget, keep=keep)
    keep(variants, printed=True)


def plan(device: torch.device, *, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, the most important first."""
    if device.type != "cuda":
        variants = {
            "millstream, overlapped": (partial(millstream, overlap=True, compiled=False), True),
            "diffusers, eager": (partial(whole, mode=None), False),
        }
    else:
        tuned = {
            "diffusers, compiled whole": (partial(whole, mode="max-autotune"), False),
            "millstream, tuned, overlapped": (partial(millstream, overlap=True, compiled=TUNED), True),
            "millstream, tuned, in order": (partial(millstream, overlap=False, compiled=TUNED), False),
            "diffusers, compiled parts": (partial(in_parts, mode="max-autotune"), False),
        }
        variants = {
            "millstream, overlapped": (partial(millstream, overlap=True, compiled=False), True),
            "millstream, compiled, overlapped": (partial(millstream, overlap=True, compiled=True), True),
            "millstream, compiled, in order": (partial(millstream, overlap=False, compiled=True), False),
            "diffusers, compiled whole, not tuned": (partial(whole, mode="reduce-overhead"), False),
            **({} if quick else tuned),
        }
    return {name: partial(measure, device, make, late=late) for name, (make, late) in variants.items()}


@torch.no_grad()
def measure(device: torch.device, make: Callable[[Any], Draw], *, late: bool) -> dict[str, Any]:
    """Frames in a row for a few seconds; `late` if a picture comes one call after its frame."""
    pipe = make_pipe(device)
    side = 8 * pipe.unet.config.sample_size
    generator = torch.Generator().manual_seed(1)
    # A camera's frames are not the same memory twice.
    frames = [torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8) for _ in range(8)]
    wanted = whole(pipe, mode=None)(frames[1])
    draw = make(pipe)
    start = time.perf_counter()
    for number in range(16):  # compiles, tunes, records
        draw(frames[0])
        print(f"#   warm-up {number + 1} of 16: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    ready = time.perf_counter() - start
    draw(frames[1])
    error = float((draw(frames[1]) - wanted).abs().mean() * 255)  # an overlapped frame comes one call later
    spread = float(wanted.std() * 255)
    if not error <= max(0.5, spread / 20):
        raise ArithmeticError(f"the picture is off by {error:.2f} steps of a byte, where it varies by {spread:.1f}")
    times = list(timed(draw, frames, 3 if device.type == "cuda" else 1))
    return {
        "frames_per_second": round(len(times) / sum(times), 1),
        "seconds_p50": statistics.median(times),
        "seconds_p99": statistics.quantiles(times, n=100)[-1],
        "seconds_to_picture_p50": statistics.median(map(sum, pairwise(times)) if late else times),
        "frames": len(times),
        "warmup_seconds": round(ready, 1),
        "error": round(error, 3),
        "spread": round(spread, 1),
    }


def timed(draw: Draw, frames: list[Tensor], seconds: float) -> Iterator[float]:
    """Seconds per call; every call ends with a picture on the host."""
    begin, number = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or number < 5:
        start = time.perf_counter()
        draw(frames[number % len(frames)])
        yield time.perf_counter() - start
        number += 1


def make_pipe(device: torch.device) -> Any:
    """The parts, with the same random weights at every call, and a prompt that is a constant."""
    torch.manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        unet: Any = UNet2DConditionModel(**(TURBO if device.type == "cuda" else SMALL)).eval()
        vae: Any = AutoencoderTiny().eval()
        text = torch.randn(1, 77, WIDE, dtype=dtype)
    pipe: Any = StableDiffusionImg2ImgPipeline(
        vae=vae.to(dtype),
        unet=unet.to(dtype),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipe.encode_prompt = lambda *args, **kwargs: (text, None)
    return pipe


def constants(pipe: Any) -> tuple[float, float, Tensor, Tensor]:
    """a, b with x = a x0 + b eps; the timestep; the noise of the first frame."""
    pipe.scheduler.set_timesteps(STEPS)
    sigma, timestep = float(pipe.scheduler.sigmas[1]), pipe.scheduler.timesteps[1:2].to(pipe.unet.device)
    side = pipe.unet.config.sample_size
    noise = philox_normal(torch.tensor([SEED]), torch.tensor([0]), 0, (4, side, side)).to(pipe.unet.device)
    return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5, timestep, noise


def whole(pipe: Any, *, mode: str | None) -> Draw:
    """One function from bytes on the device to bytes on the device, around diffusers' parts."""
    a, b, timestep, noise = constants(pipe)
    # The device is asked for once: diffusers finds it by walking through all modules.
    text, dtype, device = pipe.encode_prompt()[0], pipe.unet.dtype, pipe.unet.device
    if mode is not None:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)

    def drawn(picture: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        clean = pipe.vae.encode((picture[None].float() / 127.5 - 1).to(dtype)).latents.float()
        x = a * clean + b * noise
        eps = pipe.unet(x.to(dtype), timestep, text, return_dict=False)[0].float()
        out = pipe.vae.decode(((x - b * eps) / a).to(dtype), return_dict=False)[0].float()
        return ((out / 2 + 0.5).clamp(0, 1) * 255 + 0.5).to(torch.uint8)

    if mode is not None:
        drawn = torch.compile(drawn, mode=mode)
    pinned = device.type == "cuda"

    def draw(frame: Tensor) -> Tensor:
        picture = (frame.pin_memory() if pinned else frame).to(device, non_blocking=True)
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        return drawn(picture, noise, text).cpu()

    return lambda frame: draw(frame).float().div_(255)


def in_parts(pipe: Any, *, mode: str) -> Draw:
    """Each part compiled, the rest as the img2img call has it."""
    a, b, timestep, noise = constants(pipe)
    text, dtype, device = pipe.encode_prompt()[0], pipe.unet.dtype, pipe.unet.device
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.unet.compile(mode=mode)
    pipe.vae.encoder.compile(mode=mode)
    pipe.vae.decoder.compile(mode=mode)

    def draw(frame: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        picture = (frame[None].float() / 127.5 - 1).to(device, dtype)
        x = a * pipe.vae.encode(picture).latents.float() + b * noise
        eps = pipe.unet(x.to(dtype), timestep, text, return_dict=False)[0].float()
        out = pipe.vae.decode(((x - b * eps) / a).to(dtype), return_dict=False)[0]
        return (out.float() / 2 + 0.5).clamp(0, 1).cpu()

    return draw


def millstream(pipe: Any, *, overlap: bool, compiled: bool | str) -> Draw:
    live = LiveImagePipeline.from_diffusers(pipe, num_inference_steps=STEPS, overlap=overlap, compile=compiled)
    # The noise of frame 0 for every frame, as the other variants have it: what is compared is the same picture.
    session = live.stream("a fox", strength=STRENGTH)
    session.pipeline.begin = partial(fixed, live)  # type: ignore[method-assign]

    def draw(frame: Tensor) -> Tensor:
        if session.state is not None:
            session.state.frame = 0
        chunks = session.step(Frame(frame, 0.0))
        return chunks[-1].data.cpu() if chunks else torch.zeros(1, *frame.shape)

    return draw


def fixed(live: LiveImagePipeline, control: ImageControl, *, generator: Any = None) -> Any:
    """A stream of the seed that all variants share."""
    state = LiveImagePipeline.begin(live, control, generator=generator)
    state.seed = SEED
    return state


def forget() -> None:
    """Compiled code and graphs of the last variant."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def goal(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """140 frames/s, and 1.1 times diffusers under max-autotune."""
    rates = {name: entry.get("frames_per_second") or 0.0 for name, entry in variants.items()}
    ours = max((rate for name, rate in rates.items() if name.startswith("millstream")), default=0.0)
    against = {name: round(ours / rate, 2) for name, rate in rates.items() if name.startswith("diffusers") and rate}
    return {"wanted": {"frames_per_second": 140, "times": 1.1}, "frames_per_second": ours, "times": against}


if __name__ == "__main__":
    main()
