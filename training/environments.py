"""Episodes from real games: what a world model learns from, and what it is measured against.

ViZDoom runs the eight scenarios of `prompts.WORLDS` with one common set of seven buttons, two tics per frame (17.5
frames a second), no status bar, and the random player of `behaviour`. Any Gymnasium environment with image observations
and discrete actions is collected the same way.

Convention, everywhere: `actions[i]` is the action that LED TO frame `i`. The first frame of an episode has no such
action, so its row is zeros. One stream holds many episodes; `episodes[i]` counts them from 0.

A shard is one safetensors file with `frames` uint8 [N, H, W, 3] (RGB), `actions` uint8 [N, A] (0 or 1 per button) and
`episodes` int32 [N]; its metadata name the world, its index, the buttons, and all that decides the bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .behaviour import BUTTONS, Wanderer
from .prompts import WORLDS

FRAME_SKIP = 2
RATE = 35 / FRAME_SKIP
"""Frames per second of every recording: the game runs at 35 tics per second."""
NEAR = 4.0
"""ViZDoom depth (0 to 255) of a view that is filled by one wall."""

Bytes = NDArray[np.uint8]


class Recording(NamedTuple):
    """`frames` uint8 [N, H, W, 3], `actions` uint8 [N, A] that led to them, `episodes` int32 [N]."""

    frames: Bytes
    actions: Bytes
    episodes: NDArray[np.int32]


def play(world: str, actions: Bytes, seed: int, *, size: tuple[int, int] = (96, 128)) -> Bytes:
    """The true game under given actions: frames uint8 [N, H, W, 3]; `record` also tells where episodes begin."""
    return record(world, actions, seed, size=size).frames


def record(world: str, actions: Bytes, seed: int, *, size: tuple[int, int] = (96, 128)) -> Recording:
    """Play `world` with `actions`; when an episode ends (death, exit, two minutes) the next one begins.

    Args:
        world: the name of one of `WORLDS`.
        actions: [N, 7], one column per button of `BUTTONS`, non-zero is pressed. `actions[i]` leads to frame `i`; it is
            not used where frame `i` begins an episode, and the returned actions are zero there.
        seed: of the game; the same seed and actions give the same bytes.
        size: (height, width) of the frames.

    Raises:
        ValueError: an unknown world, or actions of another shape.
        ImportError: vizdoom or cv2 is not installed.
    """
    names = [world.name for world in WORLDS]
    if world not in names:
        raise ValueError(f"unknown world {world!r}; choose one of {', '.join(names)}")
    actions = np.asarray(actions)
    if actions.ndim != 2 or actions.shape[1] != len(BUTTONS) or not len(actions):
        raise ValueError(
            f"actions must have shape [frames, {len(BUTTONS)}] for {', '.join(BUTTONS)}, got {actions.shape}"
        )
    pressed = iter((actions != 0).astype(np.uint8).tolist())
    with _game(world, seed) as game:
        return _run_game(game, len(actions), lambda facing_wall: next(pressed), size)


def _run_game(game: Any, count: int, press: Callable[[bool], list[int]], size: tuple[int, int]) -> Recording:
    """Record `count` frames. `press` gives the buttons for every frame; it's told whether the last one faces a wall."""
    cv2 = _import("cv2")
    height, width = size
    frames = np.empty((count, height, width, 3), np.uint8)
    actions = np.zeros((count, len(BUTTONS)), np.uint8)
    episodes = np.zeros(count, np.int32)
    episode, facing_wall = 0, False
    for index in range(count):
        buttons = press(facing_wall)
        if index:
            game.make_action(buttons, FRAME_SKIP)
        if game.is_episode_finished():
            game.new_episode()
            episode += 1
        elif index:
            actions[index] = buttons
        state = game.get_state()
        cv2.resize(state.screen_buffer, (width, height), dst=frames[index], interpolation=cv2.INTER_AREA)
        episodes[index] = episode
        facing_wall = bool(state.depth_buffer[45:75, 40:120].mean() < NEAR)  # the middle of 120x160
    return Recording(frames, actions, episodes)


@contextmanager
def _game(world: str, seed: int) -> Iterator[Any]:
    """A running ViZDoom game, silent and without a window."""
    os.environ.setdefault("ALSOFT_DRIVERS", "null")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    vizdoom = _import("vizdoom")
    game = vizdoom.DoomGame()
    game.load_config(os.path.join(vizdoom.scenarios_path, f"{world}.cfg"))
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in BUTTONS])
    game.set_available_game_variables([])
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_render_hud(False)
    game.set_window_visible(False)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_doom_skill(1)  # half damage: episodes last twice as long, so long windows exist in every world
    game.set_episode_timeout(2100)
    game.add_game_args("+sv_infiniteammo 1")  # or ATTACK would mean nothing after the first fifty shots
    game.set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        _start_in(scratch, game)
        try:
            yield game
        finally:
            game.close()


def _start_in(scratch: str, game: Any) -> None:
    """Start the engine in `scratch`: it drops its settings into the working directory, where others would read them."""
    home = os.getcwd()
    os.chdir(scratch)
    try:
        game.init()
    finally:
        os.chdir(home)


