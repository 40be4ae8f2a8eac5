"""Killed at any moment, damaged, or given something wrong: nothing is lost, nothing wrong is believed, and the error says what to do."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stages.cache_teacher
from pipeline.errors import NumericsError
from pipeline.files import write_json
from pipeline.running.folder import FinishedFolder, RunFolder
from tests.conftest import CONFIG, Place

SLOW_CACHE = ["--set", "data.records_per_shard=1", "--set", "machine.teacher_batch_records=1"]
SLOW_TRAINING = ["--set", "training.steps=40", "--set", "machine.checkpoint_steps=2", "--set", "training.batch_records=24"]


def killed_after(place: Place, commits: int, *words: str) -> Path:
    """Start `pipeline`, kill -9 it once so many pieces are committed, and give the folder of the stage."""
    process = place.start(*words)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list((place.path / "runs" / words[0]).glob("*/commits/*.json"))
        if len(found) >= commits:
            break
        time.sleep(0.001)
    assert process.poll() is None, f"finished before it could be killed: {process.communicate()}"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((place.path / "runs" / words[0]).glob("*/manifest.json"))
    return found[0].parent.parent


def test_a_cache_killed_twice_goes_on_and_redoes_no_finished_shard(place: Place):
    place.pipeline("prepare-data", CONFIG, *SLOW_CACHE)
    for commits in (3, 12):
        folder = killed_after(place, commits, "cache-teacher", CONFIG, *SLOW_CACHE)
        row = place.json("status", CONFIG, *SLOW_CACHE)["stages"][1]
        assert row["state"].startswith("begun ")
        assert row["state"].endswith("shards")
    finished = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for record in folder.glob("commits/*.json") for file in folder.glob(f"*-{record.stem}.parquet")}
    assert len(finished) >= 20
    place.pipeline("cache-teacher", CONFIG, *SLOW_CACHE)
    assert finished == {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in finished}
    assert not [file for file in folder.rglob("*") if file.name.startswith(".unfinished-")]

    straight = place.path / "straight"
    place.pipeline("--runs", str(straight), "prepare-data", CONFIG, *SLOW_CACHE)
    place.pipeline("--runs", str(straight), "cache-teacher", CONFIG, *SLOW_CACHE)
    files = sorted(file.name for file in folder.glob("*.parquet"))
    assert files == sorted(file.name for file in (straight / "cache-teacher" / folder.name).glob("*.parquet"))
    assert all((folder / file).read_bytes() == (straight / "cache-teacher" / folder.name / file).read_bytes() for file in files)


def test_training_killed_twice_ends_with_the_same_bits(place: Place):
    place.pipeline("prepare-data", CONFIG)
    place.pipeline("cache-teacher", CONFIG)
    place.pipeline("fit-projection", CONFIG)
    shutil.copytree(place.path / "runs", place.path / "straight")
    # a process of its own each time, with the same number of threads
    process = place.start("--runs", "straight", "train-student", CONFIG, *SLOW_TRAINING)
    process.communicate()
    assert process.returncode == 0
    for _ in range(2):
        before = {file.name for file in (place.path / "runs" / "train-student").glob("*/commits/*.json")}
        folder = killed_after(place, 1, "train-student", CONFIG, *SLOW_TRAINING) if not before else killed_on_change(place, before)
    resumed = place.start("train-student", CONFIG, *SLOW_TRAINING)
    resumed.communicate()
    assert resumed.returncode == 0
    other = place.path / "straight" / "train-student" / folder.name
    one, two = (load_file(path / "student" / "model.safetensors") for path in (folder, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (folder / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def killed_on_change(place: Place, before: set[str]) -> Path:
    process = place.start("train-student", CONFIG, *SLOW_TRAINING)
    while process.poll() is None:
        now = list((place.path / "runs" / "train-student").glob("*/commits/*.json"))
        if {file.name for file in now} - before:
            break
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    return now[0].parent.parent


def stop_after_the_second_checkpoint(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, as if Ctrl-C came then."""
    import stages.train_student as stage

    real = stage._checkpoint

    def checkpoint(*arguments):
        real(*arguments)
        if arguments[1] == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_checkpoint", checkpoint)
        place.pipeline("train-student", CONFIG, status=1)


