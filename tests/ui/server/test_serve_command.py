"""`millstream serve` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millstream.ui.cli import main, parser
from millstream.ui.commands.serve import address_of, settings_from


def refused(capsys, *words: str) -> str:
    assert main(["serve", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_port_in_use_is_named_with_the_way_out(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use; use --port {port + 1}" in refused(capsys, "--port", str(port))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "needs --token"),
        (["--host", "nowhere.invalid", "--token"], "there is no address 'nowhere.invalid'"),
        (["--host", "203.0.113.7", "--token"], "can't listen on 203.0.113.7"),
        (["--token", "short"], "at least 8"),
        (["--ray", "--model", "freedoom", "--model", "other"], "give --model once"),
        (["--origin", "example.org"], "https://example.org"),
        (["--origin", "https://example.org/page"], "scheme and a host"),
        (["--model", "no-such-model", "--port", "0"], "no model 'no-such-model'"),
        (["--recipe", "no_such_recipe", "--port", "0"], "no_such_recipe"),
    ],
)
def test_mistakes_are_told_in_one_sentence(capsys, words, message):
    assert message in refused(capsys, *words)


@pytest.mark.parametrize(
    "words", [["--port", "70000"], ["--port", "x"], ["--max-sessions", "0"], ["--idle", "-1"], ["--replicas", "4-2"]]
)
def test_bad_numbers_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *words])
    assert ended.value.code == 2


def test_a_token_is_made_up_where_none_is_given():
    arguments = parser().parse_args(["serve", "--host", "0.0.0.0", "--token"])
    one, two = settings_from(arguments), settings_from(arguments)
    assert one.token != two.token
    assert len(one.token) >= 20
    assert address_of(one, 80) == f"http://localhost:80/?token={one.token}"


def test_replicas_are_a_number_or_a_range():
    for text, range in (("2", (2, 2)), ("1-4", (1, 4))):
        assert parser().parse_args(["serve", "--replicas", text]).replicas == range


def test_ray_is_named_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 'pip install "millstream[ray]"' in refused(capsys, "--ray")


SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from conftest import FakePipeline
import millstream.ui.commands.serve as serve
serve.load_world = lambda name, device, preset=None: FakePipeline()
from millstream.ui.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_says_goodbye_finishes_recordings_and_exits_130(tmp_path):
    from websockets.sync.client import connect

    words = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    words += ["serve", "--port", "0", "--recordings", str(tmp_path / "kept")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "0"}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("freedoom: http://localhost:")
        port = int(line.split(":")[-1].strip(" /\n"))
        with connect_when_up(connect, port) as player:
            for message in ({"type": "hello", "protocol": 1}, {"type": "record", "on": True}, {"type": "start"}):
                player.send(json.dumps(message))
                time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            said = list(player)
            assert player.protocol.close_code == 1001
        byes = [json.loads(word) for word in said if isinstance(word, str) and '"bye"' in word]
        assert byes[0]["reason"] == "going_away"
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "millstream: interrupted"
    assert "Traceback" not in errors
    (file,) = (tmp_path / "kept").rglob("*.mp4")
    assert file.stat().st_size > 1000


def connect_when_up(connect, port: int):
    for _ in range(100):
        try:
            return connect(f"ws://127.0.0.1:{port}/live", proxy=None)
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server never answered")
