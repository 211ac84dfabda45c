"""Wan-family streams on a GPU with random weights: frames per second end to end, and where the time goes.

    python benchmarks/stream.py [--quick] [--out stream.json] [--seconds 500] [--only NAME] [--profile]

Prints one JSON object; times are milliseconds, memory is bytes. The model is Wan 2.1 1.3B at 480 x 832 in bfloat16 (or
one of toy size on a machine without CUDA, to try the script). A step is a chunk: what `session.step()` takes, with its
pictures brought to the host as 8-bit values, the device synchronised after each. Steady steps begin once the window is
full. Stages are timed by CUDA events in a run of their own. A variant that fails, or that no time is left for, says so.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan
from variants import measure_all, publish

import millstream as ms
from millstream.models.tiny_vae import TinyVideoDecoder
from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.memory import memory_plan
from millstream.pipelines.recipes import RECIPES, Recipe

WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
TOY = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2, "text_dim": 32}
GOALS = {"longlive, tiny decoder": 42.0, "longlive, full decoder": 30.0}  # frames per second on one H100, preset exact
PROMPTS = ("a corgi surfing a wave at sunset", "the corgi lands on the beach")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and only the main variants")
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--seconds", type=float, default=500, help="start no variant after this time")
    parser.add_argument("--only", help="variants whose name contains this")
    parser.add_argument("--profile", action="store_true", help="add the kernels that take the most time")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # shapes never change, so the search pays
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu", quick=arguments.quick, profile=arguments.profile)
    wanted = {name: measure for name, measure in bench.variants().items() if (arguments.only or "") in name}
    report: dict[str, Any] = {"command": " ".join(sys.argv), "machine": bench.machine()}
    report["variants"] = measure_all(wanted, arguments.seconds)
    measured = {name: report["variants"].get(name, {}).get("frames_per_second") for name in GOALS}
    report["goals"] = {name: {"goal": goal, "measured": measured[name]} for name, goal in GOALS.items()}
    publish(report, arguments.out)


class Bench:
    """The weights, made once, and the measures."""

    def __init__(self, device: str, *, quick: bool, profile: bool) -> None:
        self.device, self.quick, self.profile = torch.device(device), quick, profile
        self.real = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.real else torch.float32
        self.size = (480, 832) if self.real else (32, 48)
        torch.manual_seed(0)
        with self.device:
            self.transformer = CausalTransformer3DModel(**(WAN if self.real else TOY)).eval().to(self.dtype)
            self.vae = AutoencoderKLWan(base_dim=96 if self.real else 4).eval().to(self.dtype)
            self.tiny = TinyVideoDecoder(widths=(256, 128, 64, 64) if self.real else (8, 8, 8, 4)).eval().to(self.dtype)
        for name, parameter in self.transformer.named_parameters():
            if set(name.split(".")) & set(self.transformer._keep_in_fp32_modules):  # as a checkpoint is loaded
                parameter.data = parameter.data.float()

    def variants(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What is measured, the most important first."""
        longlive = RECIPES["longlive"]
        first = {
            "longlive, tiny decoder": partial(self.stream, longlive, tiny=True),
            "longlive, full decoder": partial(self.stream, longlive, tiny=False),
            "decoder alone": self.decoder,
            "compiled blocks, longlive, tiny decoder": partial(self.stream, longlive, tiny=True, compiled=True),
        }
        windows = {
            f"window {window}, tiny decoder": partial(self.stream, replace(longlive, window=window), tiny=True)
            for window in (6, 9, 21)
        }
        recipes = {
            f"{name}, tiny decoder": partial(self.stream, recipe, tiny=True)
            for name, recipe in RECIPES.items()
            if name != "longlive"
        }
        return first if self.quick else first | windows | recipes | {"encoder alone": self.encoder}

    def pipe(self, recipe: Recipe, tiny: bool) -> ms.VideoPipeline:
        decoder = self.tiny if tiny else None
        pipe = ms.VideoPipeline(self.transformer, self.vae, None, None, recipe, decoder, size=self.size)
        pipe.set_progress_bar_config(disable=True)
        for number, prompt in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(number)
            tokens = torch.randn(512, self.transformer.config["text_dim"], generator=generator) * 0.1
            pipe.keep_prompt(prompt, tokens)
        return pipe

    @torch.no_grad()
    def stream(self, recipe: Recipe, tiny: bool, compiled: bool = False) -> dict[str, Any]:
        """One session: first frame, steady steps, stages, a prompt switch."""
        pipe = self.pipe(recipe, tiny)
        full = -(-recipe.window // recipe.chunk) + recipe.units + 2  # steps until the window has moved
        count = 12 if self.quick else 40
        report: dict[str, Any] = {"plan": memory_plan(pipe).as_json()}
        if compiled:
            self.transformer.compile_repeated_blocks()
        with pipe.stream(PROMPTS[0], generator=torch.Generator().manual_seed(0)) as session:
            report["cold_first_frame"] = 1e3 * self.until_first(session)
            for _ in range(full):
                self.step(session)
            self.forget_peak()
            steps = [self.step(session) for _ in range(count)]
            report |= summary(steps)
            report |= self.memory()
            session.steer(prompt=PROMPTS[1], switch="recache")
            report["prompt_switch"] = 1e3 * self.step(session)[0]
            for _ in range(full):
                self.step(session)
            report["stages"] = self.stages(pipe, session, 4 if self.quick else 12)
            if self.profile and self.real:
                report["kernels"] = self.kernels(session)
        with pipe.stream(PROMPTS[0], generator=torch.Generator().manual_seed(1)) as session:
            report["warm_first_frame"] = 1e3 * self.until_first(session)
        return report

    def step(self, session: Any) -> tuple[float, int]:
        """Seconds of one step with its pictures on the host, and how many there are."""
        start = time.perf_counter()
        drawn = sum(len(on_host(chunk.data)) for chunk in session.step())
        self.wait()
        return time.perf_counter() - start, drawn

    def until_first(self, session: Any) -> float:
        start = time.perf_counter()
        while not self.step(session)[1]:
            pass
        return time.perf_counter() - start

    def stages(self, pipe: ms.VideoPipeline, session: Any, count: int) -> dict[str, float]:
        """Milliseconds per chunk of each stage; `denoise` is what drawing takes without remembering."""
        clock = Clock(self.device)
        with clock.watching(pipe, "draw"), clock.watching(pipe, "_write"), clock.watching(pipe, "decode"):
            for _ in range(count):
                for chunk in session.step():
                    clock.timed("transfer", lambda: on_host(chunk.data))  # noqa: B023 (called at once)
        taken = clock.milliseconds(count)
        draw, commit = taken.pop("draw"), taken.pop("_write", 0.0)
        return {"denoise": draw - commit, "commit": commit, **taken}

    def kernels(self, session: Any) -> list[dict[str, Any]]:
        """The kernels that take the most of one steady chunk."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self.step(session)
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:25]
        return [
            {"name": row.key[:90], "calls": row.count, "milliseconds": row.self_device_time_total / 1e3} for row in rows
        ]

    @torch.no_grad()
    def decoder(self) -> dict[str, Any]:
        """Each decoder alone, per chunk of 3 latent frames, and diffusers' own on the same latents."""
        report = {}
        pipes = {"full": self.pipe(RECIPES["longlive"], False), "tiny": self.pipe(RECIPES["longlive"], True)}
        latents = torch.randn(1, *pipes["full"].latent_size[:1], 3, *pipes["full"].latent_size[1:], device=self.device)
        for name, pipe in pipes.items():
            state = pipe.codec.begin(*self.size)
            for _ in range(3):
                pipe.codec.decode(latents, state)
            report[name] = self.milliseconds(lambda: pipe.codec.decode(latents, state))  # noqa: B023
        whole = latents.to(self.dtype)
        report["diffusers, 3 frames from the first on"] = self.milliseconds(lambda: self.vae.decode(whole))
        return report

    @torch.no_grad()
    def encoder(self) -> dict[str, Any]:
        """The encoder alone, per chunk of 12 pictures."""
        encoder = self.pipe(RECIPES["longlive"], True)._encoder
        state = encoder.begin(*self.size)
        pictures = torch.rand(1, 12, 3, *self.size, device=self.device)
        encoder.encode(pictures[:, :1], state)
        return {"12 pictures": self.milliseconds(lambda: encoder.encode(pictures, state))}

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median of a few calls."""
        times = []
        for _ in range(3 if self.quick else 10):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        if self.real:
            torch.cuda.reset_peak_memory_stats()
            self.allocations = torch.cuda.memory_stats()["num_device_alloc"]

    def memory(self) -> dict[str, Any]:
        if not self.real:
            return {}
        grown = torch.cuda.memory_stats()["num_device_alloc"] - self.allocations
        return {"peak_memory": torch.cuda.max_memory_allocated(), "device_allocations_while_steady": grown}

    def machine(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name() if self.real else platform.processor() or platform.machine(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "size": self.size,
            "dtype": str(self.dtype),
        }


class Clock:
    """How long named calls take on the device, without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = self.mark()
        result = call()
        self.spans[name].append((start, self.mark()))
        return result

    @contextmanager
    def watching(self, owner: Any, name: str) -> Any:
        """Time every call of a method of `owner`."""
        inner = getattr(owner, name)
        owner.__dict__[name] = lambda *args, **kwargs: self.timed(name, lambda: inner(*args, **kwargs))
        try:
            yield
        finally:
            del owner.__dict__[name]

    def milliseconds(self, count: int) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
            return {k: sum(a.elapsed_time(b) for a, b in spans) / count for k, spans in self.spans.items()}
        return {k: 1e3 * sum(b - a for a, b in spans) / count for k, spans in self.spans.items()}


def on_host(pictures: torch.Tensor) -> torch.Tensor:
    """8-bit pictures in host memory, as a window or a file wants them."""
    return pictures.mul(255).round_().to(torch.uint8).cpu()


def summary(steps: list[tuple[float, int]]) -> dict[str, Any]:
    """Frames per second, and the spread of step times."""
    seconds = sorted(taken for taken, _ in steps)
    p50, p95, p99 = (seconds[max(0, -(-percent * len(seconds) // 100) - 1)] for percent in (50, 95, 99))
    return {
        "frames_per_second": sum(drawn for _, drawn in steps) / sum(seconds),
        **{"step_p50": 1e3 * p50, "step_p95": 1e3 * p95, "step_p99": 1e3 * p99, "p99_over_p50": p99 / p50},
        "steps": len(steps),
    }


if __name__ == "__main__":
    main()
