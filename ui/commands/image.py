"""`millstream image`: words become a PNG, or are painted into one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ...pipelines.assets import shipped
from ..world import check_prompt, model_folder, pick_device, positive_integer, seed_integer

if TYPE_CHECKING:
    from ...pipelines.image import ImagePipeline

MODEL = "emoji"
ORDERS = ("random", "masked", "raster")
LARGEST_SCALE = 64
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp")


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "image",
        help="draw a picture from words",
        description='For example: millstream image "a red apple" -o apple.png',
    )
    parser.add_argument("prompt", help="the picture, in words")
    parser.add_argument("-o", "--output", type=Path, default=Path("image.png"), help="default: %(default)s")
    parser.add_argument("--count", type=positive_integer, default=1, help="several: name-1.png, name-2.png, ...")
    parser.add_argument(
        "--image", type=Path, help="paint into this picture: where --mask is white, or it is transparent"
    )
    parser.add_argument("--mask", type=Path, help="white where to paint")
    parser.add_argument(
        "--scale", type=positive_integer, default=4, help="enlarge by this, pixels stay sharp (default: 4)"
    )
    parser.add_argument(
        "--preview", action="store_true", help="write the picture after every step too, name-step-1.png, ..."
    )
    parser.add_argument("--order", choices=ORDERS, help="which tokens are decided first (default: the model's own)")
    parser.add_argument("--steps", type=positive_integer, help="sampler steps (default: the model's own)")
    parser.add_argument(
        "--guidance", type=float, help="how closely to follow the words; 1 is least (default: the model's)"
    )
    parser.add_argument("--model", default=MODEL, help="a shipped model or a model's folder (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--seed", type=seed_integer, default=0, help="same seed, same pictures (default: 0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check everything cheap, then load, then draw."""
    import torch

    from ...samplers.token_sampler import check_scale

    prompt = check_prompt(arguments.prompt, "a picture", "a red apple")
    if arguments.guidance is not None:
        check_scale(arguments.guidance)
    if arguments.mask is not None and arguments.image is None:
        raise ValueError("--mask says where to paint in a picture; give --image too")
    if arguments.scale > LARGEST_SCALE:
        raise ValueError(f"--scale can be up to {LARGEST_SCALE}, got {arguments.scale}")
    output = check_output(arguments.output)
    given = {name: open_picture(path) for name, path in (("image", arguments.image), ("mask_image", arguments.mask))}
    pipe = load_image(arguments.model, arguments.device)
    start = time.perf_counter()

    def preview(_: Any, step: int, decided: int, kwargs: dict[str, Any]) -> None:
        write(kwargs["preview"], output.with_stem(f"{output.stem}-step-{step + 1}"), arguments.scale)

    drawn: Any = pipe(
        prompt,
        **given,
        num_images_per_prompt=arguments.count,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        order=arguments.order,
        generator=torch.Generator().manual_seed(arguments.seed),
        output_type="pt",
        callback_on_step_end=preview if arguments.preview else None,
    )
    seconds = time.perf_counter() - start
    paths = write(drawn.images, output, arguments.scale)
    print(f"{', '.join(map(str, paths))}: drawn in {seconds:.2f} s")
    return 0


def load_image(name: str, device: str) -> ImagePipeline:
    """The image model `name` (shipped, a folder, or owner/name on the Hugging Face hub) on `device`.

    Raises:
        FileNotFoundError: no such model. ValueError: a device that this machine lacks.
    """
    torch_device = pick_device(device)
    source = model_folder(name, MODEL, "model")

    from ...pipelines.image import ImagePipeline

    pipe = ImagePipeline.from_pretrained(source).to(torch_device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_loader(device: str) -> Callable[[], ImagePipeline] | None:
    """Loads the shipped image model when it is first wished for; None where none ships."""
    if shipped(MODEL) is None:
        return None
    lock, loaded = Lock(), []

    def image() -> ImagePipeline:
        with lock:
            if not loaded:
                loaded.append(load_image(MODEL, device))
        return loaded[0]

    return image


def write(pictures: Any, path: Path, scale: int) -> list[Path]:
    """Write pictures [B, 3, S, S] to `path`, numbered if there are several."""
    from PIL import Image

    from ...streaming.pixels import as_bytes

    paths = [path] if len(pictures) == 1 else [path.with_stem(f"{path.stem}-{n + 1}") for n in range(len(pictures))]
    for picture, where in zip(pictures, paths):
        array = as_bytes(picture).permute(1, 2, 0).cpu().numpy()
        size = (scale * array.shape[1], scale * array.shape[0])
        Image.fromarray(array).resize(size, Image.Resampling.NEAREST).save(where)
    return paths


def check_output(path: Path) -> Path:
    """`path` if a picture can be written there.

    Raises:
        ValueError: no kind of picture. FileNotFoundError: no such folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is no picture that can be written; end its name with one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it first")
    return path


def open_picture(path: Path | None) -> Any:
    """A picture to paint into, or None.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no picture.
    """
    if path is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that can be read") from None
