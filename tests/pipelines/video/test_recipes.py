"""Every recipe draws what a slow loop, written here after its publication, draws with the same noise.

The loops know nothing of caches: they keep every frame's raw keys in a list, choose what a chunk sees, give each frame
its position, turn the keys by it, and attend in plain float64 sums.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from millstream.kernels import philox_normal
from millstream.pipelines.recipes import RECIPES, Recipe, add_recipe, find_recipe

SEED = 11
PROMPT = "a corgi surfs"


# The network, slowly


def turned(x, positions, height, width):
    """x [F, T, H, D] turned to its frame, row and column, as pairs of channels on the complex plane."""
    dim = x.shape[-1]
    spatial = 2 * (dim // 6)
    out = torch.zeros_like(x, dtype=torch.complex128)[..., ::2]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    for f, position in enumerate(positions):
        for token in range(x.shape[1]):
            row, column = divmod(token, width)
            angles = []
            for place, size in ((position, dim - 2 * spatial), (row, spatial), (column, spatial)):
                angles += [place * 10000.0 ** (-2 * i / size) for i in range(size // 2)]
            turn = torch.polar(torch.ones(dim // 2, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
            out[f, token] = pairs[f, token] * turn
    return torch.view_as_real(out).flatten(-2)


class Slow:
    """One pass of the transformer over new frames [C, F, h, w], seeing `past` frames: lists of (raw k, v) per layer."""

    def __init__(self, model, text):
        self.model, self.text = model, model.embed_text(text[None])

    def __call__(self, x, timesteps, positions, past, past_positions):
        model = self.model
        tokens = model.patch_embedding(x[None])
        height, width = tokens.shape[-2:]
        y = tokens.flatten(2).transpose(1, 2)
        frames = x.shape[1]
        temb, modulation = model.embed_time(torch.tensor([timesteps], dtype=torch.float32), None, y.dtype)
        fresh = []
        for layer, block in enumerate(model.blocks):
            shift, scale, gate, ff_shift, ff_scale, ff_gate = (block.scale_shift_table + modulation).unbind(2)

            def grouped(z, scale, shift):
                return (z.unflatten(1, (frames, -1)) * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)

            def gated(z, gate):
                return (z.unflatten(1, (frames, -1)) * gate[:, :, None]).flatten(1, 2)

            z = grouped(block.norm1(y), scale, shift)
            q = block.attn1.query(z)[0].unflatten(0, (frames, -1))
            k, v = (part[0].unflatten(0, (frames, -1)) for part in block.attn1.keys(z))
            fresh.append((k, v))
            keys = [turned(k, positions, height, width)]
            values = [v.double()]
            for (old_k, old_v), place in zip(past[layer], past_positions):
                keys.append(turned(old_k[None], [place], height, width))
                values.append(old_v[None].double())
            k, v = torch.cat(keys).flatten(0, 1), torch.cat(values).flatten(0, 1)
            q = turned(q, positions, height, width).flatten(0, 1)
            weights = torch.einsum("qhd,khd->hqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
            seen = torch.einsum("hqk,khd->qhd", weights, v).float()
            y = y + gated(block.attn1.out(seen[None]), gate)
            y = y + block.cross_attention(block.norm2(y), self.text[layer])
            y = y + gated(block.ffn(grouped(block.norm3(y), ff_scale, ff_shift)), ff_gate)
        shift, scale = (model.scale_shift_table + temb[:, :, None]).unbind(2)
        y = model.proj_out(
            (model.norm_out(y).unflatten(1, (frames, -1)) * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)
        )
        y = y.unflatten(1, (frames, height, width)).unflatten(-1, (1, 2, 2, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)[0], fresh


class Memory:
    """Raw keys and values of every frame, per layer."""

    def __init__(self, layers):
        self.frames = [[] for _ in range(layers)]

    def __len__(self):
        return len(self.frames[0])

    def add(self, fresh):
        for kept, (k, v) in zip(self.frames, fresh):
            kept += list(zip(k, v))

    def some(self, numbers):
        return [[kept[number] for number in numbers] for kept in self.frames]


def noise(frame, count, step, shape):
    """[C, count, h, w]"""
    each = [philox_normal(torch.tensor([SEED]), torch.tensor([f]), step, shape)[0] for f in range(frame, frame + count)]
    return torch.stack(each, dim=1)


def recent(memory, chunk, window, sinks):
    """Numbers of the past frames that a chunk sees: the sinks, and what is left of the window before it."""
    room = window - sinks - chunk
    first = max(min(sinks, len(memory)), len(memory) - room)
    return [*range(min(sinks, len(memory))), *range(first, len(memory))]


def absolute(numbers, memory, chunk):
    """Every frame stands where it was drawn."""
    return list(numbers), list(range(len(memory), len(memory) + chunk))


def relative(numbers, memory, chunk):
    """What is seen stands in a row, with the chunk at its tail."""
    return list(range(len(numbers))), list(range(len(numbers), len(numbers) + chunk))


def staircase(slow, shape, chunks, timesteps, chunk, window, sinks, place):
    """Self-Forcing's loop: denoise a chunk, re-noising with fresh noise, then one pass at 0 that is remembered."""
    memory, drawn = Memory(len(slow.model.blocks)), []
    for index in range(chunks):
        start = index * chunk
        x = noise(start, chunk, 0, shape)
        seen = recent(memory, chunk, window, sinks)
        past, positions = place(seen, memory, chunk)
        for step, t in enumerate(timesteps):
            flow, _ = slow(x, [t] * chunk, positions, memory.some(seen), past)
            x = x - t / 1000 * flow
            if step + 1 < len(timesteps):
                sigma = timesteps[step + 1] / 1000
                x = (1 - sigma) * x + sigma * noise(start, chunk, step + 1, shape)
        _, fresh = slow(x, [0.0] * chunk, positions, memory.some(seen), past)
        memory.add(fresh)
        drawn.append(x)
    return torch.cat(drawn, dim=1)


