"""Pictures from words by tokens, visible from the first step on.

A call is a stream, drained: `stream` yields after every step, with the picture so far. A picture is a function of its
own seed and prompt: how many others are drawn with it changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor
from typing_extensions import Self

from ..models.text_encoder import ByteTextEncoder
from ..models.token_transformer import TokenTransformer
from ..models.vq_codec import VQAutoencoder
from ..samplers import TokenSampler, decoding
from ..samplers.schedules import check_count
from ..samplers.token_sampler import OrderName
from .assets import shipped
from .image_inputs import PAPER, Canvas, enlarged, open_cells, read_canvas
from .token_networks import PhiloxDraws, network_of
from .world_output import is_offloaded

OutputType = Literal["pil", "np", "pt", "latent"]
Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]
ORDERS = {"two_pass": ("random", "masked", "raster"), "masked": ("masked", "random", "raster"), "causal": ("raster",)}


class ImageStep(NamedTuple):
    """The pictures after a step of `ImagePipeline.stream`.

    Attributes:
        step, n_steps: which of how many, from 0.
        tokens: int64 [B, N]; of no meaning where not `known`.
        known: bool [B, N].
        preview: makes the pictures so far, [B, 3, S, S] in [0, 1]; white where nothing is decided. After the last step
            they are the result.
    """

    step: int
    n_steps: int
    tokens: Tensor
    known: Tensor
    preview: Callable[[], Tensor]


class ImagePipeline(DiffusionPipeline):
    """Draws small pictures from words, and into pictures.

    Args:
        transformer: of kind two_pass, masked or causal.
        codec, text_encoder, scheduler: the other parts.
    """

    model_cpu_offload_seq = "text_encoder->transformer->codec"

    def __init__(
        self,
        transformer: TokenTransformer,
        codec: VQAutoencoder,
        text_encoder: ByteTextEncoder,
        scheduler: TokenSampler,
    ) -> None:
        super().__init__()
        if transformer.tokens != sum(side * side for side in codec.sides):
            raise ValueError(
                f"the transformer predicts {transformer.tokens} tokens a picture, but the codec's maps are "
                f"{list(codec.sides)} a side; load parts that were trained together"
            )
        self.register_modules(transformer=transformer, codec=codec, text_encoder=text_encoder, scheduler=scheduler)

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
        return self.codec.config["sample_size"]

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
            output_type: "pil", "np" [B, S, S, 3], "pt" [B, 3, S, S], or "latent": the tokens [B, N].
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
        canvas = read_canvas(image, mask_image, self.size)
        if not isinstance(negative_prompt, str):
            raise TypeError(f"negative_prompt must be one text for all pictures, got {type(negative_prompt).__name__}")
        kind = self.transformer.config["kind"]
        tokens, known = self._given(canvas, len(prompts))
        opened = known.shape[1] - int(known[0].sum())
        plan = self.scheduler.plan(
            opened,
            num_inference_steps=num_inference_steps,
            order=self._order(order, kind),
            guidance_scale=guidance_scale,
            temperature=temperature,
        )
        if kind == "causal" and opened < known.shape[1]:
            raise ValueError("a causal model cannot draw into a picture; load one of kind two_pass or masked")
        draws = PhiloxDraws(seeds(generator, len(prompts)).to(tokens.device))
        text = self._encode(prompts, None if plan.guidance is None else negative_prompt)
        network = network_of(self.transformer, text, check_count(refresh, "refresh"))
        if not plan.counts:
            yield ImageStep(0, 0, tokens, known, lambda: self._pictures(tokens, known, canvas))
        for done in decoding(
            network,
            tokens,
            known,
            counts=plan.counts,
            order=plan.order,
            head=plan.head,
            draws=draws,
            guidance=plan.guidance,
        ):
            yield ImageStep(
                done.step,
                done.n_steps,
                done.tokens,
                done.known,
                lambda done=done: self._pictures(done.tokens, done.known, canvas),
            )

    def _order(self, order: OrderName | None, kind: str) -> OrderName:
        """The order to decode in: the configured one where the model can follow it."""
        possible = ORDERS.get(kind)
        if possible is None:
            raise ValueError(f'a transformer of kind "{kind}" is decoded level by level (samplers.decoding_levels)')
        wanted = self.scheduler.config["order"] if order is None else order
        if order is None and wanted not in possible:
            return possible[0]  # pyright: ignore[reportReturnType]
        if wanted not in possible and kind == "causal":
            raise ValueError(f'a causal transformer draws in order "raster" alone, got {order!r}')
        return wanted

    def _given(self, canvas: Canvas | None, batch: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, N] and which of them an image settles."""
        device = self._execution_device
        count = self.transformer.tokens
        if canvas is None:
            return torch.zeros(batch, count, dtype=torch.int64, device=device), torch.zeros(
                batch, count, dtype=torch.bool, device=device
            )
        picture = canvas.picture[None].to(device, self.codec.dtype)
        known = ~open_cells(canvas.hole, self.codec.sides[-1]).to(device)
        return self.codec.encode(picture).expand(batch, -1).clone(), known.expand(batch, -1).clone()

    def _encode(self, prompts: Sequence[str], negative: str | None) -> Tensor:
        """[B, S, D], or [2 B, S, D] with a negative prompt. One at a time: a batch of texts would round differently."""
        every = {
            text: self.text_encoder.encode([text]) for text in {*prompts, *([] if negative is None else [negative])}
        }
        wanted = [every[prompt] for prompt in prompts]
        return torch.cat(wanted if negative is None else wanted + [every[negative]] * len(prompts))

    @torch.no_grad()
    def _pictures(self, tokens: Tensor, known: Tensor, canvas: Canvas | None) -> Tensor:
        """[B, 3, S, S] in [0, 1]: what is decided, on paper, with an image's own pixels outside its hole."""
        pictures = self.codec.decode(tokens).float()
        pictures = torch.where(enlarged(known, self.size), pictures, PAPER)
        if canvas is None:
            return pictures
        return torch.where(canvas.hole.to(pictures.device), pictures, canvas.picture.to(pictures.device))


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
