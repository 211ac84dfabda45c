"""Live images: the stream batch against separate calls, guidance against its formula, filter, flush, refusals."""

from __future__ import annotations

import copy
from contextlib import suppress
from threading import Event, Thread, Timer
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor

import millstream as ms
from millstream.kernels import philox_normal
from millstream.pipelines.live_image import LiveImagePipeline
from millstream.streaming import Chunk, EndOfStream
from millstream.streaming.graphs import Recordings

SIZE = (64, 64)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="session")
def live(stable_diffusion: StableDiffusionImg2ImgPipeline) -> LiveImagePipeline:
    return LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=4)


def pictures(count: int) -> list[Tensor]:
    return list(torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(5)))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: LiveImagePipeline, inputs: list[Tensor | None], **settings: Any) -> list[Chunk]:
    chunks: list[Chunk] = []
    with pipe.stream("a fox", generator=seeded(), **settings) as session:
        for number, picture in enumerate(inputs):
            chunks += session.step(None if picture is None else ms.Frame(picture, float(number)))
        chunks += session.flush()
    return chunks


def together(chunks: list[Chunk]) -> Tensor:
    return torch.cat([chunk.data for chunk in chunks])


@pytest.mark.parametrize("guidance", ["none", "self", "initialize", "full"])
def test_a_stream_batch_equals_separate_calls(live: LiveImagePipeline, guidance: str) -> None:
    settings = {"strength": 0.75, "guidance": guidance, "guidance_scale": 2.0, "negative_prompt": "grey"}
    batched = run(live, [*pictures(5)], **settings)
    separate = run(live, [*pictures(5)], **settings, stream_batch=False)
    assert [chunk.start for chunk in batched] == list(range(5)), "the last ones are flushed"
    assert [chunk.time for chunk in batched] == [0.0, 1.0, 2.0, 3.0, 4.0]
    torch.testing.assert_close(together(batched), together(separate), rtol=0, atol=1e-5)


def test_a_frame_comes_as_late_as_there_are_steps(live: LiveImagePipeline) -> None:
    with live.stream("a fox", strength=0.75, generator=seeded()) as session:
        counts = [len(session.step(ms.Frame(picture, 0.0))) for picture in pictures(5)]
        assert counts == [0, 0, 1, 1, 1]
        assert len(session.flush()) == 2
        assert len(session.flush()) == 0


