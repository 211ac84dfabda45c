"""What Gradio would do for whoever asks, and doesn't do here."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from millstream.ui.page import PageSettings, narrow
from millstream.ui.page.narrow import UPLOAD_BYTES, WORDS_BYTES, Narrow
from millstream.ui.server.settings import Settings


@pytest.fixture(scope="module")
def site(world: Any, serve: Any) -> Iterator[str]:
    running = serve(world, Settings(), PageSettings(pipeline=lambda: world))
    yield running.url
    running.close()


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=http://127.0.0.1:1/",
        "gradio_api/file=https:%2f%2fexample.org/",
        "gradio_api/proxy=https://example.hf.space/",
        "gradio_api/custom_component/a/server/component/b",
        "gradio_api/../gradio_api/proxy=https://example.hf.space/",
        "page/..%2fbuild.py",
        "recordings/..%2f..%2fx.mp4",
    ],
)
def test_no_address_is_fetched_and_no_path_is_followed(site: str, path: str) -> None:
    assert httpx.get(site + path).status_code == 404


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "..%2fpyproject.toml", "/proc/self/environ"])
def test_no_file_of_this_machine_is_given_away(site: str, path: str) -> None:
    assert httpx.get(f"{site}gradio_api/file={path}").status_code == 403


@pytest.mark.parametrize("path", ["run/generate", "api/generate", "process_recording", "vibe-edit"])
def test_nothing_runs_past_the_queue(site: str, path: str) -> None:
    assert httpx.post(f"{site}gradio_api/{path}", json={"data": []}).status_code == 404


@pytest.mark.parametrize(
    ("path", "limit"), [("gradio_api/queue/join", WORDS_BYTES), ("gradio_api/upload", UPLOAD_BYTES)]
)
def test_a_body_that_says_it_is_too_large_is_not_read(site: str, path: str, limit: int) -> None:
    where = httpx.URL(site)
    with socket.create_connection((where.host, where.port), 10) as raw:
        raw.sendall(f"POST /{path} HTTP/1.1\r\nHost: {where.host}\r\nContent-Length: {limit + 1}\r\n\r\n".encode())
        answer = raw.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 413 ")


def test_a_body_that_does_not_say_how_long_it_is_is_counted(run_async: Any) -> None:
    kept, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["more_body"]:
            kept.append(message["body"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(2**16), "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": []}
    run_async(Narrow(app)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert sum(map(len, kept)) <= WORDS_BYTES


def test_uploads_fill_no_disk(run_async: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(narrow, "KEPT_BYTES", UPLOAD_BYTES + 1000)
    taken, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        taken.append(scope["path"])

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": []}
    guarded = Narrow(app, tmp_path)
    run_async(guarded(scope, None, send))
    assert (len(taken), sent) == (1, [])
    (tmp_path / "hash").mkdir()
    (tmp_path / "hash" / "video.mp4").write_bytes(bytes(1001))
    run_async(guarded(scope, None, send))
    assert (len(taken), sent[0]["status"]) == (1, 507)
    assert b"no more uploads now" in sent[1]["body"]
    (tmp_path / "hash" / "video.mp4").unlink()
    run_async(guarded(scope, None, send))
    assert len(taken) == 2


def generate(site: str, **changes: Any) -> str:
    """The end of the event stream that a call of Generate answers with."""
    fields = {"prompt": "a dark maze", "file": None, "strength": 0, "keys": "", "frames": 2, "seed": 0, "steps": 0}
    data = [*(fields | changes).values(), 1.0]
    call = httpx.post(f"{site}gradio_api/call/generate", json={"data": data}).json()
    return httpx.get(f"{site}gradio_api/call/generate/{call['event_id']}", timeout=30).text


def test_generate_takes_files_and_no_addresses(site: str) -> None:
    address = {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}
    assert "give a file, not an address" in generate(site, file=address)
    stranger = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    answer = generate(site, file=stranger)
    assert "event: error" in answer
    assert "root:" not in answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None}, "frames is empty; give a number"),
        ({"seed": None}, "seed is empty; give a number"),
        ({"steps": 51}, "at most 50, got 51"),
    ],
)
def test_generate_says_what_is_wrong(site: str, changes: dict[str, Any], message: str) -> None:
    assert message in generate(site, **changes)
    assert "event: complete" in generate(site)
