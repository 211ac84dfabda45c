"""ARPG, MaskGIL and VAR under their published names, against slow loops over those names that share no code of ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from millstream.models.checkpoints import load_token_transformer
from millstream.models.token_transformer import TokenTransformer
from millstream.pipelines.token_networks import CachedNetwork, MaskedNetwork, PhiloxDraws
from millstream.samplers import TokenSampler, decode

DIM, HEADS, HIDDEN, VOCABULARY, CLASSES, SIDE, LAYERS = 32, 2, 48, 20, 5, 3, 2
COUNT = SIDE * SIDE
Weights = dict[str, Tensor]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape) * (0.5 if len(shape) == 1 else 1 / math.sqrt(shape[-1]))


def arpg() -> Weights:
    """As `models/arpg.py` names them."""
    torch.manual_seed(0)
    weights = {"embeddings.weight": torch.randn(VOCABULARY + CLASSES + 3, DIM), "norm.weight": 1 + drawn(DIM)}
    weights |= {"head.weight": drawn(VOCABULARY, DIM), "layers.norm.weight": 1 + drawn(DIM)}
    weights |= {f"layers.to_{part}.weight": drawn(DIM, DIM) for part in "kv"}
    for half, parts in (("self", "qkv"), ("cross", "q")):
        for layer in range(LAYERS):
            begin = f"layers.{half}_dec.{layer}."
            weights |= {f"{begin}attn.to_{part}.weight": drawn(DIM, DIM) for part in parts}
            weights |= {f"{begin}attn.proj.weight": drawn(DIM, DIM)}
            weights |= {f"{begin}{name}_norm.weight": 1 + drawn(DIM) for name in ("attn", "ffn")}
            weights |= {f"{begin}ffn.w{number}.weight": drawn(HIDDEN, DIM) for number in (1, 3)}
            weights |= {f"{begin}ffn.w2.weight": drawn(DIM, HIDDEN)}
    return weights


def maskgil() -> Weights:
    """As `Network/gpt.py` names them."""
    torch.manual_seed(1)
    weights = {"tok_emb.weight": torch.randn(VOCABULARY + CLASSES + 2, DIM), "norm.weight": 1 + drawn(DIM)}
    weights |= {"output.weight": drawn(VOCABULARY + 1, DIM)}
    for layer in range(LAYERS):
        begin = f"layers.{layer}."
        weights |= {
            f"{begin}attention.wqkv.weight": drawn(3 * DIM, DIM),
            f"{begin}attention.wo.weight": drawn(DIM, DIM),
        }
        weights |= {f"{begin}{name}_norm.weight": 1 + drawn(DIM) for name in ("attention", "ffn")}
        weights |= {f"{begin}feed_forward.w{number}.weight": drawn(HIDDEN, DIM) for number in (1, 3)}
        weights |= {f"{begin}feed_forward.w2.weight": drawn(DIM, HIDDEN)}
    return weights


def var(*, shared: bool = False) -> Weights:
    """As `models/var.py` and `models/basic_var.py` name them."""
    torch.manual_seed(2)
    sides, channels = (1, 2, SIDE), 6
    count = sum(side * side for side in sides)
    weights = {"class_emb.weight": torch.randn(CLASSES + 1, DIM), "pos_start": torch.randn(1, 1, DIM)}
    weights |= {"pos_1LC": torch.randn(1, count, DIM), "lvl_embed.weight": torch.randn(len(sides), DIM)}
    weights |= {"word_embed.weight": drawn(DIM, channels), "word_embed.bias": drawn(DIM)}
    weights |= {"head.weight": drawn(VOCABULARY, DIM), "head.bias": drawn(VOCABULARY)}
    weights |= {"head_nm.ada_lin.1.weight": drawn(2 * DIM, DIM), "head_nm.ada_lin.1.bias": drawn(2 * DIM)}
    weights |= {"lvl_1L": torch.zeros(1, count), "attn_bias_for_masking": torch.zeros(1, 1, count, count)}
    if shared:
        weights |= {"shared_ada_lin.1.weight": drawn(6 * DIM, DIM), "shared_ada_lin.1.bias": drawn(6 * DIM)}
    for layer in range(LAYERS):
        begin = f"blocks.{layer}."
        weights |= {f"{begin}attn.mat_qkv.weight": drawn(3 * DIM, DIM), f"{begin}attn.zero_k_bias": torch.zeros(DIM)}
        weights |= {f"{begin}attn.{part}_bias": drawn(DIM) for part in "qv"}
        weights |= {f"{begin}attn.scale_mul_1H11": torch.tensor([1.4, 9.0]).view(1, 2, 1, 1)}
        weights |= {f"{begin}attn.proj.weight": drawn(DIM, DIM), f"{begin}attn.proj.bias": drawn(DIM)}
        weights |= {f"{begin}ffn.fc1.weight": drawn(HIDDEN, DIM), f"{begin}ffn.fc1.bias": drawn(HIDDEN)}
        weights |= {f"{begin}ffn.fc2.weight": drawn(DIM, HIDDEN), f"{begin}ffn.fc2.bias": drawn(DIM)}
        if shared:
            weights[f"{begin}ada_gss"] = torch.randn(1, 1, 6, DIM)
        else:
            weights |= {f"{begin}ada_lin.1.weight": drawn(6 * DIM, DIM), f"{begin}ada_lin.1.bias": drawn(6 * DIM)}
    return weights


def loaded(weights: Weights, path: Path, **config: Any) -> TokenTransformer:
    save_file({name: value.contiguous() for name, value in weights.items()}, path / "model.safetensors")
    return load_token_transformer(path / "model.safetensors", config={"num_heads": HEADS, **config})


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(head: Tensor, place: tuple[float, ...] | None) -> Tensor:
    """One head [d] at a place, axis after axis; None mutes it."""
    if place is None:
        return torch.zeros_like(head)
    pairs = torch.view_as_complex(head.view(-1, 2).contiguous())
    share = len(pairs) // len(place)
    angles = [each * 10000.0 ** (-index / share) for each in place for index in range(share)]
    return torch.view_as_real(pairs * torch.exp(1j * torch.tensor(angles))).flatten()


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query [D] over keys and values [K, D], head by head."""
    parts = []
    for head in range(HEADS):
        own = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        parts.append(torch.softmax(k[:, own] @ q[own] * scale, dim=0) @ v[:, own])
    return torch.cat(parts)


