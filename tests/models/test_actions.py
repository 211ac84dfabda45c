"""Action modules: names and shapes as published, and the published loop over a rolling cache, written out slowly."""

from __future__ import annotations

import pytest
import torch

from millstream.models.actions import ActionCache, Inputs
from millstream.models.mixers import make_cache
from millstream.models.transformer import CausalTransformer3DModel
from millstream.streaming.kv_cache import Window

HEADS, HIDDEN, CHUNK, WINDOW = 2, 32, 3, 6
MODULES = {
    "blocks": [0, 2],
    "keyboard_dim_in": 4,
    "hidden_size": 12,
    "heads_num": HEADS,
    "keyboard_hidden_dim": HIDDEN,
    "mouse_hidden_dim": HIDDEN,
    "rope_dim_list": [8, 4, 4],
}


def make_model(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = CausalTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=None,
            image_dim=10,
            freq_dim=16,
            ffn_dim=32,
            num_layers=4,
            action_modules=MODULES | settings,
        )
        for name, parameter in model.named_parameters():
            if "action_model.proj" in name or "norm.weight" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.3)  # norms' weights must not matter
    return model.eval()


@pytest.fixture
def model():
    return make_model()


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heard(frames, seed=0, buttons=4):
    """Keys and mouse of whole streams as raw pictures, and as the 12 pictures before each latent frame."""
    keyboard = (draw(seed, 4 * frames, buttons) > 0).float()
    mouse = draw(seed + 1, 4 * frames, 2)
    at = (4 * torch.arange(frames)[:, None] + torch.arange(-12, 0)).clamp_min(0)
    return keyboard, mouse, Inputs(keyboard[at][None], mouse[at][None])


