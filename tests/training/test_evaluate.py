"""Evaluation on tiny random models: what is compared with what, nothing read from training, and what is refused."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from millstream.models.frame_codec import FrameAutoencoder
from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.world import WorldPipeline
from millstream.samplers import FlowSampler
from millstream.streaming import Frame
from millstream.training import data, drift, evaluate, scores
from millstream.training.behaviour import BUTTONS
from millstream.training.dataset import Episodes
from millstream.training.measures import images
from millstream.training.probe import train_probe
from millstream.training.prompts import WORLDS
from millstream.training.rollout import CONTEXT, choose, continue_clips, cut, draw, keys_of, reconstruct, truth

SIZE = (32, 64)
KEYS = ("KeyW", "KeyS", "KeyA", "KeyD", "ArrowLeft", "ArrowRight", "Space")


@pytest.fixture(scope="module")
def pipe() -> WorldPipeline:
    torch.manual_seed(0)
    transformer = CausalTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=2,
        action_dim=len(BUTTONS),
        cross_attention_layers=(0,),
        position_grid=(SIZE[0] // 16, SIZE[1] // 16),
    )
    for parameter in transformer.parameters():  # layers that begin at zero would ignore keys and words
        torch.nn.init.normal_(parameter, std=0.2)
    codec = FrameAutoencoder(4, (8, 8, 8), (1, 1, 1), (1, 1, 1))
    return WorldPipeline(
        transformer.eval(),
        codec.eval(),
        ByteTextEncoder(16, tokens=2, layers=1, heads=2).eval(),
        FlowSampler(num_inference_steps=1),
        worlds=[world.caption for world in WORLDS],
        buttons=list(BUTTONS),
        key_map={**dict(zip(KEYS, BUTTONS)), "ArrowUp": "MOVE_FORWARD"},
        size=SIZE,
        window=6,
    )


def moving_square(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """MOVE_FORWARD moves a square to the right and MOVE_BACKWARD to the left; the other buttons do nothing."""
    generator = torch.Generator().manual_seed(seed)
    actions = (torch.rand(count, len(BUTTONS), generator=generator) < 0.4).to(torch.uint8)
    at = 20 + (4 * (actions[:, 0].long() - actions[:, 1].long())).cumsum(0)
    frames = torch.zeros(count, *SIZE, 3, dtype=torch.uint8)
    for width in range(6):
        frames[torch.arange(count), 12:20, (at + width) % SIZE[1]] = torch.tensor([255, 90, 200], dtype=torch.uint8)
    return frames, actions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two worlds, 900 frames each, three episodes; the last 54 frames of each are held out."""
    directory = tmp_path_factory.mktemp("shards")
    for number in range(2):
        frames, actions = moving_square(900, number)
        tensors = {"frames": frames, "actions": actions, "episodes": torch.arange(900, dtype=torch.int32) // 300}
        metadata = {"world": WORLDS[number].name, "world_index": str(number), "buttons": json.dumps(BUTTONS)}
        save_file(tensors, directory / f"shard-{number:04d}.safetensors", metadata)
    return directory


@pytest.fixture(scope="module")
def episodes(folder) -> Episodes:
    return Episodes.open(folder)


def some_clips(episodes: Episodes, length: int, per_world: int = 3):
    return cut(episodes, *choose(episodes, per_world, length, "all", torch.Generator().manual_seed(0)), length)


def test_starts_are_held_out_whole_and_spread(episodes):
    starts, world = choose(episodes, 4, 20, "held_out", torch.Generator().manual_seed(0))
    assert world.tolist() == [0] * 4 + [1] * 4
    assert episodes.held_out[starts[:, None] + torch.arange(20)].all()
    assert torch.equal(episodes.world[starts], world)
    everywhere, _ = choose(episodes, 4, 20, "all", torch.Generator().manual_seed(0))
    assert not episodes.held_out[everywhere].all()
    assert everywhere[3] - everywhere[0] > 400, "clips of one world should not be neighbours"
    with pytest.raises(ValueError, match=r"basic has 0 windows of 60 frames in split 'held_out', but 2 are wanted"):
        choose(episodes, 2, 60, "held_out", torch.Generator())


def test_streams_together_are_what_one_session_draws_alone(pipe, episodes):
    clips = some_clips(episodes, CONTEXT + 5, per_world=2)
    drawn = continue_clips(pipe, clips, horizons=range(1, 6), steps=None, seed=7, batch_size=3, title=None)
    assert drawn.shape == (4, 5, *SIZE, 3)
    row = 3  # the second batch
    key_of = dict(zip(BUTTONS, KEYS))
    with pipe.stream(WORLDS[1].caption, generator=torch.Generator().manual_seed(7 + row)) as session:
        for number in range(CONTEXT + 5):
            session.steer(keys={key_of[name] for name, down in zip(BUTTONS, clips.actions[row, number]) if down})
            told = number < CONTEXT
            frame = Frame(images(clips.frames[row, number]), time.monotonic()) if told else None
            (chunk,) = session.step(frame)
            if not told:
                alone = chunk.data[0] * 255
                assert (drawn[row, number - CONTEXT].movedim(-1, 0).float() - alone).abs().max() <= 1
    some = continue_clips(pipe, clips, horizons=[2, 4], steps=None, seed=7, batch_size=8, title=None)
    assert (some.int() - drawn[:, [1, 3]].int()).abs().max() <= 1
    assert truth(clips, [2]).equal(clips.frames[:, CONTEXT + 1 : CONTEXT + 2])


def test_keys_and_seed_decide_what_is_drawn(pipe, episodes):
    clips = some_clips(episodes, CONTEXT + 4)
    keys = keys_of(pipe, BUTTONS)
    assert keys[1:] == list(KEYS[1:])

    def run(actions: Tensor, seed: int) -> Tensor:
        prompts = [WORLDS[0].caption] * len(actions)
        context = clips.frames[:, :CONTEXT]
        return torch.stack(list(draw(pipe, prompts, context, actions, keys, steps=None, seed=seed, title=None)))

    first = run(clips.actions, 0)
    assert torch.equal(first, run(clips.actions, 0))
    assert not torch.equal(first, run(clips.actions, 1))
    assert not torch.equal(first, run(1 - clips.actions, 0))
    with pytest.raises(ValueError, match="no key of the model presses JUMP"):
        keys_of(pipe, ["JUMP"])


def test_the_truth_scores_best_at_every_horizon_and_a_shifted_one_does_not(pipe, episodes):
    clips = some_clips(episodes, CONTEXT + 10)
    perfect = clips.frames[:, CONTEXT:]
    late = clips.frames[:, CONTEXT - 1 : -1]
    at_best = scores.psnr_scores(clips, perfect, [1, 10])
    assert at_best["+1"] == at_best["+10"]
    assert at_best["+10"]["mean"] == pytest.approx(100)
    assert set(at_best["+1"]["by_world"]) == {"basic", "defend_the_center"}
    assert scores.psnr_scores(clips, late, [10])["+10"]["mean"] < 60
    ratio = scores.sharpness_scores(pipe, clips, reconstruct(pipe, perfect), [1, 10])
    assert ratio["+1"]["mean"] == ratio["+10"]["by_world"]["basic"] == pytest.approx(1.0)


def test_keys_are_read_back_from_the_truth_and_not_from_other_clips(episodes, monkeypatch):
    trained = []

    def once(*tensors, batch_size, **options):
        if not trained:
            trained.append(train_probe(*tensors, batch_size=32, width=8, learning_rate=3e-3, **options))
        return trained[0]

    monkeypatch.setattr(scores, "train_probe", once)
    clips = some_clips(episodes, CONTEXT + 60, per_world=4)
    perfect = clips.frames[:, CONTEXT:]
    device = torch.device("cpu")
    good, bad = (
        scores.read_back_score(episodes, clips, drawn, steps=200, seed=0, device=device)
        for drawn in (perfect, perfect.roll(1, dims=0))
    )
    assert good["above_chance"] == pytest.approx(1.0)
    assert good["by_button"]["MOVE_FORWARD"]["worlds"] == ["basic", "defend_the_center"]
    assert good["by_button"]["ATTACK"]["above_chance"] is None, "nobody can see that button"
    assert bad["by_button"]["MOVE_FORWARD"]["above_chance"] < 0.4


def test_the_probe_learns_from_no_frame_of_the_clips(episodes):
    clips = some_clips(episodes, CONTEXT + 60)
    windows = scores.probe_windows(episodes, clips)
    seen = set((windows[:, None] + torch.arange(4)).flatten().tolist())
    assert len(seen) > 900
    assert not seen & set((clips.starts[:, None] + torch.arange(CONTEXT + 60)).flatten().tolist())
    assert not episodes.held_out[sorted(seen)].any()


def test_frames_through_the_codec_are_as_far_as_the_codec_itself(pipe, episodes, monkeypatch):
    def perfect(pipe, clips, *, horizons, **_):
        return reconstruct(pipe, truth(clips, horizons))

    def features(frames, **_):  # a feature for each of 4 x 8 cells: the real net is tested beside `measures`
        return torch.nn.functional.adaptive_avg_pool2d(frames, (4, 8)).flatten(1)

    monkeypatch.setattr(scores, "frame_features", features)
    monkeypatch.setattr(scores.FeatureNet, "load", torch.nn.Identity)
    settings = {"per_stream": 2, "at": 12, "steps": None, "seed": 0, "batch_size": 3}
    monkeypatch.setattr(scores, "continue_clips", perfect)
    score = scores.frechet_score(pipe, episodes, "all", frames=16, **settings)
    assert score["frames_per_side"] == 16
    assert score["horizons"] == [8, 12]
    assert score["ratio"] == 1.0
    assert score["floor"] < score["codec"], "a random codec is further from the truth than other true frames"
    assert "not the published FID" in score["features"]


def test_a_model_that_goes_black_has_drifted_and_a_true_run_has_not(pipe, monkeypatch):
    def game(name, actions, seed, *, size):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(40, 216, (len(actions), *size, 3), generator=generator, dtype=torch.uint8).numpy()

    def black(pipe, prompts, context, actions, keys, **_):
        for _ in range(actions.shape[1] - context.shape[1]):
            yield torch.zeros(len(prompts), *SIZE, 3, dtype=torch.uint8)

    def another_run(pipe, prompts, context, actions, keys, **_):
        played = torch.from_numpy(game("", actions[0], 99, size=SIZE))[context.shape[1] :]
        yield from played[:, None].expand(-1, len(prompts), -1, -1, -1)

    monkeypatch.setattr(drift, "play", game)
    drifts = {}
    for drawing in (black, another_run):
        monkeypatch.setattr(drift, "draw", drawing)
        score, true, mine = drift.drift_score(pipe, ["basic", "take_cover"], "held", frames=32, steps=None, seed=0)
        drifts[drawing] = score["by_world"]["basic"]
        assert true.shape == mine.shape == (2, *SIZE, 3)
    assert drifts[another_run]["drift"] == pytest.approx(1, abs=0.2)
    assert drifts[another_run]["clipped"] == 0
    assert drifts[black]["distance"] == 1
    assert drifts[black]["drift"] > 4
    assert drifts[black]["clipped"] == 1
    assert drifts[black]["contrast"] == 0


def test_held_keys_are_held_and_random_ones_repeat_for_equal_seeds():
    held = drift.script("held", 50, 0)
    assert (held == held[0]).all()
    assert held.any()
    assert (drift.script("random", 500, 1) == drift.script("random", 500, 1)).all()
    assert (drift.script("random", 500, 1) != drift.script("random", 500, 2)).any()


def arguments(folder, out, *more: str) -> list[str]:
    skipped = ["--probe-steps", "0", "--frechet", "0", "--long-frames", "0", "--codec-frames", "0"]
    return ["--data", str(folder), "--out", str(out), "--split", "all", "--device", "cpu", *skipped, *more]


def test_the_command_prints_one_json_object_and_writes_a_sheet(pipe, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(WorldPipeline, "from_pretrained", classmethod(lambda cls, name: pipe))
    evaluate.main(arguments(folder, tmp_path, "--starts", "2", "--horizon", "9", "--batch-size", "4", "--steps", "2"))
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert (tmp_path / "measures.json").read_text() == printed
    assert report["sampler"]["steps"] == 2
    assert list(report["clips"]["psnr_db"]) == ["+1", "+4", "+8"]
    assert report["frechet"] == report["long"] == report["codec_psnr_db"] == "skipped"
    assert report["frames_per_second"]["alone"] > 0
    assert (tmp_path / "clips.png").read_bytes().startswith(b"\x89PNG")
    assert not pipe.arena.in_use, "sessions were left open"


def test_data_of_another_size_and_numbers_out_of_range_are_refused(pipe, episodes, tmp_path):
    with pytest.raises(ValueError, match="horizon must be at least 4, got 2"):
        evaluate.Sizes(horizon=2)
    with pytest.raises(ValueError, match=r"frechet must be 0 \(left out\) or more, got -1"):
        evaluate.Sizes(frechet=-1)
    larger = replace(episodes, shards=(torch.zeros(1, 96, 128, 3, dtype=torch.uint8),))
    with pytest.raises(ValueError, match=r"frames of \(96, 128\), the model draws \(32, 64\)"):
        evaluate.evaluate(pipe, larger, evaluate.Sizes(), tmp_path)


def test_the_data_recipe_hands_its_options_on(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(data, "collect", lambda out, **options: seen.update(options, out=out))
    data.main(["--out", str(tmp_path), "--shards", "3", "--frames", "50", "--seed", "9", "--processes", "2"])
    assert seen == {
        "out": tmp_path,
        "frames_per_shard": 50,
        "shards": 3,
        "processes": 2,
        "seed": 9,
        "env": None,
    }
