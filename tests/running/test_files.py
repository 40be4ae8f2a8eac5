from pathlib import Path

import pytest

from pipeline.files import appears_whole, remove_unfinished
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


def test_what_a_kill_left_is_swept_away(tmp_path: Path):
    (tmp_path / ".unfinished-1-x").write_text("half")
    (tmp_path / "kept").write_text("whole")
    remove_unfinished(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_only_shards_with_a_commit_that_fits_their_files_are_done(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for shard in range(4):
        (tmp_path / f"{shard}.bin").write_bytes(bytes([shard] * 100))
        if shard != 3:
            folder.commit(f"{shard:05d}", [f"{shard}.bin"])
    (tmp_path / "1.bin").write_bytes(bytes([9] * 100))
    record = tmp_path / "commits" / "00002.json"
    record.write_text(record.read_text().replace('"size": 100', '"size": 101'))
    assert folder.unfinished(4) == [1, 2, 3]