def test_a_checkpoint_without_the_optimizer_would_be_noticed(place: Place, monkeypatch: pytest.MonkeyPatch):
    """The control of the test above: the same comparison sees a resume that forgets the moments."""
    for name in ("prepare-data", "cache-teacher", "fit-projection"):
        place.pipeline(name, CONFIG)
    shutil.copytree(place.path / "runs", place.path / "straight")
    place.pipeline("--runs", "straight", "train-student", CONFIG)
    stop_after_the_second_checkpoint(place, monkeypatch)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    report = place.json("train-student", CONFIG)
    one, two = (load_file(place.path / runs / "train-student" / report["fingerprint"] / "student" / "model.safetensors") for runs in ("runs", "straight"))
    assert not all(torch.equal(one[name], two[name]) for name in one)


def copied(done: Place, target: Path) -> Place:
    shutil.copytree(done.path / "runs", target / "runs")
    (target / "tiny").symlink_to(done.path / "tiny")
    return Place(target)


def flip(file: Path, where: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * where)] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["logits-00001.parquet", "records-00001.parquet", "ranks-00001.parquet", "tail-00001.parquet", "vocabulary.parquet", "cache.json", "commits/00001.json", "manifest.json"]
)
def test_a_flipped_bit_is_found_named_and_mended_by_redoing_only_that(done: Place, tmp_path: Path, name: str):
    place = copied(done, tmp_path / "copy")
    folder = place.finished("cache-teacher").path
    untouched = folder / "logits-00000.parquet"
    before = untouched.stat().st_mtime_ns
    flip(folder / name)
    with pytest.raises(AssertionError, match="gave 1"):
        place.pipeline("verify", str(folder))
    found = json.loads(_stdout(place, "verify", str(folder), "--json"))["damaged"]
    assert list(found) == [name]
    _stdout(place, "verify", str(folder), "--repair")
    place.pipeline("cache-teacher", CONFIG)
    assert "Everything" in place.pipeline("verify", str(folder))
    assert untouched.stat().st_mtime_ns == before
    assert (folder / name).exists()


def _stdout(place: Place, *words: str) -> str:
    import os

    from click.testing import CliRunner

    from stages.cli import main

    before = Path.cwd()
    os.chdir(place.path)
    try:
        return CliRunner().invoke(main, list(words)).stdout
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("change", "name"), [("flip", "logits-00002.parquet"), ("cut", "records-00000.parquet"), ("remove", "logits-00000.parquet"), ("swap", "logits-00000.parquet"), ("flip", "ranks-00003.parquet")]
)
def test_training_never_sees_a_damaged_shard(done: Place, tmp_path: Path, change: str, name: str):
    place = copied(done, tmp_path / "copy")
    folder = place.finished("cache-teacher").path
    if change == "flip":
        flip(folder / name)
    elif change == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    elif change == "remove":
        (folder / name).unlink()
    else:
        shutil.copyfile(folder / "logits-00001.parquet", folder / name)
    message = place.pipeline("train-student", CONFIG, "--set", "training.seed=5", status=1)
    assert name in message
    assert "verify" in message


