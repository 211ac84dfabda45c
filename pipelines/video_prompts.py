"""Prompts as umT5 reads them, kept so that going back to one costs nothing, and mixed where one becomes another.

Reading takes long, so it is done by whoever steers, and no step waits for it: see `VideoPipeline.check`.
"""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..models.transformer import CausalTransformer3DModel
from .presets import Preset
from .video_state import VideoState

KEPT = 32  # prompts beside those that were asked for; one is 4 MB in bfloat16


class PromptReader(DiffusionPipeline):
    """The part of a video pipeline that reads prompts."""

    transformer: CausalTransformer3DModel
    text_encoder: UMT5EncoderModel | None
    tokenizer: PreTrainedTokenizerBase | None
    text_length: int
    preset: Preset
    _read: OrderedDict[str, Tensor]
    _asked: set[str]  # of these, what is never forgotten
    _knowing: Lock  # whoever looks at these
    _reading: RLock  # whoever runs the text encoder or moves it
    _reader_stream: torch.cuda.Stream | None = None

    def encode_prompt(self, prompt: str) -> Tensor:
        """A prompt's tokens [S, D], zero behind its end, as Wan was trained: on the CPU, and kept.

        Encode the prompts of a session beforehand, and `drop_text_encoder()` gives its memory (11 GB) back.

        Raises:
            ValueError: the text encoder is gone, and this prompt was not encoded before.
        """
        with self._knowing:
            self._asked.add(cleaned(prompt))
        return self.read_prompt(prompt)

    @torch.no_grad()
    def read_prompt(self, prompt: str) -> Tensor:
        """As `encode_prompt`, but forgotten when many others have been read since. From any thread."""
        text = cleaned(prompt)
        tokens = self._known(text)
        if tokens is None:
            with self._reading:
                tokens = self._known(text)  # another thread may just have read it
                if tokens is None:
                    tokens = self._encode(text)
                    self._keep(text, tokens)
        return tokens

    def _known(self, text: str) -> Tensor | None:
        with self._knowing:
            if text in self._read:
                self._read.move_to_end(text)
            return self._read.get(text)

    def _keep(self, text: str, tokens: Tensor) -> None:
        with self._knowing:
            self._read[text] = tokens
            passing = [known for known in self._read if known not in self._asked]
            for known in passing[:-KEPT]:
                del self._read[known]

    def keep_prompt(self, prompt: str, tokens: Tensor) -> None:
        """Take a prompt's tokens [S, D] that were encoded elsewhere, zero behind the prompt's end.

        Raises:
            ValueError: another shape than this pipeline's prompts have.
        """
        wanted = (self.text_length, self.transformer.config["text_dim"])
        if tuple(tokens.shape) != wanted:
            raise ValueError(f"tokens of this pipeline's prompts are {list(wanted)}, got {list(tokens.shape)}")
        with self._knowing:
            self._read[cleaned(prompt)] = tokens.cpu()
            self._asked.add(cleaned(prompt))

    def known_prompt(self) -> str:
        """A prompt that can be read: any, or one of those that were kept once there is no text encoder.

        Raises:
            ValueError: there is none.
        """
        if self.text_encoder is None:
            with self._knowing:
                if not self._read:
                    raise ValueError("there is no text encoder and no prompt was kept: keep_prompt(...) one first")
                return next(reversed(self._read))
        return "a stream of water"

    def _encode(self, text: str) -> Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            with self._knowing:
                known = ", ".join(map(repr, self._read)) or "none"
            raise ValueError(
                f"there is no text encoder to read {text!r} with; load one, or encode_prompt() before it is dropped "
                f"(encoded: {known})"
            )
        words = self.tokenizer([text], max_length=self.text_length, truncation=True, return_tensors="pt")
        # Behind a prompt's end all is zero, and what is read before it does not depend on that: nothing is padded.
        with self._aside(self.text_encoder.device):
            tokens = self.text_encoder(words["input_ids"].to(self.text_encoder.device)).last_hidden_state[0].cpu()
        return F.pad(tokens, (0, 0, 0, self.text_length - len(tokens)))

    @contextmanager
    def _aside(self, device: torch.device) -> Iterator[None]:
        """Within: work on `device` that steps of other threads need not wait for, on a CUDA stream of its own."""
        if device.type != "cuda":
            yield
            return
        if self._reader_stream is None or self._reader_stream.device != device:
            self._reader_stream = torch.cuda.Stream(device)
        self._reader_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._reader_stream):
            yield

    def drop_text_encoder(self) -> None:
        """Let go of the text encoder and its memory. Prompts that were encoded before can still be used."""
        with self._reading:
            self.register_modules(text_encoder=None)

    def blended(self, state: VideoState, chunks: int) -> Tensor:
        """The next mixture of the prompt a stream leaves and the one it reaches, `chunks` steps apart."""
        assert state.origin is not None
        assert state.target is not None
        state.blend += 1
        mixture = torch.lerp(state.origin.float(), state.target.float(), state.blend / chunks).to(state.target.dtype)
        if state.blend == chunks:
            state.origin = state.target = None
            state.blend = 0
        return mixture


def cleaned(prompt: str) -> str:
    """As Wan cleans prompts: entities resolved, white space made plain."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
