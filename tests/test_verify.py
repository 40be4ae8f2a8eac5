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
    result = place.invoke(*words)
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
    file.write_text(file.read_text().replace('"text": "keep"', '"text": "omit"'))
    sealed_again(path)
    assert "--expect" in place.pipeline("fit-projection", CONFIG, *given, "--expect", root, status=2)


def begun(path: Path) -> None:
    """As if the stage had been killed just before the end."""
    (path / "manifest.json").unlink()


def with_its_own_hash(file: Path, value: dict[str, object]) -> None:
    body = {key: part for key, part in value.items() if key != "self"}
    write_json(file, body | {"self": folders._self_hash(body)})


def test_a_stray_file_in_an_unfinished_cache_becomes_no_part_of_it(cache: tuple[Place, Path]):
    place, path = cache
    begun(path)
    for name in (".DS_Store", "more.parquet", "logits 1.parquet"):
        (path / name).write_bytes(b"x")
    place.pipeline("cache-teacher", CONFIG)
    assert place.pipeline("cache-teacher", CONFIG).startswith("cache-teacher: already done")
    assert not {".DS_Store", "more.parquet", "logits 1.parquet"} & json.loads((path / "manifest.json").read_text())["files"].keys()
    place_stdout(place, 2, "verify", str(path), "--repair")
    place.pipeline("cache-teacher", CONFIG)
    assert "Everything" in place.pipeline("verify", str(path))


def test_a_damaged_head_in_an_unfinished_cache_is_made_anew(place: Place):
    options = ["--set", "targets.logits={keep: 16, hidden: int8}"]
    place.pipeline("prepare-data", CONFIG, *options)
    path = place.path / place.json("cache-teacher", CONFIG, *options)["folder"]
    sound = (path / "head.safetensors").read_bytes()
    begun(path)
    (path / "head.safetensors").write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert "head.safetensors" in place_stdout(place, 1, "verify", str(path))
    place.pipeline("cache-teacher", CONFIG, *options)
    assert (path / "head.safetensors").read_bytes() == sound
    place.pipeline("verify", str(path), "--deep")


@pytest.mark.parametrize("name", ["../../../victim.txt", "/tmp/victim.txt", ".hidden", "a/b/c", "a b"])
def test_a_commit_that_names_a_file_elsewhere_touches_nothing(cache: tuple[Place, Path], name: str):
    place, path = cache
    begun(path)
    victim = place.path / "victim.txt"
    victim.write_text("mine")
    record = path / "commits" / "00001.json"
    commit = json.loads(record.read_text())
    with_its_own_hash(record, commit | {"files": {name: {"size": 4, "sha256": "0" * 64}}})
    assert "which no stage writes" in place_stdout(place, 1, "verify", str(path))
    place.pipeline("cache-teacher", CONFIG)
    assert victim.read_text() == "mine"
    assert "Everything" in place.pipeline("verify", str(path))


def test_somebody_elses_folder_among_the_runs_is_not_taken_over_by_names_that_lead_elsewhere(cache: tuple[Place, Path]):
    place, path = cache
    commit = json.loads((path / "commits" / "00000.json").read_text())
    foreign = path.parent / ("0" * 16)
    (foreign / "commits").mkdir(parents=True)
    with_its_own_hash(foreign / "commits" / "00000.json", commit | {"files": {f"../../../pwned_{name}": entry for name, entry in commit["files"].items()}})
    shutil.rmtree(path)
    place.pipeline("cache-teacher", CONFIG)
    assert not list(place.path.rglob("pwned*"))
    assert "Everything" in place.pipeline("verify", str(path))


@pytest.mark.parametrize(
    "body", [{"format": 1}, {"format": 1, "files": []}, {"format": 1, "files": {"x": 5}}, {"format": 1, "files": {}, "stage": 3}, {"format": 1, "files": {"a": {"size": -1, "sha256": "0" * 64}}}]
)
def test_a_manifest_of_another_shape_is_refused_whatever_its_hash(cache: tuple[Place, Path], body: dict[str, object]):
    place, path = cache
    with_its_own_hash(path / "manifest.json", body)
    assert "Do not use this folder" in place_stdout(place, 1, "verify", str(path))
    assert "Do not use this folder" in place.pipeline("fit-projection", CONFIG, "--use", f"cache-teacher={path}", status=1)


@pytest.mark.parametrize("name", ["commits/00001.json", "manifest.json", "cache.json", "logits-00001.parquet"])
def test_a_folder_in_a_files_place_is_damage_that_repair_and_a_rerun_mend(cache: tuple[Place, Path], name: str):
    place, path = cache
    (path / name).unlink()
    (path / name).mkdir()
    assert name in place_stdout(place, 1, "verify", str(path))
    place_stdout(place, 1, "verify", str(path), "--repair")
    place.pipeline("cache-teacher", CONFIG)
    assert "Everything" in place.pipeline("verify", str(path))


def test_a_link_to_a_folder_is_told_and_repaired_with_the_promised_exit_status(cache: tuple[Place, Path]):
    place, path = cache
    (path / "stray").symlink_to("/etc")
    assert "stray is not listed" in place_stdout(place, 2, "verify", str(path))
    assert "quarantine" in place_stdout(place, 2, "verify", str(path), "--repair")
    place.pipeline("cache-teacher", CONFIG)
    assert "Everything" in place.pipeline("verify", str(path))


def test_status_shows_its_table_though_what_a_stage_is_built_on_is_damaged(cache: tuple[Place, Path]):
    place, path = cache
    begun(path)
    groups = place.finished("prepare-data").path / "groups.json"
    groups.write_text(groups.read_text() + "x")
    assert [row["stage"] for row in place.json("status", CONFIG)["stages"]][:2] == ["prepare-data", "cache-teacher"]


def test_weights_that_change_between_hashing_and_the_stage_make_nothing(own: Place, monkeypatch: pytest.MonkeyPatch):
    """The folder's name was made from the file as it was before."""
    from pipeline.running.runner import Runner

    own.pipeline("prepare-data", CONFIG)
    weights = own.path / "tiny" / "teacher" / "model.safetensors"
    real = Runner.needs
    changed = []

    def late(self: Runner, stage: object) -> object:
        if getattr(stage, "name", "") == "cache-teacher" and "cache-teacher" in self._identities and not changed:
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
            changed.append(True)
        return real(self, stage)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "needs", late)
    assert "changed while it ran" in own.pipeline("cache-teacher", CONFIG, status=1)
    assert not list((own.path / "runs").glob("cache-teacher/*/commits/0*.json"))
