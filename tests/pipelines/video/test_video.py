"""The video pipeline: a clip is its stream, streams do not touch each other, and a saved one goes on to the bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import millstream as ms
from millstream.pipelines.recipes import RECIPES
from millstream.streaming import Snapshot, step_together


def pictures(session, steps):
    """What `steps` steps and a flush give."""
    chunks = [chunk for _ in range(steps) for chunk in session.step()]
    return torch.cat([chunk.data for chunk in [*chunks, *session.flush()]])


@pytest.mark.parametrize("name", RECIPES)
def test_a_clip_is_its_stream_drained(name, make, seeded):
    pipe = make(name)
    clip = pipe("a corgi surfs", num_frames=33, generator=seeded(), output_type="pt").frames
    assert clip.shape == (33, 3, 16, 32)
    assert clip.min() >= 0
    assert clip.max() <= 1
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        drawn = pictures(session, 3 if pipe.recipe.chunk == 3 else 9)
    assert torch.equal(clip, drawn[:33])


def test_iterating_gives_the_same_pictures_one_by_one(pipe, seeded):
    clip = pipe("a corgi surfs", num_frames=21, generator=seeded(), output_type="pt").frames
    stream = pipe.stream("a corgi surfs", generator=seeded())
    assert torch.equal(torch.stack(list(itertools.islice(stream, 21))), clip)
    stream.close()


@pytest.mark.parametrize("name", ["self_forcing", "rolling_forcing", "streamdiffusion_v2"])
def test_chunks_follow_each_other_and_bear_the_version_they_were_begun_under(name, make, seeded):
    pipe, begun, chunks = make(name), [], []
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        for prompt in ("a corgi surfs", "a fox", "a fox", "the snow", "the sea", "a fox", "a fox"):
            if session.control.prompt != prompt:
                session.steer(prompt=prompt)
            begun.append(session.control.version)
            chunks += session.step()
        chunks += session.flush()
    assert [chunk.version for chunk in chunks] == begun
    assert [chunk.start for chunk in chunks] == [0, *itertools.accumulate(len(chunk.data) for chunk in chunks[:-1])]
    assert {chunk.rate for chunk in chunks} == {16.0}


def test_the_seed_decides(pipe, seeded):
    one, again, other = (
        pipe("a corgi surfs", num_frames=9, generator=seeded(seed), output_type="pt").frames for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert (one - other).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["longlive", "streamdiffusion_v2", "rolling_forcing"])
def test_sessions_do_not_touch_each_other(name, make, seeded):
    pipe = make(name)
    alone = {}
    for prompt, seed in (("a corgi surfs", 0), ("the red fox", 1)):
        with pipe.stream(prompt, generator=seeded(seed)) as session:
            alone[prompt] = pictures(session, 6)
    one = pipe.stream("a corgi surfs", generator=seeded(0))
    two = pipe.stream("the red fox", generator=seeded(1))
    got = {"a corgi surfs": [], "the red fox": []}
    for step in range(6):
        together = step_together([one, two]) if step % 2 else [one.step(), two.step()]
        for prompt, chunks in zip(got, together):
            got[prompt] += [chunk.data for chunk in chunks]
    for prompt, session in zip(got, (one, two)):
        got[prompt] += [chunk.data for chunk in session.flush()]
        session.close()
        torch.testing.assert_close(torch.cat(got[prompt]), alone[prompt], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_restored_stream_goes_on_to_the_bit(name, make, seeded, tmp_path):
    pipe = make(name)
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        for _ in range(6):
            session.step()
        session.steer(prompt="the red fox", switch="lerp")
        session.step()
        path = session.snapshot().save(tmp_path / "stream.safetensors")
        expected = pictures(session, 5)
    elsewhere = make(name)
    with elsewhere.stream("the snow", generator=seeded(9)) as other:
        other.step()
        other.restore(Snapshot.load(path))
        assert torch.equal(pictures(other, 5), expected)


def test_a_fork_draws_the_same_until_it_is_steered(pipe, seeded):
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        session.step()
        twin = session.fork()
        (one,), (two,) = session.step(), twin.step()
        torch.testing.assert_close(one.data, two.data, atol=1e-5, rtol=1e-5)
        twin.steer(prompt="the red fox")
        (one,), (two,) = session.step(), twin.step()
        assert (one.data - two.data).abs().max() > 0.01
        twin.close()


def test_memory_stays_where_it_is(make, seeded):
    pipe = make("longlive_unbounded")
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        session.step()
        before = places(pipe, session)
        for _ in range(12):
            session.step()
        assert places(pipe, session) == before


def places(pipe, session):
    cache = pipe.arena.cache
    tensors = [cache.k, cache.v, cache.sink_k, session.state.history, *session.state.decoding.buffers.values()]
    tensors += [part for layer in pipe.arena.text for part in layer]
    return [tensor.data_ptr() for tensor in tensors]


def test_output_types(pipe, seeded):
    def clip(kind):
        return pipe("a corgi", num_frames=5, generator=seeded(), output_type=kind).frames

    tensor, array, images, latents = clip("pt"), clip("np"), clip("pil"), clip("latent")
    assert array.shape == (5, 16, 32, 3)
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert len(images) == 5
    assert images[0].size == (32, 16)
    assert latents.shape == (4, 3, 2, 4)
    (same,) = pipe("a corgi", num_frames=5, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(same, tensor)


def test_the_callback_sees_every_chunk(pipe, seeded):
    seen = []
    pipe("a corgi", num_frames=33, generator=seeded(), callback_on_step_end=lambda *args: seen.append(args))
    assert [number for _, number, _, _ in seen] == [0, 1, 2]
    assert [len(frames["frames"]) for *_, frames in seen] == [9, 12, 12]


def test_another_size_is_drawn_when_nothing_runs(pipe, seeded):
    assert pipe("a corgi", num_frames=2, height=32, width=48, output_type="pt").frames.shape == (2, 3, 32, 48)
    assert pipe.size == (32, 48)
    with pipe.stream("a corgi") as session:
        session.step()
        with pytest.raises(ValueError, match=r"1 open session\(s\) .* before it can be drawn in another size"):
            pipe.stream("a corgi", height=16)
        with pytest.raises(ValueError, match="before it can move"):
            pipe.to("cpu")
    with pytest.raises(ValueError, match="pictures are multiples of 16 x 16 pixels, got 40 x 48"):
        pipe.stream("a corgi", height=40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"output_type": "gif"}, "output_type must be pil, np, pt or latent, got 'gif'"),
        ({"prompt": "\ud83d"}, "half a character"),
        ({"strength": 1.5}, r"strength must be between 0 .* got 1.5"),
        ({"image": torch.zeros(3, 8, 8)}, r"is \[3, 16, 32\] in floats from 0 to 1, got \[3, 8, 8\]"),
        ({"video": [np.zeros((16, 32, 3), np.uint8)] * 5}, "the video is too short: a chunk takes 9 pictures at first"),
    ],
)
def test_bad_arguments_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a corgi", **arguments})
    assert pipe._arena is None or pipe.arena.in_use == 0


def test_another_recipe_is_another_pipeline_around_the_same_weights(pipe, seeded):
    with pytest.raises(AttributeError, match=r"make another pipeline .* VideoPipeline\(\*\*pipe.comp"):
        pipe.recipe = RECIPES["krea"]
    other = ms.VideoPipeline(**pipe.components, recipe="krea", size=pipe.size, text_length=pipe.text_length)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    clips = [each("a corgi", num_frames=45, generator=seeded(), output_type="pt").frames for each in (pipe, other)]
    assert torch.equal(clips[0][:21], clips[1][:21]), "until the first memory begins anew"
    assert not torch.equal(clips[0], clips[1])


def test_wan_2_2s_autoencoder_makes_larger_latents(make, parts, seeded):
    """16 x 16 pixels per latent, residual shortcuts, pictures in patches."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    size = {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    kind = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(
        **size, **kind, temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    pipe = ms.VideoPipeline(**parts() | {"vae": vae.eval()}, recipe="longlive", size=(32, 64), text_length=8, rate=24.0)
    pipe.set_progress_bar_config(disable=True)
    clip = pipe("a corgi", image=torch.rand(3, 32, 64), num_frames=14, generator=seeded(), output_type="pt").frames
    assert clip.shape == (14, 3, 32, 64)
    assert pipe.latent_size == (4, 2, 4)
    with pytest.raises(ValueError, match="multiples of 32 x 32 pixels, got 48 x 64"):
        pipe.resize(48, 64)


