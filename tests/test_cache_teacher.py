"""What cache-teacher keeps with each setting of targets.logits, held against the same teacher asked directly."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.reader import Cache, Example
from pipeline.cache.schema import Logits
from pipeline.cache.writer import Shard
from pipeline.models.heads import KeptHead
from pipeline.models.loading import load_teacher
from pipeline.running.folder import FinishedFolder
from pipeline.signals.codec import REST_STEP, logprob_error, step_table
from pipeline.signals.targets import Targets
from pipeline.signals.vocabulary import CLASSES, first_byte_classes
from tests.conftest import CONFIG, Place, link_inputs
from tests.signals.dense import kept_of, log_softmax, log_sum

FEWER = ("--set", "data.train.0.limit=20")
ALL = ("entropy", "logsumexp", "boundary", "hidden")


@pytest.fixture(scope="module")
def prepared(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With prepare-data done, of fewer records; each setting is another run in it."""
    place = link_inputs(made, tmp_path_factory.mktemp("caches"))
    place.pipeline("prepare-data", CONFIG, *FEWER)
    return place


@pytest.fixture(scope="module")
def model(made: Path) -> torch.nn.Module:
    return load_teacher(str(made / "tiny" / "teacher"), None, "none", True, "float32", torch.device("cpu"))


UNTEMPERED = ("--set", "training.objective.0.tail=rest", "--set", "training.temperature=1")
"""What can be trained with draws."""


def setting(logits: str) -> tuple[str, ...]:
    return ("--set", f"targets.logits={logits}", *(UNTEMPERED if "sampled" in logits else ()))


def cached(place: Place, *words: str, extras: tuple[str, ...] = ()) -> tuple[Cache, Path]:
    folder = place.path / place.json("cache-teacher", CONFIG, *FEWER, *words)["folder"]
    return Cache(FinishedFolder(folder).file, extras), folder


def logits_of(model: torch.nn.Module, example: Example, cache: Cache) -> np.ndarray:
    """float64 [P, V] of the record alone, at the described positions."""
    with torch.inference_mode():
        ids = torch.from_numpy(example.tokens.ids.astype(np.int64))[None]
        return model(ids).logits[0, example.targets.position, : cache.about["vocabulary_size"]].double().numpy()


def parts(targets: Targets, values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(targets.kept.astype(np.int64)))[:-1]


def check_kept(cache: Cache, model: torch.nn.Module, threshold: float, least: int, most: int, records: int = 10) -> list[int]:
    """Ids as a dense reference has them, log-probabilities within the codec's error; gives how many are kept at each position."""
    table = step_table(0.02, 0.5)
    counts = []
    for example in [*cache.examples("train")][:records]:
        rows = logits_of(model, example, cache)
        logprobs = log_softmax(rows)
        targets = example.targets
        for i, (row, ids, found) in enumerate(zip(logprobs, parts(targets, targets.ids), parts(targets, targets.logprobs), strict=True)):
            margin = np.abs(row - np.log(max(threshold, 1e-30))).min()
            if margin > 1e-4:  # else it is a matter of float32 whether one more is kept
                assert sorted(ids.tolist()) == kept_of(row, threshold, least, most)
            error = 1.5 * logprob_error(row[ids], table) + 1e-3
            assert (np.abs(found - row[ids]) <= error + max(error.max(), REST_STEP / 2)).all()
            assert ids[found.argmax()] == row.argmax()
            others = np.delete(row, ids)
            for rest, temperature in zip(targets.rests[1:, i], cache.temperatures[1:], strict=True):
                assert rest == pytest.approx(log_sum(others / temperature), abs=REST_STEP / 2 + 0.01)
            assert targets.realised_logprob[i] == pytest.approx(row[example.tokens.ids[targets.position[i] + 1]], abs=1e-3)
        counts += targets.kept.tolist()
    return counts


# --- which tokens ---


