import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from allmlp.errors import UserError
from allmlp.files import atomic_path, check_writable, only_writer, write_json


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "metrics.json"
    write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        write_json(target, {"a": object()})
    with contextlib.suppress(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in target.parent.iterdir()] == ["metrics.json"]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """By the name it was given by, where a directory is in its way and where its disk is full."""
    folder, file = tmp_path / "folder", tmp_path / "file.json"
    folder.mkdir()
    for refused in (check_writable, lambda path: write_json(path, {})):
        with pytest.raises(IsADirectoryError, match=r"/folder'$"):
            refused(folder)
    with pytest.raises(OSError, match=r"/file.json'$"), atomic_path(file) as temporary:
        raise OSError(28, "No space left on device", str(temporary))
    write_json(file, {"a": 1})
    check_writable(file)
    assert json.loads(file.read_text()) == {"a": 1}
    check_writable(tmp_path / "new" / "folder" / "file.json")
    for below in (file / "other.json", file / "new" / "other.json"):
        with pytest.raises(OSError, match=r"file\.json"):
            check_writable(below)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_permissions_are_the_umasks(umask: int, mode: int, tmp_path: Path) -> None:
    """Also where a library writes its files for their owner alone."""
    former = os.umask(umask)
    try:
        with atomic_path(tmp_path / "weights") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(former)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


class TestOnlyWriter:
    OTHER = """
import sys
from allmlp.files import only_writer
with only_writer(sys.argv[1]):
    print("has it", flush=True)
    sys.stdin.read()
"""

    def test_another_process_is_kept_out_until_the_first_has_ended(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        command = [sys.executable, "-c", self.OTHER, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"has it\n"
            with pytest.raises(UserError, match=r"run is being written by another process"), only_writer(folder):
                pass
            other.kill()
        # However it has ended, and whatever it left.
        with only_writer(folder):
            (folder / "result").touch()
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            assert "is being written by another process" in done.stderr
        assert [path.name for path in folder.iterdir()] == ["result"]

    def test_what_was_not_there_is_not_left_behind_empty(self, tmp_path: Path) -> None:
        with contextlib.suppress(RuntimeError), only_writer(tmp_path / "run"):
            raise RuntimeError
        assert not (tmp_path / "run").exists()
        with only_writer(tmp_path):
            pass
        assert tmp_path.exists()
