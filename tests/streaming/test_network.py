"""Cameras on the network, on a server of this machine that can be switched off."""

import http.server
import socket
import threading
import time

import cv2
import numpy as np
import pytest

from millstream.streaming import EndOfStream, NetworkCamera, network


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/clip.mp4":
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.clip)))
            self.end_headers()
            self.wfile.write(self.server.clip)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        try:
            while self.server.on:
                picture = np.full((48, 64, 3), (0, 0, 255), np.uint8)  # OpenCV's order: this is red
                jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg))
                self.wfile.write(jpeg + b"\r\n")
                time.sleep(0.02)
        except OSError:
            pass

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, allow_reuse_address = True, True
    clip, on = b"", True


@pytest.fixture
def serve():
    running = []

    def started(port=0):
        server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(server)
        return server

    def stop(server):
        server.on = False
        server.shutdown(), server.server_close()
        running.remove(server)

    started.stop = stop
    yield started
    for server in list(running):
        stop(server)


def frames(camera, count, seconds=10.0):
    read, end = [], time.monotonic() + seconds
    while len(read) < count and time.monotonic() < end:
        frame = camera.read()
        read += [frame] if frame else time.sleep(0.005) or []
    return read


def test_a_camera_comes_back_after_it_was_switched_off(serve, monkeypatch, capfd):
    monkeypatch.setattr(network, "RETRY_SECONDS", 0.1)
    server = serve()
    port = server.server_address[1]
    camera = NetworkCamera(f"http://127.0.0.1:{port}/live", timeout=2.0, patience=20.0)
    (first, *_) = frames(camera, 3)
    assert first.data.shape == (3, 48, 64)
    assert first.data[0].mean() > 0.9 > 0.1 > first.data[2].mean()
    assert abs(first.time - time.monotonic()) < 2
    serve.stop(server)
    while camera.read() is not None:
        pass
    assert camera.read() is None
    serve(port)
    assert len(frames(camera, 3)) == 3
    camera.close()
    assert capfd.readouterr().err == ""


def test_a_camera_that_stays_away_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(network, "RETRY_SECONDS", 0.05)
    server = serve()
    camera = NetworkCamera(f"http://127.0.0.1:{server.server_address[1]}/live", timeout=1.0, patience=0.3)
    frames(camera, 1)
    serve.stop(server)
    with pytest.raises(OSError, match=r"http://127.0.0.1:\d+/live has given no frame for 0.3 s: is the camera on"):
        frames(camera, 10_000)
    camera.close()


def test_a_file_on_a_server_plays_at_its_rate_and_ends(serve, tmp_path):
    import torch

    from millstream.streaming import Chunk, Recorder

    with Recorder(tmp_path / "clip.mp4", rate=25) as recorder:
        recorder.write(Chunk("video", torch.rand(10, 3, 32, 64), 0, 25, 0, 0.0))
    server = serve()
    server.clip = (tmp_path / "clip.mp4").read_bytes()
    camera = NetworkCamera(f"http://127.0.0.1:{server.server_address[1]}/clip.mp4", timeout=3.0)
    start = time.monotonic()
    assert len(frames(camera, 10)) == 10
    with pytest.raises(EndOfStream, match=r"clip.mp4 is over"):
        frames(camera, 1)
    assert time.monotonic() - start > 0.3
    camera.close()


def test_a_server_that_says_nothing_is_not_waited_for(capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(
            OSError, match=rf"no video came from rtsp://127.0.0.1:{port}/x within 0.5 s: is the address"
        ):
            NetworkCamera(f"rtsp://me:secret@127.0.0.1:{port}/x?key=secret", timeout=0.5)
        assert time.monotonic() - start < 5
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "must begin with rtsp://, http:// or https://, got ftp://"),
        ("file:///etc/passwd", "must begin with rtsp://, http:// or https://, got file://"),
        ("video.mp4", "got none; a file is given with --video"),
        ("concat:http://host/x|file:/etc/passwd", "got concat://"),
        ("", "got none"),
        ("http://", "an address must name a host, such as http://192.168.1.20/stream"),
        ("rtsp://host:99999/x", "this is no address"),
        ("http://[::1/x", "this is no address"),
    ],
)
def test_what_is_no_address_of_a_camera_is_refused(url, message):
    with pytest.raises(ValueError, match=message):
        NetworkCamera(url)


def test_nobody_there(capfd):
    with pytest.raises(OSError, match=r"no video came from http://127.0.0.1:9/x: is the address right") as refused:
        NetworkCamera("http://me:secret@127.0.0.1:9/x")
    assert "secret" not in str(refused.value)
    assert capfd.readouterr().err == ""
