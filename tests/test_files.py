"""Files are whole or absent, and private before they have content."""

import os

import pytest

from jaxdp import _files


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path) -> int:
    return path.stat().st_mode & 0o777


def test_a_private_file_is_never_anothers_to_read(tmp_path, monkeypatch, no_umask):
    """Not while it is written, nor where a write that was cut off, or an older file, left another mode behind."""
    path, opened = tmp_path / "losses.json", []

    def spy(*args, real=os.open):
        descriptor = real(*args)
        opened.append(os.fstat(descriptor).st_mode & 0o777)
        return descriptor

    monkeypatch.setattr(_files.os, "open", spy)
    for name in ("losses.json", "losses.json.partial"):
        (tmp_path / name).write_bytes(b"from before")
        (tmp_path / name).chmod(0o666)
    with (tmp_path / "losses.json.partial").open("rb") as held_by_another:
        _files.write_whole(path, b"[0.5]", mode=_files.PRIVATE)
        assert held_by_another.read() == b"from before"
    assert opened == [0o600]
    assert mode(path) == 0o600
    assert path.read_bytes() == b"[0.5]"
    assert [each.name for each in tmp_path.iterdir()] == ["losses.json"]


def test_a_file_for_everyone_has_the_mode_of_the_umask(tmp_path, no_umask):
    _files.write_whole(tmp_path / "a", b"")
    os.umask(0o027)
    _files.write_whole(tmp_path / "b", b"")
    assert (mode(tmp_path / "a"), mode(tmp_path / "b")) == (0o666, 0o640)