class Published:
    """One module over one stream, chunk by chunk, its caches rolled by hand as in the published code; B = 1."""

    def __init__(self, module, places):
        self.module, self.places = module, places
        self.old = {name: [] for name in ("mouse_k", "mouse_v", "key_k", "key_v")}

    def rope(self, x, start):
        """x [frames, ..., D]; pairs of the first 8 channels turn by the frame's number."""
        out = x.clone()
        for frame in range(len(x)):
            for pair in range(4):
                angle = torch.tensor((start + frame) / 256 ** (2 * pair / 8), dtype=torch.float64)
                a, b = x[frame, ..., 2 * pair], x[frame, ..., 2 * pair + 1]
                out[frame, ..., 2 * pair] = a * angle.cos() - b * angle.sin()
                out[frame, ..., 2 * pair + 1] = b * angle.cos() + a * angle.sin()
        return out

    def norm(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def __call__(self, x, keyboard, mouse, start, keep):
        m, frames = self.module, CHUNK
        x = x.reshape(frames, self.places, -1)
        padded_mouse = torch.cat([mouse[:1].expand(12, -1), mouse])
        padded_keys = m.keyboard_embed(torch.cat([keyboard[:1].expand(12, -1), keyboard]))
        groups = [range(4 * n, 4 * n + 12) for n in range(start, start + frames)]
        moved = torch.stack([padded_mouse[list(g)].flatten() for g in groups])[:, None].expand(-1, self.places, -1)
        qkv = m.t_qkv(m.mouse_mlp(torch.cat([x, moved], -1))).reshape(frames, self.places, 3, HEADS, -1)
        q, k, v = self.rope(self.norm(qkv[:, :, 0]), start), self.rope(self.norm(qkv[:, :, 1]), start), qkv[:, :, 2]
        k, v = self.remembered("mouse_k", k, keep), self.remembered("mouse_v", v, keep)
        weights = torch.einsum("fshd,kshd->shfk", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("shfk,kshd->fshd", weights.softmax(-1), v)
        x = x + m.proj_mouse(out.flatten(2))
        q = self.rope(self.norm(m.mouse_attn_q(x).unflatten(-1, (HEADS, -1))), start)
        kv = m.keyboard_attn_kv(torch.stack([padded_keys[list(g)].flatten() for g in groups]))
        kv = kv.reshape(frames, 2, HEADS, -1)
        k = self.remembered("key_k", self.rope(self.norm(kv[:, 0]), start), keep)
        v = self.remembered("key_v", kv[:, 1], keep)
        weights = torch.einsum("fshd,khd->shfk", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("shfk,khd->fshd", weights.softmax(-1), v)
        return (x + m.proj_keyboard(out.flatten(2))).reshape(1, frames * self.places, -1)

    def remembered(self, name, new, keep):
        seen = torch.cat([*self.old[name], new])[-WINDOW:]
        if keep:
            self.old[name] = [seen]
        return seen


@torch.no_grad()
def test_the_modules_are_the_published_loop(model, monkeypatch):
    """Two passes over every chunk, the second one kept, for longer than the memory reaches."""
    chunks, places = 4, 6
    keyboard, mouse, inputs = heard(chunks * CHUNK)
    cache = make_cache(model, rows=1, tokens_per_frame=places, window=Window(WINDOW, block=CHUNK))
    assert isinstance(cache, ActionCache)
    loops = {layer: Published(model.blocks[layer].action_model, places) for layer in (0, 2)}
    seen = []

    def compared(layer, inner):
        def call(x, number, context):
            mine = inner(x, number, context)
            start, keep = seen[-1]
            theirs = loops[layer](x, keyboard, mouse, start, keep)
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
            return mine

        return call

    for layer in loops:
        module = model.blocks[layer].action_model
        monkeypatch.setattr(module, "forward", compared(layer, module.forward))
    text = model.embed_text(draw(3, 1, 5, 10))
    for number in range(chunks):
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        chunk = cache.open([0])
        given = {"cache": chunk, "text_keys": text, "inputs": Inputs(*(each[:, part] for each in inputs))}
        for keep in (False, True):
            seen.append((number * CHUNK, keep))
            model(draw(10 * number + keep, 1, 4, CHUNK, 4, 6), torch.full((1,), 400.0), **given)
        chunk.commit()
    assert len(seen) == 2 * chunks


@torch.no_grad()
@pytest.mark.parametrize("mouse", [True, False])
def test_cached_equals_one_pass_under_the_window(mouse):
    model, frames = make_model(enable_mouse=mouse), 9
    inputs = heard(frames)[2]
    latents, time, window = draw(1, 1, 4, frames, 4, 6), torch.full((1,), 300.0), Window(WINDOW, block=CHUNK)
    text = model.embed_text(draw(3, 1, 5, 10))
    whole = model(latents, time, text_keys=text, window=window, inputs=inputs).sample
    cache = make_cache(model, rows=2, tokens_per_frame=6, window=window)
    parts = []
    for start in range(0, frames, CHUNK):
        chunk, part = cache.open([1]), slice(start, start + CHUNK)
        given = Inputs(*(each[:, part] for each in inputs))
        parts.append(model(latents[:, :, part], time, text_keys=text, cache=chunk, inputs=given).sample)
        chunk.commit()
        if start == 0:  # a row that moves house goes on as if it had not
            saved = cache.snapshot(1)
            cache.reset(1)
            cache.restore(1, saved)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=2e-5, rtol=1e-4)
    assert cache.bytes > sum(store.nbytes for store in (cache.k, cache.v))


@torch.no_grad()
def test_keys_and_mouse_matter_and_are_asked_for(model):
    latents, time, text = draw(1, 1, 4, 3, 4, 6), torch.full((1,), 300.0), draw(3, 1, 5, 10)
    inputs = heard(3)[2]
    plain = model(latents, time, text, inputs=inputs).sample
    for other in (inputs._replace(keyboard=1 - inputs.keyboard), inputs._replace(mouse=inputs.mouse + 1)):
        assert (model(latents, time, text, inputs=other).sample - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="this model hears keys and mouse"):
        model(latents, time, text)
    with pytest.raises(ValueError, match="this model hears the mouse too"):
        model(latents, time, text, inputs=inputs._replace(mouse=None))


def test_published_names_and_shapes():
    """Of the universal model's block 0, as its code makes them from its config."""
    with torch.device("meta"):
        model = CausalTransformer3DModel(
            num_attention_heads=12,
            ffn_dim=8960,
            num_layers=1,
            in_channels=36,
            text_dim=None,
            image_dim=1280,
            action_modules={"blocks": [0]},
        )
    shapes = {
        name.removeprefix("blocks.0.action_model."): tuple(value.shape)
        for name, value in model.state_dict().items()
        if "action_model" in name
    }
    assert shapes == {
        "keyboard_embed.0.weight": (128, 4),
        "keyboard_embed.0.bias": (128,),
        "keyboard_embed.2.weight": (128, 128),
        "keyboard_embed.2.bias": (128,),
        "mouse_mlp.0.weight": (1024, 2 * 4 * 3 + 1536),
        "mouse_mlp.0.bias": (1024,),
        "mouse_mlp.2.weight": (1024, 1024),
        "mouse_mlp.2.bias": (1024,),
        "mouse_mlp.3.weight": (1024,),
        "mouse_mlp.3.bias": (1024,),
        "t_qkv.weight": (3072, 1024),
        "img_attn_q_norm.weight": (64,),
        "img_attn_k_norm.weight": (64,),
        "proj_mouse.weight": (1536, 1024),
        "key_attn_q_norm.weight": (64,),
        "key_attn_k_norm.weight": (64,),
        "mouse_attn_q.weight": (1024, 1536),
        "keyboard_attn_kv.weight": (2048, 128 * 3 * 4),
        "proj_keyboard.weight": (1536, 1024),
    }
    assert not any("text_embedder" in name for name in model.state_dict())
