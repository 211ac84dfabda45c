"""Weights quantised by what diffusers itself uses for it: torchao, bitsandbytes, quanto.

diffusers quantises a model while it loads the model's own folder. Weights here come in other dialects, with adapters to
merge, so the same quantizers are given a model that is loaded already. To be imported only where they are asked for:
they import their libraries.
"""

from __future__ import annotations

import inspect
from typing import Any

from accelerate.utils import set_module_tensor_to_device
from diffusers import PipelineQuantizationConfig
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import DiffusersAutoQuantizer

PARTS = ("transformer", "text_encoder")


def configs_of(config: Any) -> dict[str, Any]:
    """What `quantization_config` asks of each part, by name, for those of which it asks anything.

    Args:
        config: diffusers' `PipelineQuantizationConfig`, or what `from_pretrained` of a diffusers model takes, which is
            then the transformer's; None asks nothing.

    Raises:
        ValueError: it speaks of parts that are not quantised here. TypeError: it is none of these.
    """
    if config is None:
        return {}
    if not isinstance(config, PipelineQuantizationConfig):
        if not hasattr(config, "quant_method"):
            raise TypeError(
                f"quantization_config must be one of diffusers' configs, such as TorchAoConfig or "
                f"PipelineQuantizationConfig, got {type(config).__name__}"
            )
        return {"transformer": config}
    named = set(config.quant_mapping or ()) | set(config.components_to_quantize or ())
    if strange := named - set(PARTS):
        raise ValueError(
            f"quantization_config names {', '.join(sorted(strange))}; a video pipeline quantises {' and '.join(PARTS)}"
        )
    found = {name: config._resolve_quant_config(name == "transformer", name) for name in PARTS}
    return {name: each for name, each in found.items() if each is not None}


def quantize_as(model: ModelMixin, config: Any) -> None:
    """Quantise the linear layers of a loaded model, in place, as diffusers would have while loading it.

    Raises:
        ImportError: the library that `config` speaks of is not installed.
    """
    quantizer: Any = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment(device_map=None)
    weights = model.state_dict(keep_vars=True)  # the parameters themselves, to see which are replaced
    kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    quantizer.preprocess_model(model, device_map=None, keep_in_fp32_modules=kept)
    takes = inspect.signature(quantizer.create_quantized_param).parameters
    more = {name: value for name, value in {"unexpected_keys": [], "dtype": model.dtype}.items() if name in takes}
    for name, value in weights.items():
        owner, _, leaf = name.rpartition(".")
        if quantizer.check_if_quantized_param(model, value.detach(), name, weights, param_device=value.device):
            quantizer.create_quantized_param(model, value.detach(), name, value.device, weights, **more)
        elif getattr(model.get_submodule(owner), leaf) is not value:
            set_module_tensor_to_device(model, name, value.device, value=value.detach())
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer  # as diffusers marks it
