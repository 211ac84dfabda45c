"""Measure an emoji model: is the drawn picture the one that was asked for, in words it never saw?

    millstream train emoji-evaluate --model runs/emoji-packed --data data/emoji.safetensors --out runs/emoji-evaluation

A recognizer trained on the true pictures is the judge. Its score on the true pictures and on those that went through
the codec are the ceiling. Writes `report.json`, `sheet.png` (true above drawn) and the recognizer.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..pipelines.image import ImagePipeline
from ..pipelines.image_ways import ORDERS
from ..samplers.token_sampler import OrderName
from .contact_sheet import contact_sheet
from .emoji_codec import as_float, psnr
from .emoji_data import Emojis
from .emoji_recognizer import Recognizer, accuracy, train_recognizer
from .emoji_words import phrase, unseen_pairs, unseen_phrase, with_article

SHOWN = (
    "red apple|pizza|hamburger|strawberry|watermelon|mushroom|cactus|sunflower|rose|maple leaf|rocket|automobile",
    "dog face|cat face|fox|panda|frog|tiger face|octopus|butterfly|penguin|unicorn|whale|turtle",
    "grinning face|face with tears of joy|crying face|pouting face|skull|ghost|robot|alien|clown face|pile of poo|"
    "thumbs up|waving hand",
    "red heart|blue heart|star|sun|full moon|rainbow|fire|snowman|umbrella|guitar|soccer ball|light bulb",
)


def ask(emojis: Emojis, count: int, seed: int, kind: str) -> tuple[list[str], Tensor]:
    """`count` prompts and the pictures [count] they mean; `kind`: "seen", "unseen" or "keywords"."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts, wanted = [], []
    for index in torch.multinomial(emojis.weights, 8 * count, replacement=True, generator=generator).tolist():
        name, keywords = emojis.names[index], () if emojis.toned[index] else emojis.keywords[index]
        pairs = unseen_pairs(keywords)
        if kind == "keywords" and not pairs:
            continue
        make: dict[str, Callable[[], str]] = {
            "seen": lambda name=name, keywords=keywords: phrase(name, keywords, chance),
            "unseen": lambda name=name: unseen_phrase(name, chance),
            "keywords": lambda pairs=pairs: ", ".join(chance.choice(pairs)),
        }
        prompts.append(make[kind]())
        wanted.append(index)
        if len(prompts) == count:
            break
    return prompts, torch.tensor(wanted)


def draw(pipe: ImagePipeline, prompts: Sequence[str], *, batch: int = 256, **given: Any) -> tuple[Tensor, float]:
    """Pictures [N, 3, S, S] and the seconds they took."""
    generator, parts = torch.Generator().manual_seed(0), []
    start = time.perf_counter()
    for first in range(0, len(prompts), batch):
        drawn: Any = pipe(list(prompts[first : first + batch]), generator=generator, output_type="pt", **given)
        parts.append(torch.as_tensor(drawn.images).cpu())
    return torch.cat(parts), time.perf_counter() - start


def evaluate(
    pipe: ImagePipeline,
    emojis: Emojis,
    net: Recognizer,
    *,
    count: int,
    steps: int | None,
    keep: Callable[[dict[str, Any]], object] = lambda report: None,
) -> dict[str, Any]:
    """Every measure of the report; `keep` gets it as it grows, so that a run may be cut off."""
    device = next(net.parameters()).device
    pictures = emojis.pictures.to(device)
    some = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[: 4 * count].to(device)
    true = as_float(pictures[some])
    through = torch.cat([pipe.codec.decode(pipe.codec.encode(part)) for part in true.split(256)])
    report: dict[str, Any] = {
        "codec_psnr": round(psnr(pipe.codec, pictures), 2),
        "true": accuracy(net, true, some),
        "through_codec": accuracy(net, through, some),
    }
    orders = [name for name in get_args(OrderName) if name in ORDERS[pipe.transformer.config["kind"]]]
    for order, kind in tqdm(list(product(orders, ("unseen", "keywords", "seen"))), desc="drawing"):
        prompts, wanted = ask(emojis, count, 1, kind)
        if not prompts:
            continue
        drawn, seconds = draw(pipe, prompts, order=order, num_inference_steps=None if order == "raster" else steps)
        report[f"{order}, {kind}"] = {
            **accuracy(net, drawn.to(device), wanted),
            "prompts": len(prompts),
            "pictures_per_second": round(len(prompts) / seconds, 1),
        }
        keep(report)
    return report


