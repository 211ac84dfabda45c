"""Who gets in: tokens, origins, hosts, floods."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from millstream.ui.server import security
from millstream.ui.server.app import create_app
from millstream.ui.server.pacing import Bucket
from millstream.ui.server.security import Doorman, check_exposure, is_loopback
from millstream.ui.server.settings import Settings

TOKEN = "correct-horse-battery"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "LOCALHOST.", "::1", "[::1]"])
def test_loopback_needs_no_token(host):
    assert is_loopback(host)
    check_exposure(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "localhost.example.org"])
def test_everything_else_does(fake, host):
    with pytest.raises(ValueError, match="--token"):
        create_app(fake(), Settings(host=host))
    create_app(fake(), Settings(host=host, token=TOKEN))


@pytest.mark.parametrize(("token", "message"), [("short", "at least 8"), ("", "at least 8"), ("ключ-ключ", "ASCII")])
def test_a_token_must_be_worth_something(token, message):
    with pytest.raises(ValueError, match=message):
        check_exposure("127.0.0.1", token)


@pytest.mark.parametrize(
    ("path", "headers", "hello"),
    [
        ("/live", {}, {"token": TOKEN}),
        (f"/live?token={TOKEN}", {}, {}),
        ("/live", {"cookie": f"a=b; millstream_token={TOKEN}"}, {}),
        ("/live", {"authorization": f"Bearer {TOKEN}"}, {}),
    ],
)
def test_the_token_opens_the_socket_four_ways(serve, client, path, headers, hello):
    visitor = client(serve(token=TOKEN), path, additional_headers=headers)
    assert visitor.hello(**hello)["type"] == "welcome"


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", "é", "\ud800"])
def test_without_the_token_the_socket_closes(serve, client, token):
    visitor = client(serve(token=TOKEN))
    visitor.say("hello", protocol=1, token=token)
    code, bye = visitor.farewell()
    assert code == 4401
    assert bye["reason"] == "token"
    assert TOKEN not in json.dumps(visitor.heard)


def test_every_route_but_health_asks_for_the_token(serve):
    running = serve(token=TOKEN)
    assert httpx.get(f"{running.http}/health").status_code == 200
    for path in ("/", "/metrics", "/recordings/x.mp4", "/page/main.js", "/gradio_api/info", "/nowhere"):
        reply = httpx.get(running.http + path)
        assert reply.status_code == 401, path
        assert TOKEN not in reply.text
    assert httpx.get(f"{running.http}/metrics", params={"token": TOKEN}).status_code == 200


def test_the_token_moves_from_the_address_into_a_cookie(serve):
    running = serve(token=TOKEN)
    with httpx.Client(follow_redirects=True) as browser:
        page = browser.get(running.http, params={"token": TOKEN, "theme": "dark"})
        assert page.status_code == 200
        assert page.url.query == b"theme=dark"
        assert "httponly" in page.history[0].headers["set-cookie"].lower()
        assert browser.get(f"{running.http}/metrics").status_code == 200


def test_the_page_asks_for_the_token_and_keeps_it_from_scripts_and_addresses(serve):
    running = serve(token=TOKEN)
    with httpx.Client(follow_redirects=True) as browser:
        asked = browser.get(running.http)
        assert (asked.status_code, "<form" in asked.text, "method=post" in asked.text) == (401, True, True)
        wrong = browser.post(running.http, data={"token": TOKEN[:-1]})
        assert (wrong.status_code, "not the token" in wrong.text) == (401, True)
        page = browser.post(running.http, data={"token": TOKEN})
        assert (page.status_code, str(page.url).rstrip("/")) == (200, running.http)
        cookie = page.history[0].headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert browser.get(f"{running.http}/metrics").status_code == 200


def test_the_form_counts_guesses_and_is_not_open_to_other_sites(serve, monkeypatch):
    monkeypatch.setattr(security, "GUESSES", 3)
    running = serve(token=TOKEN)
    evil = {"origin": "http://evil.example"}
    assert httpx.post(running.http, data={"token": TOKEN}, headers=evil).status_code == 403
    assert httpx.post(running.http, data={"token": "x" * 10_000}).status_code == 401
    for _ in range(2):
        assert httpx.post(running.http, data={"token": "guess"}).status_code == 401
    late = httpx.post(running.http, data={"token": TOKEN})
    assert (late.status_code, "Too many wrong tokens" in late.text) == (401, True)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "", "http://[::1"])
def test_a_page_of_another_origin_is_refused(serve, client, origin):
    assert client(serve(), additional_headers={"origin": origin}).farewell()[0] == 4403


def test_our_own_page_and_those_that_are_named_may_come(serve, client):
    running = serve(origins=("https://friend.example",))
    for origin in (running.http, "https://friend.example"):
        assert client(running, additional_headers={"origin": origin}).hello()["type"] == "welcome"


def test_a_name_that_somebody_pointed_here_is_refused(serve):
    running = serve()
    for path in ("/", "/health", "/metrics"):
        assert httpx.get(running.http + path, headers={"host": "evil.example"}).status_code == 421
    assert httpx.get(running.http + "/health", headers={"host": "localhost:123"}).status_code == 200
    with socket.create_connection(("127.0.0.1", running.port), 5) as raw:
        raw.sendall(
            b"GET /live HTTP/1.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        )
        answer = b""
        while not answer.endswith((4403).to_bytes(2, "big")):
            more = raw.recv(4096)
            assert more, "the socket was not closed with 4403"
            answer += more
    assert b" 101 " in answer


def test_no_other_site_may_frame_the_page(serve):
    reply = httpx.get(serve(origins=("https://friend.example",)).http)
    assert reply.headers["content-security-policy"] == "frame-ancestors 'self' https://friend.example"
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_who_guesses_tokens_is_not_listened_to_for_a_while(serve, monkeypatch):
    monkeypatch.setattr(security, "GUESSES", 3)
    running = serve(token=TOKEN)
    for guess in range(3):
        assert "asks for the token" in httpx.get(running.http, params={"token": f"guess{guess}"}).text
    late = httpx.get(running.http, headers={"authorization": f"Bearer {TOKEN}"})
    assert (late.status_code, "Too many wrong tokens" in late.text) == (401, True)
    assert httpx.get(f"{running.http}/health").status_code == 200


def test_other_sites_may_not_post(serve):
    running = serve()
    reply = httpx.post(f"{running.http}/gradio_api/call/generate", headers={"origin": "http://evil.example"})
    assert reply.status_code == 403


def test_one_address_may_not_connect_for_ever(serve, client):
    running = serve(connects=3)
    for _ in range(3):
        client(running).hello()
    assert client(running).farewell()[0] == 4429


def test_a_bucket_fills_again_at_its_rate():
    now = 0.0
    bucket = Bucket(2, 3, clock=lambda: now)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now = 0.6
    assert [bucket.take() for _ in range(2)] == [True, False]
    now = 100.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_a_household_of_ipv6_counts_as_one_address_and_mapped_ipv4_does_not():
    doorman = Doorman(1)
    assert [doorman.admits(f"2001:db8::{tail}") for tail in ("1", "2")] == [True, False]
    assert doorman.blocks("2001:db8::3")
    assert not doorman.blocks("2001:db8:0:1::3")
    assert [doorman.admits(f"::ffff:192.0.2.{tail}") for tail in ("1", "2", "1")] == [True, True, False]


def test_a_doorman_remembers_many_addresses_but_not_all():
    doorman = Doorman(1)
    assert [doorman.admits("a"), doorman.admits("a")] == [True, False]
    for number in range(10_000):
        doorman.admits(str(number))
    assert len(doorman._buckets) <= 4096
