"""The training loop: its rates, and that no interruption costs more than the time since the last checkpoint."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from millstream.training.trainer import SYNC_STEPS, Budget, Trainer

pytestmark = pytest.mark.usefixtures("on_the_cpu")


class Line(nn.Module):
    """Fits y = 3 x."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, width)

    def forward(self, batch):
        loss = (self.layer(batch["x"]) - 3 * batch["x"]).square().mean()
        return loss, {"loss": loss.detach()}


def batch():
    return {"x": torch.linspace(-1, 1, 8)[:, None]}


def trainer(directory, steps: int | None, objective: nn.Module | None = None, **budget) -> Trainer:
    settings = {"minutes": 5.0, "learning_rate": 0.05, "warmup_steps": 5, "ema_decay": 0.9} | budget
    return Trainer(objective or Line(), Budget(steps=steps, **settings), directory, Accelerator())


def test_the_rate_warms_up_and_decays():
    budget = Budget(learning_rate=1.0, warmup_steps=10)
    assert [budget.rate(step, 0.0) for step in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert [budget.rate(50, progress) for progress in (0.0, 0.5, 1.0, 1.3)] == pytest.approx([1.0, 0.51, 0.02, 0.02])


def test_an_impossible_budget_is_refused():
    for minutes in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="minutes must be more than 0, got"):
            Budget(minutes=minutes)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Budget(steps=0)


def test_learns_and_leaves_the_averaged_weights(tmp_path):
    run = trainer(tmp_path, 150)
    run.fit(batch, title="line")
    assert run.step == 150
    assert run.objective.layer.weight.item() == pytest.approx(3, abs=0.1)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(run.objective.layer.weight, saved["ema"][0])
    assert not torch.equal(saved["objective"]["layer.weight"], saved["ema"][0])
    assert not run.objective.training


def test_goes_on_from_its_checkpoint(tmp_path):
    """Twelve steps in two runs are twelve steps in one: weights, moments, average and time."""
    trainer(tmp_path / "two", 7).fit(batch, title="first")
    seconds = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["seconds"]
    second = trainer(tmp_path / "two", 12)
    assert second.step == 7
    assert second.seconds == seconds > 0
    second.fit(batch, title="second")
    once = trainer(tmp_path / "one", 12)
    once.fit(batch, title="once")
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert a["step"] == b["step"] == 12
    assert a["ema_step"] == b["ema_step"] == 12
    assert b["seconds"] > seconds
    for name in ("layer.weight", "layer.bias"):  # the rate follows the clock, so nearly equal is what there is
        torch.testing.assert_close(a["objective"][name], b["objective"][name], atol=1e-3, rtol=0)
    for one, two in zip(a["ema"], b["ema"], strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=0)


def test_a_finished_run_trains_no_further(tmp_path):
    trainer(tmp_path, 10).fit(batch, title="line")
    for steps in (10, 4):
        again = trainer(tmp_path, steps)
        again.fit(batch, title="again")
        assert again.step == 10
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(again.objective.layer.weight, saved["ema"][0])


def test_ends_when_the_time_is_spent(tmp_path):
    run = trainer(tmp_path, None, minutes=1e-3)
    run.fit(batch, title="line")
    assert run.step > 0
    assert run.step % SYNC_STEPS == 0


def test_ctrl_c_saves_first(tmp_path):
    calls = 0

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == 8:  # one batch warms up, six are learnt from
            os.kill(os.getpid(), signal.SIGINT)
        return batch()

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, 100).fit(interrupted, title="line")
    resumed = trainer(tmp_path, 9)
    assert resumed.step == 6
    resumed.fit(batch, title="resumed")
    assert resumed.step == 9


@pytest.mark.parametrize("at", ["save", "replace"])
def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, at):
    trainer(tmp_path, 5).fit(batch, title="line")

    def torn(state, path):
        path.write_bytes(b"half a checkpoint")
        raise SystemExit("killed")

    def killed(*paths):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(*((torch, "save", torn) if at == "save" else (os, "replace", killed)))
        with pytest.raises(SystemExit):
            trainer(tmp_path, 8).fit(batch, title="line")
    resumed = trainer(tmp_path, 8)
    assert resumed.step == 5
    resumed.fit(batch, title="line")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_saves_as_it_goes(tmp_path, monkeypatch):
    run, saved = trainer(tmp_path, 45, checkpoint_minutes=1e-9), []
    save = run.save
    monkeypatch.setattr(run, "save", lambda seconds: (saved.append(run.step), save(seconds)))
    run.fit(batch, title="line")
    assert saved == [20, 40, 45]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer(tmp_path, 2).fit(batch, title="line")
    with pytest.raises(ValueError, match=r"checkpoint\.pt belongs to another model; choose another --out"):
        trainer(tmp_path, 2, Line(width=2))


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(tmp_path):
    trainer(tmp_path, 5).fit(batch, title="line")
    calls = 0

    def poisoned():
        nonlocal calls
        calls += 1
        return {"x": batch()["x"] * (float("nan") if calls > 3 else 1)}

    with pytest.raises(ArithmeticError, match="the loss became nan at step 20; resume from"):
        trainer(tmp_path, 50).fit(poisoned, title="line")
    assert trainer(tmp_path, 50).step == 5
