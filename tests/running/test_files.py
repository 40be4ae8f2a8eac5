import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import DamageError
from pipeline.files import HOST, UNFINISHED, appears_whole, read_json, remove_unfinished
from pipeline.running.folder import RunFolder


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "a.txt"
    with pytest.raises(RuntimeError), appears_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with appears_whole(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(RuntimeError), appears_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "whole"


def test_a_folder_appears_whole_and_replaces_the_one_before(tmp_path: Path):
    for text in ("one", "two"):
        with appears_whole(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["two"]


def test_what_a_kill_left_is_swept_away_and_what_somebody_is_writing_is_not(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {"dead": f"{HOST}-{dead.pid}-x", "mine": f"{HOST}-{os.getpid()}-x", "living": f"{HOST}-{os.getppid()}-x", "elsewhere": "0a1b2c3d-1-x", "long ago": "0a1b2c3d-2-x", "older form": "1-x"}
    for name in names.values():
        (tmp_path / f"{UNFINISHED}{name}").write_text("half")
    for name in ("long ago", "older form"):
        os.utime(tmp_path / f"{UNFINISHED}{names[name]}", (0, 0))
    (tmp_path / "kept").write_text("whole")
    remove_unfinished(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([f"{UNFINISHED}{names['living']}", f"{UNFINISHED}{names['elsewhere']}", "kept"])


def test_of_two_writers_of_one_name_the_first_stays(tmp_path: Path):
    for text in ("one", "one"):
        with appears_whole(tmp_path / "file", absent=True) as temporary:
            temporary.write_text(text)
    with pytest.raises(FileExistsError), appears_whole(tmp_path / "file", absent=True) as temporary:
        temporary.write_text("two")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["one"]


def test_where_there_are_no_hard_links_one_writer_still_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    with appears_whole(tmp_path / "file", absent=True) as temporary:
        temporary.write_text("one")
    with pytest.raises(FileExistsError), appears_whole(tmp_path / "file", absent=True) as temporary:
        temporary.write_text("two")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["one"]


def test_only_shards_with_a_commit_that_fits_their_files_are_done(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for shard in range(4):
        (tmp_path / f"bytes-{shard:05d}.bin").write_bytes(bytes([shard] * 100))
        if shard != 3:
            folder.commit(f"{shard:05d}", {f"bytes-{shard:05d}.bin": {}})
    (tmp_path / "bytes-00001.bin").write_bytes(bytes([9] * 100))
    record = tmp_path / "commits" / "00002.json"
    record.write_text(record.read_text().replace('"size": 100', '"size": 101'))
    names = [f"{shard:05d}" for shard in range(4)]
    assert list(folder.pieces(names)) == names[1:]
    assert sorted(file.name for file in tmp_path.glob("bytes-*")) == ["bytes-00000.bin"]
    assert sorted(file.name for file in tmp_path.rglob("quarantine/*/*.bin")) == ["bytes-00001.bin", "bytes-00002.bin"]  # that of 3 was never committed
    folder.close()


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '{"a": Infinity}', "{", "\xff", ""])
def test_a_json_that_we_would_not_write_is_damage(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamageError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_json_of_many_gigabytes_is_not_read(tmp_path: Path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(DamageError, match="bytes"):
        read_json(tmp_path / "x.json")