def placed(x: Tensor, places: list[tuple[float, ...] | None]) -> Tensor:
    """Rows [L, D], each head of each turned."""
    rows = [torch.cat([turned(head, place) for head in row.view(HEADS, -1)]) for row, place in zip(x, places)]
    return torch.stack(rows)


def llama(x: Tensor, block: Weights, norm: str) -> Tensor:
    x_normed = rms(x, block[norm])
    gate, up, down = (next(value for name, value in block.items() if f".w{n}." in name) for n in (1, 3, 2))
    return x + (F.silu(x_normed @ gate.T) * (x_normed @ up.T)) @ down.T


def under(weights: Weights, begin: str) -> Weights:
    return {name.removeprefix(begin): value for name, value in weights.items() if name.startswith(begin)}


def arpg_logits(weights: Weights, label: int, tokens: Tensor, order: list[int], asked: int) -> Tensor:
    """Of the token at `order[asked]`, from the label and the tokens before it, everything computed anew."""
    scale = (DIM / HEADS) ** -0.5
    table = weights["embeddings.weight"]
    places: list[tuple[float, ...] | None] = [None, *((n // SIDE, n % SIDE) for n in order[:asked])]
    x = table[[VOCABULARY + 1 + label, *tokens[order[:asked]].tolist()]]
    for layer in range(LAYERS):
        block = under(weights, f"layers.self_dec.{layer}.")
        normed = rms(x, block["attn_norm.weight"])
        q, k = (placed(normed @ block[f"attn.to_{part}.weight"].T, places) for part in "qk")
        v = normed @ block["attn.to_v.weight"].T
        mixed = [attended(q[n], k[: n + 1], v[: n + 1], scale) for n in range(len(x))]
        x = llama(x + torch.stack(mixed) @ block["attn.proj.weight"].T, block, "ffn_norm.weight")
    normed = rms(x, weights["layers.norm.weight"])
    k, v = placed(normed @ weights["layers.to_k.weight"].T, places), normed @ weights["layers.to_v.weight"].T
    query = table[VOCABULARY]
    target: tuple[float, ...] = (order[asked] // SIDE, order[asked] % SIDE)
    for layer in range(LAYERS):
        block = under(weights, f"layers.cross_dec.{layer}.")
        q = placed((rms(query, block["attn_norm.weight"]) @ block["attn.to_q.weight"].T)[None], [target])[0]
        query = llama(query + attended(q, k, v, scale) @ block["attn.proj.weight"].T, block, "ffn_norm.weight")
    return rms(query, weights["norm.weight"]) @ weights["head.weight"].T


def maskgil_logits(weights: Weights, label: int, tokens: Tensor, known: Tensor) -> Tensor:
    """Of every token [N, V]: one row of tokens with the label behind it."""
    scale = (DIM / HEADS) ** -0.5
    ids = [*torch.where(known, tokens, VOCABULARY).tolist(), VOCABULARY + 1 + label]
    places: list[tuple[float, ...] | None] = [None, *((float(n),) for n in range(COUNT))]
    x = weights["tok_emb.weight"][ids]
    for layer in range(LAYERS):
        block = under(weights, f"layers.{layer}.")
        q, k, v = (rms(x, block["attention_norm.weight"]) @ block["attention.wqkv.weight"].T).split(DIM, dim=1)
        q, k = placed(q, places), placed(k, places)
        mixed = torch.stack([attended(each, k, v, scale) for each in q])
        x = llama(x + mixed @ block["attention.wo.weight"].T, block, "ffn_norm.weight")
    return rms(x[:COUNT], weights["norm.weight"]) @ weights["output.weight"][:VOCABULARY].T


def var_logits(weights: Weights, label: int, inputs: Tensor) -> Tensor:
    """Of every cell of every map [L, V]."""
    told = weights["class_emb.weight"][label]
    levels = torch.tensor([0] + [1] * 4 + [2] * COUNT)
    first = told + weights["pos_start"][0]
    x = torch.cat([first, inputs @ weights["word_embed.weight"].T + weights["word_embed.bias"]])
    x = x + weights["lvl_embed.weight"][levels] + weights["pos_1LC"][0]

    def spoken(name: str, prefix: str = "") -> Tensor:
        return weights[f"{prefix}{name}.1.weight"] @ F.silu(told) + weights[f"{prefix}{name}.1.bias"]

    for layer in range(LAYERS):
        block = under(weights, f"blocks.{layer}.")
        if "ada_gss" in block:
            six = block["ada_gss"][0, 0] + spoken("shared_ada_lin").view(6, DIM)
        else:
            six = spoken("ada_lin", f"blocks.{layer}.").view(6, DIM)
        gate1, gate2, scale1, scale2, shift1, shift2 = six
        bias = torch.cat([block["attn.q_bias"], torch.zeros(DIM), block["attn.v_bias"]])
        inner = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = (inner @ block["attn.mat_qkv.weight"].T + bias).split(DIM, dim=1)
        heat = block["attn.scale_mul_1H11"].flatten().clamp(max=math.log(100)).exp()
        q = (F.normalize(q.view(-1, HEADS, DIM // HEADS), dim=-1) * heat[:, None]).flatten(1)
        k = F.normalize(k.view(-1, HEADS, DIM // HEADS), dim=-1).flatten(1)
        mixed = [attended(each, k[levels <= level], v[levels <= level], 1.0) for each, level in zip(q, levels)]
        x = x + gate1 * (torch.stack(mixed) @ block["attn.proj.weight"].T + block["attn.proj.bias"])
        inner = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + scale2) + shift2
        inner = F.gelu(inner @ block["ffn.fc1.weight"].T + block["ffn.fc1.bias"], approximate="tanh")
        x = x + gate2 * (inner @ block["ffn.fc2.weight"].T + block["ffn.fc2.bias"])
    scale, shift = spoken("ada_lin", "head_nm.").view(2, DIM)
    x = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + scale) + shift
    return x @ weights["head.weight"].T + weights["head.bias"]


@torch.no_grad()
def test_arpg(tmp_path: Path) -> None:
    weights = arpg()
    model = loaded(weights, tmp_path, grid=(SIDE, SIDE))
    labels, tokens = torch.tensor([1, CLASSES]), torch.randint(VOCABULARY, (2, COUNT))
    order = torch.stack([torch.randperm(COUNT), torch.randperm(COUNT)])
    found = model(tokens, labels, order=order)
    for row in range(2):
        for asked in range(COUNT):
            wanted = arpg_logits(weights, int(labels[row]), tokens[row], order[row].tolist(), asked)
            torch.testing.assert_close(found[row, asked], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_maskgil(tmp_path: Path) -> None:
    weights = maskgil()
    model = loaded(weights, tmp_path, grid=(SIDE, SIDE))
    labels, tokens = torch.tensor([0, CLASSES]), torch.randint(VOCABULARY, (2, COUNT))
    known = torch.rand(2, COUNT) < 0.5
    found = model(tokens, labels, known=known)
    for row in range(2):
        wanted = maskgil_logits(weights, int(labels[row]), tokens[row], known[row])
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)
    every = torch.arange(COUNT).expand(2, -1)
    step = model.predict_masked(tokens, known, model.begin(labels), every)
    torch.testing.assert_close(step, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_var(tmp_path: Path, shared: bool) -> None:
    weights = var(shared=shared)
    model = loaded(weights, tmp_path, scale_sides=(1, 2, SIDE))
    labels, inputs = torch.tensor([3, CLASSES]), torch.randn(2, 4 + COUNT, 6)
    found = model(inputs, labels)
    for row in range(2):
        wanted = var_logits(weights, int(labels[row]), inputs[row])
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)
    cache = model.begin(labels)
    parts = [None, inputs[:, :4], inputs[:, 4:]]
    steps = [model.predict_scale(level, part, cache) for level, part in enumerate(parts)]
    torch.testing.assert_close(torch.cat(steps, dim=1), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [arpg, maskgil])
@torch.no_grad()
def test_what_is_loaded_decodes_with_guidance(make: Any, tmp_path: Path) -> None:
    model = loaded(make(), tmp_path, grid=(SIDE, SIDE))
    labels = torch.tensor([2, 4, CLASSES, CLASSES])  # the wanted half first, then none
    masked = model.config["kind"] == "masked"
    network = MaskedNetwork(model, labels) if masked else CachedNetwork(model, labels)
    plan = TokenSampler(4, order="masked" if masked else "random", guidance_scale=2.0).plan(COUNT)
    blank = torch.zeros(2, COUNT, dtype=torch.int64)
    settings = {"counts": plan.counts, "order": plan.order, "head": plan.head, "guidance": plan.guidance}
    tokens = decode(network, blank, blank.bool(), draws=PhiloxDraws(torch.tensor([1, 2])), **settings)
    assert tokens.shape == (2, COUNT)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < VOCABULARY


def test_published_sizes_fit() -> None:
    """ARPG-L: 1,024 wide, 12 + 12 layers, 16,384 codes, 1,000 classes: 320 million parameters."""
    from millstream.models.checkpoints import tokens as dialect

    with torch.device("meta"):
        block = {"attn.proj.weight": torch.empty(1024, 1024), "ffn.w2.weight": torch.empty(1024, 2816)}
        block |= {f"{name}_norm.weight": torch.empty(1024) for name in ("attn", "ffn")}
        block |= {f"ffn.w{number}.weight": torch.empty(2816, 1024) for number in (1, 3)}
        published = {"embeddings.weight": torch.empty(16384 + 1003, 1024), "head.weight": torch.empty(16384, 1024)}
        published |= {name: torch.empty(1024) for name in ("norm.weight", "layers.norm.weight")}
        published |= {f"layers.to_{part}.weight": torch.empty(1024, 1024) for part in "kv"}
        for layer in range(12):
            for half, parts in (("self", "qkv"), ("cross", "q")):
                begin = f"layers.{half}_dec.{layer}."
                published |= {begin + name: value for name, value in block.items()}
                published |= {f"{begin}attn.to_{part}.weight": torch.empty(1024, 1024) for part in parts}
        settings, weights = dialect.DIALECTS["arpg"](published)
        model = TokenTransformer(**settings, num_heads=16)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in weights.items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(320e6, rel=0.02)
    assert (settings["num_classes"], settings["grid"]) == (1000, (16, 16))


def test_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no token transformer of ARPG, MaskGIL or VAR, but a\.weight"):
        load_token_transformer(tmp_path / "other.safetensors")
    weights = var()
    save_file(weights, tmp_path / "var.safetensors")
    with pytest.raises(ValueError, match=r'14 places, of no published pyramid.*"scale_sides"'):
        load_token_transformer(tmp_path / "var.safetensors")
    broken = arpg()
    del broken["layers.cross_dec.1.attn.proj.weight"]
    with pytest.raises(ValueError, match=r"1 missing: cross_decoder\.blocks\.1\.to_out\.weight"):
        loaded(broken, tmp_path, grid=(SIDE, SIDE))
    broken = var()
    del broken["blocks.1.attn.scale_mul_1H11"]
    with pytest.raises(ValueError, match=r"not a whole model of var: 'attn\.scale_mul_1H11' is missing"):
        loaded(broken, tmp_path, scale_sides=(1, 2, SIDE))
    model = loaded(arpg(), tmp_path, grid=(SIDE, SIDE))
    with pytest.raises(ValueError, match=r"is told labels, int64 \[B\], got \[1, 2, 3\]"):
        model.begin(torch.zeros(1, 2, 3))