def sweep(pipe: ImagePipeline, emojis: Emojis, net: Recognizer, *, count: int) -> list[dict[str, Any]]:
    """The share of training's phrasings drawn right under many settings of the sampler, the best first.

    Not of the unseen ones, which are kept for the report.
    """
    device = next(net.parameters()).device
    prompts, wanted = ask(emojis, count, 2, "seen")
    found = []
    for steps, scale, temperature in product((8, 16, 32), (1.5, 2.0, 3.0, 4.5), (0.3, 0.5, 0.7, 1.0)):
        given = {"num_inference_steps": steps, "guidance_scale": scale, "temperature": temperature}
        drawn, _ = draw(pipe, prompts, **given)
        found.append({**given, **accuracy(net, drawn.to(device), wanted)})
    return sorted(found, key=lambda entry: (-entry["top1"], entry["num_inference_steps"]))


def write_sheet(pipe: ImagePipeline, emojis: Emojis, path: Path) -> None:
    """True pictures above drawn ones, a row of names each; names that the data lacks are left out."""
    number = {name: index for index, name in enumerate(emojis.names)}
    rows = [[name for name in row.split("|") if name in number] for row in SHOWN]
    rows = [row for row in rows if row] or [list(emojis.names[:12])]
    wide = max(map(len, rows))
    blank = np.full(emojis.pictures.shape[1:], 255, np.uint8)
    truth, model = [], []
    for row in rows:
        drawn, _ = draw(pipe, [with_article(name) for name in row])
        made = (drawn.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        truth.append([emojis.pictures[number[name]].numpy() for name in row] + [blank] * (wide - len(row)))
        model.append([*made, *[blank] * (wide - len(row))])
    contact_sheet(
        np.array(truth),
        np.array(model),
        path,
        rows=[", ".join(row) for row in rows],
        columns=[""] * wide,
        names=("true", "drawn"),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="millstream train emoji-evaluate", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--model", default="emoji", help="a shipped model or the folder of emoji-pack")
    parser.add_argument("--data", type=Path, required=True, help="the file of millstream train emoji-data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report, the sheet and the recognizer")
    parser.add_argument("--count", type=int, default=512, help="prompts of each kind (default: 512)")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the model's own)")
    parser.add_argument("--sweep", action="store_true", help="also try settings of the sampler; writes sweep.json")
    parser.add_argument("--recognizer-steps", type=int, default=2500, help="of training; kept in --out (default: 2500)")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emojis = Emojis.open(arguments.data)
    pipe = ImagePipeline.from_pretrained(arguments.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    kept = arguments.out / "recognizer.pt"
    arguments.out.mkdir(parents=True, exist_ok=True)
    if kept.is_file():
        net = Recognizer(len(emojis.names)).to(device).eval()
        net.load_state_dict(torch.load(kept, map_location=device, weights_only=True))
    else:
        net = train_recognizer(emojis, pipe.codec, device, steps=arguments.recognizer_steps)
        torch.save(net.state_dict(), kept)
    about = {"model": str(arguments.model), "device": str(device)}

    def keep(report: dict[str, Any]) -> str:
        text = json.dumps({**about, **report}, indent=2)
        (arguments.out / "report.json").write_text(text + "\n", encoding="utf-8")
        return text

    text = keep(evaluate(pipe, emojis, net, count=arguments.count, steps=arguments.steps, keep=keep))
    write_sheet(pipe, emojis, arguments.out / "sheet.png")
    print(text)
    if arguments.sweep:
        found = json.dumps(sweep(pipe, emojis, net, count=arguments.count), indent=2)
        (arguments.out / "sweep.json").write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