def test_parts_that_do_not_belong_together_are_refused(make, parts):
    from millstream.models.transformer import CausalTransformer3DModel
    from millstream.pipelines.video import VideoPipeline

    small = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1, "freq_dim": 16}
    with pytest.raises(ValueError, match="the transformer takes 36 channels and makes 16, the autoencoder has 4"):
        VideoPipeline(**parts() | {"transformer": CausalTransformer3DModel(**small, in_channels=36)}, recipe="krea")
    other = CausalTransformer3DModel(**small, in_channels=4, out_channels=4, text_dim=99)
    with pytest.raises(ValueError, match="reads prompts 99 wide, the text encoder writes them 16 wide"):
        VideoPipeline(**parts() | {"transformer": other}, recipe="krea")


def test_a_saved_pipeline_is_loaded_with_its_recipe(make, seeded, tmp_path):
    pipe = make("longlive")
    pipe.save_pretrained(tmp_path)
    loaded = ms.VideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.recipe == RECIPES["longlive"]
    assert loaded.size == (16, 32)
    clips = [
        each("a corgi surfs", num_frames=9, generator=seeded(), output_type="pt").frames for each in (pipe, loaded)
    ]
    assert torch.equal(*clips)
    assert ms.VideoPipeline.from_pretrained(tmp_path, recipe="krea").recipe == RECIPES["krea"]


