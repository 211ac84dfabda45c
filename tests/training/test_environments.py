"""True games, recorded: aligned with their actions, equal for equal seeds, kept when a run is interrupted."""

from __future__ import annotations

import importlib.util
import json
import os

import numpy as np
import pytest
from safetensors import safe_open

from millstream.training.behaviour import BUTTONS, Wanderer, wander
from millstream.training.environments import collect, play, record
from millstream.training.prompts import WORLDS

needs_vizdoom = pytest.mark.skipif(
    importlib.util.find_spec("vizdoom") is None, reason="vizdoom is not installed (it has no wheel for CPython 3.13)"
)
needs_gymnasium = pytest.mark.skipif(importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed")


def held(button: str, frames: int) -> np.ndarray:
    actions = np.zeros((frames, len(BUTTONS)), np.uint8)
    actions[:, BUTTONS.index(button)] = 1
    return actions


def contents(directory) -> dict[str, tuple]:
    """What every shard holds. Not the files' own bytes: safetensors writes metadata in no fixed order."""
    found = {}
    for path in directory.iterdir():
        with safe_open(path, "numpy") as shard:
            tensors = {key: shard.get_tensor(key).tobytes() for key in ("frames", "actions", "episodes")}
            found[path.name] = (tensors, shard.metadata())
    return found


def test_the_random_player_presses_everything_and_holds_it():
    actions = wander(50_000, np.random.default_rng(0)).astype(bool)
    share = actions.mean(0)
    assert (share > 0.04).all()
    assert (share < 0.7).all()
    together = actions.T.astype(float) @ actions / len(actions)
    assert (together > 1e-4).all(), "some pair of buttons is never held together"
    assert (~actions).all(1).mean() > 0.01, "it never stands still"
    changes = (actions[1:] != actions[:-1]).any(1).mean()
    assert changes < 0.2, "keys flicker; people hold them"


def test_the_random_player_repeats_itself_for_equal_seeds_only():
    first, again, other = (wander(500, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_random_player_turns_away_from_a_wall_and_walks_off():
    turns = [BUTTONS.index("TURN_LEFT"), BUTTONS.index("TURN_RIGHT")]
    wanderer = Wanderer(np.random.default_rng(0))
    for _ in range(50):
        at_wall = np.array([wanderer.press(facing_wall=True) for _ in range(40)])
        afterwards = np.array([wanderer.press() for _ in range(60)])
        assert at_wall[10:, turns].any(), "it stares at the wall"
        assert afterwards[:, BUTTONS.index("MOVE_FORWARD")].any(), "it does not walk off"
    stuck = np.array([wanderer.press(facing_wall=True) for _ in range(4000)])
    assert stuck[:, turns].any(1).mean() > 0.8
    assert (stuck[1:] != stuck[:-1]).any(1).mean() > 0.01, "it turns for ever where every side is a wall"


@needs_vizdoom
@pytest.mark.parametrize("world", [world.name for world in WORLDS])
def test_every_world_plays(world):
    frames = play(world, wander(40, np.random.default_rng(0)), seed=1)
    assert frames.shape == (40, 96, 128, 3)
    assert frames.dtype == np.uint8
    assert frames.std() > 5, "a blank screen"
    assert len(np.unique(frames.reshape(40, -1), axis=0)) > 30, "a frozen screen"


@needs_vizdoom
def test_action_i_led_to_frame_i():
    actions = np.zeros((12, len(BUTTONS)), np.uint8)
    actions[6, BUTTONS.index("TURN_LEFT")] = 1
    still, turned = play("my_way_home", actions * 0, seed=5), play("my_way_home", actions, seed=5)
    differs = (still != turned).any((1, 2, 3))
    assert differs.tolist() == [False] * 6 + [True] * 6


@needs_vizdoom
def test_turning_left_moves_the_picture_to_the_right():
    frames = play("basic", held("TURN_LEFT", 6), seed=5).astype(float).mean(-1)
    before, after = frames[3, 10:60], frames[4, 10:60]
    shifts = range(-12, 13)
    error = [np.abs(np.roll(before, shift, 1)[:, 16:-16] - after[:, 16:-16]).mean() for shift in shifts]
    assert shifts[int(np.argmin(error))] > 0


@needs_vizdoom
def test_a_new_episode_begins_where_one_ends_and_no_action_led_to_it():
    actions = np.ones((1400, len(BUTTONS)), np.uint8)  # longer than the time limit of 1,050 frames
    recording = record("my_way_home", actions, seed=2, size=(24, 32))
    begins = np.flatnonzero(np.diff(recording.episodes, prepend=-1))
    assert len(begins) >= 2
    assert set(np.diff(recording.episodes)) <= {0, 1}
    assert not recording.actions[begins].any()
    assert recording.actions[np.setdiff1d(np.arange(1400), begins)].all()


@needs_vizdoom
def test_same_seed_same_frames_and_the_working_directory_stays_clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actions = wander(150, np.random.default_rng(0))
    first, again, other = (play("defend_the_center", actions, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert os.getcwd() == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_actions_and_worlds_are_refused():
    with pytest.raises(ValueError, match="unknown world 'doom'; choose one of basic"):
        play("doom", held("ATTACK", 3), seed=0)
    with pytest.raises(ValueError, match=r"\[frames, 7\].*got \(3, 6\)"):
        play("basic", np.zeros((3, 6), np.uint8), seed=0)
    with pytest.raises(ValueError, match=r"got \(0, 7\)"):
        play("basic", np.zeros((0, 7), np.uint8), seed=0)


@needs_vizdoom
def test_shards_do_not_depend_on_the_number_of_processes(tmp_path):
    settings = {"frames_per_shard": 60, "shards": 3, "seed": 7, "size": (24, 32), "progress": False}
    paths = collect(tmp_path / "one", processes=1, **settings)
    collect(tmp_path / "two", processes=2, **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len({shard["frames"] for shard, _ in contents(tmp_path / "one").values()}) == 3
    with safe_open(paths[2], "numpy") as shard:
        assert shard.metadata()["world"] == WORLDS[2].name
        assert json.loads(shard.metadata()["buttons"]) == list(BUTTONS)
        assert {key: (shard.get_tensor(key).dtype.name, shard.get_tensor(key).shape) for key in shard.keys()} == {  # noqa: SIM118
            "frames": ("uint8", (60, 24, 32, 3)),
            "actions": ("uint8", (60, 7)),
            "episodes": ("int32", (60,)),
        }


@needs_vizdoom
def test_playing_the_actions_of_a_shard_gives_its_frames(tmp_path):
    """The player saw walls and episodes ended, and yet the recorded actions alone tell the whole story."""
    (path,) = collect(tmp_path, frames_per_shard=400, shards=7, seed=3, processes=1, progress=False)[6:]
    with safe_open(path, "numpy") as shard:
        seed, frames, actions = int(shard.metadata()["seed"]), shard.get_tensor("frames"), shard.get_tensor("actions")
        assert shard.get_tensor("episodes")[-1] > 0, "no second episode; the test shows less than it says"
    assert np.array_equal(play("deadly_corridor", actions, seed), frames)


@needs_vizdoom
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path):
    settings = {"frames_per_shard": 30, "seed": 7, "size": (24, 32), "processes": 1, "progress": False}
    collect(tmp_path / "whole", shards=3, **settings)
    first = collect(tmp_path / "parts", shards=1, **settings)[0]
    (tmp_path / "parts" / "shard-0001.part").write_bytes(b"half a shard")
    stamp = first.stat().st_mtime_ns
    collect(tmp_path / "parts", shards=3, **settings)
    assert first.stat().st_mtime_ns == stamp, "a finished shard was made again"
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@needs_vizdoom
def test_a_directory_with_other_settings_is_refused(tmp_path):
    settings = {"frames_per_shard": 20, "shards": 1, "size": (24, 32), "processes": 1, "progress": False}
    collect(tmp_path, seed=1, **settings)
    with pytest.raises(ValueError, match="use an empty directory"):
        collect(tmp_path, seed=2, **settings)


@pytest.mark.parametrize("setting", ["frames_per_shard", "shards", "processes"])
def test_numbers_below_one_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, got 0"):
        collect(tmp_path, **{setting: 0})


@pytest.fixture
def toy():
    """A Gymnasium environment of a bright column that actions move; the episode ends at the right edge."""
    import gymnasium

    class Toy(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, (8, 16, 3), np.uint8)
        action_space = gymnasium.spaces.Discrete(3, start=-1)

        def picture(self):
            image = np.zeros((8, 16, 3), np.uint8)
            image[:, self.at] = 255
            return image

        def reset(self, *, seed=None, options=None):
            self.at = 4
            return self.picture(), {}

        def step(self, action):
            self.at = max(0, self.at + action)
            return self.picture(), 0.0, self.at == 15, False, {}

    gymnasium.register("Toy-v0", Toy)
    yield "Toy-v0"
    del gymnasium.registry["Toy-v0"]


@needs_gymnasium
def test_any_gymnasium_environment_is_collected_with_aligned_one_hot_actions(tmp_path, toy):
    (path,) = collect(
        tmp_path, env=toy, frames_per_shard=600, shards=1, seed=0, size=(8, 16), processes=1, progress=False
    )
    with safe_open(path, "numpy") as shard:
        frames, actions, episodes = (shard.get_tensor(key) for key in ("frames", "actions", "episodes"))
        assert json.loads(shard.metadata()["buttons"]) == ["action -1", "action 0", "action 1"]
    at = frames[:, 0, :, 0].argmax(1)
    begins = np.diff(episodes, prepend=-1) > 0
    assert begins.sum() > 1, "no second episode; the test shows nothing about ends"
    assert (at[begins] == 4).all()
    assert np.array_equal(actions.sum(1), ~begins)
    moved = actions.argmax(1)[~begins] - 1
    assert np.array_equal(at[~begins], np.maximum(0, np.roll(at, 1)[~begins] + moved))


@needs_gymnasium
def test_environments_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must give uint8 images"):
        collect(tmp_path, env="CartPole-v1", frames_per_shard=5, shards=1, processes=1, progress=False)