def _import(module: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise ImportError(f'{module} is needed to collect data: pip install "millstream[train]"') from error


@dataclass(frozen=True, slots=True)
class _Job:
    path: Path
    world: str
    index: int
    frames: int
    seed: int
    size: tuple[int, int]
    env: str | None


def collect(
    directory: str | os.PathLike[str],
    *,
    frames_per_shard: int = 20_000,
    shards: int = 48,
    processes: int | None = None,
    seed: int = 0,
    size: tuple[int, int] = (96, 128),
    env: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Fill `directory` with shards of random play; finished shards are kept, so an interrupted run goes on.

    Shard `i` plays world `i % len(WORLDS)`. Its bytes depend on `seed`, `i`, `frames_per_shard` and `size` alone, not
    on `processes`. A shard takes `frames_per_shard * height * width * 3` bytes: 737 MB for the defaults.

    Args:
        directory: is made if missing.
        processes: worker processes, each with a whole shard in memory; None takes one per CPU core, 1 works in this
            process. They are spawned, so a script that calls this needs `if __name__ == "__main__":`.
        env: a Gymnasium environment id (`"module:Name-v0"` imports the module first) instead of ViZDoom: image
            observations, discrete actions written one-hot.
        progress: show a progress bar over shards.

    Returns:
        The paths of all shards, in order.

    Raises:
        ValueError: a number below 1, or a shard in `directory` that was collected with other settings.
        ImportError: vizdoom, gymnasium or cv2 is not installed.
    """
    processes = os.cpu_count() or 1 if processes is None else processes
    for name, value in (("frames_per_shard", frames_per_shard), ("shards", shards), ("processes", processes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    jobs = [_job(directory, index, frames_per_shard, seed, size, env) for index in range(shards)]
    missing = [job for job in jobs if not _is_done(job)]
    _work(missing, min(processes, max(1, len(missing))), done=shards - len(missing), progress=progress)
    return [job.path for job in jobs]


def _work(jobs: list[_Job], workers: int, *, done: int, progress: bool) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=done + len(jobs), initial=done, unit="shard", desc="collect", disable=not progress) as bar:
        if workers == 1:
            for job in jobs:
                _write_shard(job)
                bar.update()
            return
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(_write_shard, jobs):
                bar.update()


def _job(directory: Path, index: int, frames: int, seed: int, size: tuple[int, int], env: str | None) -> _Job:
    which = 0 if env else index % len(WORLDS)
    name = env or WORLDS[which].name
    own_seed = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])  # no two (seed, index) share a stream
    return _Job(directory / f"shard-{index:04d}.safetensors", name, which, frames, own_seed, size, env)


def _metadata(job: _Job) -> dict[str, str]:
    return {
        "world": job.world,
        "world_index": str(job.index),
        "frames": str(job.frames),
        "seed": str(job.seed),
        "size": json.dumps(job.size),
    }


def _is_done(job: _Job) -> bool:
    from safetensors import safe_open

    if not job.path.exists():
        return False
    with safe_open(job.path, "numpy") as shard:
        found = shard.metadata() or {}
    wanted = _metadata(job)
    if any(found.get(key) != value for key, value in wanted.items()):
        raise ValueError(f"{job.path} was collected as {found}, but {wanted} is wanted; use an empty directory")
    return True


def _write_shard(job: _Job) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(job.seed)
    if job.env:
        recording, buttons = _record_gymnasium(job, rng)
    else:
        recording, buttons = _wander(job, rng), BUTTONS
    unfinished = job.path.with_suffix(".part")
    save_file(recording._asdict(), unfinished, {**_metadata(job), "buttons": json.dumps(buttons)})
    os.replace(unfinished, job.path)


def _wander(job: _Job, rng: np.random.Generator) -> Recording:
    wanderer = Wanderer(rng)
    with _game(job.world, job.seed) as game:
        return _run_game(game, job.frames, lambda facing_wall: wanderer.press(facing_wall=facing_wall), job.size)


def _record_gymnasium(job: _Job, rng: np.random.Generator) -> tuple[Recording, tuple[str, ...]]:
    """Random play with held actions in a Gymnasium environment."""
    cv2, gymnasium = _import("cv2"), _import("gymnasium")
    env = gymnasium.make(job.world)
    count = _discrete_actions(env, job.world)
    start = int(env.action_space.start)
    height, width = job.size
    frames = np.empty((job.frames, height, width, 3), np.uint8)
    actions = np.zeros((job.frames, count), np.uint8)
    episodes = np.zeros(job.frames, np.int32)
    episode, action, over = -1, 0, True
    for index in range(job.frames):
        if not over:
            action = int(rng.integers(count)) if rng.random() < 0.3 else action
            observation, _, terminated, truncated, _ = env.step(action + start)
            actions[index, action] = 1
            over = terminated or truncated
        else:
            observation, _ = env.reset(seed=int(rng.integers(2**31)))
            episode, over = episode + 1, False
        cv2.resize(np.ascontiguousarray(observation), (width, height), dst=frames[index], interpolation=cv2.INTER_AREA)
        episodes[index] = episode
    env.close()
    return Recording(frames, actions, episodes), tuple(f"action {number + start}" for number in range(count))


def _discrete_actions(env: Any, name: str) -> int:
    shape, dtype = env.observation_space.shape, env.observation_space.dtype
    if shape is None or len(shape) != 3 or shape[2] != 3 or dtype != np.uint8:
        raise ValueError(f"{name} must give uint8 images [H, W, 3] as observations, got {env.observation_space}")
    if not hasattr(env.action_space, "n"):
        raise ValueError(f"{name} must have discrete actions, got {env.action_space}; wrap it to offer a choice")
    return int(env.action_space.n)