@pytest.mark.parametrize(
    ("logits", "threshold", "least", "most"), [("{}", 0.002, 4, 128), ("{threshold: 0.01, min: 2, keep: 10}", 0.01, 2, 10), ("{threshold: 0.3, keep: 40}", 0.3, 4, 40), ("{keep: 3}", 0.002, 3, 3)]
)
def test_every_token_from_the_threshold_on_is_kept_within_min_and_keep(prepared: Place, model: torch.nn.Module, logits: str, threshold: float, least: int, most: int):
    change = setting(logits)
    # tiny.yaml itself says keep: 16, and a mapping that is set takes the place of all that
    cache, _ = cached(prepared, *change)
    counts = check_kept(cache, model, threshold, least, most)
    assert least <= min(counts)
    assert max(counts) <= most
    assert len(set(counts)) > 1 or least == most or threshold == 0.3, counts[:9]


@pytest.mark.parametrize("keep", [1, 5, 2000])
def test_without_a_threshold_exactly_keep_tokens_are_kept(prepared: Place, model: torch.nn.Module, keep: int):
    cache, _ = cached(prepared, *setting(f"{{threshold: 0, keep: {keep}}}"))
    most = min(keep, cache.about["vocabulary_size"])
    assert set(check_kept(cache, model, 0.0, 1, most, records=4)) == {most}
    if keep == 2000:
        assert all((example.targets.rests == -np.inf).all() for example in cache.examples("heldout"))


def test_positions_all_describes_every_position_with_the_same_numbers(prepared: Place, model: torch.nn.Module):
    cache, _ = cached(prepared, *setting("{keep: 16}"), "--set", "targets.positions=all")
    answers, _ = cached(prepared, *setting("{keep: 16}"))
    assert all(example.targets.position.tolist() == list(range(len(example.tokens) - 1)) for example in cache.examples("train"))
    check_kept(cache, model, 0.002, 4, 16, records=4)
    for example, answer in zip(cache.examples("heldout"), answers.examples("heldout"), strict=True):
        wanted = answer.targets.position
        assert wanted.tolist() == example.tokens.answer_positions().tolist()
        np.testing.assert_allclose(example.targets.realised_logprob[wanted], answer.targets.realised_logprob, atol=1e-4)


def test_other_temperatures_are_kept(prepared: Place, model: torch.nn.Module):
    cache, _ = cached(prepared, *setting("{keep: 8, temperatures: [1.0, 1.5, 3.0]}"))
    assert cache.temperatures == [1.0, 1.5, 3.0]
    check_kept(cache, model, 0.002, 4, 8, records=4)


# --- sampled ---


def test_what_is_sampled_sums_to_the_draws_and_is_the_teachers_distribution_on_the_average(prepared: Place, model: torch.nn.Module):
    cache, folder = cached(prepared, *setting("{method: sampled, keep: 20}"), extras=("entropy",))
    assert cache.tail() is None
    difference, variance, positions = 0.0, 0.0, 0
    for example in cache.examples("train"):
        targets = example.targets
        assert targets.counts is not None
        assert [int(part.sum()) for part in parts(targets, targets.counts)] == [20] * len(targets.position)
        assert (targets.rests == -np.inf).all()
        np.testing.assert_allclose(np.exp(targets.logprobs), targets.counts / 20, rtol=1e-5)
        logprobs = log_softmax(logits_of(model, example, cache))
        p = np.exp(logprobs)
        for row, weight, ids, counts in zip(logprobs, p, parts(targets, targets.ids), parts(targets, targets.counts), strict=True):
            difference += (counts / 20 * row[ids]).sum() - (weight * row).sum()
            variance += ((weight * row**2).sum() - (weight * row).sum() ** 2) / 20
            positions += 1
    assert positions > 150
    assert abs(difference) < 4 * np.sqrt(variance)  # the mean of the sampled log-probabilities is minus the entropy
    assert abs(difference + 0.1 * positions) > 4 * np.sqrt(variance)  # control: 0.1 nats off would be seen
    assert not list(folder.glob("tail-*"))


