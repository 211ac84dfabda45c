"""Streams that begin with a picture, and videos that are redrawn while they come in."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

import millstream as ms
from millstream import Frame
from millstream.kernels import philox_normal
from millstream.models.wan_vae import WanDecoder, WanEncoder
from millstream.streaming import EndOfStream


@pytest.fixture
def video():
    """33 pictures that move: latents of 3 chunks."""
    base = torch.rand(3, 16, 32 + 33, generator=torch.Generator().manual_seed(4))
    return torch.stack([base[..., i : i + 32] for i in range(33)])


def coded(pipe, pictures):
    """Encoded and decoded again."""
    encoder, decoder = WanEncoder(pipe.vae), WanDecoder(pipe.vae)
    return decoder.decode(encoder.encode(pictures[None], encoder.begin(16, 32)), decoder.begin(16, 32))[0]


@pytest.mark.parametrize(
    "name", ["self_forcing", "longlive_unbounded", "rolling_forcing", "krea", "streamdiffusion_v2"]
)
def test_a_stream_that_starts_from_a_picture_shows_it_first(name, make, video, seeded):
    pipe = make(name)
    clip = pipe("a corgi surfs", image=video[0], num_frames=25, generator=seeded(), output_type="pt").frames
    other = pipe("a corgi surfs", image=video[9], num_frames=25, generator=seeded(), output_type="pt").frames
    assert len(clip) == 25
    torch.testing.assert_close(clip[:1], coded(pipe, video[:1]), atol=1e-4, rtol=1e-4)
    assert (clip[5:] - other[5:]).abs().max() > 1e-3, "what follows depends on it"


@torch.no_grad()
def test_what_follows_a_picture_is_what_one_forward_over_it_predicts(make, video, seeded):
    pipe = make("self_forcing")
    with pipe.stream("a corgi surfs", image=video[0], generator=seeded()) as session:
        (chunk,) = session.step()
        assert len(chunk.data) == 13, "the picture itself, and a chunk of three frames behind it"
        first, drawn = session.state.finished
        seed = session.state.seed
    encoder = WanEncoder(pipe.vae)
    torch.testing.assert_close(first, encoder.encode(video[:1][None], encoder.begin(16, 32))[0])
    visible = torch.ones(4, 4, dtype=torch.bool)
    visible[0, 1:] = False
    mask = visible.repeat_interleave(2, 0).repeat_interleave(2, 1)
    sigmas, x = pipe.recipe.sigmas(), None
    for step, sigma in enumerate([*sigmas[:-1]]):
        noise = torch.stack(
            [philox_normal(torch.tensor([seed]), torch.tensor([f]), step, pipe.latent_size)[0] for f in (1, 2, 3)], 1
        )
        x = noise if x is None else (1 - sigma) * x + sigma * noise
        timestep = torch.tensor([[0.0, *[1000 * sigma] * 3]])
        text = pipe.encode_prompt("a corgi surfs")[None]
        (flow,) = pipe.transformer(torch.cat([first, x], 1)[None], timestep, text, mask=mask, return_dict=False)
        x = x - sigma * flow[0, :, 1:]
    torch.testing.assert_close(drawn, x, atol=1e-3, rtol=1e-3)


def test_a_picture_stays_the_start_after_a_reset_and_in_a_fork(make, video, seeded):
    pipe = make("self_forcing")
    with pipe.stream("a corgi surfs", image=video[0], generator=seeded()) as session:
        twin = session.fork()
        (one,), (two,) = session.step(), twin.step()
        torch.testing.assert_close(one.data, two.data, atol=1e-5, rtol=1e-5)
        twin.close()
        session.reset()
        (again,) = session.step()
        torch.testing.assert_close(again.data[0], one.data[0])
        assert (again.data[1:] - one.data[1:]).abs().max() > 1e-3, "another seed"
        with session.fork() as twin:
            twin.reset()
            torch.testing.assert_close(twin.step()[0].data[0], one.data[0])


@pytest.mark.parametrize("name", ["self_forcing", "causvid", "krea"])
def test_strength_0_keeps_the_input_and_more_leaves_less_of_it(name, make, video, seeded):
    pipe = make(name)

    def redrawn(strength):
        clip = pipe("a corgi", video=list(video), strength=strength, generator=seeded(), output_type="pt").frames
        return (clip - coded(pipe, video)).abs().mean()

    distances = [redrawn(strength) for strength in (0.0, 0.05, 0.3, 1.0)]
    assert distances[0] < 1e-5
    assert distances[0] < distances[1] < distances[2]
    assert distances[2] < distances[3] * 1.5


@pytest.mark.parametrize("at", [9, 14])
def test_a_cut_begins_at_the_next_picture_of_the_input(make, video, seeded, at):
    """What had not filled a chunk is dropped with the shot it belongs to."""
    pipe, drawn = make("longlive"), []
    with pipe.stream("a corgi", strength=0.0, generator=seeded()) as session:
        for number, picture in enumerate(video):
            if number == at:
                session.steer(prompt="the red fox", switch="cut")
            drawn += [(number, chunk.data) for chunk in session.step(Frame(picture, 0.0))]
    assert [(number, len(data)) for number, data in drawn][:2] == [(8, 9), (at + 8, 9)]
    torch.testing.assert_close(drawn[1][1], coded(pipe, video[at : at + 9]), atol=1e-4, rtol=1e-4)


def test_strength_1_ignores_the_input(pipe, video, seeded):
    redrawn = pipe("a corgi", video=list(video), generator=seeded(), output_type="pt").frames
    drawn = pipe("a corgi", num_frames=33, generator=seeded(), output_type="pt").frames
    torch.testing.assert_close(redrawn, drawn, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "counts"), [("self_forcing", [9, 21, 33]), ("streamdiffusion_v2", [1, 9, 13, 17])])
def test_a_chunk_is_drawn_as_soon_as_its_pictures_are_there(name, counts, make, video, seeded):
    pipe, came = make(name), []
    with pipe.stream("a corgi", strength=0.8, generator=seeded()) as session:
        for number, picture in enumerate(video):
            chunks = session.step(Frame(picture, 100.0 + number))
            came += [number + 1] * len(chunks)
            assert all(chunk.time == 100.0 + number for chunk in chunks)
    assert came[: len(counts)] == counts


@pytest.mark.parametrize(("name", "counts"), [("self_forcing", [13, 25, 37]), ("krea", [13, 25, 37])])
def test_a_video_behind_a_picture_is_redrawn_in_step_with_it(name, counts, make, video, seeded):
    """The picture is the first latent frame; of those behind it each stands for 4 pictures of the video."""
    pipe, taken = make(name), []
    given = torch.cat([video, video[:4]])
    with pipe.stream("a corgi", image=video[0], strength=0.0, generator=seeded()) as session:
        drawn = []
        for number, picture in enumerate(given):
            for chunk in session.step(Frame(picture, 0.0)):
                drawn += [chunk.data]
                taken.append(number + 1)
                assert sum(map(len, drawn)) == number + 1, "as many pictures came out as went in"
    assert taken == counts
    torch.testing.assert_close(torch.cat(drawn), coded(pipe, given), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="too short: a chunk takes 13 pictures at first"):
        pipe("a corgi", image=video[0], video=list(video[:12]), strength=0.0)


def test_a_stream_batch_behind_a_picture_keeps_step_too(make, video, seeded):
    pipe, taken = make("streamdiffusion_v2"), []
    with pipe.stream("a corgi", image=video[0], strength=0.8, generator=seeded()) as session:
        for number, picture in enumerate(video[:25]):
            taken += [(number + 1, len(chunk.data)) for chunk in session.step(Frame(picture, 0.0))]
    assert taken == [(5, 5), (13, 4), (17, 4), (21, 4), (25, 4)]


@pytest.mark.parametrize("start", ["words", "picture"])
def test_a_video_that_joins_a_running_stream_is_redrawn_picture_for_picture(make, video, seeded, start):
    pipe, taken = make("longlive"), []
    image = video[0] if start == "picture" else None
    with pipe.stream("a corgi", image=image, strength=0.0, generator=seeded()) as session:
        session.step()
        for number, picture in enumerate(video[:24]):
            taken += [(number + 1, len(chunk.data)) for chunk in session.step(Frame(picture, 0.0))]
        assert taken == [(12, 12), (24, 12)]
        session.steer(prompt="the red fox", switch="cut")
        again = [
            (number + 1, len(chunk.data)) for number in range(9) for chunk in session.step(Frame(video[number], 0))
        ]
    assert again == [(9, 9)], "a new shot has a first frame of its own"


def test_an_input_that_is_interrupted_by_a_snapshot_is_drawn_the_same(make, video, seeded):
    for name in ("self_forcing", "streamdiffusion_v2"):
        pipe = make(name)
        with pipe.stream("a corgi", strength=0.8, generator=seeded()) as session, pipe.stream("a fox") as other:
            for picture in video[:14]:
                session.step(Frame(picture, 0.0))
            other.restore(session.snapshot())
            for picture in video[14:]:
                pair = [each.step(Frame(picture, 0.0)) for each in (session, other)]
                for one, two in zip(*pair, strict=True):
                    torch.testing.assert_close(one.data, two.data, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stream_batch_noise_follows_motion_as_published(make, video, seeded):
    """noise = (strength - 0.1 motion) 0.9 + 0.1 last; the model is told 0.1 less, and the first chunk is redrawn."""
    pipe = make("streamdiffusion_v2")
    told = []
    inner = pipe._flow
    pipe._flow = lambda x, timestep, chunk: told.append(timestep.flatten().tolist()) or inner(x, timestep, chunk)
    moving = torch.cat([video[:1], video[1:2].repeat(4, 1, 1, 1), video[5:9]])
    with pipe.stream("a corgi", strength=0.8, generator=seeded()) as session:
        for picture in moving:
            session.step(Frame(picture, 0.0))
    noise, expected = 0.8, []
    for chunk in (moving[:1], moving[:5], moving[4:9]):
        steps = [min(1.0, float((2 * (b - a)).square().mean().sqrt()) / 0.2) for a, b in pairwise(chunk)]
        noise = 0.9 * (0.8 - 0.1 * max(steps, default=0.0)) + 0.1 * noise
        expected.append(1000 * noise - 100)
    assert [told[0][0], told[2][0], told[3][0]] == pytest.approx(expected, abs=1e-3)
    assert [told[1], told[3][1:]] == [[500.0], [500.0]]


def test_inputs_that_cannot_be_redrawn_are_refused_before_anything_moves(make, video, seeded):
    pipe = make("self_forcing")
    with pipe.stream("a corgi", generator=seeded()) as session:
        with pytest.raises(ValueError, match=r"is \[3, 16, 32\] in floats from 0 to 1, got \[3, 16, 24\]"):
            session.step(Frame(video[0, ..., :24], 0.0))
        with pytest.raises(ValueError, match=r"got .* in torch\.uint8"):
            session.step(Frame(video[0].byte(), 0.0))
        assert session.state.encoding is None
    for name, message in (
        ("rolling_forcing", "recipe 'rolling_forcing' draws from prompts alone"),
        ("streamdiffusion_v2", r"redraws with strength 0\.7 or more, got 0\.5"),
    ):
        with make(name).stream("a corgi", strength=0.5) as session, pytest.raises(ValueError, match=message):
            session.step(Frame(video[0], 0.0))


def test_a_camera_of_another_shape_is_redrawn_live(make, seeded):
    """`ms.live` fits pictures to the pipeline's size; every chunk answers the newest of them."""
    pipe = make("self_forcing")
    source, sink = Camera(40), Collector(2)
    with pipe.stream("a corgi", strength=0.5, generator=seeded()) as session:
        metrics = ms.live(source, session, sink, until=60)
    assert [chunk.data.shape for chunk in sink.chunks[:2]] == [(9, 3, 16, 32), (12, 3, 16, 32)]
    assert metrics.ended in ("source", "sink")


class Camera:
    """Pictures of 24 x 20, as fast as they are taken."""

    def __init__(self, count):
        self.left = count

    def read(self):
        self.left -= 1
        if self.left < 0:
            raise EndOfStream
        time.sleep(0.03)
        return Frame(torch.rand(3, 24, 20), time.monotonic())

    def close(self):
        pass


class Collector:
    """Ends the stream after a few chunks."""

    def __init__(self, count):
        self.count, self.chunks = count, []

    def write(self, chunk):
        self.chunks.append(chunk)
        if len(self.chunks) == self.count:
            raise EndOfStream

    def close(self):
        pass