def test_frames_equal_the_plain_call(
    live: LiveImagePipeline, stable_diffusion: StableDiffusionImg2ImgPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = run(live, [*pictures(2)], strength=0.75)
    with live.stream("", generator=seeded()) as session:
        session.step(ms.Frame(pictures(1)[0], 0.0))
        assert session.state is not None
        seed = session.state.seed
    for number, picture in enumerate(pictures(2)):
        noise = philox_normal(torch.tensor([seed]), torch.tensor([number]), 0, (4, 8, 8))
        place = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
        monkeypatch.setattr(place, lambda *args, noise=noise, **kwargs: noise)
        call: Any = stable_diffusion
        plain = call(
            "a fox", image=picture[None], strength=0.75, num_inference_steps=4, guidance_scale=1, output_type="pt"
        )
        torch.testing.assert_close(drawn[number].data, plain.images, rtol=0, atol=2e-5)


def test_words_alone_draw_as_the_plain_schedule_begins(live: LiveImagePipeline) -> None:
    drawn = run(live, [None, None, None])
    assert len(drawn) == 3
    assert not torch.equal(drawn[0].data, drawn[1].data), "each from noise of its own"


def test_residual_guidance_is_its_formula(live: LiveImagePipeline) -> None:
    """One step as published: eps_u = (x - a x0) / b, then delta eps_u + w (eps - delta eps_u)."""
    (picture,), weight, delta = pictures(1), 1.8, 0.7
    control = ms.ImageControl("a fox", strength=0.25, guidance="self", guidance_scale=weight, delta=delta)
    (level,) = live.levels(control, drawn_from="picture").steps
    with torch.no_grad():
        clean = live.pipe.vae.encode(2 * picture[None] - 1).latents
        with live.stream("a fox", generator=seeded()) as session:
            session.step(ms.Frame(picture, 0.0))
            seed = session.state.seed  # pyright: ignore[reportOptionalMemberAccess]
        noise = philox_normal(torch.tensor([seed]), torch.tensor([0]), 0, (4, 8, 8))
        alpha = float(live.pipe.scheduler.alphas_cumprod[int(level.timestep)])
        a, b = alpha**0.5, (1 - alpha) ** 0.5
        x = a * clean + b * noise
        text = live.pipe.encode_prompt("a fox", "cpu", 1, False)[0]
        eps = live.pipe.unet(x, level.timestep, text).sample
        virtual = delta * (x - a * clean) / b
        guided = virtual + weight * (eps - virtual)
        wanted = live.pipe.vae.decode((x - b * guided) / a).sample
    drawn = run(live, [picture], strength=0.25, guidance="self", guidance_scale=weight, delta=delta)
    torch.testing.assert_close(drawn[0].data, (wanted / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_residual_guidance_of_weight_one_is_none(live: LiveImagePipeline) -> None:
    plain = run(live, [*pictures(2)])
    for guidance in ("self", "initialize", "full"):
        other = run(live, [*pictures(2)], guidance=guidance, guidance_scale=1.0)
        torch.testing.assert_close(together(other), together(plain), rtol=0, atol=1e-5)
    stronger = run(live, [*pictures(2)], guidance="self", guidance_scale=3.0)
    assert (together(stronger) - together(plain)).abs().max() > 1e-3


def test_lcm_renoises_alike_in_and_out_of_a_batch(stable_diffusion: StableDiffusionImg2ImgPipeline) -> None:
    lcm = with_scheduler(stable_diffusion, LCMScheduler(beta_schedule="scaled_linear"))
    settings = {"strength": 0.6, "num_inference_steps": 4}
    batched, separate = (run(lcm, [*pictures(3)], **settings, stream_batch=batch) for batch in (True, False))
    torch.testing.assert_close(together(batched), together(separate), rtol=0, atol=1e-5)


def with_scheduler(pipe: StableDiffusionImg2ImgPipeline, scheduler: Any) -> LiveImagePipeline:
    parts = {**pipe.components, "scheduler": scheduler}
    return LiveImagePipeline.from_diffusers(StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


def test_a_new_prompt_is_for_new_frames(live: LiveImagePipeline) -> None:
    first, second, third = pictures(3)
    with live.stream("a fox", strength=0.5, generator=seeded()) as session:
        chunks = [*session.step(ms.Frame(first, 0.0))]
        session.steer(prompt="an owl")
        chunks += [*session.step(ms.Frame(second, 1.0)), *session.step(ms.Frame(third, 2.0)), *session.flush()]
    assert [chunk.version for chunk in chunks] == [0, 1, 1]
    alone = run(live, [first, second, third], strength=0.5)
    torch.testing.assert_close(chunks[0].data, alone[0].data, rtol=0, atol=1e-5)
    assert (chunks[1].data - alone[1].data).abs().max() > 1e-4


def test_another_strength_lands_what_is_under_way_first(live: LiveImagePipeline) -> None:
    with live.stream("a fox", strength=1.0, generator=seeded()) as session:
        assert not [chunk for picture in pictures(3) for chunk in session.step(ms.Frame(picture, 0.0))]
        session.steer(strength=0.25)
        assert len(session.step(ms.Frame(pictures(1)[0], 0.0))) == 4


@pytest.mark.parametrize("in_bytes", [False, True])
def test_the_filter_leaves_a_still_picture_out(live: LiveImagePipeline, in_bytes: bool) -> None:
    still, *moving = [(255 * each).to(torch.uint8) if in_bytes else each for each in pictures(9)]
    passes = []
    original = live.move
    live.move = lambda lane, frames: (passes.append(len(frames)), original(lane, frames))[1]  # type: ignore[method-assign]
    try:
        chunks = run(live, [still] * 8, strength=0.25, skip_similar=0.6)
        assert len(chunks) == 8, "the last picture is given again"
        assert len(passes) == 1
        assert all(torch.equal(chunk.data, chunks[0].data) for chunk in chunks)
        passes.clear()
        run(live, [*moving], strength=0.25, skip_similar=0.6)
        assert len(passes) == 8, "what moves is drawn"
    finally:
        del live.move


def test_the_filter_shows_what_arrives_late(stable_diffusion: StableDiffusionImg2ImgPipeline) -> None:
    """With overlap a picture comes a tick later; a still scene then shows it, and goes on showing it."""
    late = LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=4, overlap=True)
    first, second = pictures(2)
    with late.stream("a fox", strength=0.25, skip_similar=0.6, generator=seeded()) as session:
        inputs = [first] * 3 + [second] * 5
        shown = [session.step(ms.Frame(picture, float(number))) for number, picture in enumerate(inputs)]
    assert [len(chunks) for chunks in shown] == [0, 1, 1, 1, 1, 1, 1, 1]
    old, new = shown[2][0].data, shown[4][0].data
    assert torch.equal(shown[3][0].data, old), "the last one is shown until the new one arrives"
    assert (new - old).abs().max() > 1e-3
    assert all(torch.equal(chunks[0].data, new) for chunks in shown[5:])


def test_a_scene_that_begins_to_move_leaves_no_hole(live: LiveImagePipeline) -> None:
    """Three frames are under way together; while the first of them is, the viewer sees the last picture."""
    still, *moving = pictures(6)
    inputs = [still] * 6 + moving + [moving[-1]] * 4
    with live.stream("a fox", strength=0.75, skip_similar=0.6, generator=seeded()) as session:
        shown = [session.step(ms.Frame(picture, float(number))) for number, picture in enumerate(inputs)]
        assert session.flush() == []
    assert [len(chunks) for chunks in shown] == [0, 0] + [1] * 13
    chunks = [chunk for each in shown for chunk in each]
    assert [chunk.start for chunk in chunks] == list(range(13))
    times = [chunk.time for chunk in chunks]
    assert times == [0.0, 1.0, 2.0, 5.0, 5.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 13.0, 14.0], "it is as old as it was"
    assert all(torch.equal(chunk.data, chunks[2].data) for chunk in chunks[2:6])
    plain = run(live, [still] * 3 + moving, strength=0.75)
    torch.testing.assert_close(together([*chunks[:3], *chunks[6:11]]), together(plain), rtol=0, atol=1e-5)


def test_words_alone_go_through_all_steps(stable_diffusion: StableDiffusionImg2ImgPipeline) -> None:
    one = LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=1)
    four = LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=4)
    picture = pictures(1)[0]
    for live, settings in ((one, {}), (four, {}), (four, {"strength": 0.25})):
        assert torch.equal(together(run(live, [None], **settings)), together(run(live, [None], strength=1.0)))
    for live, usual in ((one, 1.0), (four, 0.5)):
        assert torch.equal(together(run(live, [picture])), together(run(live, [picture], strength=usual)))

    class Film:
        def read(self) -> ms.Frame: ...

    assert four.stream("a fox", source=Film()).control.strength == 0.5
    with pytest.raises(ValueError, match=r"strength 0.5 of 1 steps leaves none; take 1 or more"):
        one.stream("a fox", source=Film())


@pytest.mark.parametrize("part", ["move", "decode"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_session_outlives_a_step_that_fails(
    stable_diffusion: StableDiffusionImg2ImgPipeline, monkeypatch: pytest.MonkeyPatch, part: str, overlap: bool
) -> None:
    live = LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=4, overlap=overlap)
    inputs = pictures(8)
    plain = together(run(live, [*inputs], strength=0.75))
    original, calls = getattr(live, part), []

    def fails(*arguments: Any, **settings: Any) -> Any:
        calls.append(part)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(*arguments, **settings)

    monkeypatch.setattr(live, part, fails)
    chunks: list[Chunk] = []
    with live.stream("a fox", strength=0.75, generator=seeded()) as session:
        for number, picture in enumerate(inputs):
            with suppress(RuntimeError):
                chunks += session.step(ms.Frame(picture, float(number)))
        chunks += session.flush()
    assert [chunk.time for chunk in chunks] == [float(number) for number in range(8)], "no picture is lost"
    torch.testing.assert_close(together(chunks), plain, rtol=0, atol=1.01 / 255)


def test_a_stream_of_words_forks(live: LiveImagePipeline) -> None:
    with live.stream("a fox", strength=0.25, generator=seeded()) as session:
        for _ in range(3):
            session.step()
        with session.fork() as twin:
            ends = [[*each.step(), *each.flush()] for each in (session, twin)]
        saved = session.snapshot()
    assert torch.equal(together(ends[0]), together(ends[1]))
    fewer = LiveImagePipeline.from_diffusers(live.pipe, num_inference_steps=4)
    with fewer.stream("a fox", num_inference_steps=4, generator=seeded()) as session:
        session.step()
        damaged = session.snapshot()
        damaged.leaves["flight0.step"] = 99
        with pytest.raises(ValueError, match="after 99 steps, which has 4 here"):
            session.restore(damaged)
        session.restore(saved)


def test_a_prompt_is_read_once(stable_diffusion: StableDiffusionImg2ImgPipeline) -> None:
    live = LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=4)
    read, original = [], live.network.read
    live.network.read = lambda *prompt: (read.append(prompt[0]), original(*prompt))[1]  # type: ignore[method-assign]
    sessions = [live.stream(f"fox {number}", strength=0.5, generator=seeded(number)) for number in range(20)]
    for picture in pictures(1):
        ms.streaming.step_together(sessions, [ms.Frame(picture, 0.0)] * 20)
    before = len(read)
    for picture in pictures(2):
        ms.streaming.step_together(sessions, [ms.Frame(picture, 0.0)] * 20)
    assert len(read) == before, "more streams than prompts are kept, and none reads twice"
    for session in sessions:
        session.close()


def test_steering_does_not_keep_a_step_waiting(stable_diffusion: StableDiffusionImg2ImgPipeline) -> None:
    live = LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=4)
    reads, stepped, original = Event(), Event(), live.network.read
    with live.stream("a fox", generator=seeded()) as session:
        session.step(ms.Frame(pictures(1)[0], 0.0))

        def slow(*prompt: Any) -> Any:
            reads.set()
            assert stepped.wait(60), "the step waited for the prompt"
            return original(*prompt)

        live.network.read = slow  # type: ignore[method-assign]
        thread = Thread(target=session.steer, kwargs={"prompt": "an owl"})
        thread.start()
        assert reads.wait(60)
        session.step(ms.Frame(pictures(1)[0], 1.0))
        stepped.set()
        thread.join()
        assert session.control.prompt == "an owl"