def restarting(slow, shape, chunks, timesteps, window, overlap, encode, decode):
    """CausVid's rollouts and Krea's blocks: a full memory begins anew from the last frames, the first one encoded from
    the picture it ends with."""
    chunk, layers = 3, len(slow.model.blocks)
    memory, drawn = Memory(layers), torch.zeros(shape[0], 0, *shape[1:])
    for index in range(chunks):
        if len(memory) + chunk > window:
            pictures = decode(drawn)
            context = drawn[:, -overlap:].clone()
            context[:, :1] = encode(pictures[-(4 * (overlap - 1) + 1)])
            memory = Memory(layers)
            memory.add(slow(context, [0.0] * overlap, range(overlap), memory.some([]), [])[1])
        start = index * chunk
        x = noise(start, chunk, 0, shape)
        seen = list(range(len(memory)))
        positions = list(range(len(memory), len(memory) + chunk))
        for step, t in enumerate(timesteps):
            flow, _ = slow(x, [t] * chunk, positions, memory.some(seen), seen)
            x = x - t / 1000 * flow
            if step + 1 < len(timesteps):
                sigma = timesteps[step + 1] / 1000
                x = (1 - sigma) * x + sigma * noise(start, chunk, step + 1, shape)
        memory.add(slow(x, [0.0] * chunk, positions, memory.some(seen), seen)[1])
        drawn = torch.cat([drawn, x], dim=1)
    return drawn


