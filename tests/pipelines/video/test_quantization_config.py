"""`quantization_config` means what it means to diffusers, whatever dialect weights come in."""

from __future__ import annotations

import pytest
import torch
from diffusers import PipelineQuantizationConfig
from torch import nn

from millstream.models.quantized import QuantizedLinear, is_plain
from millstream.pipelines.video import VideoPipeline

ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def config():
    from diffusers import TorchAoConfig

    return TorchAoConfig(ao.Int8WeightOnlyConfig())


@pytest.fixture
def folder(make, tmp_path):
    make("longlive").save_pretrained(tmp_path)
    return tmp_path


def clip(pipe, seeded):
    pipe.set_progress_bar_config(disable=True)
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        return torch.cat([chunk.data for _ in range(2) for chunk in session.step()]).float()


@pytest.mark.parametrize("preset", ["exact", "fast"])
@pytest.mark.parametrize("granular", [False, True])
def test_the_transformer_is_quantised_and_draws_nearly_the_same(folder, seeded, preset, granular):
    given = PipelineQuantizationConfig(quant_mapping={"transformer": config()}) if granular else config()
    how = {"torch_dtype": torch.bfloat16, "preset": preset}
    exact = VideoPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    narrow = VideoPipeline.from_pretrained(folder, quantization_config=given, **how)
    linears = [part for part in narrow.transformer.modules() if type(part) in (nn.Linear, QuantizedLinear)]
    assert not any(isinstance(part, QuantizedLinear) for part in linears)  # what is quantised no preset does
    assert sum(not is_plain(part) for part in linears) > 20
    embedder = narrow.transformer.condition_embedder.time_embedder
    assert is_plain(embedder.linear_1)  # of those that stay in float32
    one, other = clip(exact, seeded), clip(narrow, seeded)
    assert 1e-4 < (one - other).square().mean().sqrt() / one.std() < 0.12


def test_an_adapter_is_merged_before_and_refused_after(folder, seeded):
    adapter = {}
    for half, shape in (("A", (2, 24)), ("B", (24, 2))):
        adapter[f"blocks.0.attn1.to_q.lora_{half}.weight"] = torch.ones(shape)
    pipe = VideoPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config())
    with pytest.raises(ValueError, match=r"attn1\.to_q was quantised by another library.*give lora= when loading"):
        pipe.load_lora_weights(adapter)
    with pytest.raises(ValueError, match="quantised by quantization_config, which cannot be read back"):
        pipe.save_pretrained(folder / "again")


def test_what_cannot_be_quantised_is_told(folder):
    with pytest.raises(TypeError, match=r"must be one of diffusers' configs, .* got str"):
        VideoPipeline.from_pretrained(folder, quantization_config="int8")
    with pytest.raises(ValueError, match="names vae; a video pipeline quantises transformer and text_encoder"):
        VideoPipeline.from_pretrained(
            folder, quantization_config=PipelineQuantizationConfig(quant_mapping={"vae": config()})
        )
    with pytest.raises(ValueError, match="is not known before it is done"):
        VideoPipeline.from_pretrained(folder, quantization_config=config(), headers_only=True)


def test_the_text_encoder_is_quantised_by_transformers(folder, seeded):
    from transformers import TorchAoConfig

    both = PipelineQuantizationConfig(
        quant_mapping={"transformer": config(), "text_encoder": TorchAoConfig(ao.Int8WeightOnlyConfig())}
    )
    pipe = VideoPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=both)
    assert not all(is_plain(part) for part in pipe.text_encoder.modules() if isinstance(part, nn.Linear))
    assert clip(pipe, seeded).isfinite().all()
    with pytest.raises(ValueError, match="quantised by quantization_config, which cannot be read back"):
        pipe.save_pretrained(folder / "again")
    (folder / "text_encoder" / "config.json").rename(folder / "config.json")
    with pytest.raises(ValueError, match="text_encoder is none; quantise the transformer alone"):
        VideoPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=both)