def test_what_is_sampled_does_not_depend_on_the_batch_or_the_shard(prepared: Place):
    cache, _ = cached(prepared, *setting("{method: sampled, keep: 20}"))
    other = prepared.path / "other"
    more = (*FEWER, "--set", "machine.teacher_batch_records=3", "--set", "data.records_per_shard=5")
    prepared.pipeline("--runs", str(other), "prepare-data", CONFIG, *more)
    report = json.loads(prepared.pipeline("--runs", str(other), "cache-teacher", CONFIG, *setting("{method: sampled, keep: 20}"), *more, "--json"))
    again = Cache(FinishedFolder(prepared.path / report["folder"]).file)
    first, second = ({example.record.id: example.targets for example in one.examples("train")} for one in (cache, again))
    assert first.keys() == second.keys()
    same = [sorted(zip(first[id].ids, first[id].counts, strict=True)) == sorted(zip(second[id].ids, second[id].counts, strict=True)) for id in first]
    assert np.mean(same) > 0.95  # another shape of the batch gives other bits, and once in a while another draw


def test_a_student_learns_from_what_was_sampled(prepared: Place):
    words = (*FEWER, *setting("{method: sampled, keep: 20}"), "--set", "training.steps=3")
    prepared.pipeline("cache-teacher", CONFIG, *words)
    assert prepared.json("train-student", CONFIG, *words)["state"] == "done"


# --- what else can be kept ---


def test_hidden_states_and_the_head_give_the_teachers_logits_within_the_error_of_int8(prepared: Place, model: torch.nn.Module):
    cache, folder = cached(prepared, *setting("{keep: 16, hidden: int8}"), extras=("hidden",))
    head = KeptHead(folder / "head.safetensors", torch.device("cpu"))
    weight = model.get_output_embeddings().weight[: cache.about["vocabulary_size"]]
    differences = []
    for example in [*cache.examples("train"), *cache.examples("heldout")][:20]:
        scale = torch.from_numpy(example.targets.hidden_scale)
        with torch.inference_mode():
            found = head(torch.from_numpy(np.array(example.targets.hidden)), scale).double().numpy()
            allowed = 0.5 * scale.double()[:, None] * weight.double().abs().sum(-1)[None]
        true = logits_of(model, example, cache)
        assert (np.abs(found - true) <= allowed.numpy() + 1e-3).all()
        differences.append(np.abs(log_softmax(found) - log_softmax(true)).mean())
        # control: the states of other positions are further off than the error allows
        if len(found) > 1:
            assert (np.abs(np.roll(found, 1, 0) - true) > allowed.numpy() + 1e-3).any()
    assert np.mean(differences) < 0.1
    without, _ = cached(prepared, *setting("{keep: 16}"))
    assert [example.targets.ids.tolist() for example in cache.examples("train")] == [example.targets.ids.tolist() for example in without.examples("train")]


