"""Wan-family streams on a GPU with random weights: frames per second end to end, and where the time goes.

    python benchmarks/stream.py [--quick] [--out stream.json] [--seconds 500] [--only NAME,NAME] [--endless SECONDS]

Prints one JSON object; times are milliseconds, memory is bytes. The model is Wan 2.1 1.3B at 480 x 832 in bfloat16 (or
one of toy size on a machine without CUDA, to try the script). A step is a chunk: what `session.step()` takes, with its
pictures brought to the host as 8-bit values, the device synchronised after each. Steady steps begin after the warm-up
and once the window is full. Stages are timed by CUDA events in a run of their own. A variant that fails, or that no
time is left for, says so; the file is written anew after each of them.

variants: preset, recipe, decoder; `beside` decodes a chunk while the next is drawn. `14B` is Krea's model. `peer` is
what else runs such weights.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan
from stream_measures import Clock, kernels, memory, stepped, summary, until_first
from stream_peers import chunked_clip, decoders, encoder, one_pass, whole_clip
from variants import chosen, measure_all, publish

import millstream as ms
from millstream.models.tiny_vae import TinyVideoDecoder
from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.memory import memory_plan
from millstream.pipelines.presets import PRESETS, Preset
from millstream.pipelines.recipes import RECIPES, Recipe
from millstream.streaming.pixels import as_bytes, on_host

WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
TOY = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2, "text_dim": 32}
PROMPTS = ("a corgi surfing a wave at sunset", "the corgi lands on the beach")
GOALS = {  # on one H100
    ("exact, tiny decoder", "frames_per_second"): 42.0,
    ("exact, full decoder", "frames_per_second"): 30.0,
    ("fast, tiny decoder", "frames_per_second"): 65.0,
    ("exact, tiny decoder", "warm_first_frame"): 500.0,
    ("exact, tiny decoder", "prompt_switch"): 500.0,
    ("exact, tiny decoder", "p99_over_p50"): 1.1,
    ("exact, tiny decoder", "allocations_while_steady"): 0.0,
    ("decoder alone", "full"): 115.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and only the main variants")
    parser.add_argument("--out", help="also write the JSON here, anew after every variant")
    parser.add_argument("--seconds", type=float, default=500, help="start no variant after this time")
    parser.add_argument("--only", help="variants whose name contains one of these, separated by commas")
    parser.add_argument("--endless", type=float, help="only one stream, for so many seconds")
    parser.add_argument("--profile", action="store_true", help="add the kernels that take the most time")
    arguments = parser.parse_args()
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu", quick=arguments.quick, profile=arguments.profile)
    report: dict[str, Any] = {"command": " ".join(sys.argv), "machine": bench.machine(), "variants": {}}

    def keep(measured: dict[str, Any]) -> None:
        report["variants"] = measured
        report["goals"] = goals(measured)
        if arguments.out:
            publish(report, arguments.out, printed=False)

    variants = bench.variants()
    if arguments.endless:
        variants = {"endless": partial(bench.endless, arguments.endless, lambda rows: keep({"endless": rows}))}
    else:
        variants = chosen(variants, arguments.only, ",")
    measure_all(variants, arguments.seconds, after=bench.clear, keep=keep)
    publish(report, arguments.out)


def goals(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal beside what was reached; frames per second are to be at least that, all else at most."""
    return [
        {"variant": name, "what": what, "goal": goal, "measured": measured[name][what]}
        for (name, what), goal in GOALS.items()
        if what in measured.get(name, {})
    ]


