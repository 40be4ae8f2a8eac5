"""The stage: done in pieces by any number of processes, gone on with where it was killed; and `pipeline inspect-projection`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import stages.fit_projection
import stages.train_student
from pipeline.cache.reader import Cache
from pipeline.running.folder import RunFolder
from pipeline.signals.fitting import Places
from pipeline.signals.projection import REST, TokenMap
from tests.conftest import CONFIG, Place
from tests.test_reliability import copied, same_files


@pytest.fixture
def cached(done: Place, tmp_path: Path) -> Place:
    """A cache, and no projection yet."""
    place = copied(done, tmp_path / "copy")
    shutil.rmtree(place.path / "runs" / "fit-projection")
    return place


def test_two_processes_do_it_together_and_one_that_was_stopped_is_gone_on_with(done: Place, cached: Place, monkeypatch: pytest.MonkeyPatch):
    real, made = stages.fit_projection.write_shares, []

    def stops(path, *arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stages.fit_projection, "write_shares", stops)
        cached.pipeline("fit-projection", CONFIG, status=1)
    (begun,) = (cached.path / "runs" / "fit-projection").iterdir()
    assert "begun 2 of 7 shards" in cached.pipeline("status", CONFIG)
    before = {name: (begun / name).stat().st_mtime_ns for name in made}
    both = [cached.start("fit-projection", CONFIG) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert {name: (begun / name).stat().st_mtime_ns for name in made} == before
    same_files(begun, done.finished("fit-projection").path)
    assert "Everything" in cached.pipeline("verify", str(begun), "--deep")


def test_a_damaged_piece_is_made_again(done: Place, cached: Place):
    cached.pipeline("fit-projection", CONFIG)
    path = cached.finished("fit-projection").path
    data = bytearray((path / "shares-00001.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "shares-00001.parquet").write_bytes(data)
    shutil.rmtree(cached.path / "runs" / "train-student")
    assert "shares-00001.parquet is damaged" in cached.pipeline("train-student", CONFIG, status=1)
    cached.invoke("verify", str(path), "--repair")
    cached.pipeline("fit-projection", CONFIG)
    same_files(path, done.finished("fit-projection").path)


def test_values_without_tokens_need_the_loss_that_asks_for_no_more(cached: Place):
    told = cached.pipeline("train-student", CONFIG, "--set", "projection.method=uld", status=2)
    assert "projection.method uld" in told
    assert "forward_kl" in told
    cached.pipeline("run", CONFIG, "--set", "projection.method=uld", "--set", "training.objective=[{loss: uld}, {loss: alm}]", "--set", "evaluation.control=false")
    results = json.loads((cached.path / "runs" / "tiny" / "results.json").read_text())
    assert results["models"]["distilled"]["kl_to_teacher"] is None
    assert results["models"]["distilled"]["bits_per_byte"] > 0


@pytest.mark.parametrize("method", ["learned", "low_rank"])
def test_what_was_trained_is_trained_once(cached: Place, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch):
    real, made = stages.fit_projection.fit, []

    def counted(*arguments, **how):
        made.append(how)
        return real(*arguments, **how)

    def stops(*_):
        raise KeyboardInterrupt

    chosen = ("--set", f"projection.method={method}")
    monkeypatch.setattr(stages.fit_projection, "fit", counted)
    with monkeypatch.context() as patch:
        patch.setattr(stages.fit_projection, "write_map", stops)
        cached.pipeline("fit-projection", CONFIG, *chosen, status=1)
    cached.pipeline("fit-projection", CONFIG, *chosen)
    assert len(made) == 1
    begun = cached.finished("fit-projection")
    assert {"projection-weights.safetensors", "counts.parquet"} <= set(begun.names())
    assert begun.summary["nats_after"] <= begun.summary["nats_before"]
    assert begun.summary["places"] > 100
    other = copied(cached, tmp_path / "other")
    shutil.rmtree(other.path / "runs" / "fit-projection")
    other.pipeline("fit-projection", CONFIG, *chosen)
    same_files(begun.path, other.finished("fit-projection").path)
    other.pipeline("fit-projection", CONFIG, *chosen, "--set", "projection.learning_rate=0.1")
    assert len(made) == 3


def test_a_student_is_trained_with_values(cached: Place):
    objective = "training.objective=[{loss: forward_kl}, {loss: cross_entropy}]"
    cached.pipeline("run", CONFIG, "--set", "projection.method=low_rank", "--set", objective, "--set", "evaluation.control=false")
    results = json.loads((cached.path / "runs" / "tiny" / "results.json").read_text())
    assert results["models"]["distilled"]["kl_to_teacher"] > 0
    assert "Everything" in cached.pipeline("verify", str(cached.finished("fit-projection").path), "--deep")


@pytest.mark.parametrize("method", ["contextual", "learned", "low_rank", "count_transport", "first_token", "exact_bytes"])
def test_what_a_projection_is_worth_is_told_before_any_training(cached: Place, method: str):
    cached.pipeline("fit-projection", CONFIG, "--set", f"projection.method={method}")
    path = str(cached.finished("fit-projection").path)
    found = cached.json("inspect-projection", path)
    assert {"coverage", "retained_mass", "agreement", "agreement_ceiling", "bits_per_byte_gap", "ir", "nmi", "nmi_random_map"} <= found.keys()
    assert found["method"] == method
    assert sum(row["positions"] for row in found["strata"].values()) == found["positions"]
    assert 0 < found["retained_mass"] <= 1
    assert 0.9 < found["nmi_random_map"] <= 1
    assert 0.5 < found["coverage"] <= 1
    assert f"{method}: 9 held-out records" in cached.pipeline("inspect-projection", path)


def test_the_cache_may_lie_elsewhere_and_must_be_the_right_one(cached: Place):
    cached.pipeline("fit-projection", CONFIG)
    path, cache = cached.finished("fit-projection").path, cached.finished("cache-teacher").path
    cache.rename(cached.path / "elsewhere")
    assert "--cache" in cached.pipeline("inspect-projection", str(path), status=2)
    cached.json("inspect-projection", str(path), "--cache", str(cached.path / "elsewhere"))
    assert "is not the cache" in cached.pipeline("inspect-projection", str(path), "--cache", str(cached.finished("prepare-data").path), status=2)
    assert "not a projection" in cached.pipeline("inspect-projection", str(cached.finished("prepare-data").path), status=2)


def test_the_teacher_itself_is_asked_if_it_is_the_one_that_made_the_cache(cached: Place):
    cached.pipeline("fit-projection", CONFIG)
    path = str(cached.finished("fit-projection").path)
    found = cached.json("inspect-projection", path, "--teacher-positions", "12")["teacher"]
    assert found["positions"] == sum(row["positions"] for row in found["strata"].values()) <= 12
    # this teacher is nearly sure of every token
    assert 0 < found["tv"] < 0.05
    assert 0 <= found["kl"] < 0.05
    assert found["strongest_the_same"] == 1
    assert "the teacher itself, asked at" in cached.pipeline("inspect-projection", path, "--teacher-positions", "3")
    assert "teacher" not in cached.json("inspect-projection", path)
    models = (cached.path / "tiny").resolve()
    (cached.path / "tiny").unlink()  # it is everybody's
    shutil.copytree(models, cached.path / "tiny")
    config = cached.path / "tiny" / "teacher" / "config.json"
    config.write_text(config.read_text() + " ")
    assert "is not the teacher that made the cache" in cached.pipeline("inspect-projection", path, "--teacher-positions", "3", status=2)


def test_an_identity_needs_no_teacher_to_be_measured(cached: Place):
    cached.pipeline("fit-projection", CONFIG, "--set", "student.model=tiny/teacher")
    assert "is the identity" in cached.pipeline("inspect-projection", str(cached.finished("fit-projection").path), "--teacher-positions", "3", status=2)


def test_likelihoods_with_a_boundary_need_a_cache_with_the_masses_of_boundaries(cached: Place):
    objective = ("--set", "training.objective=[{loss: alm, boundary: true}, {loss: cross_entropy}]", "--set", "evaluation.control=false")
    assert "targets.logits.boundary: true" in cached.pipeline("train-student", CONFIG, *objective, status=2)
    without = str(cached.finished("cache-teacher").path)
    assert "made without boundary" in cached.pipeline("train-student", CONFIG, *objective, "--use", f"cache-teacher={without}", status=2)
    cached.pipeline("run", CONFIG, *objective, "--set", "targets.logits.boundary=true")
    results = json.loads((cached.path / "runs" / "tiny" / "results.json").read_text())
    assert results["models"]["distilled"]["bits_per_byte"] > 0


def test_an_identity_is_measured_as_what_it_is(cached: Place):
    cached.pipeline("fit-projection", CONFIG, "--set", "student.model=tiny/teacher")
    path = str(cached.finished("fit-projection").path)
    found = cached.json("inspect-projection", path)
    assert found["agreement_ceiling"] == found["coverage"] == found["nmi"] == 1
    assert found["agreement"] == (1 if found["agreement_positions"] else None)
    assert found["bits_per_byte_gap"] == pytest.approx(0, abs=2e-3)
    assert found["ir"] is None or found["ir"] == pytest.approx(1, abs=5e-3)
    cache = Cache(cached.finished("cache-teacher").file)
    nats = [-row for example in cache.examples("heldout") if not example.record.choice_of for row in example.targets.realised_logprob.tolist()]
    strata = found["strata"].values()
    assert sum(row["realised_nll"] * row["positions"] for row in strata) / found["positions"] == pytest.approx(sum(nats) / len(nats), rel=1e-2, abs=2e-3)


def test_a_projection_that_places_nothing_is_an_error(cached: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages.fit_projection, "find", lambda kind, name: lambda teacher, student, encode, counts: TokenMap(np.full(len(teacher), REST, dtype=np.int32)))
    told = cached.pipeline("fit-projection", CONFIG, "--set", "projection.method=count_transport", status=2)
    assert "does projection.method count_transport place any" in told


@pytest.mark.parametrize("other", ["{method: low_rank, epochs: 4, seed: 7}", "{method: low_rank, epochs: 4, rank: 32}"])
def test_an_epoch_of_another_run_is_put_away(cached: Place, tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch):
    chosen = ("--set", "projection={method: low_rank, epochs: 4}")
    theirs, right = copied(cached, tmp_path / "theirs"), copied(cached, tmp_path / "right")
    right.pipeline("fit-projection", CONFIG, *chosen)
    commit = RunFolder.commit

    def stops(folder, name: str, files, **info):
        commit(folder, name, files, **info)
        if name == "epoch-0002":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "commit", stops)
        theirs.pipeline("fit-projection", CONFIG, "--set", f"projection={other}", status=1)
    [foreign] = (theirs.path / "runs" / "fit-projection").iterdir()
    here = cached.path / "runs" / "fit-projection" / right.finished("fit-projection").path.name
    for name in ("commits/epoch-0002.json", "checkpoints/epoch-0002.safetensors"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(foreign / name, here / name)
    cached.pipeline("fit-projection", CONFIG, *chosen)
    assert list(here.glob("quarantine/*/commits/epoch-0002.json"))
    shutil.rmtree(here / "quarantine")
    same_files(here, right.finished("fit-projection").path)


def test_a_damaged_commit_of_an_epoch_that_has_served_does_no_harm(cached: Place, monkeypatch: pytest.MonkeyPatch):
    chosen = ("--set", "projection={method: low_rank, epochs: 2}")

    def stops(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.fit_projection, "write_map", stops)
        cached.pipeline("fit-projection", CONFIG, *chosen, status=1)
    [folder] = (cached.path / "runs" / "fit-projection").iterdir()
    [epoch] = folder.glob("commits/epoch-*")
    epoch.write_bytes(epoch.read_bytes()[:50])
    assert "begun" in cached.pipeline("status", CONFIG, *chosen)
    cached.pipeline("fit-projection", CONFIG, *chosen)
    assert "Everything" in cached.pipeline("verify", str(folder))


def test_training_that_was_killed_goes_on_from_its_last_epoch(cached: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chosen = ("--set", "projection={method: low_rank, epochs: 4}")
    other = copied(cached, tmp_path / "other")
    other.pipeline("fit-projection", CONFIG, *chosen)
    batches: list[int] = []
    real = Places.batches

    def counted(places: Places, order: np.ndarray):
        batches.append(len(order))
        return real(places, order)

    def stops(folder, name: str, files, **info):
        commit(folder, name, files, **info)
        if name == "epoch-0003":
            raise KeyboardInterrupt

    commit = RunFolder.commit
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "commit", stops)
        cached.pipeline("fit-projection", CONFIG, *chosen, status=1)
    monkeypatch.setattr(Places, "batches", counted)
    cached.pipeline("fit-projection", CONFIG, *chosen)
    same_files(cached.finished("fit-projection").path, other.finished("fit-projection").path)
    most = max(batches)
    assert batches.count(most) == 1  # the fourth epoch only
    assert not list(cached.finished("fit-projection").path.rglob("epoch-*"))


@pytest.mark.parametrize("tail", ["hidden", "calibrated"])
def test_a_distribution_of_its_own_has_no_tail_of_the_teachers(cached: Place, tail: str):
    chosen = ("--set", "projection.method=low_rank", "--set", f"training.objective=[{{loss: forward_kl, tail: {tail}}}]", "--set", "targets.logits.hidden=int8")
    cached.pipeline("cache-teacher", CONFIG, *chosen)
    assert "cannot shape it" in cached.pipeline("train-student", CONFIG, *chosen, status=2)


def test_the_tail_from_hidden_states_is_that_of_the_tokens_that_are_not_kept(cached: Place, monkeypatch: pytest.MonkeyPatch):
    """The teacher's own logits come out of the cache, and what it keeps at a row has no part there."""
    chosen = ("--set", "training.objective=[{loss: forward_kl, tail: hidden}]", "--set", "targets.logits={keep: 16, hidden: int8}", "--set", "training.temperature=1.0", "--set", "training.steps=2")
    shutil.rmtree(cached.path / "runs" / "cache-teacher")
    cached.pipeline("cache-teacher", CONFIG, *chosen)
    cache = Cache(cached.finished("cache-teacher").file)
    said = {}
    for example in cache.examples("train"):
        ends = np.cumsum(example.targets.kept.astype(np.int64))
        for i, end in enumerate(ends.tolist()):
            ids = example.targets.ids[end - int(example.targets.kept[i]) : end]
            said[frozenset([*ids.tolist(), int(example.tokens.ids[example.targets.position[i] + 1])])] = float(np.exp(example.targets.rests[0, i]))
    real, seen = stages.train_student.placed_logits, []

    def looked_at(logits, kept, *others):
        p = logits.double().softmax(-1)
        for row in range(len(logits)):
            ids = kept[1][kept[0] == row].tolist()
            left = float(1 - p[row, ids].sum())
            seen.append((left, said[frozenset(ids)]))
        return real(logits, kept, *others)

    monkeypatch.setattr(stages.train_student, "placed_logits", looked_at)
    cached.pipeline("train-student", CONFIG, *chosen)
    assert len(seen) > 100
    ours, theirs = np.array(seen).T
    assert (ours <= theirs + 0.02).all()  # the realised token is out of it, too


