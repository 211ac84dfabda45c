"""What `millstream evaluate` measures: each function gives one entry of its JSON.

Numbers by world come with their mean over worlds, so that every world counts alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..pipelines.world import WorldPipeline
from .dataset import Episodes
from .features import FeatureNet
from .measures import above_chance, balanced_accuracy, frame_features, frechet, images, psnr, sharpness
from .probe import CONTEXT as PROBE_CONTEXT
from .probe import MIDDLE, read_actions, train_probe
from .rollout import CONTEXT, Clips, choose, continue_clips, cut, reconstruct, truth

Split = Literal["held_out", "all"]
READABLE = 0.6
"""A button counts in the worlds where the probe reads it from TRUE frames with this balanced accuracy or better."""
FRECHET_STRIDE = 4


def worlds_alike(values: Mapping[str, float]) -> dict[str, Any]:
    """Mean over worlds, and each world."""
    return {
        "mean": round(sum(values.values()) / len(values), 3),
        "by_world": {name: round(value, 3) for name, value in values.items()},
    }


def codec_score(pipe: WorldPipeline, episodes: Episodes, split: Split, per_world: int, seed: int) -> dict[str, Any]:
    """PSNR in dB of true frames through the codec and back."""
    starts, world = choose(episodes, per_world, 1, split, torch.Generator().manual_seed(seed))
    clips = cut(episodes, starts, world, 1)
    quality = psnr(images(reconstruct(pipe, clips.frames)), images(clips.frames))[:, 0]
    return {"frames_per_world": per_world, **worlds_alike(clips.by_world(quality))}


def psnr_scores(clips: Clips, drawn: Tensor, horizons: Sequence[int]) -> dict[str, Any]:
    """PSNR in dB to the true frames. `drawn` uint8 [N, horizon, H, W, 3] begins at +1."""
    scores = {}
    for horizon in horizons:
        quality = psnr(images(drawn[:, horizon - 1]), images(truth(clips, [horizon])[:, 0]))
        scores[f"+{horizon}"] = worlds_alike(clips.by_world(quality))
    return scores


def sharpness_scores(pipe: WorldPipeline, clips: Clips, drawn: Tensor, horizons: Sequence[int]) -> dict[str, Any]:
    """Mean gradient magnitude of drawn frames over that of the true frames through the codec."""
    scores = {}
    for horizon in horizons:
        mine = clips.by_world(sharpness(images(drawn[:, horizon - 1])))
        true = clips.by_world(sharpness(images(reconstruct(pipe, truth(clips, [horizon])[:, 0]))))
        scores[f"+{horizon}"] = worlds_alike({name: mine[name] / true[name] for name in mine})
    return scores


def frechet_score(
    pipe: WorldPipeline,
    episodes: Episodes,
    split: Split,
    *,
    frames: int,
    per_stream: int,
    at: int,
    steps: int | None,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Frechet distance of drawn frames near horizon `at` to true frames; the same for true frames through the codec.

    Drawn frames come from `frames / per_stream` streams, each giving the frames at `at`, `at - 4`, ... The codec's side
    is the true frames of the very same clips. Both are compared with the same other true frames, drawn in the same way
    from other clips, so chance weighs alike on both; `floor` is what chance alone makes of true against true.
    """
    horizons = sorted(at - FRECHET_STRIDE * number for number in range(per_stream))
    worlds = len(episodes.names)
    generator = torch.Generator().manual_seed(seed)
    per_world = -(-frames // (per_stream * worlds))
    starts, world = choose(episodes, per_world, CONTEXT + at, split, generator)
    others, other_world = choose(episodes, per_world, CONTEXT + at, split, generator)
    net = FeatureNet.load().to(pipe.device)
    found: dict[str, list[Tensor]] = {"model": [], "codec": [], "true": [], "other": []}
    for rows in torch.arange(len(starts)).split(batch_size):
        clips = cut(episodes, starts[rows], world[rows], CONTEXT + at)
        drawn = continue_clips(
            pipe,
            clips,
            horizons=horizons,
            steps=steps,
            seed=seed + int(rows[0]),
            batch_size=batch_size,
            title=f"frechet {int(rows[-1]) + 1}/{len(starts)}",
        )
        true = truth(clips, horizons)
        other = truth(cut(episodes, others[rows], other_world[rows], CONTEXT + at), horizons)
        sides = {"model": drawn, "codec": reconstruct(pipe, true), "true": true, "other": other}
        for name, side in sides.items():
            found[name].append(_features(side, net, pipe.device))
    reference = torch.cat(found.pop("other"))
    features = {name: torch.cat(parts) for name, parts in found.items()}
    distance = {name: frechet(values, reference) for name, values in features.items()}
    paired = {name: frechet(features[name], features["true"]) for name in ("model", "codec")}
    return {
        "features": "EfficientNet-Lite0 (not Inception: this is not the published FID)",
        "frames_per_side": len(reference),
        "streams": len(starts),
        "horizons": horizons,
        "model": round(distance["model"], 3),
        "codec": round(distance["codec"], 3),
        "floor": round(distance["true"], 3),
        "ratio": round(distance["model"] / distance["codec"], 3),
        "model_to_same_clips": round(paired["model"], 3),
        "codec_to_same_clips": round(paired["codec"], 3),
    }


def _features(frames: Tensor, net: FeatureNet, device: torch.device) -> Tensor:
    parts = frames.flatten(0, 1).split(256)
    return torch.cat([frame_features(images(part).to(device), batch_size=64, net=net) for part in parts])


def read_back_score(
    episodes: Episodes, clips: Clips, drawn: Tensor, *, steps: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """How well a probe, trained on true frames of other clips, reads the buttons from drawn frames.

    Per button: balanced accuracy on the drawn and on the true frames of the same clips, and (drawn - 0.5) /
    (true - 0.5), over the worlds where the button can be read at all (`READABLE`; a gun that is not there cannot fire).
    """
    windows = probe_windows(episodes, clips)
    generator = torch.Generator().manual_seed(seed)
    # Frames are gathered from memory, so only as many as the steps can use.
    windows = windows[torch.randperm(len(windows), generator=generator)[:50_000]].sort().values
    frames, actions = _gather(episodes, windows)
    starts = torch.arange(len(windows)) * PROBE_CONTEXT
    batch_size = 512 if device.type == "cuda" else 128
    probe = train_probe(frames, actions, starts, device=device, steps=steps, batch_size=batch_size, generator=generator)
    pressed = clips.actions[:, CONTEXT + MIDDLE : clips.actions.shape[1] - (PROBE_CONTEXT - 1 - MIDDLE)].bool()
    true, mine = (read_actions(probe, side) for side in (clips.frames[:, CONTEXT:], drawn))
    buttons: dict[str, Any] = {}
    for column, name in enumerate(clips.buttons):
        buttons[name] = _button_score(clips, *(side[..., column : column + 1] for side in (mine, true, pressed)))
    ratios = [score["above_chance"] for score in buttons.values() if score["above_chance"] is not None]
    return {
        "probe_steps": steps,
        "probe_windows": len(windows),
        "above_chance": round(sum(ratios) / len(ratios), 3) if ratios else None,
        "by_button": buttons,
    }


def probe_windows(episodes: Episodes, clips: Clips) -> Tensor:
    """Starts of windows for the probe that share no frame with `clips`."""
    starts = episodes.windows(PROBE_CONTEXT, "train")
    taken = torch.zeros(len(episodes), dtype=torch.bool)
    taken[(clips.starts[:, None] + torch.arange(clips.frames.shape[1])).flatten()] = True
    return starts[~taken[starts[:, None] + torch.arange(PROBE_CONTEXT)].any(1)]


def _gather(episodes: Episodes, windows: Tensor) -> tuple[Tensor, Tensor]:
    where = (windows[:, None] + torch.arange(PROBE_CONTEXT)).flatten()
    return episodes.take(where), episodes.actions[where]


def _button_score(clips: Clips, mine: Tensor, true: Tensor, pressed: Tensor) -> dict[str, Any]:
    """One button's [N, T, 1] readings and truth."""
    readable = []
    for index in range(len(clips.names)):
        here = clips.world == index
        if float(balanced_accuracy(true[here], pressed[here])) >= READABLE:
            readable.append(index)
    names = [clips.names[index] for index in readable]
    if not readable:
        return {"above_chance": None, "worlds": names}
    here = torch.isin(clips.world, torch.tensor(readable))
    accuracy, reference = (balanced_accuracy(side[here], pressed[here]) for side in (mine, true))
    return {
        "above_chance": round(float(above_chance(accuracy, reference)), 3),
        "drawn": round(float(accuracy), 3),
        "true": round(float(reference), 3),
        "worlds": names,
    }
