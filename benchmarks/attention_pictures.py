"""The pictures of docs/attention.md, drawn from the plans themselves.

python benchmarks/attention_pictures.py docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
from attention_cases import clustered_inputs, video_inputs
from matplotlib.colors import ListedColormap

from millstream.kernels import BlockPlan
from millstream.kernels import planners as P
from millstream.kernels.attention import causal_frames

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRID = (6, 12, 24)  # 1,728 tokens
COLOURS = ListedColormap(["#ffffff", "#8ec7d2", "#0d6986", "#f2c14e"])  # not visited, masked, full, centroid


def state(plan: BlockPlan, head: int = 0) -> torch.Tensor:
    """0 not visited, 1 masked, 2 full, 3 by its centroid: [NQ, NK]."""
    key_blocks = int(plan.indices.max()) + 1
    if plan.lengths is not None:
        key_blocks = plan.lengths[1].shape[-1]
    if plan.summary is not None:
        key_blocks = plan.summary.key.shape[2]
    head = min(head, plan.indices.shape[1] - 1)
    picture = torch.full((plan.query_blocks, key_blocks), 3 if plan.rest == "centroid" else 0)
    for row in range(plan.query_blocks):
        full, masked = int(plan.n_full[0, head, row]), int(plan.n_masked[0, head, row])
        picture[row, plan.indices[0, head, row, :full].long()] = 2
        picture[row, plan.indices[0, head, row, full : full + masked].long()] = 1
    return picture


def sheet(pictures: dict[str, torch.Tensor], path: Path, columns: int = 4) -> None:
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.55 * rows), dpi=90, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, picture) in zip(axes.flat, pictures.items()):
        axis.axis("on")
        axis.imshow(picture, cmap=COLOURS, vmin=0, vmax=3, interpolation="nearest", aspect="auto")
        axis.set(xticks=[], yticks=[])
        density = float(((picture == 1) | (picture == 2)).double().mean())
        axis.set_title(f"{name}\n{density:.0%}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    q, k, v = (x.float() for x in video_inputs(GRID, 2, 64, "cpu"))
    frame = torch.arange(1728) // 288
    tiling = P.tile_grid(GRID, (2, 4, 8))
    static = {
        "causal frames,\nwindow 3, sink 1": BlockPlan.of_mask(
            causal_frames(frame, frame, window=3, sinks=1), 1728, 1728, (64, 64)
        ),
        "window 3x5x9,\ntiles 2x4x8": P.window(GRID, (3, 5, 9), tile=(2, 4, 8)),
        "window 2x12x8,\nstride = tile": P.window(GRID, (2, 12, 8), stride=(2, 4, 8), tile=(2, 4, 8)),
        "sliding tile 3x1x3": P.sliding_tile(GRID, (3, 1, 3), tile=(2, 4, 4)),
        "radial": P.radial(21, 1560),
        "streaming head": P.duo(torch.tensor([False]), 1728, block=64),
        "spatial": P.spatial(GRID),
        "temporal": P.temporal(GRID),
    }
    dynamic = {
        "PISA": P.pisa(q, k, v),
        "SVG-EAR": P.svg_ear(*(x.float() for x in clustered_inputs(GRID, 2, 64, "cpu"))),
        "VMoBA": P.vmoba(q, k, tiling),
        "BiFormer": P.biformer(q, k, tiling, topk=5),
        "SpargeAttn": P.sparge(q, k, cdfthreshd=0.5, simthreshd1=0.1, block=(64, 64)),
        "SVG 1, temporal head": P.svg1(q, k, v, GRID, block=64),
        "SVG 2, clusters": P.svg2(q, k, num_q_clusters=16, num_k_clusters=16, block=(64, 64))[0],
        "PBS": P.pbs(q, k, block=64),
    }
    sheet({name: state(plan) for name, plan in static.items()}, folder / "attention-static.png")
    sheet({name: state(plan) for name, plan in dynamic.items()}, folder / "attention-dynamic.png")


if __name__ == "__main__":
    main()
