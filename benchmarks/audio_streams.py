"""Codecs and speech as streams: computing time per second of sound, and how far streams are from the whole."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from audio_masked import quiet
from torch import Tensor

from millstream.models.audio_codec import AudioCodec
from millstream.models.frame_tokens import FrameTokenTransformer
from millstream.models.published_codecs import wrap_codec
from millstream.pipelines.sound_frames import FrameStream

CHUNK = 0.08  # seconds that a piece lasts, or one frame where that is longer
SENTENCES = (
    "Hello there, how are you today?",
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "In 1969, 3 astronauts flew to the moon; it took them about 4 days.",
)


def codec_variants(device: torch.device, model: str | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """The house's codec, trained or with random weights."""
    return {"codec: millstream": partial(measure_codec, partial(house_codec, model), device)}


def published_variants(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """Mimi first. On CUDA its decoder is also recorded as one graph per piece."""
    variants: dict[str, Callable[[], dict[str, Any]]] = {}
    for kind in ("mimi", "encodec", "dac"):
        variants[f"published: {kind}"] = partial(measure_codec, partial(published_codec, kind), device)
    if device.type == "cuda":
        variants["published: mimi, decoding as one graph"] = partial(measure_graph, device)
    return variants


def house_codec(folder: str | None) -> AudioCodec:
    if folder is None:
        return AudioCodec()
    return AudioCodec.from_pretrained(Path(folder) / "codec", torch_dtype=torch.float32)


def published_codec(kind: str) -> Any:
    """At the published configuration, random weights, codebooks filled."""
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

    config, model = {
        "mimi": (MimiConfig, MimiModel),
        "encodec": (EncodecConfig, EncodecModel),
        "dac": (DacConfig, DacModel),
    }[kind]
    made = model(config())
    for name, buffer in made.named_buffers():
        if name.endswith(("embed_sum", "embed")):
            buffer.normal_()
    return wrap_codec(made)


@torch.no_grad()
def measure_codec(make: Callable[[], Any], device: torch.device, seconds: float = 4.0) -> dict[str, Any]:
    """Encode and decode a clip in pieces, and as a whole, in float32 proper: TF32 would differ from piece to piece."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    codec = make().eval().to(device)
    frames = max(1, round(CHUNK * codec.frame_rate))
    count = max(4, round(seconds * codec.frame_rate / frames))
    length = count * frames * codec.hop / codec.sample_rate
    waveform = (torch.randn(1, 1, count * frames * codec.hop) * 0.1).to(device)
    whole = clock(lambda: codec.encode(waveform), device)
    latents = whole[1]
    sound = clock(lambda: codec.decode(latents), device)
    pieces = waveform.split(frames * codec.hop, dim=-1)
    heard = stepped(codec, "encode", pieces, device)
    made = stepped(codec, "decode", latents.split(frames, dim=-1), device)
    return {
        "parameters": sum(parameter.numel() for parameter in codec.parameters()),
        "frame_rate": codec.frame_rate,
        "piece_seconds": frames / codec.frame_rate,
        "held_back_frames": getattr(codec, "held", (0, 0)),
        "encode_real_time_factor": heard[0] / length,
        "decode_real_time_factor": made[0] / length,
        "encode_piece_p50_seconds": heard[1],
        "decode_piece_p50_seconds": made[1],
        "whole_encode_real_time_factor": whole[0] / length,
        "whole_decode_real_time_factor": sound[0] / length,
        "encode_error": error(heard[2], latents),
        "decode_error": error(made[2], sound[1]),
    }


def stepped(codec: Any, way: str, pieces: Any, device: torch.device) -> tuple[float, float, Tensor]:
    """Seconds in all and per piece (median), and what came out. A first stream warms up and is not counted."""
    step, end = getattr(codec, f"{way}_step"), getattr(codec, f"{way}_rest", None)
    out: list[Tensor] = []
    times: list[float] = []
    for _ in range(2):
        state, out, times = codec.begin(), [], []
        for piece in pieces:
            seconds, made = clock(partial(step, piece, state), device, warm=False)
            out.append(made)
            times.append(seconds)
        if end is not None:
            seconds, made = clock(partial(end, state), device, warm=False)
            out.append(made)
            times.append(seconds)
    return sum(times), statistics.median(times), torch.cat(out, dim=-1)


def clock(run: Callable[[], Tensor], device: torch.device, *, warm: bool = True) -> tuple[float, Tensor]:
    """Seconds that a call takes, and its result; `warm`: the second of two calls."""
    if warm:
        run()
    wait(device)
    start = time.perf_counter()
    result = run()
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def error(made: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((made - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def measure_graph(device: torch.device, pieces: int = 100) -> dict[str, Any]:
    """Mimi's decoder step, recorded once its start is over."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    codec = published_codec("mimi").to(device)
    latents = torch.randn(1, codec.latent_channels, pieces, device=device)
    whole, state, buffer = codec.decode(latents), codec.begin(), latents[..., :1].clone()
    made = []
    for piece in latents[..., :3].split(1, dim=-1):
        made.append(codec.decode_step(buffer.copy_(piece), state).clone())
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    saved = state.snapshot(0)
    with torch.cuda.stream(stream):
        codec.decode_step(buffer, state)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = codec.decode_step(buffer, state)
    state.restore(0, saved)
    times = []
    for piece in latents[..., 3:].split(1, dim=-1):
        wait(device)
        start = time.perf_counter()
        buffer.copy_(piece)
        graph.replay()
        wait(device)
        times.append(time.perf_counter() - start)
        made.append(out.clone())
    return {
        "decode_real_time_factor": statistics.mean(times) * codec.frame_rate,
        "decode_piece_p50_seconds": statistics.median(times),
        "decode_error": error(torch.cat(made, dim=-1), whole),
    }


def frames_variants(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """Codes frame after frame, and several per pass by chained heads: the default size, random weights."""
    return {f"frames: {count} per pass": partial(measure_frames, device, count) for count in (1, 2, 4)}


@torch.no_grad()
def measure_frames(
    device: torch.device, per_pass: int, seconds: float = 8.0, frame_rate: float = 12.5
) -> dict[str, Any]:
    torch.manual_seed(0)
    with device:
        model = FrameTokenTransformer(chained=3).eval()
    if device.type == "cuda":
        model = quiet(model, torch.bfloat16)
    stream = FrameStream(model, per_pass)
    condition = torch.zeros(1, per_pass, dtype=torch.int64, device=device)
    seeds = torch.zeros(1, dtype=torch.int64, device=device)
    times, state = [0.0], stream.begin(seeds)
    for _ in range(2):  # the first stream warms up
        state = stream.begin(seeds)
        times = [
            clock(lambda: stream.step(state, condition), device, warm=False)[0]  # noqa: B023
            for _ in range(round(seconds / CHUNK / per_pass))
        ]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "first_pass_seconds": times[0],
        "pass_p50_seconds": statistics.median(times),
        "frames_per_second": per_pass / statistics.mean(times),
        "real_time_factor": statistics.mean(times) / CHUNK / per_pass,
        "cache_bytes": state.cache.bytes,
    }


def speech_variants(device: torch.device, model: str | None) -> dict[str, Callable[[], dict[str, Any]]]:
    if model is None:
        raise SystemExit("--only speech needs --model, the folder of a speaking model (millstream train speech-pack)")
    return {"speech": partial(measure_speech, Path(model), device)}


def measure_speech(folder: Path, device: torch.device) -> dict[str, Any]:
    """Text to sound, with a clock where the codec gives a piece away."""
    from millstream.pipelines.speech_draw import speak
    from millstream.training.speech_pack import load_parts

    loaded = load_parts(folder)
    parts = loaded._replace(
        **{name: getattr(loaded, name).to(device) for name in ("transformer", "codec", "pronouncer")}
    )
    codec, given = parts.codec, []
    step = codec.decode_step

    def clocked(latents: Tensor, state: Any) -> Tensor:
        made = step(latents, state)
        wait(device)
        given.append(time.perf_counter())
        return made

    codec.decode_step = clocked  # type: ignore[method-assign]
    voices, found = list(parts.transformer.config["voices"]), []
    speak(parts, SENTENCES[0], voices[0])  # warms up
    for sentence in SENTENCES:
        for voice in voices:
            given.clear()
            start = time.perf_counter()
            sound = speak(parts, sentence, voice)
            length = sound.numel() / codec.sample_rate
            gaps = [b - a for a, b in pairwise(given)]
            found.append(((given[-1] - start) / length, given[0] - start, max(gaps), length))
    factors, firsts, gaps, lengths = zip(*found)
    return {
        "parameters": sum(p.numel() for part in parts[:3] for p in part.parameters()),
        "real_time_factor": statistics.mean(factors),
        "first_sound_p50_seconds": statistics.median(firsts),
        "first_sound_max_seconds": max(firsts),
        "longest_gap_between_pieces_seconds": max(gaps),
        "seconds_of_sound": sum(lengths),
        "met": statistics.mean(factors) <= 0.3 and max(firsts) <= 0.2,
    }
