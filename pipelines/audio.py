"""Speech from words, drawn while it is heard, and while the text is still being written.

`AudioPipeline` is stateless; what a stream is lives in the `SpeechState` that its session owns. All noise is a pure
function of (seed, frame, step), so saved and forked streams sound the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from torch import Tensor
from typing_extensions import Self

from ..models.audio_codec import AudioCodec
from ..models.pronouncer import Pronouncer
from ..models.speech import SpeechTransformer
from ..samplers import FlowSampler
from ..streaming import Session, Snapshot, SpeechControl
from .assets import shipped
from .speech_state import SpeechState, as_voice
from .speech_streams import SpeechStreams, draw_seed
from .world_output import is_offloaded

SHIPPED = "speech"
SAMPLE = "The quick brown fox jumps over the lazy dog."  # what a voice says before it is saved


@dataclass
class AudioPipelineOutput(BaseOutput):
    """`audios`: float32 [1, samples] in [-1, 1]; `sampling_rate` of them make a second."""

    audios: np.ndarray | Tensor
    sampling_rate: int


class AudioPipeline(SpeechStreams, DiffusionPipeline):
    """Speaks English text.

    Args:
        transformer, codec, pronouncer, scheduler: the parts.
        temperature: deviation of the noise that a frame starts from; below 1 is steadier.
    """

    model_cpu_offload_seq = "transformer->codec"

    def __init__(
        self,
        transformer: SpeechTransformer,
        codec: AudioCodec,
        pronouncer: Pronouncer,
        scheduler: FlowSampler,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, codec=codec, pronouncer=pronouncer, scheduler=scheduler)
        self.register_to_config(temperature=temperature)
        self.temperature = temperature
        self.rate = self.codec.frame_rate / self.frames_per_chunk
        self._sharing = RLock()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a shipped model by name ("speech"), a folder, or a repository; see diffusers for the arguments.

        Raises:
            FileNotFoundError: the speaking model is not part of this copy.
        """
        name = shipped(pretrained_model_name_or_path) or Path(pretrained_model_name_or_path)
        if str(name) == SHIPPED and not name.is_dir():
            raise FileNotFoundError(
                "this copy of millstream has no speaking model (assets/speech): give the folder of one that you have "
                "trained, see docs/sound.md"
            )
        return super().from_pretrained(str(name), **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        text: str,
        *,
        voice: str | os.PathLike[str] | None = None,
        generator: torch.Generator | None = None,
        output_type: Literal["np", "pt"] = "np",
        return_dict: bool = True,
    ) -> AudioPipelineOutput | tuple[Any, int]:
        """Speak a text: the stream, drained.

        Args:
            text: English; numbers, money, times and abbreviations are read out.
            voice: one of `voices` (the first by default), or a file that `save_voice` wrote.
            generator: the same generator state, text and voice give the same samples.

        Raises:
            ValueError, TypeError: nothing to say, too long a text, an unknown voice or output type.
        """
        if output_type not in ("np", "pt"):
            raise ValueError(f"output_type must be np or pt, got {output_type!r}")
        with self.stream(text, voice=voice, generator=generator) as session:
            chunks = [*session.chunks(), *session.flush()]
        sound = torch.cat([chunk.data for chunk in chunks], dim=1)
        audios = sound.cpu().numpy() if output_type == "np" else sound
        if not return_dict:
            return audios, self.sampling_rate
        return AudioPipelineOutput(audios=audios, sampling_rate=self.sampling_rate)

    def stream(
        self,
        text: str,
        *,
        voice: str | os.PathLike[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> Session[SpeechState, SpeechControl]:
        """A session that speaks `text` in chunks of 80 ms, and then whatever `session.steer(text=...)` appends.

        Arguments and errors as of a call.
        """
        if any(is_offloaded(part) for part in self.components.values()):
            raise ValueError("a stream cannot run with model CPU offload; move the pipeline with .to(device) instead")
        if isinstance(text, str) and not text.strip():
            raise ValueError('the text is empty; give something to say, for example "hello there"')
        if voice is None or Path(voice).suffix != ".safetensors":
            return Session(self, SpeechControl(text=text, voice=str(voice or self.voices[0])), generator=generator)
        saved = Snapshot.load(voice)
        name = saved.leaves.get("voice")
        control = SpeechControl(text=text, voice=name if isinstance(name, str) else "")
        session = Session(self, control, generator=generator)
        state = as_voice(saved.leaves, draw_seed(generator), self.delay)
        session.restore(replace(session.snapshot(), leaves=state))
        return session

    def save_voice(
        self,
        path: str | os.PathLike[str],
        *,
        voice: str | None = None,
        text: str = SAMPLE,
        generator: torch.Generator | None = None,
    ) -> Path:
        """Speak `text` and keep where the stream then stands, as safetensors: it goes on in just this voice.

        Raises:
            ValueError: as of a call, or a name that does not end with .safetensors. FileNotFoundError: no such folder.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"a voice is saved to a .safetensors file, got {Path(path).name!r}")
        with self.stream(text, voice=voice, generator=generator) as session:
            for _ in session.chunks():
                pass
            return session.snapshot().save(path)
