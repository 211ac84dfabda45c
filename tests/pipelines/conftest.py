"""A world so small that a frame takes milliseconds; its weights are random, so everything that should matter does."""

from __future__ import annotations

import itertools

import pytest
import torch

from millstream import WorldPipeline
from millstream.models.frame_codec import FrameAutoencoder
from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.transformer import CausalTransformer3DModel
from millstream.samplers import FlowSampler
from millstream.streaming import Frame

BUTTONS = ["FORWARD", "BACKWARD", "LEFT", "RIGHT", "TURN_LEFT", "TURN_RIGHT", "ATTACK"]
KEY_MAP = {
    "KeyW": "FORWARD",
    "KeyS": "BACKWARD",
    "KeyA": "LEFT",
    "KeyD": "RIGHT",
    "ArrowLeft": "TURN_LEFT",
    "ArrowRight": "TURN_RIGHT",
    "Space": "ATTACK",
}


def make_world(
    *, sampler: FlowSampler | None = None, window: int = 4, sinks: int = 0, layers: int = 2
) -> WorldPipeline:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformer = CausalTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=48,
            num_layers=layers,
            action_dim=len(BUTTONS),
            cross_attention_layers=[0],
            position_grid=(2, 3),
        )
        codec = FrameAutoencoder(4, (8, 8, 16), (0, 0, 1), (1, 0, 0))
        text_encoder = ByteTextEncoder(16, 2, 1, 2, 64)
        for part, name, by in (
            (transformer, "action_embedder.weight", 5.0),
            (transformer, "blocks.0.attn2.to_out.0.weight", 5.0),
            (transformer, "proj_out.weight", 2.0),
            (text_encoder, "embedding.weight", 3.0),
        ):
            part.get_parameter(name).data.mul_(by)  # so that keys, words and memory show in the picture
    pipe = WorldPipeline(
        transformer.eval(),
        codec.eval(),
        text_encoder.eval(),
        sampler or FlowSampler(2),
        worlds=["a brick corridor", "a slime arena"],
        buttons=BUTTONS,
        key_map=KEY_MAP,
        size=(32, 48),
        rate=17.5,
        window=window,
        sinks=sinks,
        pixels_per_turn=10.0,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def shared_pipe() -> WorldPipeline:
    return make_world()


@pytest.fixture
def pipe(shared_pipe: WorldPipeline) -> WorldPipeline:
    """The shared world with no row in use and a fresh arena."""
    shared_pipe._arena = None
    return shared_pipe


@pytest.fixture
def make():
    return make_world


@pytest.fixture
def seeded():
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture
def draw():
    """`count` frames of a session, [count, 3, H, W], while `keys` (one entry per frame) are played."""

    def drawn(session, count, keys=()):
        pictures = []
        for held in itertools.islice(itertools.chain(keys, itertools.repeat(None)), count):
            if keys:
                session.steer(keys={held} if held else set())
            pictures.append(session.step()[0].data[0].clone())
        return torch.stack(pictures)

    return drawn


@pytest.fixture
def camera():
    """`count` frames of a camera that pans over a smooth picture."""

    def panning(count, seed=3):
        coarse = torch.rand(1, 3, 5, 16, generator=torch.Generator().manual_seed(seed))
        wide = torch.nn.functional.interpolate(coarse, (32, 144), mode="bicubic").clamp(0, 1)[0]
        return [Frame(wide[..., 2 * n : 2 * n + 48].clone(), 10.0 + n) for n in range(count)]

    return panning


@pytest.fixture
def play():
    """The chunks of a session that is given frames one after the other."""

    def played(session, frames, flush=False):
        chunks = [chunk for frame in frames for chunk in session.step(frame)]
        return chunks + list(session.flush()) if flush else chunks

    return played
