"""The Generate form: text, image or video to clip, with progress and download."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from .clips import ClipRequest, make_clip, remove_old
from .settings import PageSettings

KEPT_CLIPS = 20
FILE_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".mp4", ".mov", ".webm", ".mkv"]
EXAMPLE_KEYS = "KeyW*40 ArrowLeft*20"


def add_generate(gr: Any, settings: PageSettings) -> None:
    """Put the form into the Blocks that are being built. `gr` is Gradio, which only the page's users import."""
    with gr.Column(elem_id="ms-generate"):
        if settings.pipeline is None:
            gr.HTML("<p class='ms-empty'>This server draws live pictures only. Clips need a model that it owns.</p>")
            return
        with gr.Row(elem_classes="ms-panel-columns"):
            with gr.Column(elem_classes="ms-form", min_width=280):
                inputs = _inputs(gr)
                with gr.Row():
                    go = gr.Button("Draw the clip", variant="primary", elem_id="ms-draw")
                    stop = gr.Button("Stop", elem_id="ms-draw-stop")
            with gr.Column(elem_classes="ms-result", min_width=280):
                clip = gr.Video(
                    label="Clip",
                    show_label=False,
                    autoplay=True,
                    loop=True,
                    interactive=False,
                    buttons=[],
                    elem_id="ms-clip",
                )
                told = gr.HTML(elem_id="ms-clip-told", apply_default_css=False)
                download = gr.DownloadButton("Download", interactive=False, elem_id="ms-clip-download")
        wanted: set[str] = set()  # browsers whose clip is being drawn
        drawing = go.click(
            _drawer(gr, settings, wanted),
            inputs,
            [clip, told, download],
            concurrency_limit=1,
            show_progress_on=clip,
            api_name="generate",
        )
        stop.click(_stopper(gr, wanted), cancels=[drawing], concurrency_limit=None, api_visibility="private")


def _inputs(gr: Any) -> list[Any]:
    prompt = gr.Textbox(
        label="Prompt", placeholder="a brick corridor with soldiers", lines=2, max_length=2000, elem_id="ms-clip-prompt"
    )
    upload = gr.File(
        label="Begin from an image or a video (optional)",
        file_types=FILE_TYPES,
        type="filepath",
        height=104,
        elem_classes="ms-upload",
    )
    upload.async_move_resource_to_block_cache = _only_uploaded(gr, upload.async_move_resource_to_block_cache)
    strength = gr.Slider(
        0.0, 1.0, 0.0, step=0.05, label="Strength", info="0 goes on from the file, more redraws it", buttons=[]
    )
    keys = gr.Textbox(
        label="Keys", value=EXAMPLE_KEYS, info="KEY*FRAMES, repeated to the end; - is no key", max_length=4000
    )
    with gr.Row():
        frames = gr.Number(label="Frames", value=70, precision=0, minimum=0, elem_id="ms-clip-frames")
        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, elem_id="ms-clip-seed")
    with gr.Row():
        steps = gr.Number(label="Steps per frame", value=0, precision=0, minimum=0, info="0 is the model's own")
        guidance = gr.Number(label="Guidance", value=1.0, minimum=0, maximum=100, info="1 is off")
    return [prompt, upload, strength, keys, frames, seed, steps, guidance]


def _only_uploaded(gr: Any, take: Any) -> Any:
    """Gradio would fetch an address that stands where an uploaded file should, of any size, for anybody."""

    async def take_file(path: Any) -> Any:
        if "://" in str(path):
            raise gr.Error("give a file, not an address", print_exception=False)
        return await take(path)

    return take_file


class Stopped(ValueError):
    """The user asked for the clip no longer. Gradio only stops waiting for it; this ends the drawing, too."""


def _stopper(gr: Any, wanted: set[str]) -> Any:
    def stop(request: Any) -> None:
        wanted.discard(request.session_hash)

    return asking(gr, stop)


def asking(gr: Any, function: Any) -> Any:
    """Gradio finds by the annotation, which needs Gradio, that `request` is who asks."""
    function.__annotations__["request"] = gr.Request
    return function


def _drawer(gr: Any, settings: PageSettings, wanted: set[str]) -> Any:
    folder = Path(tempfile.mkdtemp(prefix="millstream-clips-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pipeline = settings.pipeline
    assert pipeline is not None, "the form is only built with a pipeline"

    def draw(
        prompt: str,
        upload: str | None,
        strength: float | None,
        keys: str,
        frames: float | None,
        seed: float | None,
        steps: float | None,
        guidance: float | None,
        request: Any,
        progress: Any = gr.Progress(),  # noqa: B008  (how Gradio is asked for one)
    ) -> tuple[str, str, Any]:
        def report(done: int, total: int) -> None:
            if request.session_hash not in wanted:
                raise Stopped("it was stopped")
            progress((done, total), desc="drawing", unit="frames")

        pipe = pipeline()
        wanted.add(request.session_hash)
        output = folder / f"millstream-{uuid.uuid4().hex[:12]}.mp4"
        try:
            clip = ClipRequest(
                prompt=prompt,
                num_frames=int(_given("frames", frames)),
                seed=int(_given("seed", seed)),
                num_inference_steps=int(steps or 0) or None,
                guidance_scale=float(_given("guidance", guidance)),
                keys="" if keys == EXAMPLE_KEYS and not hasattr(pipe, "key_map") else keys,
                upload=Path(upload) if upload else None,
                strength=float(_given("strength", strength)),
            )
            drawn, seconds = make_clip(
                pipe, clip, output, most=max(1, int(settings.clip_seconds * pipe.rate)), progress=report
            )
        except (ValueError, TypeError, OSError) as error:
            output.unlink(missing_ok=True)  # what a clip that was stopped had so far
            raise gr.Error(f"{error}", title="This clip can't be drawn", print_exception=False) from error
        finally:
            wanted.discard(request.session_hash)
        remove_old(folder, KEPT_CLIPS)
        told = f"{drawn} frames, {drawn / pipe.rate:.1f} s, drawn at {drawn / seconds:.1f} frames/s"
        return str(output), f"<p>{told}</p>", gr.DownloadButton(value=str(output), interactive=True)

    return asking(gr, draw)


def _given(name: str, value: float | None) -> float:
    """A field that somebody has emptied arrives as None."""
    if value is None:
        raise ValueError(f"{name} is empty; give a number")
    return value