def test_a_published_checkpoint_takes_the_place_of_the_folders_transformer(make, seeded, tmp_path):
    """What the README shows: a diffusers folder, somebody's .pt, and the recipe it is run by."""
    pipe = make("self_forcing")
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model_index.json").unlink()  # a published folder has another one, which names no recipe
    weights = {f"model.{name}": value + 0.01 for name, value in pipe.transformer.state_dict().items()}
    torch.save({"generator": weights}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="does not say how its weights are run; give recipe=, one of self_forcing, "):
        ms.VideoPipeline.from_pretrained(tmp_path / "base")
    loaded = ms.VideoPipeline.from_pretrained(
        tmp_path / "base",
        checkpoint=tmp_path / "model.pt",
        recipe="causvid",
        size=(16, 32),
        text_length=8,
        torch_dtype=torch.bfloat16,
    )
    assert loaded.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    expected = pipe.transformer.blocks[0].attn1.to_q.weight + 0.01
    torch.testing.assert_close(loaded.transformer.blocks[0].attn1.to_q.weight.float(), expected, atol=1e-2, rtol=1e-2)
    loaded.set_progress_bar_config(disable=True)
    assert loaded("a corgi", num_frames=3, generator=seeded(), output_type="pt").frames.isfinite().all()


def test_a_folder_that_lacks_a_part_is_refused(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; give one in diffusers' layout"):
        ms.VideoPipeline.from_pretrained(tmp_path / "nowhere", recipe="krea")
    make().save_pretrained(tmp_path)
    for file in (tmp_path / "vae").iterdir():
        file.unlink()
    (tmp_path / "vae").rmdir()
    with pytest.raises(FileNotFoundError, match=r"has no vae; a model has transformer, vae, text_encoder, tokenizer"):
        ms.VideoPipeline.from_pretrained(tmp_path, recipe="krea")


def test_a_tiny_decoder_takes_the_place_of_the_autoencoders(make, seeded, tmp_path):
    from millstream.models.tiny_vae import TinyVideoDecoder

    pipe = make("self_forcing")
    torch.manual_seed(0)
    tiny = TinyVideoDecoder(4, 1, (12, 10, 8, 6)).eval()
    torch.save(tiny.state_dict() | {"encoder.0.weight": torch.zeros(1)}, tmp_path / "taew2_1.pth")
    pipe.save_pretrained(tmp_path / "base")
    quick = ms.VideoPipeline.from_pretrained(tmp_path / "base", decoder=tmp_path / "taew2_1.pth")
    quick.set_progress_bar_config(disable=True)
    latents = pipe("a corgi surfs", num_frames=21, generator=seeded(), output_type="latent").frames
    clip = quick("a corgi surfs", num_frames=21, generator=seeded(), output_type="pt").frames
    torch.testing.assert_close(clip, tiny.decode(latents[None], tiny.begin(16, 32))[0], atol=1e-5, rtol=1e-5)
    quick.save_pretrained(tmp_path / "again")
    again = ms.VideoPipeline.from_pretrained(tmp_path / "again")
    assert isinstance(again.decoder, TinyVideoDecoder)


def test_offloading_is_refused_for_streams(pipe):
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(pipe.vae, CpuOffload())
    with pytest.raises(ValueError, match="a stream cannot run with model CPU offload"):
        pipe.stream("a corgi")


def test_pictures_of_every_kind_are_read(pipe):
    from millstream.pipelines.video_output import as_picture

    array = np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).movedim(-1, 0) / 255
    for image in (array, Image.fromarray(array), expected, array.astype(np.float32) / 255):
        torch.testing.assert_close(as_picture(image, (16, 32)), expected)
    assert as_picture(Image.new("L", (99, 20)), (16, 32)).shape == (3, 16, 32)


def test_a_picture_is_turned_upright_and_16_bits_of_grey_stay_grey(tmp_path):
    from millstream.pipelines.video_output import as_picture

    lying = Image.new("RGB", (32, 16))
    lying.paste("white", (0, 0, 8, 16))  # at the left, which is the top once turned
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "turned.png", exif=exif)
    picture = as_picture(Image.open(tmp_path / "turned.png"), (32, 16))
    assert picture[:, :6].mean() > 0.9
    assert picture[:, 10:].mean() < 0.1
    Image.fromarray(np.full((16, 32), 0x4000, np.uint16)).save(tmp_path / "grey.png")
    grey = as_picture(Image.open(tmp_path / "grey.png"), (16, 32))
    torch.testing.assert_close(grey, torch.full((3, 16, 32), 64 / 255))


@pytest.mark.parametrize("value", [-0.5, 1.5, 255.0, float("nan"), float("inf")])
def test_a_picture_beyond_0_to_1_is_refused(pipe, value):
    picture = torch.full((3, 16, 32), 0.5)
    picture[1, 2, 3] = value
    with pytest.raises(ValueError, match="in floats from 0 to 1, got"):
        pipe("a corgi", image=picture, num_frames=1)