def test_the_masses_of_first_bytes_and_the_logsumexp_are_the_teachers(prepared: Place, model: torch.nn.Module):
    cache, _ = cached(prepared, *setting("{keep: 16, boundary: true, logsumexp: true}"), extras=("entropy", "logsumexp", "boundary"))
    assert cache.about["extras"] == ["entropy", "logsumexp", "boundary"]
    class_of = first_byte_classes(cache.vocabulary())
    for example in [*cache.examples("train")][:10]:
        logits = logits_of(model, example, cache)
        logprobs = log_softmax(logits)
        wanted = np.array([[log_sum(row[class_of == i]) for i in range(len(CLASSES))] for row in logprobs])
        np.testing.assert_allclose(np.maximum(example.targets.boundary, -60), np.maximum(wanted, -60), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(np.exp(example.targets.boundary.astype(np.float64)).sum(-1), 1, atol=5e-3)
        np.testing.assert_allclose(example.targets.logsumexp, [log_sum(row) for row in logits], atol=1e-3)
        np.testing.assert_allclose(example.targets.entropy, -(np.exp(logprobs) * logprobs).sum(-1), rtol=2e-3, atol=1e-3)


def test_everything_at_once_is_kept_verified_and_inspected(prepared: Place):
    words = setting("{keep: 16, hidden: int8, boundary: true, logsumexp: true}")
    cache, folder = cached(prepared, *words, extras=ALL)
    assert all(getattr(example.targets, name) is not None for example in cache.examples("heldout") for name in ALL)
    assert "Everything" in prepared.pipeline("verify", str(folder))
    assert prepared.json("inspect", str(folder))["positions"] > 0


def test_the_tail_is_the_teachers_mean_where_a_token_is_not_kept(prepared: Place, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.models.teacher.TAIL_EVERY", 1)
    cache, folder = cached(prepared, *setting("{keep: 7}"))
    assert cache.about["tail_shards"] == cache.shards("train")  # as they are few
    assert not [shard for shard in cache.shards("heldout") if (folder / f"tail-{shard:05d}.parquet").exists()]
    sums, count = np.zeros((3, cache.about["vocabulary_size"])), 0
    for example in cache.examples("train"):
        for row, ids in zip(logits_of(model, example, cache), parts(example.targets, example.targets.ids), strict=True):
            for i, temperature in enumerate(cache.temperatures):
                p = np.exp(log_softmax(row, temperature))
                p[ids] = 0
                sums[i] += p
            count += 1
    tail = cache.tail()
    assert tail.positions == count
    assert np.abs(tail.log_means - np.log(sums / count)).max() < REST_STEP / 2 + 0.01


# --- stopped and gone on ---


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in {".parquet", ".safetensors"}}


def test_a_shard_whose_commit_was_removed_is_made_again_with_the_same_bytes_and_no_other(place: Place):
    words = setting("{keep: 16, hidden: int8, boundary: true, logsumexp: true}")
    place.pipeline("prepare-data", CONFIG, *FEWER)
    _, folder = cached(place, *words)
    before = files_of(folder)
    stamps = {file: file.stat().st_mtime_ns for file in folder.glob("*-0000[02].parquet")}
    (folder / "manifest.json").unlink()
    (folder / "commits" / "00001.json").unlink()
    for file in folder.glob("*-00001.parquet"):
        file.unlink()
    assert place.json("status", CONFIG, *FEWER, *words)["stages"][1]["state"].startswith("begun 2 of 3")
    cached(place, *words)
    assert files_of(folder) == before
    assert len(stamps) > 6
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}


def test_a_kept_head_that_is_damaged_is_made_again_alone(place: Place):
    words = setting("{keep: 16, hidden: int8}")
    place.pipeline("prepare-data", CONFIG, *FEWER)
    _, folder = cached(place, *words)
    before = files_of(folder)
    stamps = {file: file.stat().st_mtime_ns for file in folder.glob("*-0000?.parquet")}
    data = bytearray(before["head.safetensors"])
    data[-5] ^= 1
    (folder / "head.safetensors").write_bytes(data)
    with pytest.raises(AssertionError, match=r"head\.safetensors is damaged"):
        place.pipeline("verify", str(folder), "--repair")
    cached(place, *words)
    assert files_of(folder) == before
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "a file"), ValueError("a bug")])
def test_an_error_in_writing_a_shard_stops_the_stage_and_a_rerun_ends_with_the_same_bytes(place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception):
    place.pipeline("prepare-data", CONFIG, *FEWER)
    shutil.copytree(place.path / "runs", place.path / "straight")
    real = Shard.write

    def write(self: Shard) -> list[str]:
        if self.number == 1:
            raise error
        return real(self)

    monkeypatch.setattr(Shard, "write", write)
    message = place.pipeline("cache-teacher", CONFIG, *FEWER, status=1)
    assert str(error.args[-1] if isinstance(error, ValueError) else "No space left") in message
    [folder] = (place.path / "runs" / "cache-teacher").iterdir()
    assert [commit.name for commit in folder.glob("commits/*.json")] == ["00000.json"]
    assert not (folder / "manifest.json").exists()
    assert place.json("status", CONFIG, *FEWER)["stages"][1]["state"].startswith("begun 1 of 3")
    stamp = (folder / "logits-00000.parquet").stat().st_mtime_ns
    monkeypatch.setattr(Shard, "write", real)
    place.pipeline("cache-teacher", CONFIG, *FEWER)
    assert (folder / "logits-00000.parquet").stat().st_mtime_ns == stamp
    place.pipeline("--runs", "straight", "cache-teacher", CONFIG, *FEWER)
    assert files_of(folder) == files_of(place.path / "straight" / "cache-teacher" / folder.name)


