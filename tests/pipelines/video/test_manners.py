"""Diffusers' goods on a video pipeline: adapters on whole and on quantised weights, offload for clips."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from millstream.models.checkpoints import merge_lora
from millstream.pipelines.timeline import Timeline
from millstream.pipelines.video import VideoPipeline

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAYER = "blocks.0.ffn.net.0.proj"


@pytest.fixture
def adapter(tmp_path):
    generator = torch.Generator().manual_seed(3)
    pair = {"A": torch.randn(2, 24, generator=generator), "B": torch.randn(32, 2, generator=generator)}
    weights = {f"{LAYER}.lora_{half}.weight": value / 4 for half, value in pair.items()}
    torch.save(weights, tmp_path / "lora.pt")
    return tmp_path / "lora.pt", weights


def clip(pipe, seeded, **more):
    return pipe("a corgi surfs", num_frames=21, generator=seeded(), output_type="pt", **more).frames


def test_an_adapter_that_is_loaded_later_is_the_one_that_is_merged_first(make, seeded, adapter):
    path, weights = adapter
    pipe, merged, plain = make("longlive"), make("longlive"), make("longlive")
    merge_lora(merged.transformer, weights, scale=0.5)
    clip(pipe, seeded)  # its weights are laid out for streams by now
    pipe.load_lora_weights(path, scale=0.5)
    torch.testing.assert_close(clip(pipe, seeded), clip(merged, seeded), atol=1e-5, rtol=0)
    assert (clip(pipe, seeded) - clip(plain, seeded)).abs().max() > 0.01


def in_words_of(dialect, weights, alpha):
    """The adapter, as trainers write it; all but diffusers' own have an alpha of their own."""
    pair = [weights[f"{LAYER}.lora_{half}.weight"] for half in "AB"]
    if dialect == "diffusers":
        return {f"transformer.{name}": value for name, value in weights.items()}
    layer, halves = {
        "original": ("diffusion_model.blocks.0.ffn.0", "AB"),
        "kohya": ("diffusion_model.blocks.0.ffn.0", ("down", "up")),
        "musubi": ("lora_unet_blocks_0_ffn_0", ("down", "up")),
    }[dialect]
    named = {f"{layer}.lora_{half}.weight": value for half, value in zip(halves, pair, strict=True)}
    return named | {f"{layer}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("dialect", ["diffusers", "original", "kohya", "musubi"])
def test_an_adapter_is_a_file_of_a_folder_or_a_dictionary_of_tensors(make, adapter, tmp_path, dialect):
    weights = adapter[1]
    stored = in_words_of(dialect, weights, 2.0)
    save_file(stored, tmp_path / "mine.safetensors")
    save_file({name: value + 1 for name, value in stored.items()}, tmp_path / "other.safetensors")
    expected, from_folder, from_tensors = make("longlive"), make("longlive"), make("longlive")
    merge_lora(expected.transformer, weights, scale=0.5)  # its rank is 2, and so is the alpha
    from_folder.load_lora_weights(str(tmp_path), weight_name="mine.safetensors", scale=0.5)
    from_tensors.load_lora_weights(dict(stored), scale=0.5)
    wanted, plain = (pipe.transformer.get_parameter(f"{LAYER}.weight") for pipe in (expected, make("longlive")))
    assert (wanted - plain).abs().max() > 0.1
    for pipe in (from_folder, from_tensors):
        torch.testing.assert_close(pipe.transformer.get_parameter(f"{LAYER}.weight"), wanted, atol=1e-6, rtol=0)


def test_what_is_no_adapter_on_this_machine_is_refused_in_a_sentence(make, adapter, tmp_path, monkeypatch):
    path, weights = adapter
    pipe = make("longlive")
    before = pipe.transformer.get_parameter(f"{LAYER}.weight").clone()
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something is fetched"))
    for source, settings, error, message in (
        (
            "someone/an-adapter",
            {},
            FileNotFoundError,
            "fetched silently: hf download someone/an-adapter, or name a file",
        ),
        (tmp_path / "none.pt", {}, FileNotFoundError, "there is no file or folder .*none.pt"),
        (tmp_path, {"weight_name": "none.pt"}, FileNotFoundError, "no file 'none.pt' in .*, which holds lora.pt"),
        (path, {"weight_name": "lora.pt"}, ValueError, "weight_name is for folders, and .*lora.pt is a file"),
        (weights, {"weight_name": "x"}, TypeError, "holds tensors by name and nothing else, got weight_name 'x'"),
        ({"a": 1}, {}, TypeError, "holds tensors by name and nothing else, got int"),
        ({}, {}, ValueError, "the adapter holds no Wan transformer"),
        (path, {"adapter_name": "x"}, TypeError, "with its strength as scale=, and knows no adapter_name"),
        (path, {"scale": float("nan")}, ValueError, "the strength of an adapter must be a finite number"),
    ):
        with pytest.raises(error, match=message):
            pipe.load_lora_weights(source, **settings)
    assert torch.equal(pipe.transformer.get_parameter(f"{LAYER}.weight"), before)


@pytest.mark.parametrize("preset", ["fast", "small"])
def test_quantised_weights_take_an_adapter_too(make, seeded, adapter, preset):
    path, weights = adapter
    late, plain = make("longlive", preset=preset), make("longlive", preset=preset)
    late.load_lora_weights(path)
    parts = make("longlive")
    merge_lora(parts.transformer, weights)
    early = VideoPipeline(**parts.components, recipe="longlive", size=(16, 32), text_length=8, preset=preset)
    early.set_progress_bar_config(disable=True)
    one, other, none = (clip(pipe, seeded)[:9] for pipe in (late, early, plain))
    assert (one - other).square().mean() < 0.1 * (one - none).square().mean()


def test_a_model_is_no_adapter_and_a_foreign_adapter_changes_nothing(make, tmp_path):
    pipe = make("longlive")
    torch.save(pipe.transformer.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is a whole model"):
        pipe.load_lora_weights(tmp_path / "model.pt")
    pair = {f"blocks.9.attn1.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    torch.save(pair, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="belongs to another model"):
        pipe.load_lora_weights(tmp_path / "lora.pt")


@pytest.mark.parametrize("preset", ["exact", "small"])
def test_an_offloaded_pipeline_draws_the_same_clip_part_after_part(make, seeded, monkeypatch, preset):
    plain, pipe = make("longlive", preset=preset), make("longlive", preset=preset)
    pipe.enable_model_cpu_offload(device="cpu")
    done = []
    to, read = pipe.to, pipe.encode_prompt
    monkeypatch.setattr(pipe, "to", lambda *a: done.append(("moved", pipe.text_encoder is None)) or to(*a))
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt: done.append(("read", prompt)) or read(prompt))
    timeline = Timeline.of([{"at": 0, "prompt": "a corgi surfs"}, {"at": 0.6, "prompt": "a fox in snow"}])
    frames = clip(pipe, seeded, timeline=timeline)
    assert torch.equal(frames, clip(plain, seeded, timeline=timeline))
    first = done.index(("moved", True))  # the text encoder is not among what comes to stay
    assert {("read", "a corgi surfs"), ("read", "a fox in snow")} <= set(done[:first])
    assert done[-1][0] == "moved", "all of it went back"
    assert pipe.text_encoder is not None
    with pytest.raises(ValueError, match="a stream cannot run with model CPU offload"):
        pipe.stream("a corgi surfs")


def test_a_pipeline_that_is_moved_streams_again(make, seeded):
    pipe = make("longlive")
    pipe.enable_model_cpu_offload(device="cpu")
    clip(pipe, seeded)
    assert pipe.is_away, "a clip does not end it"
    assert not pipe.to(torch.device("cpu")).is_away
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        assert session.step()
    if not torch.cuda.is_available():
        for given in ({}, {"gpu_id": "cuda"}, {"device": "cuda:1"}):
            with pytest.raises(ValueError, match="this machine has no cuda"):
                pipe.enable_model_cpu_offload(**given)


def test_weights_go_back_when_a_clip_fails(make, seeded):
    pipe = make("longlive")
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="a picture of this pipeline"):
        clip(pipe, seeded, image=torch.zeros(3, 5, 5))
    assert pipe.is_away
    assert pipe.text_encoder is not None
    assert clip(pipe, seeded).shape == (21, 3, 16, 32)


@pytest.mark.gpu
@needs_cuda
def test_nothing_is_left_on_the_gpu_between_two_clips(make, seeded):
    pipe = make("longlive")
    pipe.enable_model_cpu_offload()
    before = torch.cuda.memory_allocated()
    assert clip(pipe, seeded).shape == (21, 3, 16, 32)
    assert pipe.transformer.device.type == "cpu"
    assert torch.cuda.memory_allocated() - before < 1 << 20
