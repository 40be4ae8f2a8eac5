"""What somebody who looked for it found to be believed, and is not believed any more."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stages.cache_teacher
import stages.train_student
from pipeline.files import write_json
from pipeline.running import claims, code
from pipeline.running.folder import RunFolder, read_manifest
from stages import STAGES
from tests.conftest import CONFIG, Place
from tests.test_reliability import copied, poisoned
from tests.test_verify import place_stdout, sealed_again, with_its_own_hash


@pytest.fixture
def all_done(done: Place, tmp_path: Path) -> Place:
    return copied(done, tmp_path / "copy")


def folder_of(place: Place, stage: str) -> Path:
    return next(place.path / row["folder"] for row in place.json("status", CONFIG)["stages"] if row["stage"] == stage)


def student_of(place: Place) -> dict[str, torch.Tensor]:
    return load_file(folder_of(place, "train-student") / "student" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- code ---


def test_a_loss_of_ones_own_is_in_the_key_of_those_who_name_it_and_of_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("pipeline", "stages"):
        shutil.copytree(code.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    own = tmp_path / "pipeline" / "losses" / "own.py"
    own.write_text("from pipeline.losses.half import half\n")
    (own.parent / "half.py").write_text("half = 0.5\n")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    code._sha256.cache_clear()
    stage = next(stage for stage in STAGES if stage.name == "train-student")
    name, built_in = "pipeline/losses/own.py", "pipeline/losses/forward_kl.py"
    try:
        assert code.version_of(stage, [built_in]) == stage.version
        before = code.version_of(stage, [built_in, name])
        assert before == code.version_of(stage, [name]) != stage.version
        own.write_text(own.read_text() + "own = 1\n")
        changed = code.version_of(stage, [name])
        (own.parent / "half.py").write_text("half = 0.25\n")
        assert len({before, changed, code.version_of(stage, [name])}) == 3
        assert code.version_of(stage, [built_in]) == stage.version
    finally:
        code._sha256.cache_clear()


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(all_done: Place, what: str):
    side, stage = {"model": ("teacher", "cache-teacher"), "tokenizer": ("student", "fit-projection")}[what]
    evil = all_done.path / "evil"
    shutil.copytree(all_done.path / "tiny" / side, evil)
    (evil / "evil.py").write_text(f"open({str(all_done.path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n")
    if what == "model":
        config = json.loads((evil / "config.json").read_text()) | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
        (evil / "config.json").write_text(json.dumps(config))
    else:
        config = json.loads((evil / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}}
        (evil / "tokenizer_config.json").write_text(json.dumps(config))
    all_done.pipeline(stage, CONFIG, "--set", f"{side}.model=evil", status=2)
    assert not (all_done.path / "ran").exists()


def test_weights_in_pickles_are_not_read(all_done: Place):
    pickled = all_done.path / "pickled"
    shutil.copytree(all_done.path / "tiny" / "teacher", pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "safetensors" in all_done.pipeline("cache-teacher", CONFIG, "--set", "teacher.model=pickled", status=2)


# --- inputs ---


def test_a_file_that_is_added_to_a_model_while_it_is_read_is_noticed_before_anything_is_vouched_for(own: Place, monkeypatch: pytest.MonkeyPatch):
    own.pipeline("prepare-data", CONFIG)
    real = stages.cache_teacher.load_tokenizer

    def adds(*arguments):
        (own.path / "tiny" / "teacher" / "chat_template.jinja").write_text("{{ messages }}")
        return real(*arguments)

    monkeypatch.setattr(stages.cache_teacher, "load_tokenizer", adds)
    assert "chat_template.jinja" in own.pipeline("cache-teacher", CONFIG, status=1)
    assert not list((own.path / "runs" / "cache-teacher").glob("*/commits/*"))


def test_what_was_made_from_another_result_of_the_same_key_is_not_taken_for_made_from_this_one(all_done: Place):
    place = all_done
    shutil.copytree(place.path / "runs" / "prepare-data", place.path / "other" / "prepare-data")
    place.pipeline("--runs", "other", "cache-teacher", CONFIG, "--set", "machine.teacher_batch_records=1")
    (other,) = (place.path / "other" / "cache-teacher").iterdir()
    assert other.name == place.finished("cache-teacher").path.name
    root = place.pipeline("verify", str(other), "--fast").splitlines()[-1]
    given = ["--use", f"cache-teacher={other}", "--expect", root]
    assert "was made from another result of cache-teacher" in place.pipeline("train-student", CONFIG, *given, status=2)
    assert "made from another" in place.pipeline("status", CONFIG, *given)
    # one that was only begun does not go on from it, either
    (folder_of(place, "train-student") / "manifest.json").unlink()
    (place.finished("fit-projection").path / "manifest.json").unlink()
    assert "was made from another result of cache-teacher" in place.pipeline("train-student", CONFIG, *given, status=2)
    assert "already done" in place.pipeline("cache-teacher", CONFIG)


def test_a_manifest_that_says_something_else_than_its_fingerprint_is_refused(all_done: Place):
    path = all_done.finished("cache-teacher").path
    identity = read_manifest(path)["identity"]
    identity["sections"]["teacher"]["quantization"] = "int8"
    sealed_again(path, identity=identity)
    assert "than its fingerprint does" in place_stdout(all_done, 1, "verify", str(path))
    all_done.pipeline("cache-teacher", CONFIG, status=1)


def test_a_student_that_is_damaged_or_not_finished_is_no_teacher(all_done: Place):
    folder = folder_of(all_done, "train-student")
    teacher = ["--set", f"teacher.model=run:train-student/{folder.name}"]
    (folder / "manifest.json").rename(folder / "away")
    assert "has not finished" in all_done.pipeline("cache-teacher", CONFIG, *teacher, status=2)
    (folder / "away").rename(folder / "manifest.json")
    flip(folder / "student" / "model.safetensors")
    assert "model.safetensors is damaged" in all_done.pipeline("cache-teacher", CONFIG, *teacher, status=1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def test_a_remembered_hash_that_was_changed_is_forgotten(all_done: Place):
    before = all_done.pipeline("status", CONFIG)
    file = all_done.path / "runs" / "inputs.json"
    for text in (file.read_text().replace("sha256:", "sha256:0", 1), "{", "[1]", '{"inputs": 1, "self": 2}'):
        file.write_text(text)
        assert all_done.pipeline("status", CONFIG) == before


# --- checkpoints ---


def stopped_at(place: Place, monkeypatch: pytest.MonkeyPatch, step: int, *words: str) -> Path:
    real = stages.train_student._checkpoint

    def checkpoint(out, at, *others):
        real(out, at, *others)
        if at == step:
            raise KeyboardInterrupt

    before = set((place.path / "runs" / "train-student").glob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(stages.train_student, "_checkpoint", checkpoint)
        place.pipeline("train-student", CONFIG, *words, status=1)
    (folder,) = set((place.path / "runs" / "train-student").glob("*")) - before
    return folder


@pytest.mark.parametrize("change", ["of another run", "under the name of another step"])
def test_a_checkpoint_that_was_brought_here_is_not_gone_on_from(all_done: Place, monkeypatch: pytest.MonkeyPatch, change: str):
    wanted = student_of(all_done)
    shutil.rmtree(all_done.path / "runs" / "train-student")
    ours = stopped_at(all_done, monkeypatch, 8)
    if change == "of another run":
        theirs = stopped_at(all_done, monkeypatch, 8, "--set", "training.seed=7")
        for file in [*theirs.glob("checkpoints/*"), *theirs.glob("commits/*")]:
            shutil.copyfile(file, ours / file.relative_to(theirs))
        shutil.rmtree(theirs)
    else:
        commit = json.loads((ours / "commits" / "step-0000008.json").read_text())
        entry = commit["files"].pop("checkpoints/step-0000008.safetensors")
        shutil.copyfile(ours / "checkpoints" / "step-0000008.safetensors", ours / "checkpoints" / "step-0000012.safetensors")
        with_its_own_hash(ours / "commits" / "step-0000012.json", commit | {"name": "step-0000012", "files": {"checkpoints/step-0000012.safetensors": entry}})
    all_done.pipeline("train-student", CONFIG)
    assert same(student_of(all_done), wanted)
    assert list(ours.glob("quarantine/*/checkpoints/*"))


# --- writers that are late ---


def test_a_sole_writer_whose_place_was_taken_changes_nothing(tmp_path: Path):
    late = RunFolder(tmp_path)
    (tmp_path / "claims" / "whole").unlink()  # as after two minutes without a sign of life
    other = RunFolder(tmp_path)
    for write in (lambda: late.commit("a", {}), lambda: late.keep("b"), lambda: late.seal("s", "f", {}, {}, {}, {}), lambda: late.result("student").__enter__()):
        with pytest.raises(Exception, match="has taken over"):
            write()
    before = late.result("student")
    other.close()
    with pytest.raises(Exception, match="has taken over"), before as folder:
        folder.mkdir()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["claims", "commits"]
    late.close()


def test_the_name_by_which_the_teacher_is_found_is_not_in_the_caches_content(all_done: Place):
    (all_done.path / "mnt").mkdir()
    (all_done.path / "mnt" / "big").symlink_to(all_done.path / "tiny" / "teacher")
    shutil.copytree(all_done.path / "runs" / "prepare-data", all_done.path / "other" / "prepare-data")
    all_done.pipeline("--runs", "other", "cache-teacher", CONFIG, "--set", "teacher.model=mnt/big")
    (other,) = (all_done.path / "other" / "cache-teacher").iterdir()
    assert read_manifest(other)["root"] == read_manifest(all_done.finished("cache-teacher").path)["root"]


def test_a_claim_that_has_this_process_number_and_is_not_ours_is_left_behind(tmp_path: Path):
    """In a container a process that is started again has the number of the one that was killed."""
    left = {"owner": "somebody", "host": claims.HOST, "process": str(os.getpid()), "beats": 3}
    (tmp_path / "claims").mkdir()
    write_json(tmp_path / "claims" / "whole", left)
    RunFolder(tmp_path).close()
    ours = RunFolder(tmp_path)
    with pytest.raises(Exception, match="claims/whole"):
        RunFolder(tmp_path)
    ours.close()


# --- what is shown and published ---


@pytest.mark.parametrize("name", ["table.md", "results.json"])
def test_an_edited_table_is_neither_shown_nor_published(all_done: Place, name: str):
    file = all_done.finished("evaluate").path / name
    text = file.read_text()
    digit = max(text.rfind(letter) for letter in "123456789")
    file.write_text(f"{text[:digit]}0{text[digit + 1 :]}")
    before = (all_done.path / "runs" / "tiny" / name).read_bytes()
    assert f"{name} is damaged" in all_done.pipeline("evaluate", CONFIG, status=1)
    assert (all_done.path / "runs" / "tiny" / name).read_bytes() == before


def test_status_sees_what_is_missing_and_what_is_too_much(all_done: Place):
    path = all_done.finished("cache-teacher").path
    file = path / "logits-00000.parquet"
    file.rename(all_done.path / "away")
    rows = {row["stage"]: row for row in all_done.json("status", CONFIG)["stages"]}
    assert rows["cache-teacher"]["state"] == "damaged"
    assert "logits-00000.parquet is missing" in rows["cache-teacher"]["why"]
    assert rows["prepare-data"]["state"] == "done"
    total = len(list(path.glob("logits-*"))) + 1
    (path / "manifest.json").unlink()
    with_its_own_hash(path / "commits" / "00099.json", {"name": "00099", "files": {}, "info": {}})
    assert f"begun {total - 1} of {total} shards" in all_done.pipeline("status", CONFIG)


def test_what_is_not_expected_is_not_called_damaged_and_nothing_is_put_away(all_done: Place):
    path = all_done.finished("cache-teacher").path
    before = sorted(path.rglob("*"))
    told = place_stdout(all_done, 2, "verify", str(path), "--expect", "sha256:00", "--repair")
    assert "quarantine" not in told
    assert "--repair" not in told
    assert sorted(path.rglob("*")) == before


# --- hostile folders ---


@pytest.mark.parametrize("kind", ["device", "link", "pipe"])
def test_a_manifest_that_is_no_file_is_refused_at_once(all_done: Place, kind: str):
    path = all_done.finished("cache-teacher").path
    (path / "manifest.json").rename(path / "commits" / "real")
    if kind == "pipe":
        os.mkfifo(path / "manifest.json")
    else:
        (path / "manifest.json").symlink_to("/dev/zero" if kind == "device" else path / "commits" / "real")
    assert "it is no file" in place_stdout(all_done, 1, "verify", str(path))
    assert "damaged" in all_done.pipeline("status", CONFIG)


def test_a_stray_commit_becomes_no_part_of_the_result(all_done: Place):
    path = all_done.finished("cache-teacher").path
    root = read_manifest(path)["root"]
    (path / "manifest.json").unlink()
    (path / "extra-00099.parquet").write_bytes(b"x")
    entry = {"size": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    with_its_own_hash(path / "commits" / "00099.json", {"name": "00099", "files": {"extra-00099.parquet": entry}, "info": {}})
    all_done.pipeline("cache-teacher", CONFIG)
    assert read_manifest(path)["root"] == root


def test_a_stray_file_beside_a_student_is_not_loaded_with_it(all_done: Place):
    folder = folder_of(all_done, "train-student") / "student"
    (folder / "adapter_config.json").write_text("{}")
    shutil.rmtree(all_done.path / "runs" / "evaluate")
    assert "adapter_config.json is not of the result" in all_done.pipeline("evaluate", CONFIG, status=1)


def test_too_many_rejected_records_are_asked_about_when_a_cache_is_gone_on_with(all_done: Place, monkeypatch: pytest.MonkeyPatch):
    place, again = all_done, ["--runs", "again"]
    place.pipeline(*again, "prepare-data", CONFIG)
    with monkeypatch.context() as patch:
        poisoned(patch, place, 3)
        place.pipeline(*again, "cache-teacher", CONFIG, "--set", "machine.max_rejected=1")
    (manifest,) = (place.path / "again" / "cache-teacher").glob("*/manifest.json")
    manifest.unlink()
    assert "max_rejected" in place.pipeline(*again, "cache-teacher", CONFIG, status=1)


def test_several_processes_end_a_cache_with_one_description(place: Place):
    """What the shards have in common is a piece of its own, made by one."""
    place.pipeline("prepare-data", CONFIG)
    both = [place.start("cache-teacher", CONFIG) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert "Everything" in place.pipeline("verify", str(place.finished("cache-teacher").path))
    assert (place.finished("cache-teacher").path / "commits" / "about.json").exists()


def test_a_token_as_the_name_of_a_setting_is_refused_and_not_repeated(done: Place):
    token = "hf_" + "a" * 30
    told = done.pipeline("status", CONFIG, "--set", f"training.specialty_weights={{{token}: 3}}", status=2)
    assert "a password or a token" in told
    assert token not in told
