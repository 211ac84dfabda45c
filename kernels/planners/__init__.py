"""Planners: which key blocks each query block visits, one published method each. All plans run on one kernel.

Static planners take the shape of the token grid: `window`, `sliding_tile`, `radial`, `duo`, `spatial`, `temporal`,
`interleaved`, `paro`. Dynamic ones look at q and k (and v): `moba`, `vmoba`, `biformer`, `sparge`, `seer`, `proxy`,
`pisa`, `svg_ear`, `svg1`, `svg2`, `pbs`. `FlashBlock` and `SparseD` reuse work across denoising steps; `agent` is two
calls of `attend`. Parameters bear the names of their source; *surrogate* marks what a source leaves open.
"""

from .centroid import kmeans, pisa, svg_ear
from .factorised import interleaved, spatial, temporal
from .low_rank import agent
from .permute import paro, paro_calibrate, pbs, svg1, svg2
from .pooled import biformer, moba, proxy, seer, sparge, vmoba
from .reuse import FlashBlock, SparseD, refreshed
from .tiles import Tiling, best_tile, tile_grid
from .window import duo, radial, sliding_tile, window

__all__ = [
    "FlashBlock",
    "SparseD",
    "Tiling",
    "agent",
    "best_tile",
    "biformer",
    "duo",
    "interleaved",
    "kmeans",
    "moba",
    "paro",
    "paro_calibrate",
    "pbs",
    "pisa",
    "proxy",
    "radial",
    "refreshed",
    "seer",
    "sliding_tile",
    "sparge",
    "spatial",
    "svg1",
    "svg2",
    "svg_ear",
    "temporal",
    "tile_grid",
    "vmoba",
    "window",
]
