"""Pictures in and out of the page: the camera, a video file, recordings, clips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millstream.streaming import Chunk, Recorder, VideoFile
from millstream.ui.page import PageSettings
from millstream.ui.server.settings import Settings

CAMERA_RGB = (200, 60, 30)
TOLERANCE = 24  # JPEG and video code colour coarsely


def near(colour: tuple[int, int, int], wanted: tuple[int, ...]) -> bool:
    return all(abs(have - want) < TOLERANCE for have, want in zip(colour, wanted))


def write_video(path: Path, rgb: tuple[int, int, int], frames: int = 30) -> None:
    picture = torch.tensor(rgb).view(1, 3, 1, 1).div(255).expand(1, 3, 96, 128)
    with Recorder(path, rate=30) as recorder:
        for number in range(frames):
            recorder.write(Chunk("video", picture, number, 30, 0, 0.0))


@pytest.fixture
def camera(view: Any) -> Any:
    view.page.click("#tab-camera")
    view.page.wait_for_selector(".cover-button:text('Use the camera')")
    return view


def test_the_camera_goes_round_through_the_model(camera: Any, wait: Any) -> None:
    camera.page.click(".cover-button")
    negative = tuple(255 - channel for channel in CAMERA_RGB)
    wait(lambda: near(camera.colour("upper"), negative))
    wait(lambda: near(camera.colour("upper", ".before canvas"), CAMERA_RGB))
    wait(lambda: float(camera.status.strip().partition(" fps")[0] or 0) > 5)
    assert camera.page.evaluate("document.querySelector('.before').style.clipPath") == "inset(0px 100% 0px 0px)"
    camera.page.fill(".wipe", "50")
    assert camera.page.evaluate("document.querySelector('.before').style.clipPath") == "inset(0px 50% 0px 0px)"


def test_a_single_step_answers_one_camera_picture(camera: Any, server: Any, wait: Any) -> None:
    camera.page.click(".cover-button")
    wait(lambda: "applied" in camera.status)
    camera.page.click(".run:text('Pause')")
    wait(lambda: camera.status.strip() == "Paused")
    camera.page.wait_for_timeout(300)
    (seat,) = (seat for seat in server.sessions.seats if seat.viewer is not None)
    frame = seat.frame
    camera.page.click("text='Step'")
    wait(lambda: seat.frame == frame + 1)
    camera.page.wait_for_timeout(300)
    assert seat.frame == frame + 1


def test_strength_reaches_the_model(camera: Any, world: Any, wait: Any) -> None:
    camera.page.click(".cover-button")
    camera.page.fill(".strength", "0.25")
    wait(lambda: world.controls and world.controls[-1].strength == 0.25)


def test_more_options_reach_the_model(camera: Any, world: Any, wait: Any) -> None:
    camera.page.click(".cover-button")
    camera.page.click(".more summary")
    camera.page.check(".more [name=skip_similar]")
    camera.page.fill(".more [name=num_inference_steps]", "2")
    camera.page.press(".more [name=num_inference_steps]", "Tab")
    wait(lambda: world.controls[-1].skip_similar == 0.98 and world.controls[-1].num_inference_steps == 2)


def test_one_camera_picture_at_a_time_is_unanswered(camera: Any, world: Any, server: Any, wait: Any) -> None:
    camera.page.click(".cover-button")
    wait(lambda: near(camera.colour("upper"), tuple(255 - channel for channel in CAMERA_RGB)))
    (seat,) = (seat for seat in server.sessions.seats if seat.viewer is not None)
    world.slow = 0.15
    try:
        camera.page.wait_for_timeout(1500)
        assert seat.inbox.dropped == 0
    finally:
        world.slow = 0.0


def test_a_model_that_answers_four_pictures_at_once_gets_them_all(look: Any, serve: Any, world: Any, wait: Any) -> None:
    class Fours(type(world)):
        pictures_per_chunk = 4

        def __init__(self) -> None:
            super().__init__()
            self.waiting: list[Any] = []

        def advance(self, states: Any, controls: Any, media: Any) -> Any:
            self.waiting.append(media[0])
            if len(self.waiting) < 4:
                return [[]]
            drawn = [self.draw(states[0], controls[0], frame) for frame in self.waiting]
            self.waiting.clear()
            return [[replace(drawn[-1], data=torch.cat([chunk.data for chunk in drawn]), start=drawn[0].start)]]

    four = Fours()
    running = serve(four, Settings(model="four"), PageSettings(model="four", models=("four",)))
    view = look(running.url)
    view.page.click("#tab-camera")
    view.page.click(".cover-button:text('Use the camera')")
    wait(lambda: near(view.colour("upper"), tuple(255 - channel for channel in CAMERA_RGB)))
    view.page.wait_for_timeout(2500)
    assert float(view.status.partition(" fps")[0]) > 0.6 * four.rate
    (seat,) = (seat for seat in running.sessions.seats if seat.viewer is not None)
    assert seat.inbox.dropped < 5
    assert near(view.colour("upper", ".before canvas"), CAMERA_RGB)
    running.close()


def test_a_video_file_takes_the_cameras_place(camera: Any, wait: Any, tmp_path: Path) -> None:
    video = tmp_path / "blue.mp4"
    write_video(video, (20, 60, 220))
    camera.page.set_input_files(".source input[type=file]", video)
    wait(lambda: near(camera.colour("upper"), (235, 195, 35)))


def test_what_is_no_video_is_said_to_be_none(camera: Any, wait: Any, tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("not a video")
    camera.page.set_input_files(".source input[type=file]", text)
    wait(lambda: "notes.mp4 is not a video that this browser can play" in camera.page.inner_text(".notice"))


def test_leaving_the_camera_turns_it_off(camera: Any, wait: Any) -> None:
    camera.page.click(".cover-button")
    wait(lambda: "applied" in camera.status)
    camera.page.click("#tab-play")
    camera.page.click("#tab-camera")
    camera.page.wait_for_selector(".cover-button:text('Use the camera')")


def test_a_recording_downloads_and_plays(view: Any, wait: Any, tmp_path: Path) -> None:
    view.start()
    view.page.keyboard.down("KeyW")
    view.until_colour(lambda red, green, blue: green > 200)
    view.page.click(".record")
    view.page.wait_for_selector(".rec:visible")
    view.page.wait_for_timeout(1000)
    view.page.click(".record")
    link = view.page.wait_for_selector(".saved a")
    with view.page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename.endswith(".mp4")
    path = tmp_path / "recording.mp4"
    download.value.save_as(path)
    frames = list(VideoFile(path))
    assert len(frames) > 10
    below = frames[-1][:, -frames[-1].shape[1] // 3 :].mean((1, 2))
    assert below[1] > 0.8 > 0.2 > below[0]
    plays = """async (link) => {
      const video = document.createElement("video");
      video.muted = true;
      video.src = link.href;
      await video.play();
      return video.videoWidth;
    }"""
    assert view.page.evaluate(plays, link) >= 64


def test_generate_draws_a_clip_to_download(view: Any, wait: Any, tmp_path: Path) -> None:
    view.page.click("#tab-generate")
    view.page.fill("#ms-clip-prompt textarea", "a dark maze with red walls")
    view.page.fill("#ms-clip-frames input", "12")
    view.page.click("#ms-draw")
    wait(lambda: "12 frames, 0.5 s" in view.page.inner_text("#ms-clip-told"))
    assert view.page.wait_for_selector("#ms-clip video")
    with view.page.expect_download() as download:
        view.page.click("#ms-clip-download")
    path = tmp_path / "clip.mp4"
    download.value.save_as(path)
    frames = list(VideoFile(path))
    assert len(frames) == 12
    assert frames[0][0, -20:].mean() > 0.8


def test_generate_stops_when_told(view: Any, world: Any, wait: Any) -> None:
    view.page.click("#tab-generate")
    view.page.fill("#ms-clip-prompt textarea", "a dark maze with red walls")
    view.page.fill("#ms-clip-frames input", "1500")
    world.slow = 0.02
    try:
        drawn = len(world.controls)
        view.page.click("#ms-draw")
        wait(lambda: len(world.controls) > drawn + 10)
        view.page.click("#ms-draw-stop")
        wait(lambda: len(world.controls) == (view.page.wait_for_timeout(300), len(world.controls))[1])
        assert len(world.controls) < drawn + 1000
    finally:
        world.slow = 0.0
    view.complaints.clear()  # Gradio may say that the clip has ended


def test_generate_says_why_it_can_not(view: Any, wait: Any) -> None:
    view.page.click("#tab-generate")
    view.page.fill("#ms-clip-prompt textarea", " ")
    view.page.click("#ms-draw")
    wait(lambda: "the prompt is empty" in view.page.inner_text(".toast-wrap"))
    view.complaints.clear()  # Gradio repeats the error in the console


def test_generate_goes_on_from_an_image(view: Any, wait: Any, tmp_path: Path) -> None:
    from PIL import Image

    image = tmp_path / "start.png"
    Image.fromarray(np.full((90, 120, 3), (20, 60, 220), np.uint8)).save(image)
    view.page.click("#tab-generate")
    view.page.fill("#ms-clip-prompt textarea", "a dark maze with red walls")
    view.page.fill("#ms-clip-frames input", "5")
    view.page.set_input_files("#ms-generate input[type=file]", image)
    view.page.wait_for_selector("#ms-generate >> text=start")
    view.page.click("#ms-draw")
    wait(lambda: "6 frames" in view.page.inner_text("#ms-clip-told"))
