"""Endless video from a prompt, a picture or another video, by any causal model of the Wan family.

`VideoPipeline` is stateless apart from its arena of rows; what a stream is lives in the `VideoState` that its session
owns. A step draws one chunk of frames as the `Recipe` says, writes it into the KV cache and decodes it. All noise is a
pure function of (seed, frame, step), so however a stream is stepped, saved or forked, its frames stay the same, and
`pipe(...)` is the stream, drained.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock, RLock
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel
from typing_extensions import Self

from ..models.stream_codec import PICTURES_PER_LATENT
from ..models.tiny_vae import TinyVideoDecoder
from ..models.transformer import CausalTransformer3DModel
from ..models.wan_vae import WanDecoder, WanEncoder
from ..streaming import Chunk, Frame, VideoControl
from ..streaming.types import Leaves
from .presets import Preset, apply_preset, find_preset, refuse_saving
from .recipes import Recipe, as_config, find_recipe
from .timeline import Timeline
from .video_actions import new_control
from .video_load import check_parts, check_settings, load_components
from .video_manners import ManneredStreamer
from .video_output import (
    OutputType,
    VideoPipelineOutput,
    VideoSession,
    as_output,
    as_picture,
    joined,
)
from .video_saved import check_saved, made_by
from .video_state import VideoState, to_leaves

FIXED = ("recipe", "text_length", "preset")
RATE = 16.0  # pictures per second, of every Wan model but the 5B one


class VideoPipeline(ManneredStreamer):
    """Draws video chunk by chunk while words steer it.

    Args:
        transformer, vae, text_encoder, tokenizer: the parts, as diffusers' Wan folders have them.
        recipe: how the weights are run: a `Recipe`, or the name of one.
        decoder: a tiny decoder that takes the place of the autoencoder's own.
        size: (height, width) in pixels, multiples of 16 (32 for Wan 2.2's autoencoder).
        rate: pictures per second.
        text_length: tokens a prompt is cut or padded to.
        preset: how exactly it draws: a `Preset`, or the name of one. It is applied to the weights that are given.
        image_encoder: CLIP, for models that are played and see the picture their world begins with.

    Raises:
        ValueError: parts that do not belong together.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["text_encoder", "tokenizer", "decoder", "image_encoder"]

    def __init__(
        self,
        transformer: CausalTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        recipe: Recipe | str | Mapping[str, Any] = "self_forcing",
        decoder: TinyVideoDecoder | None = None,
        size: Sequence[int] = (480, 832),
        rate: float = RATE,
        text_length: int = 512,
        preset: Preset | str = "exact",
        image_encoder: CLIPVisionModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, decoder=decoder
        )
        self.register_modules(image_encoder=image_encoder)
        self.recipe, self.rate, self.text_length = find_recipe(recipe), rate, text_length
        self.preset = find_preset(preset)
        check_parts(transformer, vae, text_encoder, decoder, tokenizer)
        check_settings(size, rate, text_length)
        apply_preset(self.preset, transformer, text_encoder)
        self._arena = self._still = self._beside = self._caller = None
        self.overlap = False  # decode a chunk while the next is drawn: see `video_ahead`
        self._size = (0, 0)
        self._sharing = RLock()  # sessions may run on threads of their own, and share the arena and the codecs' scratch
        self._read: OrderedDict[str, Tensor] = OrderedDict()
        self._asked: set[str] = set()
        self._knowing, self._reading = Lock(), RLock()
        self._encoder = WanEncoder(vae)
        self._decoder = WanDecoder(vae, self.recipe.chunk) if decoder is None else decoder
        self.register_to_config(recipe=as_config(self.recipe), size=list(size), rate=rate, text_length=text_length)
        self.resize(*size)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and name in self.__dict__:
            raise AttributeError(
                f"the {name} of a video pipeline is what its memory was made for; for another one make another "
                f"pipeline around the same weights: VideoPipeline(**pipe.components, {name}=...)"
            )
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        checkpoint: str | Path | None = None,
        lora: str | Path | None = None,
        recipe: Recipe | str | None = None,
        decoder: str | Path | None = None,
        preset: Preset | str = "exact",
        torch_dtype: torch.dtype | None = None,
        quantization_config: Any = None,
        headers_only: bool = False,
        **settings: Any,
    ) -> Self:
        """Load a folder or a repository in diffusers' layout, and weights of any dialect in place of its transformer.

        Args:
            pretrained_model_name_or_path: with `transformer/`, `vae/`, `text_encoder/` and `tokenizer/`.
            checkpoint: a file or folder with the transformer's weights (`models.checkpoints.dialects`).
            lora: an adapter to merge into them.
            recipe: how they are run; needed unless the folder was saved by this class.
            decoder: TAEHV weights (`taew2_1.pth`), or a folder of a `TinyVideoDecoder`, to decode with.
            preset: how exactly they draw, and in how much memory: exact, fast, small or a `Preset`.
            torch_dtype: of the weights.
            quantization_config: diffusers' own: a `PipelineQuantizationConfig` for the transformer, the text encoder or
                both, or one for the transformer, such as `TorchAoConfig`. What it quantises no preset does.
            headers_only: check everything and read no weights: a pipeline on the meta device, for `memory`.
            settings: `size`, `rate`, `text_length`: see the class.

        Raises:
            FileNotFoundError, ValueError: files are missing, damaged, unsafe or do not fit, with what is wrong.
        """
        strange = settings.keys() - {"size", "rate", "text_length"}
        if strange:
            raise TypeError(
                f"from_pretrained knows no {', '.join(sorted(strange))}; see its docstring for what it takes"
            )
        found = load_components(
            pretrained_model_name_or_path,
            checkpoint=checkpoint,
            lora=lora,
            recipe=recipe,
            decoder=decoder,
            torch_dtype=torch_dtype,
            quantization_config=quantization_config,
            headers_only=headers_only,
        )
        return cls(**found | settings, preset=preset)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers does. ValueError if a preset has changed the weights."""
        refuse_saving(self.preset, self.transformer, self.text_encoder)
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        image: Any = None,
        video: Iterable[Any] | None = None,
        strength: float = 1.0,
        timeline: Timeline | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        generator: torch.Generator | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> VideoPipelineOutput | tuple[Any]:
        """Draw a clip: the stream, drained.

        Args:
            prompt: what is seen.
            image: what the first picture shows: a PIL image, an array [H, W, 3] or a tensor [3, H, W].
            video: pictures to redraw, of the same kinds; `num_frames` is then at most what they make. Where there is an
                `image` too, it stands in the place of the first of them.
            strength: how far `video` is redrawn, from 0 (kept) to 1 (ignored).
            timeline: what `prompt` becomes, and when.
            height, width: in pixels; as the pipeline is by default.
            num_frames: pictures, at least 1; 81 are 5 seconds.
            generator: the same generator state draws the same pictures.
            callback_on_step_end: called after every chunk as (pipeline, number, 0, {"frames": [T, 3, H, W]}).

        Raises:
            ValueError, TypeError: an argument out of range.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        pictures: list[Tensor] = []
        latents: list[Tensor] = []
        given = None if video is None else (as_picture(picture, self.size) for picture in video)
        progress: Any = self.progress_bar  # accelerate's wrapper hides its signature from type checkers
        place = {"height": height, "width": width, "generator": generator}
        prompts = [prompt, *(cue.prompt for cue in (timeline.cues if timeline else ()))]
        with (
            self.visiting(prompts),
            self.stream(prompt, image=image, strength=strength, **place) as session,
            progress(total=num_frames) as bar,
        ):
            for drawn in self.drain(session, num_frames, given, timeline):
                latents += session.state.finished if session.state is not None else []
                for chunk in drawn:
                    pictures.append(chunk.data)
                    bar.update(len(chunk.data))
                    if callback_on_step_end is not None:
                        callback_on_step_end(self, len(pictures) - 1, 0, {"frames": chunk.data})
        if not pictures:
            least = self.pictures_per_chunk + (1 if image is not None else 1 - PICTURES_PER_LATENT)
            raise ValueError(f"the video is too short: a chunk takes {least} pictures at first")
        drained = joined(latents, 1) if output_type == "latent" else joined(pictures, 0)[:num_frames]
        clip = drained if output_type == "latent" else as_output(drained, output_type)
        return VideoPipelineOutput(frames=clip) if return_dict else (clip,)

    def stream(
        self,
        prompt: str,
        *,
        image: Any = None,
        strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
    ) -> VideoSession:
        """An endless session; arguments as in the call. `session.step(Frame(picture, time))` redraws an input video."""
        self.refuse_offload()
        self.resize(height or self.size[0], width or self.size[1])
        start = None if image is None else as_picture(image, self.size)
        if self.is_game and start is None:
            raise ValueError("a world of this model begins with a picture: give image=")
        control = new_control(self.is_game, prompt, strength)
        return VideoSession(self, control, generator=generator, image=start)

    # What a session asks for (`Streamable`).

    def check(self, control: VideoControl) -> None:
        """Refuse prompts that cannot be read, by reading them: on the thread that steers, so that no step waits."""
        if any("\ud800" <= character <= "\udfff" for character in control.prompt):
            raise ValueError("the prompt holds half a character (a lone surrogate); send it as UTF-8")
        if self.is_game:
            self.check_game(control)
        else:
            self.read_prompt(control.prompt)

    @torch.no_grad()
    def begin(self, control: VideoControl, *, generator: torch.Generator | None = None) -> VideoState:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None))
        return self.fresh(seed)

    @torch.no_grad()
    def advance(
        self, states: Sequence[VideoState], controls: Sequence[VideoControl], media: Sequence[Frame | None]
    ) -> Sequence[Sequence[Chunk]]:
        """One chunk for every state, one state after the other; none yet while an input does not fill a chunk."""
        for control, frame in zip(controls, media):
            if frame is not None:
                self.check_input(control, frame.data)
        for state, control in zip(states, controls):  # many others may have been read since `check`
            if control.prompt != state.prompt and not self.is_game:
                self.read_prompt(control.prompt)
        drawn = []
        for state, control, frame in zip(states, controls, media):
            with self._sharing:
                drawn.append(self._advance(state, control, frame))
        return drawn

    @torch.no_grad()
    def flush(self, state: VideoState) -> Sequence[Chunk]:
        with self._sharing:
            state.finished = []
            with self.drawing():
                chunks = self.settled(state)
                return chunks + [self.shown(state, each, time.monotonic()) for each in self.complete(state)]

    def save(self, state: VideoState) -> Leaves:
        with self._sharing, self.apart():
            memory = [self.arena.cache.snapshot(row) for row in state.rows]
            return to_leaves(state, memory) | {"made": made_by(self)}

    @torch.no_grad()
    def load(self, leaves: Leaves) -> VideoState:
        check_saved(self, leaves)
        with self._sharing:
            state = self.fresh(0)
            try:
                with self.apart():
                    self.put_back(state, leaves)
            except BaseException:
                self.end(state)
                raise
            return state

    def end(self, state: VideoState) -> None:
        rows, state.rows = state.rows, []
        if self._beside is not None:  # which may still write what is given back here
            torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)
        for row in rows:
            self.arena.give_back(row)
