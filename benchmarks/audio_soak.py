"""Minutes of continuous speech through the jitter buffer, against a clock that is as true as it is quick.

The listener's clock runs on by what each step really took, and leaps where the speaker would only wait because enough
sound is ahead. So ten minutes take as long as their computing, and a stumble is still heard.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import psutil
import torch
from audio_streams import SENTENCES

from millstream.pipelines.audio import AudioPipeline
from millstream.streaming import JitterBuffer
from millstream.ui.server.seat import AHEAD_SECONDS

BLOCK = 0.01  # seconds that a device takes at a time


def soak_variants(device: torch.device, model: str | None, minutes: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """The speaking model of a folder, or a small one with random weights, which says whether the plumbing holds."""
    return {f"soak: {minutes:g} minutes": partial(soak, device, model, minutes)}


def random_pipeline() -> AudioPipeline:
    from millstream.models.audio_codec import AudioCodec
    from millstream.models.pronouncer import Pronouncer
    from millstream.models.speech import SpeechTransformer
    from millstream.samplers import FlowSampler

    torch.manual_seed(0)
    codec = AudioCodec().eval()
    small = {"phoneme_dim": 16, "dim": 64, "layers": 2, "ffn_dim": 64, "head_dim": 32, "head_layers": 1}
    model = SpeechTransformer(codec.latent_channels, codec.frame_rate, **small).eval()
    torch.nn.init.constant_(model.duration[-1].bias, 1.8)  # six hundredths of a second for a sound
    return AudioPipeline(model, codec, Pronouncer(16, 1).eval(), FlowSampler(2))


def soak(device: torch.device, folder: str | None, minutes: float) -> dict[str, Any]:
    pipe = (random_pipeline() if folder is None else AudioPipeline.from_pretrained(folder)).to(device)
    rate, process, texts = pipe.sampling_rate, psutil.Process(), cycle(SENTENCES)
    pipe(SENTENCES[0])  # warms up
    buffer = JitterBuffer(rate)
    block, ahead = round(BLOCK * rate), round(AHEAD_SECONDS * rate)
    clock, heard_until, worked, longest, memory = 0.0, 0.0, 0.0, 0.0, []
    with pipe.stream(next(texts), generator=torch.Generator().manual_seed(0)) as session:
        while buffer.position < 60 * minutes:
            start = time.perf_counter()
            if session.state is not None and len(session.state.waiting) < 100:
                session.steer(text=next(texts))
            chunks = session.step()
            took = time.perf_counter() - start
            clock, worked, longest = clock + took, worked + took, max(longest, took)
            while heard_until + BLOCK <= clock:
                buffer.read(block)
                heard_until += BLOCK
            for chunk in chunks:
                buffer.write(chunk.data, 0)
            while len(buffer) > ahead:
                buffer.read(block)
                clock = heard_until = heard_until + BLOCK
            if buffer.position >= 30 * len(memory):
                memory.append(process.memory_info().rss)
        state = session.state
        kept = state.cache.bytes + state.codec.bytes
    settled = memory[len(memory) // 5 :]  # the first minutes fill caches of words
    return {
        "seconds_heard": buffer.position,
        "underruns": buffer.underruns,
        "real_time_factor": worked / buffer.position,
        "first_sound_seconds": session.metrics.time_to_first_sound,
        "longest_step_seconds": longest,
        "state_bytes": kept,
        "memory_bytes_every_30_seconds": memory,
        "memory_growth_bytes": settled[-1] - settled[0],
        "met": buffer.underruns == 0 and settled[-1] - settled[0] < 2**20 * minutes / 10,
    }
