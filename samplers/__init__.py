"""Noise schedules, update rules, plans of who is denoised when, guidance, and token decoding: small parts, freely
combined.

Everything is a pure function of tensors; the network is a callable that is passed in.
"""

from .counts import block_counts, cosine_counts, curve_counts, even_counts, share_counts
from .flow import Sigma, add_noise, clean
from .flow_sampler import FlowSampler, integrate
from .guidance import BatchedPair, ConstantWeight, Guidance, LinearWeight, Residual, TwoCalls, combine
from .heads import Categorical, FlowTokens
from .levels import Codebooks, Level, Scales, decoding_levels, level_weights
from .orders import BlockOrder, Confidence, ContrastiveOrder, RandomOrder, RasterOrder
from .plans import Lag, OneShot, Plan, Row, Staircase, Triangle
from .rules import Euler, FlowMap, Heun, Renoise, Rule, TrigConsistency
from .schedules import FlowSchedule, TrigSchedule, WarpedSchedule
from .token_sampler import TokenPlan, TokenSampler
from .tokens import Ask, Draws, Head, Network, Order, Revealed, decode, decoding, revealed_weights
from .unipc import UniPC

__all__ = [
    "Ask",
    "BatchedPair",
    "BlockOrder",
    "Categorical",
    "Codebooks",
    "Confidence",
    "ConstantWeight",
    "ContrastiveOrder",
    "Draws",
    "Euler",
    "FlowMap",
    "FlowSampler",
    "FlowSchedule",
    "FlowTokens",
    "Guidance",
    "Head",
    "Heun",
    "Lag",
    "Level",
    "LinearWeight",
    "Network",
    "OneShot",
    "Order",
    "Plan",
    "RandomOrder",
    "RasterOrder",
    "Renoise",
    "Residual",
    "Revealed",
    "Row",
    "Rule",
    "Scales",
    "Sigma",
    "Staircase",
    "TokenPlan",
    "TokenSampler",
    "Triangle",
    "TrigConsistency",
    "TrigSchedule",
    "TwoCalls",
    "UniPC",
    "WarpedSchedule",
    "add_noise",
    "block_counts",
    "clean",
    "combine",
    "cosine_counts",
    "curve_counts",
    "decode",
    "decoding",
    "decoding_levels",
    "even_counts",
    "integrate",
    "level_weights",
    "revealed_weights",
    "share_counts",
]
