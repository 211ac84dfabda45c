"""Ten thousand latent frames (40,000 pictures, 42 minutes): no cut where tables used to end, no growth, no slowing."""

from __future__ import annotations

import gc
import resource
import statistics
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from millstream.models.tiny_vae import TinyVideoDecoder


class Work(TorchDispatchMode):
    """Counts operations, and the numbers that they give: what a step costs, however busy the machine is."""

    def __init__(self):
        super().__init__()
        self.count, self.numbers = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += 1
        self.numbers += sum(part.numel() for part in tree_leaves(out) if isinstance(part, torch.Tensor))
        return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "frames"), [("longlive_unbounded", 10_000), ("rolling_forcing", 2_000), ("krea", 2_000)]
)
def test_a_stream_never_ends(name, frames, make, seeded):
    torch.manual_seed(0)
    pipe = make(name, decoder=TinyVideoDecoder(4, 1, (8, 8, 8, 4)).eval())
    early, late, memory, brightness, steps = set(), set(), [], [], 0
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        session.step()
        while session.state.frame < frames:
            works = early if 50 <= steps < 250 else late if session.state.frame > frames - 300 else None
            with Work() if works is not None else nullcontext() as work:
                chunks = session.step()
            if works is not None:
                works.add((work.count, work.numbers))
            for chunk in chunks:
                assert chunk.data.isfinite().all()
                brightness.append(float(chunk.data.mean()))
            steps += 1
            if steps % 100 == 0:
                gc.collect()
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        pictures = session.state.pictures
    assert pictures > 4 * (frames - 3) - 3
    assert late == early, "the last chunks cost what early ones did"
    assert memory[-1] < memory[1] + 20_000, "kilobytes: the stream keeps nothing"
    jumps = [abs(one - two) for one, two in pairwise(brightness)]
    assert max(jumps[330:360]) < 3 * statistics.quantiles(jumps, n=100)[98], "nothing happens at frame 1,024"
