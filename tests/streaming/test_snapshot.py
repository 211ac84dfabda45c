import itertools
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from millstream.streaming import Session, Snapshot, WorldControl


@pytest.fixture
def session(toy, seeded):
    session = Session(toy(), WorldControl("a cave"), generator=seeded())
    session.step()
    session.steer(keys={"KeyW", "Space"}, mouse=(1.5, -2))
    return session


def test_a_session_goes_on_in_another_process_from_the_file(toy, session, tmp_path):
    path = session.snapshot().save(tmp_path / "here.safetensors")
    other = Session(toy(), WorldControl("something else"))
    other.restore(Snapshot.load(path))
    assert other.control == session.control
    for mine, its in itertools.islice(zip(session, other), 6):
        assert torch.equal(mine, its)


def test_every_kind_of_leaf_survives(tmp_path):
    leaves = {
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "view": torch.arange(12).view(3, 4).t(),
        "none": torch.zeros(0, 3),
        "truth": torch.tensor([True, False]),
        "seed": 2**63 + 1,
        "rate": 17.5,
        "name": 'quoted "ünïcode"',
    }
    leaves["alias"] = leaves["view"]
    path = Snapshot(leaves, {"prompt": ""}, None, "Control").save(tmp_path / "all.safetensors")
    loaded = Snapshot.load(path).leaves
    assert set(loaded) == set(leaves)
    for name, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor):
            assert loaded[name].dtype == leaf.dtype
            assert torch.equal(loaded[name], leaf)
        else:
            assert loaded[name] == leaf


def test_a_snapshot_is_not_moved_by_later_steps(session):
    snapshot = session.snapshot()
    before = snapshot.leaves["memory"].clone()
    session.step()
    assert torch.equal(snapshot.leaves["memory"], before)


def test_saving_is_whole_or_not_at_all(session, tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    session.snapshot().save(path)
    before = path.read_bytes()

    def fails(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("millstream.streaming.snapshot.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        session.snapshot().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"


def test_saving_where_it_cannot_be_saved(session, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        session.snapshot().save(tmp_path / "missing" / "x.safetensors")
    with pytest.raises(TypeError, match="leaf 'bad' must be a tensor, a number or a string, got list"):
        Snapshot({"bad": [1]}, {}, None, "Control").save(tmp_path / "x.safetensors")


def write_foreign(path):
    save_file({"x": torch.zeros(2)}, path)


def write_header(text):
    return lambda path: save_file({"x": torch.zeros(2)}, path, metadata={"millstream.snapshot": text})


def header(**changes):
    good = {"format": 1, "scalars": {}, "control": {}, "unread": None, "kind": "Control"}
    return write_header(json.dumps(good | changes))


def write_pickle(path):
    path.write_bytes(pickle.dumps({"x": 1}))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a readable safetensors file"),
        (write_pickle, "not a readable safetensors file"),
        (write_foreign, "no millstream snapshot"),
        (write_header("{not json"), "damaged snapshot header"),
        (write_header("[" * 200_000), "damaged snapshot header"),
        (write_header("[]"), "damaged snapshot header"),
        (header(scalars={"seed": {"a": 1}}), "damaged snapshot header"),
        (header(control=[]), "damaged snapshot header"),
        (header(unread=3), "damaged snapshot header"),
        (header(format=99), "snapshot format 99, this version of millstream reads format 1"),
    ],
)
def test_what_is_no_snapshot_is_refused_in_one_sentence(write, message, tmp_path):
    path = tmp_path / "odd.safetensors"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        Snapshot.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(session, tmp_path):
    path = session.snapshot().save(tmp_path / "whole.safetensors")
    whole = path.read_bytes()
    for length in (1, 7, 8, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            Snapshot.load(path)


def test_missing_and_too_large_files(session, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no snapshot file"):
        Snapshot.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no snapshot file"):
        Snapshot.load(tmp_path)
    path = session.snapshot().save(tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match="a snapshot of at most 100 bytes is read"):
        Snapshot.load(path, max_bytes=100)
