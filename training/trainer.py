"""One training loop for every recipe: a time budget, warm-up and decay, an averaged copy, checkpoints that survive.

A recipe is a module whose forward takes a batch and returns a loss and what to log; everything else is the same. The
budget is wall-clock time, because that is what a GPU lends, and it is what the learning rate follows: a run that was
interrupted goes on from its last checkpoint with the time it has left.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .muon import Muon

Batch = dict[str, Tensor]
SYNC_STEPS = 20  # how often ranks agree on the time and the loss is read: each costs a wait for the device


@dataclass(frozen=True, slots=True)
class Budget:
    """How long and how fast. `steps`, where given, ends training early (a test, a smoke run)."""

    minutes: float = 10.0
    steps: int | None = None
    learning_rate: float = 4e-4
    weight_decay: float = 0.01
    warmup_steps: int = 200
    ema_decay: float = 0.999
    checkpoint_minutes: float = 2.0
    muon_scale: float = 2.0  # Muon's rate for hidden matrices, in units of `learning_rate`; 0 leaves them to AdamW

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes must be more than 0, got {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def rate(self, step: int, progress: float) -> float:
        """Learning rate: linear warm-up in steps, then a cosine to 2 % over the time budget (`progress` 0 to 1)."""
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * decay


def make_optimizers(objective: nn.Module, budget: Budget) -> list[torch.optim.Optimizer]:
    """`Muon` for matrices inside transformer blocks, AdamW for the rest.

    An objective may slow or speed a part of itself: `objective.rates` maps prefixes of parameter names to factors.
    """
    rates: dict[str, float] = getattr(objective, "rates", {})
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            hidden = budget.muon_scale > 0 and ".blocks." in name and parameter.ndim == 2
            scale = next((factor for prefix, factor in rates.items() if name.startswith(prefix)), 1.0)
            groups.setdefault((hidden, scale), []).append(parameter)
    adam = [{"params": mine, "scale": scale} for (hidden, scale), mine in groups.items() if not hidden]
    muon = [{"params": mine, "scale": scale * budget.muon_scale} for (hidden, scale), mine in groups.items() if hidden]
    fused = any(parameter.is_cuda for parameter in objective.parameters())
    decay = budget.weight_decay
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adam, budget.learning_rate, betas=(0.9, 0.95), weight_decay=decay, fused=fused)
    ]
    if muon:
        made.append(Muon(muon, budget.learning_rate, weight_decay=decay))
    return made


def add_budget(parser: argparse.ArgumentParser, *, minutes: float, batch_size: int, unit: str, rate: float) -> None:
    """The options that every recipe has; the arguments are its defaults, `unit` what a batch holds."""
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--steps", type=int, help="end after this many steps, however little time has passed")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"{unit} per step and process")
    parser.add_argument("--learning-rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)


def budget_from(arguments: argparse.Namespace, **settings: float) -> Budget:
    """The budget that the options of `add_budget` ask for, with a recipe's own `settings`."""
    return Budget(arguments.minutes, arguments.steps, arguments.learning_rate, **settings)  # pyright: ignore[reportArgumentType]


class Trainer:
    """Trains one objective in place.

    Args:
        objective: module whose forward takes a `Batch` and returns (loss, logs).
        budget: time and rates.
        directory: where `checkpoint.pt` is kept; training resumes from it if it is there.
        accelerator: device, precision and processes.

    Attributes:
        progress: share of the time that is spent.
    """

    def __init__(self, objective: nn.Module, budget: Budget, directory: Path, accelerator: Accelerator) -> None:
        self.budget, self.accelerator = budget, accelerator
        self.objective = objective.to(accelerator.device)
        self.parameters = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.optimizers = make_optimizers(self.objective, budget)
        self.ema = EMAModel(self.parameters, decay=budget.ema_decay, foreach=True, use_ema_warmup=True)
        self.ema.to(accelerator.device)
        self.path = directory / "checkpoint.pt"
        self.step, self.seconds, self.progress = 0, 0.0, 0.0
        if self.path.is_file():
            self._resume()
        self.wrapped, *self.optimizers = accelerator.prepare(self.objective, *self.optimizers)

    def fit(self, batch: Callable[[], Batch], *, title: str) -> None:
        """Train until the budget is spent, then leave the averaged weights in the objective.

        Raises:
            KeyboardInterrupt: Ctrl-C, once the checkpoint is written.
            ArithmeticError: the loss is no longer a number; the last checkpoint is left as it was.
        """
        self.objective.train()
        self._warm_up(batch)
        begun = saved = time.monotonic() - self.seconds
        self.progress, loss = self._progress(begun), float("nan")
        bar = tqdm(
            desc=title, unit="step", initial=self.step, disable=not self.accelerator.is_main_process, mininterval=5
        )
        steps = math.inf if self.budget.steps is None else self.budget.steps
        try:
            while self.progress < 1.0 and self.step < steps:
                self._set_rate(self.budget.rate(self.step, self.progress))
                value, logs = self._update(batch())
                if self.step % SYNC_STEPS == 0:
                    self.progress, loss = self._progress(begun), float(value)
                    if not math.isfinite(loss):
                        raise ArithmeticError(
                            f"the loss became {loss} at step {self.step}; resume from {self.path} with a lower rate"
                        )
                    shown = {name: f"{float(entry):.4g}" for name, entry in logs.items()}
                    bar.set_postfix({"done": f"{self.progress:.0%}", "loss": f"{loss:.4f}", **shown}, refresh=False)
                    if time.monotonic() - saved > 60 * self.budget.checkpoint_minutes:
                        self.save(time.monotonic() - begun)
                        saved = time.monotonic()
                bar.update()
        except KeyboardInterrupt:
            self.save(time.monotonic() - begun)
            raise
        finally:
            bar.close()
        self.save(time.monotonic() - begun)
        self.ema.copy_to(self.parameters)
        self.objective.eval()

    def _warm_up(self, batch: Callable[[], Batch]) -> None:
        """Compile before the clock starts; nothing is learnt."""
        loss, _ = self.wrapped(batch())
        self.accelerator.backward(loss)
        self.objective.zero_grad(set_to_none=True)

    def _set_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

    def _update(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = self.wrapped(batch)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.objective.zero_grad(set_to_none=True)
        self.ema.step(self.parameters)
        self.step += 1
        return loss.detach(), logs

    def _progress(self, begun: float) -> float:
        """Share of the time that is spent, the same number on every process."""
        spent = torch.tensor([time.monotonic() - begun], dtype=torch.float64, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(spent, src=0)
        return float(spent) / (60 * self.budget.minutes)

    def save(self, seconds: float) -> None:
        """Write the checkpoint under a temporary name, then rename it, so that the last one is always whole."""
        if not self.accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "objective": self.objective.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.shadow_params,
            "ema_step": self.ema.optimization_step,
            "step": self.step,
            "seconds": seconds,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def _resume(self) -> None:
        state = torch.load(self.path, map_location=self.accelerator.device, weights_only=True)
        try:
            self.objective.load_state_dict(state["objective"])
        except RuntimeError as error:
            raise ValueError(f"{self.path} belongs to another model; choose another --out or remove it") from error
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.shadow_params = state["ema"]
        self.ema.optimization_step = state["ema_step"]
        self.step, self.seconds = state["step"], state["seconds"]