def test_sessions_step_together_as_alone(live: LiveImagePipeline) -> None:
    first, second = pictures(2)
    with live.stream("a fox", generator=seeded(1)) as one, live.stream("an owl", generator=seeded(2)) as other:
        both = ms.streaming.step_together([one, other], [ms.Frame(first, 0.0), ms.Frame(second, 0.0)])
        both = [[*each, *session.flush()] for each, session in zip(both, (one, other))]
    with live.stream("an owl", generator=seeded(2)) as alone:
        wanted = [*alone.step(ms.Frame(second, 0.0)), *alone.flush()]
    torch.testing.assert_close(both[1][0].data, wanted[0].data, rtol=0, atol=1e-5)


def test_a_snapshot_goes_on_alike(live: LiveImagePipeline) -> None:
    first, second = pictures(2)
    with live.stream("a fox", strength=0.75, generator=seeded()) as session:
        session.step(ms.Frame(first, 0.0))
        with session.fork() as twin:
            ends = [[*each.step(ms.Frame(second, 1.0)), *each.flush()] for each in (session, twin)]
    assert torch.equal(together(ends[0]), together(ends[1]))


def test_overlap_gives_the_same_pictures_one_tick_later(stable_diffusion: StableDiffusionImg2ImgPipeline) -> None:
    late = LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=4, overlap=True)
    prompt = LiveImagePipeline.from_diffusers(stable_diffusion, num_inference_steps=4)
    with late.stream("a fox", strength=0.25, generator=seeded()) as session:
        counts = [len(session.step(ms.Frame(picture, 0.0))) for picture in pictures(3)]
        assert counts == [0, 1, 1]
        assert len(session.flush()) == 1
    difference = together(run(late, [*pictures(3)])) - together(run(prompt, [*pictures(3)]))
    assert difference.abs().max() < 0.503 / 255, "but for the rounding to bytes"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("strength", [0.25, 0.75])