def rolling(slow, shape, chunks, timesteps):
    """Rolling Forcing's windows: blocks enter one per pass; the oldest leaves after its fifth."""
    chunk, units, sinks = 3, len(timesteps), 3
    memory = Memory(len(slow.model.blocks))
    noisy, drawn = {}, []
    for window in range(chunks + units - 1):
        first, last = max(0, window - units + 1), min(chunks - 1, window)
        if window < chunks:
            noisy[window] = noise(window * chunk, chunk, 0, shape)
        blocks = list(range(first, last + 1))
        steps = [window - block for block in blocks]
        seen = recent(memory, chunk * len(blocks), 21, sinks)
        x = torch.cat([noisy[block] for block in blocks], dim=1)
        told = [timesteps[step] for step in steps for _ in range(chunk)]
        past, positions = relative(seen, memory, chunk * len(blocks))
        flow, _ = slow(x, told, positions, memory.some(seen), past)
        x0 = x - torch.tensor(told).view(1, -1, 1, 1) / 1000 * flow
        for number, (block, step) in enumerate(zip(blocks, steps)):
            clean = x0[:, number * chunk : (number + 1) * chunk]
            if step + 1 < units:
                sigma = timesteps[step + 1] / 1000
                noisy[block] = (1 - sigma) * clean + sigma * noise(block * chunk, chunk, step + 1, shape)
                continue
            seen = recent(memory, chunk, 21, sinks)
            past, positions = relative(seen, memory, chunk)
            memory.add(slow(clean, [0.0] * chunk, positions, memory.some(seen), past)[1])
            drawn.append(clean)
    return torch.cat(drawn, dim=1)


def batched(slow, shape, chunks, timesteps):
    """StreamDiffusionV2: the first frame alone through all levels; then one frame enters per pass, and each level
    keeps what it saw."""
    layers = len(slow.model.blocks)
    memory = Memory(layers)
    x = noise(0, 1, 0, shape)
    for step, t in enumerate(timesteps):
        flow, fresh = slow(x, [t], [0], memory.some([]), [])
        x = x - t / 1000 * flow
        if step + 1 < len(timesteps):
            sigma = timesteps[step + 1] / 1000
            x = (1 - sigma) * x + sigma * noise(0, 1, step + 1, shape)
    drawn, memories = [x], [Memory(layers) for _ in timesteps]
    for kept in memories:
        kept.add(fresh)
    for frame in range(1, chunks):  # level after level, which the pass over all levels must equal
        x = noise(frame, 1, 0, shape)
        for step, t in enumerate(timesteps):
            seen = recent(memories[step], 1, 6, 3)
            past, positions = relative(seen, memories[step], 1)
            flow, fresh = slow(x, [t], positions, memories[step].some(seen), past)
            memories[step].add(fresh)
            x = x - t / 1000 * flow
            if step + 1 < len(timesteps):
                sigma = timesteps[step + 1] / 1000
                x = (1 - sigma) * x + sigma * noise(frame, 1, step + 1, shape)
        drawn.append(x)
    return torch.cat(drawn, dim=1)


WARPED = [1000.0, 937.5, 2500 / 3, 625.0]
GAME = [1000.0, 3330 / 3.664, 1665 / 2.332]
UNWARPED = [1000.0, 757.0, 522.0]
ROLLING = [1000.0, 20000 / 21, 15000 / 17, 10000 / 13, 5000 / 9]
BATCHED = [1000.0, 500.0]  # without an input the first level is pure noise


@torch.no_grad()
def published(name, pipe, chunks):
    text = pipe.encode_prompt(PROMPT)
    slow, shape = Slow(pipe.transformer, text), pipe.latent_size
    if name == "self_forcing":
        return staircase(slow, shape, chunks, WARPED, 3, 21, 0, absolute)
    if name == "longlive":
        return staircase(slow, shape, chunks, WARPED, 3, 12, 3, absolute)
    if name == "longlive_unbounded":
        return staircase(slow, shape, chunks, WARPED, 3, 12, 3, relative)
    if name == "matrix_game_2":  # with a picture, keys and mouse: see test_game
        return staircase(slow, shape, chunks, GAME, 3, 6, 0, absolute)
    if name == "rolling_forcing":
        return rolling(slow, shape, chunks, ROLLING)
    if name == "streamdiffusion_v2":
        return batched(slow, shape, chunks, BATCHED)

    std, mean = (torch.tensor(pipe.vae.config[key]).view(-1, 1, 1, 1) for key in ("latents_std", "latents_mean"))

    def decode(latents):
        return pipe.vae.decode((latents * std + mean)[None]).sample[0].movedim(1, 0) / 2 + 0.5

    def encode(picture):
        return (pipe.vae.encode(picture[None, :, None] * 2 - 1).latent_dist.mode()[0] - mean) / std

    if name == "causvid":
        return restarting(slow, shape, chunks, UNWARPED, 21, 3, encode, decode)
    assert name == "krea"
    return restarting(slow, shape, chunks, WARPED, 6, 3, encode, decode)


