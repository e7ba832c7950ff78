"""What is in the compile cache is run: none is read that another user may have written."""

import os
import shutil
import stat

import numba
import pytest
from test_processes import Y, files, normalized

from numbanorm.numba_ext import cache

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users and modes here")

CONTENT = bytes(range(256))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder of the cache, where there is one kernel."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_has_warned", False)
    cache._write("kernel", CONTENT)
    assert cache._read("kernel") == CONTENT
    return tmp_path / "cache" / "numbanorm"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o277])
def test_own_files_and_folders_are_for_this_user_alone(tmp_path, monkeypatch, umask):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "shared" / "cache"))
    before = os.umask(umask)
    try:
        cache._write("kernel", CONTENT)
    finally:
        os.umask(before)
    (file,) = files(tmp_path)
    made = {path: mode(path) for path in (file, *file.parents) if tmp_path in path.parents}
    assert made == {path: 0o600 if path == file else 0o700 for path in made}
    assert cache._read("kernel") == CONTENT


def test_pythons_own_folder_stays_open_to_others(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "folders", lambda: [tmp_path / "__pycache__" / "numbanorm"])
    before = os.umask(0o022)
    try:
        cache._write("kernel", CONTENT)
    finally:
        os.umask(before)
    assert mode(tmp_path / "__pycache__") == 0o755
    assert mode(tmp_path / "__pycache__" / "numbanorm") == 0o700


@pytest.mark.parametrize("bit", [0o020, 0o002], ids=["group", "others"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_can_write_to_is_not_read(folder, what, bit):
    path = folder / "kernel" if what == "file" else folder
    path.chmod(mode(path) | bit)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR") as caught:
        assert cache._read("kernel") is None
        assert cache._read("kernel") is None
    (warning,) = caught
    assert f"{path}: others can write to it, mode {mode(path):o}" in str(warning.message)
    # What is compiled takes the place of the file, not of the folder.
    cache._write("kernel", CONTENT)
    assert cache._read("kernel") == (CONTENT if what == "file" else None)


@pytest.mark.parametrize("bit", [0o044, 0o055])
def test_what_others_can_read_is_read(folder, bit):
    folder.chmod(mode(folder) | bit)
    (folder / "kernel").chmod(0o600 | bit & 0o044)
    assert cache._read("kernel") == CONTENT


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_another_user_is_not_read(folder, monkeypatch, what):
    path = folder / "kernel" if what == "file" else folder
    me = os.geteuid()
    if me == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(RuntimeWarning, match=f"belongs to user {me or 12345}"):
        assert cache._read("kernel") is None


def test_what_belongs_to_root_is_read(folder, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root has files of root's")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert cache._read("kernel") == CONTENT


def test_a_file_in_the_place_of_another_is_not_read(folder):
    shutil.copy(folder / "kernel", folder / "another")
    assert cache._read("another") is None


def test_a_process_compiles_what_it_does_not_trust(tmp_path):
    first = normalized(NUMBA_CACHE_DIR=str(tmp_path))
    assert normalized(NUMBA_CACHE_DIR=str(tmp_path))["compiled"] == 0
    (tmp_path / "numbanorm").chmod(0o777)
    found = normalized(NUMBA_CACHE_DIR=str(tmp_path))
    assert (found["y"], found["loaded"], found["compiled"]) == (Y, 0, first["compiled"])
    (warning,) = found["warnings"]
    assert warning.startswith("RuntimeWarning: numbanorm does not read compiled kernels")
    (tmp_path / "numbanorm").chmod(0o755)
    assert normalized(NUMBA_CACHE_DIR=str(tmp_path))["compiled"] == 0


def test_nothing_is_written_where_others_can_write(tmp_path):
    (tmp_path / "numbanorm").mkdir()
    (tmp_path / "numbanorm").chmod(0o777)
    found = normalized(NUMBA_CACHE_DIR=str(tmp_path))
    assert (found["y"], found["loaded"], files(tmp_path)) == (Y, 0, [])
    (warning,) = found["warnings"]
    assert "cannot keep its compiled kernels" in warning
    assert "others can write to it, mode 777" in warning