def test_lanes_draw_what_one_lane_draws(stable_diffusion: StableDiffusionImg2ImgPipeline, strength: float) -> None:
    """Two ticks at once, from the first that is not recorded to the last that is; words that change meanwhile."""
    pipe = copy.deepcopy(stable_diffusion).to("cuda")
    drawn = []
    for overlap in (False, True):
        live = LiveImagePipeline.from_diffusers(pipe, num_inference_steps=4, overlap=overlap)
        chunks: list[Chunk] = []
        with live.stream("a fox", strength=strength, generator=seeded()) as session:
            for number, picture in enumerate(pictures(40)):
                chunks += session.step(ms.Frame(picture, float(number)))
                if number % 7 == 6:
                    session.steer(prompt=f"a fox, seen {number} times")
            chunks += session.flush()
        assert [chunk.time for chunk in chunks] == [float(number) for number in range(40)]
        assert all(len(lane.recordings) >= 3 for lane in live.lanes)
        drawn.append(together(chunks).cpu())
    assert (drawn[1] - drawn[0]).abs().max() < 1.01 / 255


def test_bytes_are_read_as_floats_are(live: LiveImagePipeline) -> None:
    raw = [(picture * 255).to(torch.uint8) for picture in pictures(2)]
    assert torch.equal(together(run(live, [*raw])), together(run(live, [each.float() / 255 for each in raw])))