CHUNKS = {"self_forcing": 9, "causvid": 9, "krea": 5, "rolling_forcing": 10, "streamdiffusion_v2": 10}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_draws_what_its_published_loop_draws(name, make, monkeypatch):
    pipe = make(name, size=(32, 48))  # 2 x 3 tokens
    chunks = CHUNKS.get(name, 7)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(SEED))
    recipe = pipe.recipe
    pictures = 4 * chunks * recipe.chunk - 3
    drawn = pipe(PROMPT, num_frames=pictures, output_type="latent").frames
    expected = published(name, pipe, chunks)
    assert drawn.shape == expected.shape
    assert (drawn - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (drawn[:, -1] - drawn[:, 0]).abs().max() > 0.1, "frames differ, or nothing was tested"


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("self_forcing", [1000, 937.5, 833.333, 625]),
        ("causvid", [1000, 757, 522]),
        ("longlive", [1000, 937.5, 833.333, 625]),
        ("longlive_unbounded", [1000, 937.5, 833.333, 625]),
        ("rolling_forcing", [1000, 952.381, 882.353, 769.231, 555.556]),
        ("krea", [1000, 937.5, 833.333, 625]),
        ("matrix_game_2", [1000, 908.843, 713.979]),
        ("streamdiffusion_v2", [700, 500]),
    ],
)
def test_timesteps_are_the_published_ones(name, timesteps):
    assert [1000 * sigma for sigma in RECIPES[name].sigmas()] == pytest.approx([*timesteps, 0], abs=1e-3)


def test_kreas_strength_scales_its_list_before_the_table():
    """`linspace(1000 strength, 0, 5)` looked up in the table of shift 5; the fifth, 0, changes nothing."""
    table = [5 * s / (1 + 4 * s) for s in (0.6, 0.45, 0.3, 0.15)]
    assert RECIPES["krea"].sigmas(0.6) == pytest.approx([*table, 0])
    assert RECIPES["krea"].sigmas(0.0) == [0.0]


def test_the_table_can_be_extended_and_names_cannot_be_taken_twice(monkeypatch):
    monkeypatch.setattr("millstream.pipelines.recipes.RECIPES", dict(RECIPES))
    mine = dataclasses.replace(RECIPES["longlive"], name="mine", window=15)
    assert add_recipe(mine) is mine
    assert find_recipe("mine") is mine
    add_recipe(mine)
    with pytest.raises(ValueError, match="there is a recipe 'mine' already"):
        add_recipe(dataclasses.replace(mine, window=18))
    with pytest.raises(ValueError, match=r"no recipe 'self-forcing'; there are self_forcing, .* add_recipe adds more"):
        find_recipe("self-forcing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": (500, 750)}, r"timesteps must decrease from at most 1000 .* got \[500.0, 750.0\]"),
        ({"timesteps": ()}, "timesteps must decrease"),
        ({"window": 2}, "1 chunks of 3 frames do not fit a window of 2 with 0 sinks"),
        ({"plan": "triangle"}, "a triangle has 2 to 4 units, other plans 1; got triangle, 1"),
        ({"units": 2}, "got staircase, 2"),
        ({"overlap": 3, "sinks": 3}, "an overlap needs a staircase without sinks"),
        ({"plan": "spiral"}, "plan must be staircase, triangle or batch, got 'spiral'"),
        ({"context_timestep": 1000.0}, r"context_timestep in \[0, 1000\)"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"name": "x", "timesteps": (1000, 750, 500, 250), **changes})
