"""What a user asks of live images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .types import Control, check_strength, lies_between


@dataclass(frozen=True, slots=True)
class ImageControl(Control):
    """What a live image pipeline is asked for, of every picture anew.

    - `strength`: share of the steps that a picture goes through: near 0 keeps it, 1 hardly looks at it. None is half of
      them, and one at least; a stream with a source takes it as 0.5. What is drawn from words alone goes through all.
    - `num_inference_steps`: of which `strength` is a share; None takes the pipeline's own.
    - `guidance`: how the prompt is followed beyond the model's own way. "none"; "self" and "initialize" are residual
      guidance, which takes no second pass, or one at a frame's first step; "full" takes two passes at every step.
    - `guidance_scale`: how strongly, where `guidance` is not "none" or the model itself is told; None takes the
      model's own. `delta`: how much the residual counts. `negative_prompt`: for "initialize" and "full".
    - `stream_batch`: the frames under way are at different steps of one pass, so that a tick is one pass of the
      network; they come as many ticks late as there are steps, less one.
    - `skip_similar`: as in `WorldControl`.
    """

    strength: float | None = None
    num_inference_steps: int | None = None
    guidance: Literal["none", "self", "initialize", "full"] = "none"
    guidance_scale: float | None = None
    delta: float = 1.0
    negative_prompt: str = ""
    stream_batch: bool = True
    skip_similar: float | None = None

    def __post_init__(self) -> None:
        Control.__post_init__(self)
        if self.strength is not None:
            check_strength(self.strength)
        steps = self.num_inference_steps
        if steps is not None and (not isinstance(steps, int) or not 1 <= steps <= 1000):
            raise ValueError(f"num_inference_steps must be a whole number from 1 to 1000, got {steps!r}")
        if self.guidance not in ("none", "self", "initialize", "full"):
            raise ValueError(f"guidance must be none, self, initialize or full, got {self.guidance!r}")
        if self.guidance_scale is not None and not lies_between(0, self.guidance_scale, 100):
            raise ValueError(f"guidance_scale must be a number from 0 to 100, or None, got {self.guidance_scale!r}")
        if not lies_between(0, self.delta, 10):
            raise ValueError(f"delta must be a number from 0 to 10, got {self.delta!r}")
        Control(self.negative_prompt)
        if not isinstance(self.stream_batch, bool):
            raise TypeError(f"stream_batch must be True or False, got {self.stream_batch!r}")
        if self.skip_similar is not None and not lies_between(0, self.skip_similar, 1):
            raise ValueError(f"skip_similar must be a likeness from 0 to 1, or None, got {self.skip_similar!r}")
