"""`pipeline verify` and `--expect`: what they find, what they say, and their exit status."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.files import write_json
from pipeline.models.heads import RowLogits
from pipeline.running import folder as folders
from tests.conftest import CONFIG, Place
from tests.test_reliability import copied


@pytest.fixture
def cache(done: Place, tmp_path: Path) -> tuple[Place, Path]:
    place = copied(done, tmp_path / "copy")
    return place, place.finished("cache-teacher").path


def sealed_again(path: Path, **changes: object) -> None:
    """As somebody would who wants to be believed: all hashes fit."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    manifest["files"] = {name: entry | folders.describe(path / name) for name, entry in manifest["files"].items()}
    manifest["self"] = folders._self_hash({key: value for key, value in manifest.items() if key != "self"})
    write_json(path / "manifest.json", manifest)
    for record in (path / "commits").iterdir():
        commit = json.loads(record.read_text())
        commit["files"] = {name: entry | folders.describe(path / name) for name, entry in commit["files"].items()}
        commit["self"] = folders._self_hash({key: value for key, value in commit.items() if key != "self"})
        write_json(record, commit)


def test_a_sound_cache_stands_every_look_and_the_root_is_printed(cache: tuple[Place, Path]):
    place, path = cache
    roots = {place.pipeline("verify", str(path), *options).splitlines()[-1] for options in ([], ["--fast"], ["--deep"], ["--recompute", "2"])}
    (root,) = roots
    assert root.startswith("sha256:")
    assert "Everything" in place.pipeline("verify", str(path), "--expect", root)


def test_a_wrong_size_is_seen_fast_and_a_flipped_bit_is_not(cache: tuple[Place, Path]):
    place, path = cache
    file = path / "logits-00001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "of another size" in place.pipeline("verify", str(path), "--fast")
    assert json.loads(place_stdout(place, 1, "verify", str(path), "--json"))["damaged"].keys() == {file.name}
    file.write_bytes(data[:-1])
    assert json.loads(place_stdout(place, 1, "verify", str(path), "--fast", "--json"))["damaged"].keys() == {file.name}


def place_stdout(place: Place, status: int, *words: str) -> str:
    """What is printed when the exit status is not 0."""
    import os

    from click.testing import CliRunner

    from stages.cli import main

    before = Path.cwd()
    os.chdir(place.path)
    try:
        result = CliRunner().invoke(main, list(words))
    finally:
        os.chdir(before)
    assert result.exit_code == status, result.output
    return result.stdout


def test_the_exit_status_is_the_sum_of_what_was_found(cache: tuple[Place, Path]):
    place, path = cache
    (path / "more.parquet").write_bytes(b"x")
    assert "more.parquet is not listed" in place_stdout(place, 2, "verify", str(path))
    (path / "logits-00000.parquet").unlink()
    found = json.loads(place_stdout(place, 3, "verify", str(path), "--json"))
    assert found["damaged"] == {"logits-00000.parquet": "is missing"}
    assert found["untrusted"].keys() == {"more.parquet"}
    (path / "more.parquet").unlink()
    place_stdout(place, 3, "verify", str(path), "--expect", "sha256:00")


def test_mixed_numerics_are_told(cache: tuple[Place, Path]):
    place, path = cache
    manifest = json.loads((path / "manifest.json").read_text())
    sealed_again(path, summary=manifest["summary"] | {"mixed_numerics": True})
    assert "different devices" in place_stdout(place, 8, "verify", str(path))


def test_what_cannot_be_read_is_told_apart_from_damage(cache: tuple[Place, Path], monkeypatch: pytest.MonkeyPatch):
    place, path = cache
    real = folders.sha256_of

    def fails(file: Path) -> str:
        if file.name == "ranks-00002.parquet":
            raise OSError(5, "Input/output error")
        return real(file)

    monkeypatch.setattr(folders, "sha256_of", fails)
    found = json.loads(place_stdout(place, 4, "verify", str(path), "--json"))
    assert found["unchecked"].keys() == {"ranks-00002.parquet"}
    assert not found["damaged"]


def test_a_link_is_not_followed_and_a_name_that_leads_elsewhere_is_refused(cache: tuple[Place, Path]):
    place, path = cache
    file = path / "ranks-00000.parquet"
    shutil.move(file, path.parent / "elsewhere")
    file.symlink_to(path.parent / "elsewhere")
    assert "links are not followed" in place_stdout(place, 1, "verify", str(path))
    file.unlink()
    shutil.move(path.parent / "elsewhere", file)
    manifest = json.loads((path / "manifest.json").read_text())
    (path.parent / "secret").write_bytes(b"x")
    sealed_again(path, files=manifest["files"] | {"../secret": {}})
    assert "Do not use this folder" in place_stdout(place, 1, "verify", str(path))


def test_rows_that_are_not_those_of_their_digest_are_found_deep(cache: tuple[Place, Path]):
    place, path = cache
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["logits-00000.parquet"]["rows_digest"] = "sha256:0"
    sealed_again(path, files=manifest["files"])
    place.pipeline("verify", str(path))
    assert "logits-00000.parquet does not have the rows" in place_stdout(place, 1, "verify", str(path), "--deep")


def test_a_teacher_that_is_asked_again_and_says_something_else_is_noticed(cache: tuple[Place, Path], monkeypatch: pytest.MonkeyPatch):
    place, path = cache
    real = RowLogits.head

    def louder(self: RowLogits, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return real(self, hidden, out) * 1.0001

    monkeypatch.setattr(RowLogits, "head", louder)
    found = json.loads(place_stdout(place, 1, "verify", str(path), "--recompute", "2", "--json"))["damaged"]
    assert len(found) == 2
    assert all(name.startswith("logits-") and "says now" in text for name, text in found.items())


def test_a_cache_that_was_given_must_have_the_root_that_was_named(cache: tuple[Place, Path]):
    place, path = cache
    root = place.pipeline("verify", str(path), "--fast").splitlines()[-1]
    given = ["--use", f"cache-teacher={path}"]
    place.pipeline("fit-projection", CONFIG, *given, "--expect", root)
    assert root in place.pipeline("fit-projection", CONFIG, *given, "--expect", "sha256:" + "0" * 64, status=2)
    assert "no folder is given" in place.pipeline("fit-projection", CONFIG, "--expect", root, status=2)
    # every hash can be made to fit other data, but then the root is another
    file = path / "cache.json"
    file.write_text(file.read_text().replace("tiny/teacher", "tiny/preacher"))
    sealed_again(path)
    assert "--expect" in place.pipeline("fit-projection", CONFIG, *given, "--expect", root, status=2)