def test_decoding_finds_what_hashes_cannot(done: Place, tmp_path: Path):
    """A cache whose hashes are right and whose content is not: as a faulty writer would leave it."""
    from pipeline.reporting.inspection import undecodable
    from pipeline.running import folder as folders

    place = copied(done, tmp_path / "copy")
    path = place.finished("cache-teacher").path
    assert undecodable(path) == {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = path / "logits-00001.parquet"
    table = pq.read_table(file)
    rests = [[value - 40 for value in row] for row in table["rest_1"].to_pylist()]  # two nats
    index = table.schema.get_field_index("rest_1")
    table = table.set_column(index, table.schema.field("rest_1"), pa.array(rests, table.schema.field("rest_1").type))
    pq.write_table(table, file, row_group_size=pq.read_metadata(file).row_group(0).num_rows, write_page_checksum=True)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = folders.describe(file)
    manifest["self"] = folders._self_hash({key: value for key, value in manifest.items() if key != "self"})
    write_json(path / "manifest.json", manifest)
    assert "do not sum to 1" in undecodable(path)[file.name]


def test_nan_logits_stop_the_cache_with_the_record_named_and_keep_what_was_done(place: Place, monkeypatch: pytest.MonkeyPatch):
    place.pipeline("prepare-data", CONFIG)
    real = stages.cache_teacher.said_of
    calls = []

    def breaks(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise NumericsError("the logits are not finite", 2, 7)
        return real(*arguments, **options)

    monkeypatch.setattr(stages.cache_teacher, "said_of", breaks)
    message = place.pipeline("cache-teacher", CONFIG, status=1)
    assert "record r" in message
    assert "position 7" in message
    assert "float32" in message
    monkeypatch.setattr(stages.cache_teacher, "said_of", real)
    assert place.json("status", CONFIG)["stages"][1]["state"].startswith("begun 2 of ")
    place.pipeline("cache-teacher", CONFIG)


def poisoned(monkeypatch: pytest.MonkeyPatch, place: Place, number: int) -> str:
    """The teacher's hidden states become NaN wherever it reads this training record; gives the record's id."""
    from pipeline.cache.reader import Cache
    from pipeline.models.heads import RowLogits

    example = list(Cache(place.finished("cache-teacher").file).examples("train"))[number]
    real = RowLogits.hidden

    def hidden(self: RowLogits, ids: torch.Tensor) -> torch.Tensor:
        states = real(self, ids).unflatten(0, ids.shape).clone()
        length = min(len(example.tokens), ids.shape[1])
        states[(ids[:, :length] == torch.from_numpy(example.tokens.ids[:length].astype("int64"))).all(1)] = float("nan")
        return states.flatten(0, 1)

    monkeypatch.setattr(RowLogits, "hidden", hidden)
    return str(example.record.id)


def test_a_record_with_nan_logits_is_listed_and_its_neighbours_stay_the_same(done: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pipeline.cache.reader import Cache

    place = copied(done, tmp_path / "copy")
    id = poisoned(monkeypatch, place, 3)
    again = ["--runs", "again"]
    place.pipeline(*again, "prepare-data", CONFIG)
    assert id in place.pipeline(*again, "cache-teacher", CONFIG, status=1)
    report = place.json(*again, "cache-teacher", CONFIG, "--set", "machine.max_rejected=0.1")
    assert report["summary"]["rejected"] == 1
    reader = Cache(FinishedFolder(place.path / report["folder"]).file)
    assert [each["id"] for each in reader.about["rejected"]] == [id]
    assert "NaN" in reader.about["rejected"][0]["reason"]
    before = {example.record.id: example for example in Cache(done.finished("cache-teacher").file).examples("train")}
    after = {example.record.id: example for example in reader.examples("train")}
    assert after.keys() == before.keys() - {id}
    for name, example in after.items():
        ours, theirs = example.targets, before[name].targets
        for field in ("kept", "rests", "realised_logprob"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
        owner = np.repeat(np.arange(len(ours.kept)), ours.kept)
        # inside a position tokens lie by the shard's ranks, which a record less can change
        one, two = (np.lexsort((targets.ids, owner)) for targets in (ours, theirs))
        np.testing.assert_array_equal(ours.ids[one], theirs.ids[two])
        np.testing.assert_array_equal(ours.logprobs[one], theirs.logprobs[two])


def test_too_little_memory_once_is_tried_again_and_twice_is_an_error_that_names_the_setting(done: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = copied(done, tmp_path / "copy")
    real, calls = stages.cache_teacher.said_of, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) in (2, 4, 5):
            real(*arguments, **options)  # so far that the tail's sums have something in them
            raise torch.OutOfMemoryError
        return real(*arguments, **options)

    monkeypatch.setattr(stages.cache_teacher, "said_of", full)
    again = ["--runs", "again"]
    place.pipeline(*again, "prepare-data", CONFIG)
    assert "machine.teacher_batch_records" in place.pipeline(*again, "cache-teacher", CONFIG, status=2)
    report = place.json(*again, "cache-teacher", CONFIG)
    same_files(place.path / report["folder"], done.finished("cache-teacher").path)


def same_files(one: Path, other: Path) -> None:
    """Of two caches of the same input."""
    files = [sorted(file.name for file in folder.glob("*.parquet")) for folder in (one, other)]
    assert files[0] == files[1]
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files[0])


def test_two_processes_fill_one_cache_and_a_third_that_is_killed_does_not_matter(place: Place):
    place.pipeline("prepare-data", CONFIG, *SLOW_CACHE)
    processes = [place.start("cache-teacher", CONFIG, *SLOW_CACHE, "--json") for _ in range(3)]
    (runs,) = [place.path / "runs" / "cache-teacher"]
    while not list(runs.glob("*/commits/*.json")):
        assert any(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[0].kill()
    reports = [json.loads(process.communicate()[0]) for process in processes[1:]]
    assert reports[0]["folder"] == reports[1]["folder"]
    place.pipeline("--runs", "straight", "prepare-data", CONFIG, *SLOW_CACHE)
    straight = place.json("--runs", "straight", "cache-teacher", CONFIG, *SLOW_CACHE)
    same_files(place.path / reports[0]["folder"], place.path / straight["folder"])
    folder = place.finished("cache-teacher").path
    assert not [file for file in folder.rglob("*") if file.name.startswith(".unfinished-")]
    assert not list((folder / "claims").iterdir())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The teacher's calls from now on."""
    real, calls = stages.cache_teacher.said_of, []
    monkeypatch.setattr(stages.cache_teacher, "said_of", lambda *arguments, **options: calls.append(1) or real(*arguments, **options))
    return calls


def test_appended_data_costs_the_new_shards_only_and_a_changed_record_its_own(own: Place, monkeypatch: pytest.MonkeyPatch):
    train = own.path / "tiny" / "train.jsonl"
    lines = train.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (own.path / "heldout.jsonl").write_text("\n".join(lines[-8:]) + "\n")
    train.write_text("\n".join(lines[:32]) + "\n")
    options = ["--set", "data.heldout=[{dataset: jsonl, path: heldout.jsonl}]", "--set", "data.records_per_shard=4"]
    own.pipeline("prepare-data", CONFIG, *options)
    calls = counted(monkeypatch)
    first = own.json("cache-teacher", CONFIG, *options)
    assert len(calls) == 10

    train.write_text("\n".join(lines[:37]) + "\n")
    own.pipeline("prepare-data", CONFIG, *options)
    row = own.json("status", CONFIG, *options)["stages"][1]
    assert row["reusable"] == {"of": 12, "made": 10}
    assert "10 of 12 pieces are there already" in own.pipeline("status", CONFIG, *options)
    calls.clear()
    second = own.json("cache-teacher", CONFIG, *options)
    assert len(calls) == 2

    changed = [json.dumps(row | ({"answer": row["answer"] + " Indeed."} if i == 6 else {})) for i, row in enumerate(rows[:37])]
    train.write_text("\n".join(changed) + "\n")
    own.pipeline("prepare-data", CONFIG, *options)
    calls.clear()
    third = own.json("cache-teacher", CONFIG, *options)
    assert len(calls) == 1

    own.pipeline("--runs", "straight", "prepare-data", CONFIG, *options)
    calls.clear()
    straight = own.json("--runs", "straight", "cache-teacher", CONFIG, *options)
    assert len(calls) == 12
    same_files(own.path / third["folder"], own.path / straight["folder"])
    assert len({report["fingerprint"] for report in (first, second, third)}) == 3

    # with other targets no shard is the same; what is damaged is not taken over
    assert own.json("status", CONFIG, *options, "--set", "targets.logits.keep=8")["stages"][1]["reusable"]["made"] == 0
    file = own.path / third["folder"] / "logits-00000.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    shutil.rmtree(own.path / first["folder"])
    shutil.rmtree(own.path / second["folder"])
    file.write_bytes(data)
    train.write_text("\n".join([*changed, json.dumps(rows[37])]) + "\n")
    own.pipeline("prepare-data", CONFIG, *options)
    calls.clear()
    own.pipeline("cache-teacher", CONFIG, *options)
    assert len(calls) == 2


def test_status_names_what_differs_from_a_run_that_was_only_begun(place: Place):
    place.pipeline("prepare-data", CONFIG, *SLOW_CACHE)
    folder = killed_after(place, 2, "cache-teacher", CONFIG, *SLOW_CACHE)
    row = place.json("status", CONFIG, *SLOW_CACHE, "--set", "targets.logits.keep=8")["stages"][1]
    assert row["nearest"] == {"folder": str(folder.relative_to(place.path)), "differs": ["targets.logits.keep"]}
    assert place.json("status", CONFIG, *SLOW_CACHE)["stages"][1]["nearest"] is None


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 100, 1000])
def test_the_shards_with_a_tail_are_few_spread_and_stay_when_data_is_appended(count: int):
    from pipeline.cache.plan import TAIL_SHARDS, tails

    chosen = tails(count)
    assert (8 if count > TAIL_SHARDS else count) <= len(chosen) <= TAIL_SHARDS
    for more in range(count, 2 * count):
        assert {number for number in tails(more) if number < count} <= chosen


def told_to_stop(place: Place, *words: str) -> Path:
    """Start `pipeline`, send SIGTERM after its first commit, and give the folder of the stage."""
    process = place.start(*words)
    while not (found := list((place.path / "runs" / words[0]).glob("*/commits/*.json"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    _, errors = process.communicate()
    assert time.monotonic() - begin < 5
    assert process.returncode == 75, errors
    assert "Stopped by SIGTERM" in errors
    assert "Traceback" not in errors
    return found[0].parent.parent


def test_a_notice_that_the_machine_goes_away_stops_the_cache_at_once_and_loses_nothing(place: Place):
    place.pipeline("prepare-data", CONFIG, *SLOW_CACHE)
    folder = told_to_stop(place, "cache-teacher", CONFIG, *SLOW_CACHE)
    assert not [file for file in folder.rglob("*") if file.name.startswith(".unfinished-")]
    assert not list((folder / "claims").iterdir())
    shards = {file.stem for file in (folder / "commits").iterdir()}
    assert {file.stem.removeprefix("logits-") for file in folder.glob("logits-*")} == shards
    place.pipeline("cache-teacher", CONFIG, *SLOW_CACHE)
    place.pipeline("--runs", "straight", "prepare-data", CONFIG, *SLOW_CACHE)
    same_files(folder, place.path / place.json("--runs", "straight", "cache-teacher", CONFIG, *SLOW_CACHE)["folder"])


def test_a_notice_that_the_machine_goes_away_stops_training_at_a_checkpoint(done: Place, tmp_path: Path):
    place = copied(done, tmp_path / "copy")
    shutil.rmtree(place.path / "runs" / "train-student")
    folder = told_to_stop(place, "train-student", CONFIG, *SLOW_TRAINING, "--set", "machine.checkpoint_steps=5")
    steps = sorted(int(file.stem.removeprefix("step-")) for file in (folder / "commits").iterdir())
    assert steps[0] == 5
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == steps[-1]
    worked = json.loads((folder / "commits" / f"step-{steps[-1]:07d}.json").read_text())["info"]["seconds"]
    process = place.start("train-student", CONFIG, *SLOW_TRAINING, "--set", "machine.checkpoint_steps=5")
    process.communicate()
    finished = FinishedFolder(folder)
    assert worked < finished.summary["seconds"] <= worked + finished.manifest["machine"]["seconds"] + 0.2  # both sittings
    straight = place.start("--runs", "straight", "train-student", CONFIG, *SLOW_TRAINING, "--use", f"cache-teacher={done.finished('cache-teacher').path}")
    straight.communicate()
    (other,) = (place.path / "straight" / "train-student").glob("*")
    one, two = (load_file(path / "student" / "model.safetensors") for path in (folder, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_teacher_whose_weights_are_nan_is_refused_for_real(own: Place):
    from safetensors.torch import save_file

    weights = own.path / "tiny" / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    own.pipeline("prepare-data", CONFIG)
    assert "NaN" in own.pipeline("cache-teacher", CONFIG, status=1)


def test_an_exploding_training_stops_and_keeps_its_checkpoint(done: Place, tmp_path: Path):
    place = copied(done, tmp_path / "copy")
    message = place.pipeline("train-student", CONFIG, "--set", "training.learning_rate=1e30", "--set", "training.max_gradient_norm=1e30", "--set", "training.warmup_steps=0", status=1)
    assert "learning_rate" in message


def test_a_full_disk_is_one_clear_error_and_the_next_run_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch):
    import pyarrow.parquet as pq

    place.pipeline("prepare-data", CONFIG)
    real = pq.ParquetWriter.write_table
    calls = []

    def full(self, table, *arguments, **options):
        calls.append(1)
        if len(calls) == 6:  # in the second shard
            raise OSError(28, "No space left on device", "logits-00001.parquet")
        real(self, table, *arguments, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    message = place.pipeline("cache-teacher", CONFIG, status=1)
    assert "No space left" in message
    assert "goes on where it stopped" in message
    monkeypatch.setattr(pq.ParquetWriter, "write_table", real)
    assert not list((place.path / "runs" / "cache-teacher").rglob(".unfinished-*"))
    assert place.json("status", CONFIG)["stages"][1]["state"].startswith("begun 1 of ")
    place.pipeline("cache-teacher", CONFIG)
    assert "Everything" in place.pipeline("verify", str(place.finished("cache-teacher").path))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["prepare-data", "no.yaml"], ["no.yaml", "cannot be read"]),
        (["prepare-data", CONFIG, "--set", "data.train.0.path=no.jsonl"], ["no.jsonl", "No file"]),
        (["cache-teacher", CONFIG, "--set", "teacher.model=nowhere"], ["nowhere", "revision"]),
        (["cache-teacher", CONFIG, "--set", "data.train.0.limit=3"], ["needs prepare-data", "pipeline prepare-data", "data.train.0.limit"]),
        (["evaluate", CONFIG, "--set", "training.seed=9"], ["needs train-student", "training.seed"]),
        (["train-student", CONFIG, "--use", "cache-teacher=tiny"], ["tiny", "no finished folder"]),
        (["train-student", CONFIG, "--use", "teacher=tiny"], ["there is no stage 'teacher'"]),
        (["train-student", CONFIG, "--set", "student.layers=[0, 9]"], ["student.layers", "0 to 3"]),
        (["prepare-data", CONFIG, "--set", "data.train.0.fields={user: question, asistant: answer}"], ["asistant"]),
        (["prepare-data", CONFIG, "--set", "data.train.0.fields={user: question, assistant: nothing}"], ["train.jsonl line 1", "no answer", "incomplete: drop"]),
        (["cache-teacher", CONFIG, "--set", "data.template=chat"], ["chat template", "plain"]),
        (["train-student", CONFIG, "--set", "training.temperature=9"], ["training.temperature", "targets.logits.temperatures"]),
        (["inspect", "tiny"], ["tiny", "manifest.json"]),
        (["train-student", CONFIG, "--set", "machine.device=cuda"], ["cuda"]),
    ],
)
def test_bad_input_gets_one_clear_error(done: Place, tmp_path: Path, words: list[str], wanted: list[str]):
    place = copied(done, tmp_path / "copy")
    if "data.template=chat" in words[-1]:
        place.pipeline("prepare-data", *words[1:])
    if torch.cuda.is_available() and "machine.device=cuda" in words[-1]:
        pytest.skip("there is a CUDA device")
    if words[0] == "train-student" and any(word.startswith(("student", "machine")) for word in words):
        words = [*words, "--set", "training.seed=77"]
    message = place.pipeline(*words, status=2)
    assert all(part in message for part in wanted), message


def test_a_projection_for_another_vocabulary_is_refused(done: Place, made: Path, tmp_path: Path):
    place = copied(done, tmp_path / "copy")
    other = ["--set", "teacher.model=tiny/student"]
    place.pipeline("cache-teacher", CONFIG, *other)
    foreign = place.json("cache-teacher", CONFIG, *other)["folder"]
    mine = place.json("fit-projection", CONFIG)["folder"]
    message = place.pipeline("train-student", CONFIG, "--use", f"cache-teacher={foreign}", "--use", f"fit-projection={mine}", status=2)
    assert "another teacher vocabulary" in message


def test_a_checkpoint_that_lacks_layers_or_has_too_many_is_refused(own: Place):
    config = own.path / "tiny" / "teacher" / "config.json"
    own.pipeline("prepare-data", CONFIG)
    for layers in (3, 1):
        settings = json.loads(config.read_text())
        settings |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
        config.write_text(json.dumps(settings))
        assert "model.layers." in own.pipeline("cache-teacher", CONFIG, status=2)


def test_a_student_with_another_models_tokenizer_is_refused(own: Place):
    for name in ("prepare-data", "cache-teacher", "fit-projection"):
        own.pipeline(name, CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(own.path / "tiny" / "teacher" / name, own.path / "tiny" / "student" / name)
    assert "not of the same model" in own.pipeline("train-student", CONFIG, status=2)


def test_a_second_process_on_the_same_folder_is_refused(place: Place):
    from pipeline.errors import InputError

    first = RunFolder(place.path / "folder")
    with pytest.raises(InputError, match="Another process is writing"):
        RunFolder(place.path / "folder")
    first.close()
    RunFolder(place.path / "folder").close()


def test_status_survives_damage_elsewhere_and_names_damage_here(done: Place, tmp_path: Path):
    place = copied(done, tmp_path / "copy")
    folder = place.finished("cache-teacher").path
    (folder / "plan.json").write_text("x")
    assert place.json("status", CONFIG)["stages"][1]["state"] == "done"
    (folder / "manifest.json").write_text("{}")
    assert place.json("status", CONFIG)["stages"][1]["state"] == "damaged"
    assert place.json("status", CONFIG, "--set", "targets.logits.keep=4")["stages"][1]["nearest"] is None
    evaluated = place.finished("evaluate").path
    (evaluated / "results.json").unlink()
    shutil.copyfile(done.finished("cache-teacher").path / "manifest.json", folder / "manifest.json")
    assert "results.json is missing" in place.pipeline("evaluate", CONFIG, status=1)


@pytest.mark.parametrize("weights", ["{herat: 2.0}", "{heart: 0.0, kidney: 0.0, liver: 0.0, lung: 0.0, eye: 0.0, ear: 0.0, skin: 0.0, nerve: 0.0}"])
def test_specialty_weights_without_effect_or_without_weight_are_refused(done: Place, tmp_path: Path, weights: str):
    place = copied(done, tmp_path / "copy")
    assert "specialty_weights" in place.pipeline("train-student", CONFIG, "--set", f"training.specialty_weights={weights}", status=2)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "its commit"])
def test_a_damaged_checkpoint_goes_to_the_quarantine_and_the_one_before_leads_to_the_same_bits(done: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str):
    place = copied(done, tmp_path / "copy")
    shutil.rmtree(place.path / "runs" / "train-student")
    stop_after_the_second_checkpoint(place, monkeypatch)
    (folder,) = (place.path / "runs" / "train-student").glob("*")
    newest = folder / "checkpoints" / "step-0000008.safetensors"
    if damage == "its commit":
        (folder / "commits" / "step-0000008.json").write_text("{}")
    else:
        data = bytearray(newest.read_bytes())
        data[len(data) // 2] ^= 1
        newest.write_bytes(data if damage == "a flipped bit" else data[:-10])
    report = place.json("train-student", CONFIG)
    assert list(folder.glob("quarantine/*/commits/step-0000008.json"))
    one, two = (load_file(runs / "train-student" / report["fingerprint"] / "student" / "model.safetensors") for runs in (place.path / "runs", done.path / "runs"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_no_secret_of_the_environment_or_of_a_setting_is_written_down(place: Place, monkeypatch: pytest.MonkeyPatch):
    """Tokens that a hub or a cloud reads from the environment, and a password in a file's address."""
    canaries = {"HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary", "AWS_SECRET_ACCESS_KEY": "AKIACANARYCANARY", "WANDB_API_KEY": "canary0123456789"}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    place.pipeline("run", CONFIG)
    message = place.pipeline("prepare-data", CONFIG, "--set", "data.train.0.path=https://user:hunter2canary@example.org/x.jsonl", status=2)
    assert "data.train.0.path" in message
    message += place.pipeline("prepare-data", CONFIG, "--set", "teacher.model=hf_CanaryCanaryCanaryCanaryCanary", status=2)
    written = b"".join(file.read_bytes() for file in (place.path / "runs").rglob("*") if file.is_file()) + message.encode()
    assert not [value for value in canaries.values() if value.encode() in written]
    assert b"tiny/teacher" in written  # the control: what is in a setting is found
    assert b"hunter2canary" not in written


def test_strict_numerics_refuse_to_mix_and_tolerant_ones_say_so(place: Place, monkeypatch: pytest.MonkeyPatch):
    strict, batch = ["--set", "machine.numerics=strict"], ["--set", "machine.teacher_batch_records=3"]
    place.pipeline("prepare-data", CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(stages.cache_teacher, "_check_room", interrupted_once_there_is_a_shard)
        place.pipeline("cache-teacher", CONFIG, *strict, status=1)
    told = place.pipeline("cache-teacher", CONFIG, *strict, *batch, status=2)
    assert "batch_records" in told
    assert "(here 3)" in told
    shutil.copytree(place.path / "runs", place.path / "same")
    assert not place.json("--runs", "same", "cache-teacher", CONFIG, *strict)["summary"]["mixed_numerics"]
    assert place.json("cache-teacher", CONFIG, *batch)["summary"]["mixed_numerics"]


def interrupted_once_there_is_a_shard(out: RunFolder, shards) -> bool:
    if set(out.names()) & set(shards):
        raise KeyboardInterrupt
    return False


def test_a_cache_that_will_not_fit_is_refused_after_its_first_shard(place: Place, monkeypatch: pytest.MonkeyPatch):
    place.pipeline("prepare-data", CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
        told = place.pipeline("cache-teacher", CONFIG, status=1)
    assert "need about" in told
    assert "1e-07 GB free" in told
    place.pipeline("cache-teacher", CONFIG)