class Bench:
    """The measures; weights are made for each of them, since a preset changes them."""

    def __init__(self, device: str, *, quick: bool, profile: bool) -> None:
        self.device, self.quick, self.profile = torch.device(device), quick, profile
        self.real = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.real else torch.float32
        self.size = (480, 832) if self.real else (32, 48)
        self.shape = WAN if self.real else TOY

    def variants(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What is measured, the most important first."""
        longlive, stream = RECIPES["longlive"], self.stream
        first: dict[str, Callable[[], dict[str, Any]]] = {
            f"{preset}, {decoder} decoder": partial(stream, longlive, preset, decoder == "tiny")
            for decoder in ("tiny", "full")
            for preset in ("exact", "fast")
        }
        fast = PRESETS["fast"]
        others = {
            "attending in bfloat16": replace(fast, attention=None),
            "attending in bfloat16, kept earlier": replace(fast, attention=None, reuse=2),
            "kept earlier": replace(fast, reuse=2),
            "in FP8": replace(fast, linears="fp8"),
            "in FP8, kept earlier": replace(fast, linears="fp8", reuse=2),
        }
        first |= {
            f"fast {name}, tiny decoder": partial(stream, longlive, each, tiny=True) for name, each in others.items()
        }
        first |= {
            f"{preset}, {decoder} decoder beside": partial(stream, longlive, preset, decoder == "tiny", beside=True)
            for decoder in ("full", "tiny")
            for preset in ("exact", "fast")
        }
        first |= {"decoder alone": self.decoder, "peer: one pass": partial(self.one_pass, compiled=False)}
        first |= {"peer: diffusers WanPipeline": partial(self.peer, chunked=False)}
        first |= {"peer: diffusers AnyFlowFARPipeline": partial(self.peer, chunked=True)}
        first |= {"small, tiny decoder": partial(stream, longlive, "small", tiny=True)}
        if self.quick:
            return first
        windows = {
            f"{preset}, window {window}, tiny decoder": partial(
                stream, replace(longlive, name=f"window {window}", window=window), preset, tiny=True
            )
            for window in (6, 21)
            for preset in ("exact", "fast")
        }
        large = {
            f"14B {preset}, tiny decoder": partial(
                stream, RECIPES["krea"], preset, tiny=True, shape=WAN_14B if self.real else TOY, count=6
            )
            for preset in ("fast", "exact")
        }
        recipes = {
            f"exact, {name}, tiny decoder": partial(stream, recipe, "exact", tiny=True, count=8)
            for name, recipe in RECIPES.items()
            if name not in ("longlive", "krea")
        }
        last = {"encoder alone": self.encoder, "peer: one pass, compiled": partial(self.one_pass, compiled=True)}
        return first | windows | large | recipes | last

    def make(self, kind: Callable[..., Any], config: dict[str, Any]) -> Any:
        """A model with random weights in the dtype that a checkpoint is loaded in."""
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)  # 14B parameters in float32 would not fit
        try:
            with self.device:
                model = kind(**config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            if set(name.split(".")) & kept:
                parameter.data = parameter.data.float()
        return model

    def vae(self) -> AutoencoderKLWan:
        return self.make(AutoencoderKLWan, {"base_dim": 96 if self.real else 4})

    def pipe(
        self,
        recipe: Recipe,
        preset: Preset | str,
        tiny: bool,
        shape: dict[str, Any] | None = None,
        beside: bool = False,
    ) -> ms.VideoPipeline:
        model = self.make(CausalTransformer3DModel, shape or self.shape)
        widths = (256, 128, 64, 64) if self.real else (8, 8, 8, 4)
        decoder = self.make(TinyVideoDecoder, {"widths": widths}) if tiny else None
        pipe = ms.VideoPipeline(model, self.vae(), None, None, recipe, decoder, size=self.size, preset=preset)
        pipe.overlap = beside
        pipe.set_progress_bar_config(disable=True)
        for number, prompt in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(number)
            tokens = torch.randn(512, model.config["text_dim"], generator=generator) * 0.1
            pipe.keep_prompt(prompt, tokens)
        return pipe

    @torch.no_grad()
    def stream(
        self,
        recipe: Recipe,
        preset: Preset | str,
        tiny: bool,
        beside: bool = False,
        shape: dict[str, Any] | None = None,
        count: int | None = None,
    ) -> dict[str, Any]:
        """Sessions: the first frame cold and warm, steady steps, a prompt switch, stages."""
        pipe, device = self.pipe(recipe, preset, tiny, shape, beside), self.device
        report: dict[str, Any] = {"plan": memory_plan(pipe).as_json()}
        with self.session(pipe, 0) as session:
            report["cold_first_frame"] = until_first(session, device)
        start = time.perf_counter()
        pipe.warmup()
        report["warmup"] = 1e3 * (time.perf_counter() - start)
        full = -(-recipe.window // recipe.chunk) + recipe.units + 1  # steps until the window has moved
        with self.session(pipe, 1) as session:
            report["warm_first_frame"] = until_first(session, device)
            for _ in range(full):
                stepped(session, device)
            before = memory(device)
            steps = [stepped(session, device) for _ in range(count or (20 if self.quick else 50))]
            after = memory(device)
            report |= summary(steps) | after
            grown = after.get("device_allocations", 0) - before.get("device_allocations", 0)
            report["allocations_while_steady"] = grown
            session.steer(prompt=PROMPTS[1], switch="recache")
            report["prompt_switch"] = 1e3 * stepped(session, device)[0]
            if not beside:
                report["stages"] = self.stages(pipe, session, 4)
            if self.profile and self.real:
                report["kernels"] = kernels(session, device)
        return report

    def session(self, pipe: ms.VideoPipeline, seed: int) -> Any:
        return pipe.stream(PROMPTS[0], generator=torch.Generator().manual_seed(seed))

    def stages(self, pipe: ms.VideoPipeline, session: Any, count: int) -> dict[str, float]:
        """Milliseconds per chunk of each stage; `denoise` is what drawing takes without remembering."""
        clock = Clock(self.device)
        with clock.watching(pipe, "draw"), clock.watching(pipe, "_write"), clock.watching(pipe, "decode"):
            for _ in range(count):
                for chunk in session.step():
                    clock.timed("transfer", lambda: on_host(as_bytes(chunk.data)))  # noqa: B023 (called at once)
        taken = clock.milliseconds(count)
        draw, commit = taken.pop("draw"), taken.pop("_write", 0.0)
        return {"denoise": draw - commit, "commit": commit, **taken}

    @torch.no_grad()
    def endless(self, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """One stream for a long time, its prompt switched now and then: step times and memory in stretches."""
        pipe, device = self.pipe(RECIPES["longlive_unbounded"], "fast", tiny=True), self.device
        pipe.warmup()
        stretches: list[dict[str, Any]] = []
        report: dict[str, Any] = {"stretches": stretches}
        start, number = time.perf_counter(), 0
        with self.session(pipe, 0) as session:
            while time.perf_counter() - start < seconds:
                steps, until = [], time.perf_counter() + max(1.0, seconds / 12)
                while time.perf_counter() < until:
                    steps.append(stepped(session, device))
                    number += 1
                    if number % 50 == 0:
                        session.steer(prompt=PROMPTS[number // 50 % 2], switch="keep")
                latents = number * pipe.recipe.chunk
                stretches.append({"latent_frames": latents, **summary(steps), **memory(device)})
                keep(report)
        first, last = stretches[min(1, len(stretches) - 1)], stretches[-1]
        report["last_against_second"] = {
            name: last[name] / first[name] for name in ("step_p50", "memory", "reserved") if first.get(name)
        }
        return report

    @torch.no_grad()
    def decoder(self) -> dict[str, Any]:
        pipes = {name: self.pipe(RECIPES["longlive"], "exact", name == "tiny") for name in ("full", "tiny")}
        return decoders(pipes, self.device)

    @torch.no_grad()
    def encoder(self) -> dict[str, Any]:
        return encoder(self.pipe(RECIPES["longlive"], "exact", True), self.device)

    @torch.no_grad()
    def one_pass(self, compiled: bool) -> dict[str, Any]:
        return one_pass(self.make(CausalTransformer3DModel, self.shape), self.size, 3 if self.quick else 10, compiled)

    def peer(self, chunked: bool) -> dict[str, Any]:
        frames = 81 if self.real else 17
        if chunked:
            return chunked_clip(self.shape, self.vae(), self.size, frames, self.make)
        return whole_clip(self.make(CausalTransformer3DModel, self.shape), self.vae(), self.size, frames)

    def clear(self) -> None:
        """Give back what the variant before took."""
        gc.collect()
        if self.real:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def machine(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name() if self.real else platform.processor() or platform.machine(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "size": self.size,
            "dtype": str(self.dtype),
        }


if __name__ == "__main__":
    main()
