"""Recordings: they play, they download for their owner alone, they stop at their quota, they go with the server."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path

import cv2
import httpx
import imageio_ffmpeg
import numpy as np
import pytest

from millstream.streaming import Recorder
from millstream.ui.server.recordings import Recording, Recordings


def frames_of(path: Path) -> tuple[int, tuple[int, int]]:
    """How many frames a player finds in the file, and their (width, height)."""
    frames = imageio_ffmpeg.read_frames(str(path))
    size = next(frames)["size"]
    return sum(1 for _ in frames), size


def record(player, seconds: float) -> dict:
    player.ask("record", on=True)
    player.say("start")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        player.read()
    player.ask("pause")
    return player.ask("record", on=False)


def test_a_recording_downloads_and_plays(serve, client, tmp_path):
    running = serve()
    player = client(running)
    secret = player.hello()["resume"]
    answer = record(player, 1.0)
    assert answer["seconds"] == pytest.approx(1.0, abs=0.3)
    reply = httpx.get(running.http + answer["url"], params={"key": secret})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "video/mp4"
    assert "attachment" in reply.headers["content-disposition"]
    assert len(reply.content) == answer["bytes"]
    path = tmp_path / "got.mp4"
    path.write_bytes(reply.content)
    count, size = frames_of(path)
    assert count == round(answer["seconds"] * 50)
    assert size == (32 * 16, 24 * 16), "a small picture is enlarged by a whole number"
    part = httpx.get(running.http + answer["url"], params={"key": secret}, headers={"range": "bytes=0-99"})
    assert (part.status_code, len(part.content)) == (206, 100)


def test_the_name_of_a_branch_opens_the_recording_too(serve, client):
    running = serve()
    player = client(running)
    player.hello()
    answer = record(player, 0.2)
    branch = player.ask("branch")["resume"]
    player.ask("switch", resume=branch)
    assert httpx.get(running.http + answer["url"], params={"key": branch}).status_code == 200


def test_a_recording_is_its_owner_s_alone(serve, client):
    running = serve()
    player, other = client(running), client(running)
    secret, others = player.hello()["resume"], other.hello()["resume"]
    answer = record(player, 0.2)
    for key in (None, "", others, secret[:-1], answer["recording"]):
        assert httpx.get(running.http + answer["url"], params={"key": key} if key else None).status_code == 404
    cookie = httpx.get(running.http + answer["url"], headers={"cookie": f"millstream_session={secret}"})
    assert cookie.status_code == 200


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "../../../etc/passwd", "%00", "é" * 50, "x" * 5000, "*"])
def test_no_name_becomes_a_path(serve, client, name):
    running = serve()
    secret = client(running).hello()["resume"]
    assert httpx.get(f"{running.http}/recordings/{name}.mp4", params={"key": secret}).status_code == 404


def test_recording_twice_or_nothing_is_refused(serve, client):
    player = client(serve())
    player.hello()
    assert "nothing is being recorded" in player.ask("record", on=False)["message"]
    player.ask("record", on=True)
    assert "runs already" in player.ask("record", on=True)["message"]
    assert "no frame was drawn" in player.ask("record", on=False)["message"]


def test_a_recording_ends_at_its_quota_and_the_stream_goes_on(serve, client, eventually):
    running = serve(recording_bytes=20_000)
    player = client(running)
    player.hello()
    player.ask("record", on=True)
    player.say("start")
    player.find(lambda message: "quota" in message.get("recording", {}).get("stopped", ""), timeout=20)
    frame = player.shots[-1].frame
    player.shot(lambda shot: shot.frame > frame + 5)
    answer = player.ask("record", on=False)
    assert "quota" in answer["stopped"]
    assert answer["bytes"] < 60_000
    assert "quota" in player.ask("record", on=True)["message"]


def test_a_camera_recording_keeps_real_time(serve, client, fake, tmp_path):
    picture = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    running = serve(fake(rate=20))
    visitor = client(running)
    secret = visitor.hello(mode="camera")["resume"]
    visitor.ask("start")
    visitor.ask("record", on=True)
    start = time.monotonic()
    while time.monotonic() - start < 1.5:
        visitor.picture(picture)
        visitor.shot()
        time.sleep(0.15)
    answer = visitor.ask("record", on=False)
    assert answer["seconds"] == pytest.approx(1.5, abs=0.35)
    reply = httpx.get(running.http + answer["url"], params={"key": secret})
    path = tmp_path / "got.mp4"
    path.write_bytes(reply.content)
    assert frames_of(path)[0] == round(answer["seconds"] * 20)


def test_recordings_go_with_the_server_or_stay_where_asked(serve, client, tmp_path):
    temporary, kept = serve(), serve(recordings=tmp_path)
    for running in (temporary, kept):
        player = client(running)
        player.hello()
        player.ask("record", on=True)
        player.say("start")
        player.shot(lambda shot: shot.frame > 20)
        running.server.should_exit = True
        player.farewell()
    root = temporary.sessions.recordings.root
    deadline = time.monotonic() + 5
    while root.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not root.exists()
    (file,) = tmp_path.rglob("*.mp4")
    while kept.sessions.engine.alive:
        time.sleep(0.02)
    time.sleep(0.2)
    assert frames_of(file)[0] > 15


def test_recordings_of_an_ended_session_stay_a_while(tmp_path, fake, monkeypatch):
    from millstream.streaming import WorldControl

    monkeypatch.setattr("millstream.ui.server.recordings.KEEP_SECONDS", 0.05)
    recordings = Recordings(None, 10**6, 10**6)
    recording = recordings.begin("owner", "key", rate=20, live=False)
    pipe = fake()
    state = pipe.begin(WorldControl("x"))
    recording.write(pipe.advance([state], [WorldControl("x")], [None])[0][0])
    recording.finish()
    recordings.leave("owner")
    recordings.sweep()
    path = recordings.fetch(recording.id, "key")
    assert path is not None
    assert path.exists()
    time.sleep(0.06)
    recordings.sweep()
    assert recordings.fetch(recording.id, "key") is None
    assert not path.exists()
    recordings.close()


def test_files_that_are_kept_count_for_ever(tmp_path, fake, monkeypatch):
    from millstream.streaming import WorldControl

    monkeypatch.setattr("millstream.ui.server.recordings.KEEP_SECONDS", 0.0)
    recordings = Recordings(tmp_path, 10**6, 500)
    recording = recordings.begin("owner", "key", rate=20, live=False)
    pipe = fake()
    state = pipe.begin(WorldControl("x"))
    recording.write(pipe.advance([state], [WorldControl("x")], [None])[0][0])
    recording.finish()
    recordings.leave("owner")
    time.sleep(0.01)
    recordings.sweep()
    assert recording.path.stat().st_size > 500
    with pytest.raises(ValueError, match="quota"):
        recordings.begin("another", "key", rate=20, live=False)
    recordings.close()


def test_a_disk_that_is_too_slow_ends_the_recording_at_once(tmp_path, fake, monkeypatch):
    from millstream.streaming import WorldControl

    class Stuck:
        frames = 0

        def __init__(self, *_, **__):
            time.sleep(1)

        def write(self, chunk): ...

        def close(self): ...

    monkeypatch.setattr("millstream.ui.server.recordings.Recorder", Stuck)
    recording = Recording("id", tmp_path / "id.mp4", rate=20, live=False, allowance=lambda: 10**6)
    pipe = fake()
    state = pipe.begin(WorldControl("x"))
    start = time.monotonic()
    for _ in range(60):
        recording.write(pipe.advance([state], [WorldControl("x")], [None])[0][0])
    assert time.monotonic() - start < 0.5
    assert "too slow" in recording.stopped
    recording.finish()


def test_a_folder_that_can_not_be_written_is_said_in_a_sentence(serve, client, tmp_path):
    blocked = tmp_path / "recordings"
    blocked.write_text("a file stands where the folder should")
    player = client(serve(recordings=blocked))
    player.hello()
    player.say("start")
    answer = player.ask("record", on=True)
    assert answer["type"] == "refused"
    assert answer["message"] == "nothing is recorded: the server can't write recordings"
    assert str(tmp_path) not in answer["message"]
    player.shot()


def test_a_folder_that_is_removed_costs_the_recording_alone(serve, client, tmp_path):
    running = serve(recordings=tmp_path)
    player = client(running)
    secret = player.hello()["resume"]
    player.ask("record", on=True)
    player.say("start")
    player.shot(lambda shot: shot.frame > 20)
    shutil.rmtree(next(tmp_path.iterdir()))
    answer = player.ask("record", on=False)
    assert (answer["type"], "removed from the server" in answer["message"]) == ("refused", True)
    frame = player.shots[-1].frame
    player.shot(lambda shot: shot.frame > frame)
    again = record(player, 0.2)
    (file,) = tmp_path.rglob("*.mp4")
    file.unlink()
    assert httpx.get(running.http + again["url"], params={"key": secret}).status_code == 404


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the server's disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "the server may not write recordings"),
        (ImportError("no encoder"), "the server can't write recordings"),
    ],
)
def test_what_was_recorded_before_an_error_plays(serve, client, tmp_path, monkeypatch, error, sentence):
    class Failing(Recorder):
        def write(self, chunk):
            if self.frames >= 20:
                raise error
            super().write(chunk)

    monkeypatch.setattr("millstream.ui.server.recordings.Recorder", Failing)
    running = serve()
    player = client(running)
    secret = player.hello()["resume"]
    player.ask("record", on=True)
    player.say("start")
    player.find(lambda message: message.get("recording", {}).get("stopped") == sentence, timeout=20)
    frame = player.shots[-1].frame
    player.shot(lambda shot: shot.frame > frame)
    answer = player.ask("record", on=False)
    assert answer["stopped"] == sentence
    path = tmp_path / "got.mp4"
    path.write_bytes(httpx.get(running.http + answer["url"], params={"key": secret}).content)
    assert frames_of(path)[0] == 20


def test_whatever_fails_is_answered(serve, client, monkeypatch):
    running = serve()
    player = client(running)
    player.hello()
    player.say("start")
    monkeypatch.setattr(running.sessions.recordings, "begin", lambda *_, **__: 1 / 0)
    assert "its log says how" in player.ask("record", on=True)["message"]
    player.shot()


def finished(recordings, owner, fake):
    from millstream.streaming import WorldControl

    recording = recordings.begin(owner, "key", rate=20, live=False)
    pipe = fake()
    recording.write(pipe.advance([pipe.begin(WorldControl("x"))], [WorldControl("x")], [None])[0][0])
    recording.finish()
    return recording


def test_the_oldest_of_those_who_left_make_room(fake):
    recordings = Recordings(None, 10**6, 500)
    old = finished(recordings, "old", fake)
    with pytest.raises(ValueError, match="quota"):
        recordings.begin("new", "key", rate=20, live=False)
    recordings.leave("old")
    recordings.begin("new", "key", rate=20, live=False).finish()
    assert not old.path.exists()
    recordings.close()


def test_what_a_folder_held_before_counts(tmp_path):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "a.mp4").write_bytes(bytes(600))
    recordings = Recordings(tmp_path, 10**6, 500)
    with pytest.raises(ValueError, match="quota"):
        recordings.begin("new", "key", rate=20, live=False)
    recordings.close()


def test_recordings_leave_room_on_the_disk(monkeypatch):
    monkeypatch.setattr("millstream.ui.server.recordings.FREE_BYTES", 2**60)
    recordings = Recordings(None, 10**6, 10**6)
    with pytest.raises(ValueError, match="quota"):
        recordings.begin("new", "key", rate=20, live=False)
    recordings.close()