def test_a_source_is_read_to_its_end(live: LiveImagePipeline) -> None:
    class Film:
        def __init__(self) -> None:
            self.left: list[Tensor | None] = [torch.rand(3, 80, 96), None, *torch.rand(2, 3, 80, 96)]

        def read(self) -> ms.Frame | None:
            if not self.left:
                raise EndOfStream
            picture = self.left.pop(0)
            return None if picture is None else ms.Frame(picture, 0.0)

        def close(self) -> None: ...

    with live.stream("a fox", source=Film(), strength=1.0) as session:
        drawn = list(session)
        with pytest.raises(ValueError, match="two sessions cannot read one source"):
            session.fork()
    endless = Film()
    endless.left = [None] * 10**6
    session = live.stream("a fox", source=endless)
    Timer(0.2, session.close).start()
    assert list(session) == []
    with pytest.raises(TypeError, match="a source is a Camera, a VideoFile or the like"):
        live.stream("a fox", source="in.mp4")
    assert [tuple(each.shape) for each in drawn] == [(3, *SIZE)] * 3


def test_steps_are_recorded_once_they_are_steady(live: LiveImagePipeline) -> None:
    kinds: list[int] = []

    def record(step: Any, inputs: Any) -> Any:
        kinds.append(len(inputs))
        return step

    wanted = together(run(live, [*pictures(6)], strength=0.5))
    (lane,) = live.lanes
    unrecorded, lane.recordings = lane.recordings, Recordings(torch.device("cpu"), record=record)
    try:
        live.warmup(ms.ImageControl(strength=0.5))
        recorded = len(kinds)
        assert recorded == 3, "take in, move, decode"
        torch.testing.assert_close(together(run(live, [*pictures(6)], strength=0.5)), wanted, rtol=0, atol=1e-5)
        assert len(kinds) == recorded, "nothing is recorded once it is warm"
    finally:
        lane.recordings = unrecorded


def test_the_text_keys_leave_the_pipeline_as_it_was(stable_diffusion: StableDiffusionImg2ImgPipeline) -> None:
    live = LiveImagePipeline.from_diffusers(stable_diffusion)
    told, _ = live.conditions(ms.ImageControl("a fox"))
    text = stable_diffusion.encode_prompt("a fox", "cpu", 1, False)[0]
    assert told[0].shape[-1] > text.shape[-1]
    x, when = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        torch.testing.assert_close(live.network(x, when, told), stable_diffusion.unet(x, when, text).sample)


