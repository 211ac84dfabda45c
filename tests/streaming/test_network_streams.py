"""Streams as cameras send them: H.264 over RTSP, motion JPEG and MPEG-TS over HTTP, made by FFmpeg on this machine."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import threading
import time

import imageio_ffmpeg
import pytest

from millstream.streaming import NetworkCamera, network

FILM = ("-loglevel", "quiet", "-re", "-f", "lavfi", "-i", "color=red:size=64x48:rate=25")
H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "5", "-pix_fmt", "yuv420p")


@pytest.fixture
def film():
    """Start FFmpeg on a red picture: `film(*output)`."""
    running = []

    def start(*output: str) -> subprocess.Popen:
        words = [imageio_ffmpeg.get_ffmpeg_exe(), *FILM, *output]
        running.append(subprocess.Popen(words, stdin=subprocess.DEVNULL))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class RtspServer:
    """Answers one viewer at a time (RFC 2326, RTP inside the TCP connection) with what FFmpeg sends to a UDP port."""

    def __init__(self, film, port: int = 0) -> None:
        self.film = film
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.viewer: socket.socket | None = None
        self.asked: list[str] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.viewer, _ = self.listener.accept()
                with contextlib.suppress(OSError):
                    self.talk(self.viewer)

    def talk(self, viewer: socket.socket) -> None:
        parameters = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=film\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
        parameters += "a=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\na=control:track\r\n"
        about = {
            "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n\r\n",
            "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(parameters)}\r\n\r\n{parameters}",
            "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n\r\n",
            "PLAY": "Session: 1\r\n\r\n",
        }
        while request := viewer.recv(4096).decode(errors="replace"):
            method, number = request.split()[0], re.search(r"CSeq: (\d+)", request)
            if number is None:
                continue
            self.asked.append(method)
            answer = about.get(method, "\r\n")
            viewer.sendall(f"RTSP/1.0 200 OK\r\nCSeq: {number[1]}\r\n{answer}".encode())
            if method == "PLAY":
                threading.Thread(target=self.play, args=(viewer,), daemon=True).start()

    def play(self, viewer: socket.socket) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packets:
            packets.bind(("127.0.0.1", 0))
            packets.settimeout(5)
            self.film(*H264, "-f", "rtp", f"rtp://127.0.0.1:{packets.getsockname()[1]}")
            with contextlib.suppress(OSError):
                while packet := packets.recv(65536):
                    viewer.sendall(b"$\0" + len(packet).to_bytes(2, "big") + packet)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # a thread that waits in `accept` would hold the port
        self.listener.close()
        if self.viewer is not None:
            self.viewer.close()


def see(camera: NetworkCamera, count: int, seconds: float = 10.0) -> None:
    """Read so many frames, all of them red."""
    end = time.monotonic() + seconds
    while count:
        assert time.monotonic() < end, f"{count} frames never came"
        frame = camera.read()
        if frame is None:
            time.sleep(0.005)
            continue
        count -= 1
        assert frame.data.shape == (3, 48, 64)
        assert frame.data[0].mean() > 0.8 > 0.2 > frame.data[2].mean()


def test_an_rtsp_camera_that_comes_back_after_it_was_switched_off(film, monkeypatch, capfd):
    monkeypatch.setattr(network, "RETRY_SECONDS", 0.1)
    server = RtspServer(film)
    camera = NetworkCamera(f"rtsp://me:secret@127.0.0.1:{server.port}/cam", timeout=5.0)
    see(camera, 10)
    assert {"DESCRIBE", "SETUP", "PLAY"} <= set(server.asked)
    server.viewer.shutdown(socket.SHUT_RDWR)
    server.close()
    for _ in range(200):  # what had been received before
        if camera.read() is None:
            break
    again = RtspServer(film, server.port)
    see(camera, 5)
    camera.close()
    again.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("output", [("-f", "mpjpeg"), (*H264, "-f", "mpegts")], ids=["motion-jpeg", "mpeg-ts"])
def test_a_stream_over_http(film, output):
    port = free_port()
    film(*output, "-listen", "1", f"http://127.0.0.1:{port}/cam")
    end = time.monotonic() + 10
    while True:
        try:
            camera = NetworkCamera(f"http://127.0.0.1:{port}/cam", timeout=5.0)
            break
        except OSError:  # FFmpeg does not listen yet
            assert time.monotonic() < end
            time.sleep(0.05)
    see(camera, 10)
    camera.close()