def test_weights_that_were_damaged_and_are_others_when_trained_again_make_anew_what_was_made_with_them(cached: Place, monkeypatch: pytest.MonkeyPatch):
    chosen = ("--set", "projection.method=low_rank")
    cached.pipeline("fit-projection", CONFIG, *chosen)
    path = cached.finished("fit-projection").path
    before = {file.name: file.read_bytes() for file in path.glob("values-*")}
    weights = path / "projection-weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    cached.invoke("verify", str(path), "--repair")
    real = stages.fit_projection.fit
    monkeypatch.setattr(stages.fit_projection, "fit", lambda *arguments, **how: real(*arguments, **how | {"seed": 1}))
    cached.pipeline("fit-projection", CONFIG, *chosen)
    after = {file.name: file.read_bytes() for file in path.glob("values-*")}
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


@pytest.mark.parametrize("method", ["contextual", "low_rank"])
def test_records_that_the_students_tokenizer_does_not_keep_are_left_out_and_counted(cached: Place, method: str):
    tiny = (cached.path / "tiny").resolve()
    (cached.path / "tiny").unlink()  # it is everybody's
    shutil.copytree(tiny, cached.path / "tiny")
    with (cached.path / "tiny" / "train.jsonl").open("a", encoding="utf-8") as file:
        for number in range(24):
            file.write(json.dumps({"question": f"What is fibrose\u0301 {number}?", "answer": f"a kind of e\u0301 {number}"}) + "\n")
    shutil.rmtree(cached.path / "runs")
    composes = cached.path / "tiny" / "composes"
    shutil.copytree(tiny / "student", composes)
    tokenizer = json.loads((composes / "tokenizer.json").read_text())
    (composes / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "NFC"}}))
    chosen = ("--set", "student.model=tiny/composes", "--set", f"projection.method={method}", "--set", "training.objective=[{loss: forward_kl}, {loss: cross_entropy}]")
    cached.pipeline("run", CONFIG, *chosen, "--set", "training.validation={every: 10, records: 4}", "--set", "evaluation.control=false")
    refused = cached.finished("fit-projection").summary["refused"]
    assert len(refused) == cached.finished("fit-projection").summary["refused_records"] == 24
    cache = Cache(cached.finished("cache-teacher").file)
    assert {example.record.id for split in ("train", "heldout") for example in cache.examples(split) if "fibrose\u0301" in example.record.segments[0].text} == set(refused)
    assert all(cache.example(tuple(place)).record.id == id for id, place in refused.items())
    here = sum(example.record.id in refused for example in cache.examples("train"))
    assert 0 < here < 24
    assert cached.finished("train-student").summary["records"] == cache.count("train") - here - 4
    results = json.loads((cached.path / "runs" / "tiny" / "results.json").read_text())
    assert results["refused_records"] == 24
    assert results["heldout_records"] == sum(not example.record.choice_of for example in cache.examples("heldout")) - (24 - here)
    assert cached.json("inspect-projection", str(cached.finished("fit-projection").path))["refused_records"] == 24


def test_records_that_the_teachers_tokenizer_does_not_keep_are_rejected_and_counted(cached: Place):
    tiny = (cached.path / "tiny").resolve()
    (cached.path / "tiny").unlink()  # it is everybody's
    shutil.copytree(tiny, cached.path / "tiny")
    with (cached.path / "tiny" / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "odd", "question": "What is \u2581?", "answer": "a sign"}) + "\n")
    told = cached.pipeline("run", CONFIG, status=2)
    assert "odd" in told
    assert "machine.max_rejected" in told
    shutil.rmtree(cached.path / "runs" / "cache-teacher")
    cached.pipeline("cache-teacher", CONFIG, "--set", "machine.max_rejected=0.1")
    assert cached.finished("cache-teacher").summary["rejected"] == 1
    (said,) = json.loads(cached.finished("cache-teacher").file("cache.json").read_text())["rejected"]
    assert said["id"].endswith("odd")
    assert "does not keep its bytes" in said["reason"]
