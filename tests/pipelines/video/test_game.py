"""A video model that is played: the picture its world begins with, keys and mouse, against the published loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from millstream.kernels import philox_normal
from millstream.models.actions import Inputs
from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.memory import memory_plan, plan_for, weight_bytes
from millstream.pipelines.video import VideoPipeline
from millstream.pipelines.video_actions import BUTTONS, GREY

MODULES = {"blocks": [0], "hidden_size": 12, "heads_num": 2, "keyboard_hidden_dim": 32, "mouse_hidden_dim": 32}
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 12,
    "out_channels": 4,
    "text_dim": None,
    "image_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}


def make_game(parts, buttons=4, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        modules = MODULES | {"keyboard_dim_in": buttons, "rope_dim_list": [8, 4, 4], "enable_mouse": buttons != 7}
        transformer = CausalTransformer3DModel(**CONFIG, action_modules=modules).eval()
        for name, parameter in transformer.named_parameters():
            if "action_model.proj" in name or "proj_out.weight" in name:
                parameter.data.mul_(3.0)
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        ).eval()
    others = {"recipe": "matrix_game_2", "size": (16, 32), "image_encoder": clip}
    pipe = VideoPipeline(transformer, parts()["vae"], None, None, **others | settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def game(parts):
    return partial(make_game, parts)


@pytest.fixture
def picture():
    return torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(8))


def walk(session, script):
    drawn = []
    for held in script:
        session.steer(keys=held)
        drawn += [chunk.data for chunk in session.step()]
    return torch.cat(drawn)


SCRIPT = [{"KeyW"}, {"KeyW", "ArrowLeft"}, set(), {"KeyD"}]


def test_keys_and_the_picture_matter_and_the_past_does_not_change(game, picture, seeded):
    pipe = game()
    first = walk(pipe.stream("", image=picture, generator=seeded()), SCRIPT)
    assert first.shape == (9 + 3 * 12, 3, 16, 32)
    assert torch.equal(first, walk(game().stream("", image=picture, generator=seeded()), SCRIPT))
    other = walk(pipe.stream("", image=picture, generator=seeded()), [*SCRIPT[:2], {"KeyS"}, set()])
    assert torch.equal(first[:21], other[:21])
    assert (first[21:] - other[21:]).abs().max() > 1e-3
    elsewhere = walk(pipe.stream("", image=1 - picture, generator=seeded()), SCRIPT)
    assert (first[:9] - elsewhere[:9]).abs().max() > 1e-3


@torch.no_grad()
def test_the_first_two_chunks_are_those_of_the_published_loop(game, picture, seeded):
    """Noise, steps and renoise, the picture beside the noise, and what each frame hears, written out."""
    pipe = game()
    session = pipe.stream("", image=picture, generator=seeded())
    session.steer(keys={"KeyW"})
    session.step()
    seed = session.state.seed
    tokens, grey = pipe.see(picture)
    model, shape = pipe.transformer, (4, 2, 4)
    actions = {0: [1, 0, 0, 0, 0.0, 0.0], 1: [0, 0, 0, 1, 0.1, 0.0]}
    raw = [actions[0 if picture_number < 9 else 1] for picture_number in range(21)]
    cond = torch.zeros(1, 8, 6, 2, 4)
    cond[:, :4, 0] = 1
    cond[:, 4:] = grey[:, :6]

    def drawn(frame, step):
        number = torch.tensor([seed] * 3), torch.arange(frame, frame + 3)
        return philox_normal(*number, step, shape).transpose(0, 1)[None]

    cache = pipe._make_cache(1)
    text = model.embed_text(tokens[None])
    results = []
    for start in (0, 3):
        chunk = cache.open([0], 3)
        groups = [[raw[max(0, 4 * n + back)] for back in range(-12, 0)] for n in range(start, start + 3)]
        heard = torch.tensor(groups)[None]
        inputs = Inputs(heard[..., :4], heard[..., 4:])
        given = {"text_keys": text, "cache": chunk, "inputs": inputs, "return_dict": False}
        x = drawn(start, 0)
        sigmas = [1.0, 5 * 0.666 / (1 + 4 * 0.666), 5 * 0.333 / (1 + 4 * 0.333)]
        for step, sigma in enumerate(sigmas):
            both = torch.cat([x, cond[:, :, start : start + 3]], dim=1)
            (flow,) = model(both, torch.full((1,), 1000 * sigma), **given)
            clean = x - sigma * flow
            if step < 2:
                x = (1 - sigmas[step + 1]) * clean + sigmas[step + 1] * drawn(start, step + 1)
        results.append(clean)
        model(torch.cat([clean, cond[:, :, start : start + 3]], dim=1), torch.zeros(1), **given)
        chunk.commit()
    (first,) = session.state.finished
    torch.testing.assert_close(first[None], results[0], atol=1e-4, rtol=1e-3)
    session.steer(keys={"KeyD", "ArrowUp"})
    session.step()
    torch.testing.assert_close(session.state.finished[0][None], results[1], atol=1e-4, rtol=1e-3)


def test_grey_is_grey_from_where_the_codec_no_longer_sees_the_picture(game, picture):
    """So that a world goes on for ever with the last of its latents: Wan's own depth, which a toy lacks."""
    from diffusers import AutoencoderKLWan

    from millstream.models.wan_vae import WanEncoder

    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKLWan(base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    encoder = WanEncoder(vae)
    latents = []
    for start in (picture, 1 - picture):
        state = encoder.begin(16, 32)
        parts = [encoder.encode(start[None, None], state)]
        parts += [encoder.encode(torch.full((1, 4, 3, 16, 32), 0.5), state) for _ in range(GREY - 1)]
        latents.append(torch.cat(parts, dim=2))
    difference = (latents[0] - latents[1]).abs().amax((0, 1, 3, 4))
    assert difference[0] > 1e-3
    assert difference[-1] == 0
    assert torch.equal(latents[0][:, :, -1], latents[0][:, :, -2])


def test_the_mouse_turns_as_the_arrows_do_and_no_further(game):
    from millstream.streaming.types import GameControl

    pipe = game()
    up = pipe.action(GameControl(keys={"ArrowUp"}))
    assert up.tolist() == pytest.approx([0, 0, 0, 0, 0.1, 0])
    assert pipe.action(GameControl(mouse=(0.0, -40.0))).tolist() == pytest.approx(up.tolist())
    assert pipe.action(GameControl(mouse=(20.0, 500.0))).tolist() == pytest.approx([0, 0, 0, 0, -0.1, 0.05])
    assert game(buttons=2).action(GameControl(keys={"KeyW", "KeyA"})).tolist() == pytest.approx([1, 0, 0, -0.1])
    runner = game(buttons=7)
    assert runner.action(GameControl()).tolist()[:7] == [1, 0, 0, 0, 0, 0, 0]
    assert runner.action(GameControl(keys={"KeyZ"})).tolist()[:7] == [0, 0, 0, 1, 0, 0, 0]
    assert set(BUTTONS) == {2, 4, 7}


def test_what_a_played_model_refuses(game, make, picture):
    pipe = game()
    with pytest.raises(ValueError, match="begins with a picture: give image="):
        pipe.stream("")
    session = pipe.stream("", image=picture)
    with pytest.raises(ValueError, match="unknown key KeyQ; the keys of this world are ArrowDown"):
        session.steer(keys={"KeyQ"})
    with pytest.raises(ValueError, match="there is no image encoder"):
        game(image_encoder=None).stream("", image=picture).step()
    with pytest.raises(ValueError, match="unknown control keys"):
        make().stream("a corgi surfs").steer(keys={"KeyW"})
    with pytest.raises(ValueError, match="a world that is played redraws no video"):
        game()("", image=picture, video=[picture] * 20)


def test_a_session_is_saved_and_goes_on_the_same(game, picture, seeded):
    pipe = game()
    session = pipe.stream("", image=picture, generator=seeded())
    walk(session, SCRIPT[:2])
    saved = session.snapshot()
    rest = walk(session, SCRIPT[2:])
    again = game().stream("", image=picture, generator=seeded(9))
    again.restore(saved)
    assert torch.equal(rest, walk(again, SCRIPT[2:]))


def test_its_plan_of_memory_is_what_it_takes_and_warming_up_draws_for_nobody(game, picture):
    pipe = game()
    pipe.warmup()
    plan = memory_plan(pipe)
    with pipe.stream("", image=picture) as session:
        session.step()
        assert plan.kv == pipe.arena.cache.bytes
        assert plan.prompts == sum(part.nbytes for layer in pipe.arena.text for part in layer)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_its_plan_counts_clip_before_anything_is_loaded(game, tmp_path, dtype):
    game().save_pretrained(tmp_path)
    empty, plan = plan_for(tmp_path, torch_dtype=dtype)
    loaded = VideoPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert empty.image_encoder.device.type == "meta"
    assert plan.weights["image_encoder"] == weight_bytes(loaded.image_encoder) > 0
    assert plan == memory_plan(loaded)
    assert plan.inputs == {}, "its picture is part of every stream"
    (tmp_path / "image_encoder" / "config.json").write_text("{bad")
    with pytest.raises(ValueError, match="image_encoder holds no image encoder that can be read"):
        plan_for(tmp_path)
