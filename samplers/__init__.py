"""Noise schedules, update rules, plans of who is denoised when, and guidance: small parts, freely combined.

Everything is a pure function of tensors; the network is a callable that is passed in.
"""

from .flow import Sigma, add_noise, clean
from .flow_sampler import FlowSampler, integrate
from .guidance import BatchedPair, ConstantWeight, Guidance, LinearWeight, Residual, TwoCalls, combine
from .plans import Lag, OneShot, Plan, Row, Staircase, Triangle
from .rules import Euler, FlowMap, Heun, Renoise, Rule, TrigConsistency
from .schedules import FlowSchedule, TrigSchedule, WarpedSchedule
from .unipc import UniPC

__all__ = [
    "BatchedPair",
    "ConstantWeight",
    "Euler",
    "FlowMap",
    "FlowSampler",
    "FlowSchedule",
    "Guidance",
    "Heun",
    "Lag",
    "LinearWeight",
    "OneShot",
    "Plan",
    "Renoise",
    "Residual",
    "Row",
    "Rule",
    "Sigma",
    "Staircase",
    "Triangle",
    "TrigConsistency",
    "TrigSchedule",
    "TwoCalls",
    "UniPC",
    "WarpedSchedule",
    "add_noise",
    "clean",
    "combine",
    "integrate",
]
