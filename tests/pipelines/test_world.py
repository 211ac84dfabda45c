"""What a user of a world relies on: its arguments, its answers, its refusals, and memory that stays where it is."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millstream import WorldPipeline
from millstream.models.packed import FILE
from millstream.samplers import FlowSampler
from millstream.streaming import Frame, Snapshot


def test_output_types(pipe, seeded):
    def drawn(output_type, **more):
        return pipe("a cave", num_frames=3, generator=seeded(), output_type=output_type, **more)

    frames = drawn("pt").frames
    assert frames.shape == (3, 3, 32, 48)
    assert (frames.dtype, frames.min() >= 0, frames.max() <= 1) == (torch.float32, True, True)
    pictures = drawn("np").frames
    assert np.array_equal(pictures, frames.permute(0, 2, 3, 1).numpy())
    images = drawn("pil").frames
    assert [image.size for image in images] == [(48, 32)] * 3
    assert np.abs(np.asarray(images[2]) / 255 - pictures[2]).max() <= 0.5 / 255 + 1e-6
    (latents,) = drawn("latent", return_dict=False)
    assert latents.shape == (4, 3, 4, 6)
    torch.testing.assert_close(pipe.codec.decode(latents[None])[0], frames, atol=1e-6, rtol=0)  # frames in one batch


def test_the_callback_sees_every_frame(pipe, seeded):
    seen = []
    clip = pipe(
        "a cave",
        num_frames=4,
        generator=seeded(),
        output_type="pt",
        callback_on_step_end=lambda *arguments: seen.append(arguments),
    ).frames
    assert [(owner is pipe, number, step) for owner, number, step, _ in seen] == [(True, n, 0) for n in range(4)]
    assert torch.equal(torch.stack([given["frame"] for *_, given in seen]), clip)


def test_progress_is_shown_unless_switched_off(make, capfd):
    pipe = make()
    pipe("a cave", num_frames=3)
    assert "3/3" not in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=False, desc="frames")
    pipe("a cave", num_frames=3)
    assert "3/3" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_draws_nearly_the_same(make, seeded, dtype):
    pipe = make()
    exact = pipe("a cave", num_frames=6, keys=["KeyW"] * 6, generator=seeded(), output_type="pt").frames
    pipe.to(dtype)
    other = pipe("a cave", num_frames=6, keys=["KeyW"] * 6, generator=seeded(), output_type="pt").frames
    assert other.dtype == torch.float32
    assert (other - exact).abs().mean() < (1e-5 if dtype == torch.float64 else 0.03)
    assert pipe.arena.cache.k.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": "  "}, ValueError, 'prompt is empty; describe a world, for example "a brick corridor"'),
        ({"prompt": "x" * 10_000}, ValueError, "10,000 characters; at most 2,000"),
        ({"prompt": "a \ud800 cave"}, ValueError, "half a character"),
        ({"prompt": ["a cave"]}, TypeError, "prompt must be a string, got list"),
        ({"keys": ["KeyW", "KeyQ"]}, ValueError, "unknown key KeyQ; the keys of this world are KeyW, KeyS"),
        ({"keys": "KeyW"}, TypeError, "one entry per frame"),
        ({"num_frames": 0}, ValueError, "num_frames must be at least 1, got 0"),
        ({"output_type": "gif"}, ValueError, "output_type must be pil, np, pt or latent, got 'gif'"),
        ({"num_inference_steps": 0}, ValueError, "whole number from 1 to 1000, got 0"),
        ({"num_inference_steps": 2.5}, ValueError, "whole number from 1 to 1000, got 2.5"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be a number from 0 to 100"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_by_name(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**({"prompt": "a cave", "num_frames": 2} | arguments))
    assert pipe.arena.in_use == 0


def test_a_world_without_captions_refuses_an_empty_prompt_too(pipe):
    pipe = WorldPipeline(**pipe.components)
    with pytest.raises(ValueError, match="the prompt is empty"):
        pipe.stream("")


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": ""},
        {"prompt": "x" * 10_000},
        {"prompt": "\udc00"},
        {"keys": {"KeyW", "Enter"}},
        {"keys": "KeyW"},
        {"keys": 3},
        {"mouse": (float("nan"), 0)},
        {"num_inference_steps": 0},
        {"guidance_scale": "high"},
        {"speed": 2},
    ],
    ids=str,
)
def test_a_session_survives_a_bad_steer(pipe, seeded, draw, bad):
    session, twin = (pipe.stream("a cave", generator=seeded()) for _ in range(2))
    session.step(), twin.step()
    with pytest.raises((ValueError, TypeError)):
        session.steer(**bad)
    assert torch.equal(draw(session, 2), draw(twin, 2))


def test_a_number_of_steps_the_sampler_cannot_take_is_refused_when_steered(make):
    session = make(sampler=FlowSampler(timesteps=[1000, 500])).stream("a cave")
    with pytest.raises(ValueError, match="2"):
        session.steer(num_inference_steps=3)
    session.step()


def test_a_true_frame_is_shown_as_the_codec_sees_it_and_is_remembered(pipe, seeded):
    shown = torch.rand(3, 32, 48, generator=seeded(3))
    session, blind = (pipe.stream("a cave", generator=seeded()) for _ in range(2))
    (chunk,) = session.step(Frame(shown, 4.5))
    latents = pipe.codec.encode(shown[None, None])
    assert torch.equal(chunk.data, pipe.codec.decode(latents)[0])
    assert torch.equal(session.state.latents, latents[0, :, 0])
    assert (chunk.start, chunk.time) == (0, 4.5)
    blind.step()
    assert not torch.equal(session.step()[0].data, blind.step()[0].data)


@pytest.mark.parametrize(
    "picture",
    [torch.zeros(3, 48, 32), torch.zeros(32, 48, 3), torch.zeros(1, 3, 32, 48), torch.zeros(3, 32, 48).byte()],
    ids=lambda p: f"{list(p.shape)} {p.dtype}",
)
def test_a_picture_that_does_not_fit_is_refused_and_moves_nothing(pipe, seeded, draw, picture):
    session, twin = (pipe.stream("a cave", generator=seeded()) for _ in range(2))
    draw(session, 2), draw(twin, 2)
    with pytest.raises(ValueError, match=r"a frame of this world is \[3, 32, 48\] in floats from 0 to 1, got"):
        session.step(Frame(picture, 0.0))
    assert torch.equal(draw(session, 2), draw(twin, 2))


@pytest.mark.parametrize(("pixels", "key"), [(10, "ArrowRight"), (-10, "ArrowLeft")])
def test_the_mouse_turns_as_the_key_does(pipe, seeded, draw, pixels, key):
    mouse, keys, still = (pipe.stream("a cave", generator=seeded()) for _ in range(3))
    mouse.steer(mouse=(0.4 * pixels, 99))
    assert torch.equal(draw(mouse, 1), draw(still, 1)), "not enough for a turn, and looking down is no turn"
    draw(keys, 1)
    mouse.steer(mouse=(0.3 * pixels, 0))
    mouse.steer(mouse=(0.3 * pixels, 0))
    keys.steer(keys={key})
    turned = draw(mouse, 1)
    assert torch.equal(turned, draw(keys, 1))
    assert not torch.equal(turned, draw(still, 1))
    keys.steer(keys=set())
    assert torch.equal(draw(mouse, 3), draw(keys, 3)), "used up"


def test_movement_not_yet_paid_out_is_in_the_snapshot(pipe, seeded, draw, tmp_path):
    session = pipe.stream("a cave", generator=seeded())
    session.steer(mouse=(25, 0))
    draw(session, 1)
    assert session.state.turn == 15
    path = session.snapshot().save(tmp_path / "turning.safetensors")
    expected = draw(session, 4)
    other = pipe.stream("a cave")
    other.restore(Snapshot.load(path))
    assert other.state.turn == 15
    assert torch.equal(draw(other, 4), expected)


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_a_saved_world_is_the_same_world(make, seeded, tmp_path, form):
    pipe = make(sampler=FlowSampler(3, shift=2.0, context_sigma=0.1), window=5, sinks=1)
    pipe.save_pretrained(tmp_path)
    if form == "packed":
        for name in ("transformer", "codec", "text_encoder"):
            getattr(pipe, name).save_packed(tmp_path / name)
            getattr(pipe, name).load_state_dict(type(getattr(pipe, name)).from_pretrained(tmp_path / name).state_dict())
    loaded = WorldPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for name in ("worlds", "buttons", "key_map", "size", "rate", "window", "pixels_per_turn"):
        assert getattr(loaded, name) == getattr(pipe, name), name
    assert loaded.scheduler.config["context_sigma"] == 0.1
    clips = [p("a cave", num_frames=7, keys=["KeyW"] * 7, generator=seeded(), output_type="pt") for p in (pipe, loaded)]
    assert torch.equal(clips[0].frames, clips[1].frames)
    assert loaded.nearest_world("a slime arena")[0] == "a slime arena"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".pth", ".ckpt"}]


def test_a_damaged_or_missing_part_is_refused(make, tmp_path):
    make().save_pretrained(tmp_path)
    weights = tmp_path / "codec" / FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        WorldPipeline.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match=FILE):
        WorldPipeline.from_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError), match="nowhere"):
        WorldPipeline.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["layers", "count", "foreign", "seedless", "prompt", "latents"])
def test_a_snapshot_that_does_not_fit_is_refused_and_the_session_goes_on(pipe, make, seeded, draw, damage):
    session, twin = (pipe.stream("a cave", generator=seeded()) for _ in range(2))
    draw(session, 2), draw(twin, 2)
    snapshot = (make(layers=3).stream("a cave") if damage == "layers" else session).snapshot()
    leaves = dict(snapshot.leaves)
    if damage == "count":
        leaves["cache.count"] = 7
    elif damage == "foreign":
        leaves = {"weights": torch.zeros(3)}
    elif damage == "seedless":
        del leaves["seed"]
    elif damage == "prompt":
        leaves["prompt"] = 5
    elif damage == "latents":
        leaves["latents"] = "none"
    with pytest.raises(ValueError, match=r"snapshot|shape"):
        session.restore(Snapshot(leaves, snapshot.control, snapshot.unread, snapshot.kind))
    assert pipe.arena.in_use == 2
    assert torch.equal(draw(session, 3), draw(twin, 3))


def test_memory_stays_what_and_where_it_is(pipe, seeded):
    session = pipe.stream("a cave", generator=seeded())
    session.step()

    def memory():
        tensors = [pipe.arena.cache.k, pipe.arena.cache.v, *(part for layer in pipe.arena.text for part in layer)]
        assert not any(tensor.requires_grad for tensor in tensors)
        return pipe.arena.cache.bytes, [tensor.data_ptr() for tensor in tensors]

    before = memory()
    for step in range(300):
        if step % 100 == 50:
            session.steer(prompt=f"world number {step}")
        session.step()
    assert memory() == before
    session.restore(session.snapshot())
    memory()


class HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_on_the_host_while_drawing(pipe, seeded, monkeypatch):
    from millstream.kernels import noise

    monkeypatch.setattr(noise, "_check", lambda seed, frame, step, shape, dtype: int(np.prod(shape)))  # CPU only
    session = pipe.stream("a cave", generator=seeded())
    session.step()
    session.steer(keys={"KeyW"}, guidance_scale=2.0)
    with HostReads() as reads:
        for _ in range(6):
            session.step()
    assert reads.count == 0
    with HostReads() as reads:
        session.state.latents.max().item()
    assert reads.count == 1, "the counter counts"


def test_offloaded_weights_are_refused_for_a_stream(make):
    pipe = make()
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="cannot run with model CPU offload; move the pipeline"):
        pipe.stream("a cave")
    pipe.remove_all_hooks()
    pipe.stream("a cave").step()


@pytest.mark.parametrize("where", [(torch.float64,), ("meta",), ("cpu", torch.bfloat16)], ids=str)
def test_a_pipeline_with_open_sessions_does_not_move(make, seeded, draw, where):
    pipe = make()
    session, twin = (pipe.stream("a cave", generator=seeded()) for _ in range(2))
    draw(session, 2), draw(twin, 2)
    with pytest.raises(ValueError, match=r"2 open session\(s\) .* live on cpu in torch.float32; close them"):
        pipe.to(*where)
    assert pipe.to("cpu", torch.float32) is pipe, "it is there already"
    assert torch.equal(draw(session, 2), draw(twin, 2))
    session.close(), twin.close()
    if where[-1] != "meta":
        pipe.to(*where)
        assert pipe.stream("a cave").step()[0].data.isfinite().all()
        assert pipe.arena.dtype == where[-1]


def test_worlds_may_be_set_and_are_saved(make, tmp_path):
    pipe = make()
    assert pipe.nearest_world("a slime arena")[0] == "a slime arena"
    pipe.worlds = ["a cave of ice", "a river of lava"]
    assert pipe.nearest_world("a river of lava")[0] == "a river of lava"
    pipe.save_pretrained(tmp_path)
    assert WorldPipeline.from_pretrained(tmp_path).worlds == ("a cave of ice", "a river of lava")
    for wrong in ("a cave", ["a cave", ""], [3]):
        with pytest.raises(ValueError, match="worlds must be captions such as"):
            pipe.worlds = wrong
    assert pipe.worlds == ("a cave of ice", "a river of lava")


@pytest.mark.parametrize(("name", "value"), [("size", (64, 64)), ("buttons", ["JUMP"])])
def test_what_the_weights_were_made_for_stays(make, name, value):
    pipe = make()
    before = getattr(pipe, name)
    with pytest.raises(AttributeError, match=f"{name} is what the weights of this pipeline were made for"):
        setattr(pipe, name, value)
    assert getattr(pipe, name) == before
