"""Ten thousand latent frames (40,000 pictures, 42 minutes): no cut where tables used to end, no growth, no slowing."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from itertools import pairwise

import pytest
import torch

from millstream.models.tiny_vae import TinyVideoDecoder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "frames"), [("longlive_unbounded", 10_000), ("rolling_forcing", 2_000), ("krea", 2_000)]
)
def test_a_stream_never_ends(name, frames, make, seeded):
    torch.manual_seed(0)
    pipe = make(name, decoder=TinyVideoDecoder(4, 1, (8, 8, 8, 4)).eval())
    seconds, memory, brightness = [], [], []
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        session.step()
        while session.state.frame < frames:
            start = time.thread_time()  # others may be busy on this machine
            chunks = session.step()
            seconds.append(time.thread_time() - start)
            for chunk in chunks:
                assert chunk.data.isfinite().all()
                brightness.append(float(chunk.data.mean()))
            if len(seconds) % 100 == 0:
                gc.collect()
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        pictures = session.state.pictures
    assert pictures > 4 * (frames - 3) - 3
    early, late = min(seconds[50:250]), min(seconds[-200:])  # the least disturbed of each
    assert late < 1.3 * early, "the last chunk costs what an early one did"
    assert memory[-1] < memory[1] + 20_000, "kilobytes: the stream keeps nothing"
    jumps = [abs(one - two) for one, two in pairwise(brightness)]
    assert max(jumps[330:360]) < 3 * statistics.quantiles(jumps, n=100)[98], "nothing happens at frame 1,024"
