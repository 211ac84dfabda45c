"""A session at one moment, in memory or in one safetensors file: tensors as tensors, everything else as JSON.

Nothing is ever unpickled, so a snapshot from a stranger can at worst be refused.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .types import Control, ControlT, Leaves

FORMAT = 1
METADATA_KEY = "millstream.snapshot"
MAX_BYTES = 8 * 2**30  # the context of a 14B model is a few GiB; more than this is no snapshot of ours


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What `Session.snapshot` takes and `Session.restore` puts back.

    Attributes:
        leaves: the pipeline's state: tensors and JSON scalars by name.
        control: fields of the control as last steered.
        unread: fields of the control that the next step would have read, None when nothing is waiting.
        kind: name of the control's class.
    """

    leaves: Leaves
    control: dict[str, Any]
    unread: dict[str, Any] | None
    kind: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, whole or not at all (a temporary neighbour is renamed).

        Raises:
            FileNotFoundError: the directory does not exist.
            TypeError: a leaf is neither a tensor nor a JSON scalar.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"cannot save a snapshot to {target}: there is no directory {target.parent}")
        tensors, scalars = {}, {}
        for name, leaf in self.leaves.items():
            if isinstance(leaf, Tensor):
                # a copy, because leaves may be views of one buffer, which safetensors refuses to write twice
                tensors[name] = leaf.detach().to("cpu", copy=True).contiguous()
            elif isinstance(leaf, (int, float, str)):
                scalars[name] = leaf
            else:
                raise TypeError(f"leaf {name!r} must be a tensor, a number or a string, got {type(leaf).__name__}")
        contents = {"format": FORMAT, "scalars": scalars}
        contents |= {"control": self.control, "unread": self.unread, "kind": self.kind}
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(contents)})
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    @staticmethod
    def load(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Snapshot:
        """Read what `save` wrote; tensors arrive on the CPU. A server that takes uploads lowers `max_bytes`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is too large, corrupt, or not a snapshot this version can read.
        """
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"there is no snapshot file {source}")
        size = source.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{source} has {size:,} bytes; a snapshot of at most {max_bytes:,} bytes is read")
        try:
            # clones, because the tensors would otherwise be windows on a file that may change under them
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except SafetensorError as error:
            raise ValueError(f"{source} is not a readable safetensors file, or was cut short: {error}") from None
        if METADATA_KEY not in metadata:
            raise ValueError(f"{source} is a safetensors file but no millstream snapshot; make one with Snapshot.save")
        return _parsed(source, metadata[METADATA_KEY], tensors)


def _parsed(source: Path, text: str, tensors: dict[str, Tensor]) -> Snapshot:
    try:
        contents = json.loads(text)
        version, scalars = contents["format"], contents["scalars"]
        control, unread, kind = contents["control"], contents["unread"], contents["kind"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{source} has a damaged snapshot header; it cannot be restored") from None
    if version != FORMAT:
        raise ValueError(f"{source} has snapshot format {version}, this version of millstream reads format {FORMAT}")
    well_formed = (
        isinstance(scalars, dict)
        and all(isinstance(value, (int, float, str)) for value in scalars.values())
        and isinstance(control, dict)
        and isinstance(unread, (dict, type(None)))
        and isinstance(kind, str)
    )
    if not well_formed:
        raise ValueError(f"{source} has a damaged snapshot header; it cannot be restored")
    return Snapshot({**scalars, **tensors}, control, unread, kind)


def control_fields(control: Control) -> dict[str, Any]:
    """The fields of `control` as JSON knows them; sets become sorted lists so that equal controls give equal text."""
    return {name: _plain(value) for name, value in asdict(control).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def control_from(fields: Mapping[str, Any], kind: str, like: ControlT) -> ControlT:
    """The control that `control_fields` came from, of the class of `like`.

    Raises:
        ValueError: the fields belong to another class of control, or are not valid.
    """
    wanted = type(like)
    if kind != wanted.__name__:
        raise ValueError(f"the snapshot holds a {kind}, this session is steered by a {wanted.__name__}")
    try:
        return wanted(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the snapshot's control is not valid: {error}") from None
