"""A recorded step draws what the step itself draws, whatever happens to the streams in between.

A `Tape` stands in for a CUDA graph: it keeps the tensor operations of one run and repeats them on the same memory, so
whatever a step reads on the host is baked in, as it would be on a GPU.
"""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from millstream.samplers import FlowSampler
from millstream.streaming import step_together
from millstream.streaming.graphs import Recordings, undisturbed

PROMPTS = ["a brick corridor", "a slime arena", "a cave of ice"]


def places(tree):
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)}


class Tape(TorchDispatchMode):
    def __init__(self, step, inputs):
        super().__init__()
        self.inputs, self.operations, self.undo, self.made = [value.clone() for value in inputs], [], [], []
        with self:
            self.output = step(*self.inputs)
        for tensor, before in reversed(self.undo):  # recording does nothing
            tensor.copy_(before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "a host read"
        if func._schema.is_mutable:
            self.undo.append((args[0], args[0].clone()))
        out = func(*args, **(kwargs or {}))
        is_view = not func._schema.is_mutable and places(out) & places([args, kwargs])
        if not is_view:
            self.operations.append((func, args, kwargs or {}, None if func._schema.is_mutable else out))
        return out

    def __call__(self, *inputs):
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        for func, args, kwargs, out in self.operations:
            result = func(*args, **kwargs)
            if out is not None:
                for old, new in zip(tree_leaves(out), tree_leaves(result)):
                    if torch.is_tensor(old):
                        old.copy_(new)
        return None if self.output is None else self.output.clone()


@pytest.fixture
def world(make, monkeypatch):
    """A world whose steps are recorded after `patience` runs; 10^9 runs the same steps and records none."""
    from millstream.kernels import noise

    monkeypatch.setattr(noise, "_check", lambda seed, frame, step, shape, dtype: torch.Size(shape).numel())  # CPU only

    def made(patience=1, limit=24, **options):
        pipe = make(**options)
        pipe.arena.recordings = Recordings(torch.device("cpu"), patience=patience, limit=limit, record=Tape)
        return pipe

    return made


def played(pipe, seeded, play):
    """Frames of a script of steps, run on `pipe`."""
    frames = []
    sessions = [pipe.stream(prompt, generator=seeded(number)) for number, prompt in enumerate(PROMPTS)]

    def step(*which):
        chunks = step_together([sessions[number] for number in which])
        frames.append(torch.stack([chunk.data[0] for (chunk,) in chunks]))

    play(sessions, step)
    return frames


def alone(sessions, step):
    for number in range(12):
        sessions[0].steer(keys={"KeyW"} if number % 3 else {"ArrowLeft"})
        step(0)


def words_and_settings(sessions, step):
    for changes in (
        {},
        {"prompt": "a river"},
        {"guidance_scale": 3.0},
        {"guidance_scale": 4.5},
        {"guidance_scale": 1.0},
    ):
        sessions[0].steer(**changes)
        for _ in range(4):
            step(0)
    sessions[0].steer(num_inference_steps=3)
    for _ in range(4):
        step(0)
    sessions[0].steer(num_inference_steps=2)
    for _ in range(4):
        step(0)


def ages(sessions, step):
    for _ in range(3):
        step(0)
    for _ in range(12):
        step(0, 1)


def rows_far_apart(sessions, step):
    step(0, 1, 2)
    for _ in range(7):
        step(2, 0)
    for _ in range(7):
        step(0, 1)
    for _ in range(3):
        step(0, 2)


def resets_and_returns(sessions, step):
    for _ in range(6):
        step(0)
    saved = sessions[0].snapshot()
    for _ in range(3):
        step(0)
    sessions[0].restore(saved)
    for _ in range(3):
        step(0)
    sessions[0].reset()
    for _ in range(7):
        step(0)
    sessions[1].restore(saved)
    for _ in range(4):
        step(1, 0)


SCRIPTS = [alone, words_and_settings, ages, rows_far_apart, resets_and_returns]


@pytest.mark.parametrize("play", SCRIPTS, ids=lambda play: play.__name__)
@pytest.mark.parametrize("sinks", [0, 2])
def test_replayed_equals_run_to_the_bit(world, seeded, play, sinks):
    recorded, plain = world(1, sinks=sinks), world(10**9, sinks=sinks)
    for one, other in zip(played(recorded, seeded, play), played(plain, seeded, play), strict=True):
        assert torch.equal(one, other)
    assert len(recorded.arena.recordings) > 2
    assert len(plain.arena.recordings) == 0


@pytest.mark.parametrize("play", SCRIPTS, ids=lambda play: play.__name__)
def test_replayed_equals_steps_whose_shapes_follow_the_fill(world, make, seeded, play):
    for one, other in zip(played(world(2), seeded, play), played(make(), seeded, play), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["euler", "heun", "unipc", "renoise"])
def test_every_rule_can_be_recorded(world, seeded, rule):
    pipes = [world(patience, sampler=FlowSampler(3, rule=rule)) for patience in (1, 10**9)]
    for one, other in zip(*(played(pipe, seeded, alone) for pipe in pipes)):
        assert torch.equal(one, other)


def test_a_true_frame_between_replays_is_remembered(world, seeded):
    from millstream.streaming import Frame

    shown = Frame(torch.rand(3, 32, 48, generator=seeded()), 0.0)

    def play(pipe):
        session = pipe.stream("a cave", generator=seeded())
        return torch.stack([session.step(shown if n % 4 == 3 else None)[0].data[0] for n in range(14)])

    assert torch.equal(play(world(1)), play(world(10**9)))


def test_frames_that_were_handed_out_stay_as_they_are(world, seeded):
    session = world(1).stream("a cave", generator=seeded())
    chunks = [session.step()[0].data for _ in range(12)]
    latents = session.state.latents
    before = [chunk.clone() for chunk in [*chunks, latents]]
    for _ in range(3):
        session.step()
    assert all(torch.equal(one, other) for one, other in zip([*chunks, latents], before))


def test_few_recordings_are_kept_however_many_kinds_there_are(world, seeded):
    pipe, plain = world(1, limit=4), world(10**9)
    sessions = [p.stream("a cave", generator=seeded()) for p in (pipe, plain)]
    for number in range(12):
        for session in sessions:
            session.steer(num_inference_steps=1 + number % 6)
        assert torch.equal(*(session.step()[0].data for session in sessions))
        assert len(pipe.arena.recordings) <= 4


def test_what_is_asked_for_once_is_not_recorded(world, seeded):
    pipe = world(3)
    session = pipe.stream("a cave", generator=seeded())
    for number in range(8):
        session.steer(num_inference_steps=1 + number)
        session.step()
    draws = [kind for kind in pipe.arena.recordings._replays if kind[0][0] == "draw"]
    assert not draws


def test_new_weights_are_drawn_with(world, make, seeded):
    pipe = world(1)
    session = pipe.stream("a cave", generator=seeded())
    old = [session.step()[0].data for _ in range(8)]
    session.close()
    with torch.no_grad():
        for linear in (pipe.transformer.proj_out, pipe.codec.decoder[0]):
            linear.weight = torch.nn.Parameter(linear.weight * 1.5)
    session = pipe.stream("a cave", generator=seeded())
    new = [session.step()[0].data for _ in range(8)]
    assert not any(torch.equal(one, other) for one, other in zip(old, new))
    fresh = make()
    fresh.transformer.load_state_dict(pipe.transformer.state_dict())
    fresh.codec.load_state_dict(pipe.codec.state_dict())
    session = fresh.stream("a cave", generator=seeded())
    for one in new:
        torch.testing.assert_close(one, session.step()[0].data, rtol=0, atol=1e-5)


def test_a_step_that_cannot_be_recorded_is_drawn_as_it_is(world, make, seeded):
    pipe = world(1)

    def refuse(step, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    pipe.arena.recordings._record = refuse
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph and stays slow: operation not permitted"):
        frames = played(pipe, seeded, alone)
    for one, other in zip(frames, played(make(), seeded, alone)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_warmup_records_all_that_a_stream_needs_and_leaves_no_trace(world, seeded, capfd):
    pipe, plain = world(2), world(10**9)
    pipe.set_progress_bar_config(disable=False)
    pipe.warmup(2)
    pipe.warmup()
    assert "6/6" in capfd.readouterr().err
    recordings = pipe.arena.recordings
    before = len(recordings)
    assert pipe.arena.in_use == 0
    for one, other in zip(played(pipe, seeded, alone), played(plain, seeded, alone), strict=True):
        assert torch.equal(one, other)
    assert len(recordings) == before
    with pytest.raises(ValueError, match="sessions must be at least 1, got 0"):
        pipe.warmup(0)
    assert pipe.arena.in_use == 0


def test_warmup_where_nothing_is_recorded_changes_nothing(make, seeded):
    warm, cold = make(), make()
    warm.warmup(num_inference_steps=1)
    for one, other in zip(played(warm, seeded, alone), played(cold, seeded, alone), strict=True):
        assert torch.equal(one, other)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def on_gpu(make):
    """The same on a GPU, with real graphs."""

    def made(patience=1, dtype=torch.float32, **options):
        pipe = make(**options).to("cuda", dtype)
        pipe.arena.recordings = Recordings(pipe.device, patience=patience)
        return pipe

    return made


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("play", SCRIPTS, ids=lambda play: play.__name__)
def test_cuda_graphs_draw_what_the_steps_draw(on_gpu, seeded, play, dtype):
    recorded, plain = on_gpu(1, dtype), on_gpu(10**9, dtype)
    for one, other in zip(played(recorded, seeded, play), played(plain, seeded, play), strict=True):
        assert torch.equal(one, other)
    assert len(recorded.arena.recordings) > 2
    assert None not in recorded.arena.recordings._replays.values(), "nothing was refused"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("play", SCRIPTS, ids=lambda play: play.__name__)
def test_a_gpu_draws_what_a_cpu_draws(on_gpu, make, seeded, play):
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, before = False, torch.backends.cudnn.allow_tf32
    try:
        drawn = played(on_gpu(2), seeded, play)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    for one, other in zip(drawn, played(make(), seeded, play), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=2e-3)


@pytest.mark.gpu
@needs_cuda
def test_nothing_is_allocated_or_recorded_after_the_warmup(on_gpu, seeded):
    pipe = on_gpu(3)
    pipe.warmup()
    recordings = len(pipe.arena.recordings)
    session = pipe.stream("a cave", generator=seeded())

    def drawn(count):
        for number in range(count):
            session.steer(keys={"KeyW"} if number % 2 else set(), prompt=PROMPTS[number // 50 % 3])
            session.step()
        torch.cuda.synchronize()
        gc.collect()  # what other tests left behind is no business of this one
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    early = drawn(100)
    assert drawn(400) == early
    assert len(pipe.arena.recordings) == recordings


@pytest.mark.gpu
@needs_cuda
def test_the_host_does_not_wait_for_the_gpu_while_drawing(on_gpu, seeded):
    pipe = on_gpu(2)
    pipe.warmup()
    session = pipe.stream("a cave", generator=seeded())
    for _ in range(8):
        session.step()
    state, control = session.state, session.control
    with torch.no_grad():
        actions = torch.zeros(1, 1, 7, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            chunk = pipe.arena.cache.open([state.row])
            latents = pipe.draw([state], chunk, actions, control)
            pipe.remember([state], latents, chunk, actions)
            pipe.decode(latents)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
def test_other_threads_may_use_the_gpu_while_a_step_is_recorded(on_gpu, seeded):
    from threading import Event, Thread

    done, errors = Event(), []

    def busy():
        generator = torch.Generator("cuda")  # not PyTorch's own, which refuses while anything is recorded
        try:
            while not done.is_set():
                torch.rand(256, 256, device="cuda", generator=generator).sum().item()
        except RuntimeError as error:
            errors.append(error)

    thread = Thread(target=busy)
    thread.start()
    try:
        frames = played(on_gpu(1), seeded, alone)
    finally:
        done.set()
        thread.join()
    assert not errors
    for one, other in zip(frames, played(on_gpu(10**9), seeded, alone)):
        assert torch.equal(one, other)


@pytest.mark.gpu
@needs_cuda
def test_garbage_spoils_no_recording():
    """Graphs of streams that are gone, in cycles, while the steps of another make garbage as they are recorded."""
    gone = Recordings(torch.device("cuda"), patience=1)
    for kind in range(4):
        gone.run(kind, lambda x: x + 1, [torch.ones(8)])
    circle = [gone]
    circle.append(circle)
    del gone, circle

    def step(x):
        for _ in range(2000):
            waste = []
            waste.append(waste)
        return x * 2

    recordings = Recordings(torch.device("cuda"), patience=1)
    for number in range(3):
        assert torch.equal(
            recordings.run("step", step, [torch.full((8,), float(number))]).cpu(), torch.full((8,), 2.0 * number)
        )
    assert len(recordings) == 1


def test_nothing_is_collected_while_a_step_is_recorded():
    assert gc.isenabled()
    with undisturbed(), undisturbed():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError), undisturbed():
            raise ZeroDivisionError
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()


@pytest.mark.parametrize("rule", ["renoise", "heun"])
def test_redrawing_a_camera_can_be_recorded(world, seeded, camera, rule):
    """Plain and in a stream batch, guided or not, alone and together."""
    batched = [] if rule == "heun" else [{"stream_batch": True}, {"stream_batch": True, "guidance_scale": 3.0}]
    settings = [{"strength": 0.9}, {"strength": 0.5, "guidance_scale": 2.0}, *({"strength": 0.8} | b for b in batched)]

    def play(pipe):
        sessions = [
            pipe.stream(f"cave {number}", generator=seeded(number), **setting)
            for number, setting in enumerate(settings)
        ]
        inputs = [camera(11, seed=number) for number in range(len(settings))]
        steps = [step_together(sessions, list(frames)) for frames in zip(*(each[:7] for each in inputs))]
        steps += [[session.step(frame) for frame in each[7:]] for session, each in zip(sessions, inputs)]
        return torch.cat([chunk.data for step in steps for chunks in step for chunk in chunks])

    recorded = world(1, sampler=FlowSampler(3, rule=rule))
    assert torch.equal(play(recorded), play(world(10**9, sampler=FlowSampler(3, rule=rule))))
    assert len(recorded.arena.recordings) > 5
