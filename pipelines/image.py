"""Pictures from words by tokens, visible from the first step on.

A call is a stream, drained: `stream` yields after every step, with the picture so far. A picture is a function of its
own seed and prompt: how many others are drawn with it changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor
from typing_extensions import Self

from ..models.flow_head import FlowHead
from ..models.text_encoder import ByteTextEncoder
from ..models.token_transformer import TokenTransformer
from ..models.vq_codec import VQAutoencoder
from ..samplers import TokenSampler
from ..samplers.schedules import check_count
from ..samplers.token_sampler import OrderName
from .assets import shipped
from .image_inputs import read_canvas
from .image_ways import Way, way_of
from .token_networks import PhiloxDraws
from .world_output import is_offloaded

OutputType = Literal["pil", "np", "pt", "latent"]
Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]


class ImageStep(NamedTuple):
    """The pictures after a step of `ImagePipeline.stream`.

    Attributes:
        step, n_steps: which of how many, from 0.
        tokens: int64 [B, N], or [B, N, C] of a model with continuous ones; of no meaning where not `known`.
        known: bool [B, N].
        preview: makes the pictures so far, [B, 3, S, S] in [0, 1]; white where nothing is decided. Of a next-scale
            model they are whole from the first step on, and blurred. After the last step they are the result.
    """

    step: int
    n_steps: int
    tokens: Tensor
    known: Tensor
    preview: Callable[[], Tensor]


class ImagePipeline(DiffusionPipeline):
    """Draws small pictures from words, and into pictures.

    Args:
        transformer: of any kind, told by words; its config says how it draws, see `image_ways`.
        codec: a `VQAutoencoder` with the transformer's maps; of continuous tokens diffusers' `AutoencoderKL`.
        text_encoder, scheduler: the other parts.
        flow_head: of continuous tokens alone.

    Raises:
        ValueError: parts that do not belong together.
    """

    model_cpu_offload_seq = "text_encoder->transformer->flow_head->codec"
    _optional_components = ["flow_head"]  # noqa: RUF012 (diffusers' own name and kind)

    def __init__(
        self,
        transformer: TokenTransformer,
        codec: VQAutoencoder | AutoencoderKL,
        text_encoder: ByteTextEncoder,
        scheduler: TokenSampler,
        flow_head: FlowHead | None = None,
    ) -> None:
        super().__init__()
        way_of(transformer, codec, flow_head, scheduler)
        self.register_modules(
            transformer=transformer,
            codec=codec,
            text_encoder=text_encoder,
            scheduler=scheduler,
            flow_head=flow_head,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a shipped model by name ("emoji"), a folder, or a repository; see diffusers for the arguments.

        Raises:
            FileNotFoundError: "emoji" does not ship with this copy of millstream yet; the message tells how to make it.
        """
        packaged = shipped(pretrained_model_name_or_path)
        if packaged is not None:
            return super().from_pretrained(str(packaged), **kwargs)
        if str(pretrained_model_name_or_path) == "emoji" and not Path("emoji").is_dir():
            raise FileNotFoundError(
                'the model "emoji" does not ship with this copy of millstream; make it with `millstream train '
                "emoji-data`, `emoji-codec`, `emoji` and `emoji-pack` (20 minutes on a GPU, see docs/images.md) and "
                "load the folder that emoji-pack wrote"
            )
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self._way.size

    @property
    def _way(self) -> Way:
        return way_of(self.transformer, self.codec, self.flow_head, self.scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Any = None,
        mask_image: Any = None,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        order: OrderName | None = None,
        temperature: float | None = None,
        refresh: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures: the stream, drained.

        Args:
            prompt: one or several.
            image, mask_image: draw into a picture, where the mask is white; see `read_canvas`. A larger canvas with the
                picture in it and transparency around it is out-painting.
            negative_prompt: what guidance leads away from.
            num_images_per_prompt: pictures of each prompt, neighbours in the result.
            num_inference_steps, guidance_scale, order, temperature: see `TokenSampler`; as configured by default.
            refresh: of a masked transformer: 1 computes every token at every step and is exact. N does so at every N-th
                step; between, a token that was decided is computed once more and then kept as it is, though it has
                not seen what came later. That is an approximation but for the first two steps and every N-th, and no
                bound is known: docs/images.md says how many tokens came out otherwise. Other kinds are exact, and as
                fast, with 1.
            generator: the same state gives the same pictures; or one for each picture.
            output_type: "pil", "np" [B, S, S, 3], "pt" [B, 3, S, S], or "latent": the tokens [B, N] or [B, N, C].
            callback_on_step_end: called after every step as (pipeline, step, tokens decided, {"preview": pictures
                [B, 3, S, S], "tokens", "known"}); what it returns is not used.

        Raises:
            ValueError, TypeError: an argument out of range or of another kind.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        stream = self.stream(
            prompt,
            image=image,
            mask_image=mask_image,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            order=order,
            temperature=temperature,
            refresh=refresh,
            generator=generator,
        )
        last = next(stream)
        progress_bar: Any = self.progress_bar  # accelerate's wrapper hides its signature from type checkers
        with progress_bar(total=last.n_steps) as bar:
            while True:
                if callback_on_step_end is not None and last.n_steps:
                    kwargs = {"preview": last.preview(), "tokens": last.tokens, "known": last.known}
                    callback_on_step_end(self, last.step, int(last.known[0].sum()), kwargs)
                bar.update()
                following = next(stream, None)
                if following is None:
                    break
                last = following
        images: Any = last.tokens if output_type == "latent" else _as(output_type, last.preview())
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        image: Any = None,
        mask_image: Any = None,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        order: OrderName | None = None,
        temperature: float | None = None,
        refresh: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[ImageStep]:
        """The pictures after every step; the arguments are those of a call, and are checked at the first `next`.

        Stop iterating to stop drawing: nothing else has to be closed. At least one step is yielded, even where an image
        has no hole.
        """
        if any(is_offloaded(part) for part in self.components.values()):
            raise ValueError("tokens are not drawn under model CPU offload; move the pipeline with .to(device) instead")
        prompts = _repeated(prompt, num_images_per_prompt)
        way = self._way
        canvas = read_canvas(image, mask_image, way.size)
        if not isinstance(negative_prompt, str):
            raise TypeError(f"negative_prompt must be one text for all pictures, got {type(negative_prompt).__name__}")
        tokens, known = way.begin(canvas, len(prompts), self._execution_device)
        plan = way.plan(
            known,
            refresh,
            num_inference_steps=num_inference_steps,
            order=order,
            guidance_scale=guidance_scale,
            temperature=temperature,
        )
        draws = PhiloxDraws(seeds(generator, len(prompts)).to(tokens.device))
        text = self._encode(prompts, None if plan.guidance is None else negative_prompt)

        def shown(tokens: Tensor, known: Tensor) -> Callable[[], Tensor]:
            return torch.no_grad()(partial(way.pictures, tokens, known, canvas))

        if not plan.counts:
            yield ImageStep(0, 0, tokens, known, shown(tokens, known))
        for done in way.decoding(tokens, known, text, plan, draws, refresh):
            yield ImageStep(done.step, done.n_steps, done.tokens, done.known, shown(done.tokens, done.known))

    def _encode(self, prompts: Sequence[str], negative: str | None) -> Tensor:
        """[B, S, D], or [2 B, S, D] with a negative prompt. One at a time: a batch of texts would round differently."""
        every = {
            text: self.text_encoder.encode([text]) for text in {*prompts, *([] if negative is None else [negative])}
        }
        wanted = [every[prompt] for prompt in prompts]
        return torch.cat(wanted if negative is None else wanted + [every[negative]] * len(prompts))


def seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Tensor:
    """A seed in [0, 2^63) for each picture, int64 [count]. The first few are the same however many there are."""
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"generator must be one, or one for each of the {count} pictures, got {len(generator)}")
        return torch.cat([seeds(one, 1) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.cat([torch.randint(2**63 - 1, (1,), generator=generator, device=device) for _ in range(count)]).cpu()


def _repeated(prompt: str | Sequence[str], times: int) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"prompt must be a text or a list of texts, got {prompt!r}")
    check_count(times, "num_images_per_prompt")
    return [text for text in prompts for _ in range(times)]


def _as(output_type: OutputType, pictures: Tensor) -> Any:
    if output_type == "pt":
        return pictures
    arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(arrays) if output_type == "pil" else arrays