@pytest.mark.parametrize("compiled", [False, pytest.param("default", marks=[pytest.mark.gpu, needs_cuda])])
def test_joined_projections_draw_the_same(
    stable_diffusion: StableDiffusionImg2ImgPipeline, compiled: str | bool
) -> None:
    device = "cuda" if compiled else "cpu"
    pipes = []
    for _ in range(2):
        parts = {**stable_diffusion.components, "unet": copy.deepcopy(stable_diffusion.unet)}
        parts["vae"] = copy.deepcopy(stable_diffusion.vae)
        parts["text_encoder"] = copy.deepcopy(stable_diffusion.text_encoder)
        pipes.append(StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False).to(device))
    eager, joined = (LiveImagePipeline.from_diffusers(pipe, compile=pipe is pipes[1] and compiled) for pipe in pipes)
    joined.network.join_projections()
    settings = {"strength": 1.0, "guidance": "initialize", "guidance_scale": 1.5}
    wanted, drawn = (together(run(live, [*pictures(6)], **settings)) for live in (eager, joined))
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-2 if compiled else 1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.1, "num_inference_steps": 4}, r"strength 0.1 of 4 steps leaves none; take 0.25 or more"),
        ({"guidance": "residual"}, "guidance must be none, self, initialize or full, got 'residual'"),
        ({"strength": 2}, "strength must be between 0"),
        ({"stream_batch": 1}, "stream_batch must be True or False"),
    ],
)
def test_settings_out_of_range_are_refused(live: LiveImagePipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        live.stream("a fox", **settings)


def test_pictures_that_do_not_fit_are_refused(live: LiveImagePipeline) -> None:
    with live.stream("a fox") as session, pytest.raises(ValueError, match=r"\[3, 64, 64\].*fit\(picture"):
        session.step(ms.Frame(torch.rand(3, 32, 64), 0.0))
    with live.stream("a fox", guidance="self") as session, pytest.raises(ValueError, match="there is none"):
        session.step()
    with pytest.raises(ValueError, match="multiples of 8 pixels each way, got 60 x 64"):
        LiveImagePipeline.from_diffusers(live.pipe, size=(60, 64))


def test_other_pipelines_are_refused(stable_diffusion: StableDiffusionImg2ImgPipeline, make_vae: Any) -> None:
    class Other:
        components: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(ValueError, match=r"can be made of Stable Diffusion 1, 2, XL and 3.*Other has no network"):
        LiveImagePipeline.from_diffusers(Other())
    with pytest.raises(ValueError, match="this UNet reads 4 channels and the autoencoder's latents have 8"):
        LiveImagePipeline.from_diffusers(stable_diffusion, tiny=make_vae(8))
    tiny = make_vae()
    with pytest.raises(ValueError, match="multiples of 8 pixels"):
        LiveImagePipeline.from_diffusers(stable_diffusion, tiny=tiny, size=(60, 64))
    assert stable_diffusion.vae is not tiny, "a refusal changes nothing"
    assert LiveImagePipeline.from_diffusers(stable_diffusion, tiny=tiny).vae is tiny
    for settings, message in (
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"rate": float("nan")}, "rate is pictures per second"),
        ({"size": 64}, r"size is \(height, width\)"),
        ({"compile": "reduce-overhead"}, "compile must be True, False or one of default"),
    ):
        with pytest.raises(ValueError, match=message):
            LiveImagePipeline.from_diffusers(stable_diffusion, **settings)
    parts = {**stable_diffusion.components, "vae": None}

    class NoCodec(Other):
        components = parts

    with pytest.raises(ValueError, match="this NoCodec has no vae"):
        LiveImagePipeline.from_diffusers(NoCodec())


def test_ddim_ends_where_its_config_says(stable_diffusion: StableDiffusionImg2ImgPipeline) -> None:
    """SD 1's set_alpha_to_one=False: the last step does not quite reach the clean latents."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1)
    live = with_scheduler(stable_diffusion, scheduler)
    levels = live.levels(ms.ImageControl(strength=1.0, num_inference_steps=4), drawn_from="picture")
    x = torch.randn(1, 4, 8, 8)
    ddim: Any = scheduler
    ddim.set_timesteps(4)
    steps, plain = levels.steps, levels.steps[0].scale * x
    for step, timestep in zip(steps, ddim.timesteps):
        out = torch.sin(plain * 3)
        flow = step.keep * x + step.take * out
        x, _ = levels.rule.step(x, flow, step.sigma, step.sigma_next)
        plain = ddim.step(out, timestep, plain).prev_sample
    torch.testing.assert_close(levels.final * x, plain, rtol=1e-5, atol=1e-5)
