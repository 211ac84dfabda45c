"""The Image form: words become pictures while they are typed, and every step of the drawing is shown."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .generate import asking
from .settings import PageSettings

PICTURES = 4
MOST_STEPS = 64
LONGEST_PROMPT = 200
BROWSERS_KNOWN = 1000
LONGEST_TURN = 2.0  # seconds that a newer wish waits for the older one's last step
AT_ONCE = 4  # browsers that are drawn for at a time; the same number of older wishes can be on their way out
ORDERS = {"all over": "random", "the surest first": "masked", "line by line": "raster"}
EMPTY = "<p class='ms-empty'>Type what you want to see. The pictures follow while you type.</p>"
MISSING = (
    "<p class='ms-empty'>This server has no model of pictures. How one is trained: "
    "<code>millstream train emoji --help</code></p>"
)
# What a browser wishes last counts, whichever of its events Python sees first.
STAMP = "(prompt, order, steps, seed) => [prompt, order, steps, seed, performance.now()]"


def add_image(gr: Any, settings: PageSettings) -> None:
    """Put the form into the Blocks that are being built. `gr` is Gradio, which only the page's users import."""
    with gr.Column(elem_id="ms-image"):
        if settings.image is None:
            gr.HTML(MISSING)
            return
        with gr.Row(elem_classes="ms-panel-columns"):
            with gr.Column(elem_classes="ms-form", min_width=280):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="a red apple", max_length=LONGEST_PROMPT, elem_id="ms-image-prompt"
                )
                order = gr.Radio(
                    list(ORDERS.items()), value="random", label="Order in which they appear", elem_id="ms-image-order"
                )
                with gr.Row():
                    steps = gr.Slider(1, MOST_STEPS, 16, step=1, label="Steps", buttons=[], elem_id="ms-image-steps")
                    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, elem_id="ms-image-seed")
                more = gr.Button("Draw others", elem_id="ms-image-more")
                stamp = gr.Number(visible=False)
            with gr.Column(elem_classes="ms-result", min_width=280):
                pictures = gr.HTML(EMPTY, elem_id="ms-image-pictures", apply_default_css=False)
        fields = [prompt, order, steps, seed, stamp]
        calls = {"concurrency_limit": 2 * AT_ONCE, "concurrency_id": "image", "show_progress": "hidden"}
        draw = _drawer(gr, settings.image)
        # A change of the field by a script is no `input`.
        others = more.click(None, seed, seed, js=f"(seed) => (seed ?? 0) + {PICTURES}", api_visibility="private")
        others.then(draw, fields, pictures, js=STAMP, api_visibility="private", **calls)
        gr.on(
            [prompt.change, order.input, steps.release, seed.input],
            draw,
            fields,
            pictures,
            js=STAMP,
            trigger_mode="multiple",
            api_name="image",
            **calls,
        )


class Wishes:
    """The newest wish of every browser. A drawing that is no longer wished for ends at its next step."""

    def __init__(self) -> None:
        self._newest: OrderedDict[str, float] = OrderedDict()
        self._turns: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def wish(self, who: str, stamp: float) -> bool:
        """Is this the newest one of `who` so far?"""
        with self._lock:
            if self._newest.get(who, stamp) > stamp:
                return False
            self._newest[who] = stamp
            self._newest.move_to_end(who)
            if len(self._newest) > BROWSERS_KNOWN:
                self._turns.pop(self._newest.popitem(last=False)[0], None)
            return True

    def stands(self, who: str, stamp: float) -> bool:
        with self._lock:
            return self._newest.get(who) == stamp

    @contextmanager
    def turn(self, who: str) -> Iterator[None]:
        """Begin when what `who` wished before has shown its last, so that an older picture never covers a newer one."""
        with self._lock:
            turn = self._turns.setdefault(who, threading.Lock())
        mine = turn.acquire(timeout=LONGEST_TURN)  # a drawing whose browser is gone may never end
        try:
            yield
        finally:
            if mine:
                turn.release()


def _drawer(gr: Any, image: Callable[[], Any]) -> Any:
    wishes, turns = Wishes(), threading.BoundedSemaphore(AT_ONCE)

    def draw(
        prompt: str, order: str, steps: float | None, seed: float | None, stamp: float | None, request: Any
    ) -> Iterator[Any]:
        who, when = request.session_hash or "", time.monotonic() if stamp is None else stamp
        if not wishes.wish(who, when):
            return
        try:
            with wishes.turn(who):
                if not wishes.stands(who, when):  # a newer one came while this one waited
                    return
                if not prompt.strip():
                    yield EMPTY
                    return
                with turns:
                    for pictures, told in drawing(image(), prompt, order, int(steps or 0), int(seed or 0)):
                        if not wishes.stands(who, when):
                            yield gr.skip()  # else Gradio would show the last step once more when this ends
                            return
                        yield figure(pictures, told)
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(f"{error}", title="This can't be drawn", print_exception=False) from error

    return asking(gr, draw)


def drawing(pipe: Any, prompt: str, order: str, steps: int, seed: int) -> Iterator[tuple[Any, str]]:
    """Pictures [B, 3, S, S] after every step, and what to say of them.

    Raises:
        ValueError: a field out of range; fields come from a browser, so none is believed.
    """
    import torch

    if order not in ORDERS.values():
        raise ValueError(f"the order must be one of {', '.join(ORDERS.values())}, got {order!r}")
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps must be 1 to {MOST_STEPS}, got {steps}")
    if not 0 <= seed < 2**53:
        raise ValueError(f"the seed must be 0 to {2**53 - 1}, got {seed}")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"the prompt has {len(prompt)} letters; at most {LONGEST_PROMPT} are read")
    # A seed for each: others are the next four, and a picture that was liked is found again.
    generators = [torch.Generator().manual_seed(seed + number) for number in range(PICTURES)]
    begun = time.perf_counter()
    stream = pipe.stream(
        prompt, num_images_per_prompt=PICTURES, num_inference_steps=steps, order=order, generator=generators
    )
    for step in stream:
        seconds = time.perf_counter() - begun
        last = step.step + 1 >= step.n_steps
        told = f"drawn in {seconds:.2f} s" if last else f"step {step.step + 1} of {step.n_steps}"
        yield step.preview(), told


def figure(pictures: Any, told: str) -> str:
    """Pictures [B, 3, S, S] in [0, 1] as HTML that needs no other file; each is a link that saves it."""
    from PIL import Image

    from ...streaming.pixels import as_bytes

    shown = []
    for number, picture in enumerate(pictures):
        data = io.BytesIO()
        array = as_bytes(picture).permute(1, 2, 0).cpu().numpy()
        Image.fromarray(array).save(data, "PNG", compress_level=1)
        source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        shown.append(
            f'<a download="millstream-{number + 1}.png" href="{source}" title="Save this picture">'
            f'<img src="{source}" alt="Picture {number + 1}"></a>'
        )
    return f'<div class="ms-pictures">{"".join(shown)}</div><p class="ms-told">{told}</p>'
