"""What tests of several rooms need."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, as diffusers does where torchao is there


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Here and in child processes, also where a shell started the tests in the background and so with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny speaking model with random weights, saved as a pipeline; its voices are ann and bob."""
    from millstream.models.audio_codec import AudioCodec
    from millstream.models.pronouncer import Pronouncer
    from millstream.models.speech import SpeechTransformer
    from millstream.pipelines.audio import AudioPipeline
    from millstream.samplers import FlowSampler

    torch.manual_seed(0)
    codec = AudioCodec(latent_channels=8)
    sizes = {"phoneme_dim": 16, "dim": 64, "layers": 2, "ffn_dim": 64, "head_dim": 32, "head_layers": 1}
    model = SpeechTransformer(8, codec.frame_rate, ("ann", "bob"), window=8, **sizes)
    for parameter in model.parameters():
        if not parameter.any():  # layers that begin at zero would leave the text unheard
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.constant_(model.duration[-1].bias, 1.0)  # three hundredths of a second for a sound
    pipe = AudioPipeline(
        model.eval(), codec.eval(), Pronouncer(16, 1).eval(), FlowSampler(num_inference_steps=2, context_sigma=0.1)
    )
    folder = tmp_path_factory.mktemp("speech") / "tiny"
    pipe.save_pretrained(folder)
    return folder