def test_an_error_in_writing_the_last_shard_is_no_success(place: Place, monkeypatch: pytest.MonkeyPatch):
    place.pipeline("prepare-data", CONFIG, *FEWER)
    real = Shard.write
    monkeypatch.setattr(Shard, "write", lambda self: real(self) if self.number != 2 else (_ for _ in ()).throw(OSError(28, "No space left on device", "a file")))
    assert "No space left" in place.pipeline("cache-teacher", CONFIG, *FEWER, status=1)
    assert not list((place.path / "runs" / "cache-teacher").glob("*/manifest.json"))
    assert place.json("status", CONFIG, *FEWER)["stages"][1]["state"].startswith("begun 2 of 3")


def test_an_error_in_writing_stops_the_teacher_before_it_has_read_everything(place: Place, monkeypatch: pytest.MonkeyPatch):
    import time

    import stages.cache_teacher as stage

    place.pipeline("prepare-data", CONFIG, *FEWER)
    asked = []
    real = stage.said_of

    def slow(*arguments, **options):
        asked.append(1)
        time.sleep(0.05)
        return real(*arguments, **options)

    monkeypatch.setattr(stage, "said_of", slow)
    monkeypatch.setattr(Shard, "write", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device", "a file")))
    place.pipeline("cache-teacher", CONFIG, *FEWER, status=1)
    assert len(asked) <= 2


# --- settings that make no sense ---


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["min=20", "keep=10"], ["min (20)", "above keep (10)"]),
        (["={method: sampled}"], ["sampled needs keep", "255"]),
        (["={method: sampled, keep: 300}"], ["sampled needs keep", "255"]),
        (["={method: sampled, keep: 50, threshold: 0.01}"], ["threshold has no effect", "sampled"]),
        (["={method: sampled, keep: 50, min: 2}"], ["min has no effect", "sampled"]),
        (["={method: sampled, keep: 50, step: [0.02, 0.5]}"], ["step has no effect", "sampled"]),
        (["step=[0.001, 0.5]"], ["step", "too fine"]),
        (["step=[0.01, 0.01]"], ["step", "too fine"]),  # the lowest code would be -2.6: p = 0.08
        (["step=[0.02]"], ["targets.logits.step"]),
        (["temperatures=[2.0, 8.0]"], ["temperatures must ascend and begin with 1.0"]),
        (["temperatures=[1.0, 8.0, 2.0]"], ["temperatures must ascend"]),
        (["temperatures=[]"], ["targets.logits.temperatures"]),
        (["threshold=1.0"], ["targets.logits.threshold"]),
        (["keep=0"], ["targets.logits.keep"]),
        (["hidden=int4"], ["targets.logits.hidden", "int8"]),
        (["treshold=0.1"], ["treshold", "did you mean 'threshold'"]),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_clear_error(prepared: Place, changes: list[str], wanted: list[str]):
    words = [word for change in changes for word in ("--set", f"targets.logits{change}" if change.startswith("=") else f"targets.logits.{change}")]
    message = prepared.pipeline("cache-teacher", CONFIG, *words, status=2)
    assert all(part in message for part in wanted), message
    assert message.count("\n") == 1, message
    assert "targets.logits" in message


@pytest.mark.parametrize("step", [(0.02, 0.5), (0.05, 0.5), (0.008, 0.5)])
def test_another_step_is_another_table_in_the_file(prepared: Place, step: tuple[float, float]):
    """And can be given in a YAML, as a list."""
    cache, folder = cached(prepared, "--set", f"targets.logits.step={list(step)}")
    form = Logits.from_metadata({key.decode(): value.decode() for key, value in pq.read_schema(folder / "logits-00000.parquet").metadata.items()}, [])
    np.testing.assert_allclose(form.table, step_table(*step), atol=1e-8)
    assert cache.count("train") > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "targets.logits={method: sampled, keep: 50}"), "tail: calibrated"),
        (("--set", "targets.logits={method: sampled, keep: 50}", "--set", "training.objective.0.tail=rest"), "training.temperature"),
        (("--set", "training.objective.0.tail=hidden"), "targets.logits.hidden: int8"),
    ],
)
def test_a_cache_that_training_could_not_use_is_refused_before_the_teacher_runs(prepared: Place, words: tuple[str, ...], said: str):
    assert said in prepared.pipeline("cache-teacher", CONFIG, *FEWER, *words, status=2)
