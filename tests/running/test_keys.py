"""What a folder's name covers: everything that can change the result, and nothing else; and what differs is named."""

import base64
import functools
import hashlib
import importlib
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.cache.plan import GROUPS
from pipeline.config import Benchmark, Data, Dataset, Experiment, Machine, Named, Objective, Projection, load_experiment
from pipeline.datasets.hub import hub
from pipeline.errors import ConfigError, InputError, NotFinished, PipelineError
from pipeline.files import sha256_of, write_text
from pipeline.lookup import names, parameters
from pipeline.models.tokenizers import load_tokenizer
from pipeline.running import runner as running
from pipeline.running.fingerprint import Identity, canonical, differing_keys, fingerprint, named, settings_digest, with_names
from pipeline.running.folder import FinishedFolder, RunFolder, read_manifest
from pipeline.running.runner import Runner
from pipeline.running.stage import Stage
from stages import STAGES
from tests import tiny
from tests.conftest import CONFIG, ROOT, Place

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
ROWS = """
    - {dataset: jsonl, path: tiny/FILE.jsonl, fields: {user: question, assistant: answer}}
    - {dataset: hub, repo: some/rows, revision: COMMIT}
    - {dataset: hpo, path: tiny/FILE.obo}"""
RICH = f"""
name: rich
data:
  train:{ROWS.replace("FILE", "train")}
  heldout:
    fraction: 0.2
    datasets:{ROWS.replace("FILE", "heldout").replace("    -", "      -")}
  max_tokens: 128
teacher: {{model: tiny/teacher, quantization: none, dtype: float32}}
targets: {{logits: {{keep: 16}}}}
student: {{model: tiny/student, layers: [0, 2]}}
training:
  objective:
    - {{loss: forward_kl, weight: 0.7}}
    - {{loss: cross_entropy, weight: 0.3}}
  temperature: {{from: 2.0, to: 1.0, schedule: linear}}
  steps: 12
  learning_rate: {{from: 1.0e-3, to: 1.0e-4, schedule: cosine}}
  validation: {{every: 4}}
evaluation:
  benchmarks:
    - {{benchmark: perplexity}}
    - {{benchmark: multiple_choice, path: tiny/choice.jsonl, fields: {{user: question}}}}
    - {{benchmark: text_quality, max_tokens: 8}}
machine: {{device: cpu}}
""".replace("COMMIT", COMMIT)
"""An experiment in which every setting can be changed alone."""


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rich.yaml and what it names. Not to be changed."""
    place = tmp_path_factory.mktemp("keys")
    tiny.make(place / "tiny", records=16)
    for name in ("heldout.jsonl", "train.obo", "heldout.obo", "choice.jsonl", "other.jsonl"):
        (place / "tiny" / name).write_text(f'{{"question": "What is {name}?"}}\n')
    for name in ("teacher", "student"):
        (place / "tiny" / name / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    for name, file in (("teacher", "config.json"), ("student", "config.json"), ("student", "tokenizer.json")):
        shutil.copytree(place / "tiny" / name, place / "tiny" / f"other_{file.partition('.')[0]}_{name}")
        change(place / "tiny" / f"other_{file.partition('.')[0]}_{name}" / file)
    for name in ("cache", "projection", "other_cache", "other_projection"):
        folder = RunFolder(place / "tiny" / name)
        identity: Identity = {"stage": name.removeprefix("other_"), "version": 1, "sections": {"of": {"name": name}}, "needs": {}}
        folder.seal(identity["stage"], fingerprint(identity), identity, {}, {}, {})
        folder.close()
    (place / "rich.yaml").write_text(RICH)
    return place


@pytest.fixture
def here(rich: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may change, to be in."""
    shutil.copytree(rich, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def change(file: Path) -> None:
    """One byte."""
    file.write_bytes(changed(file.read_bytes()))


def changed(data: bytes) -> bytes:
    """One byte is another; JSON stays JSON, its last number is another."""
    if b"What is" in data:
        return data.replace(b"What is", b"What iz", 1)
    digits = re.match(rb"\{.*([0-9])", data, re.DOTALL)
    place = digits.start(1) if digits else len(data) - 3
    byte = b"%d" % ((int(data[place : place + 1]) + 1) % 10) if digits else bytes([data[place] ^ 1])
    return data[:place] + byte + data[place + 1 :]


def runner_of(*changes: str, file: str = "rich.yaml", of: tuple[Stage, ...] = STAGES) -> Runner:
    return Runner(of, load_experiment(file, list(changes)), Path("runs"))


def keys_of(runner: Runner) -> dict[str, str]:
    return {stage.name: runner.folder(stage).name for stage in runner.stages}


def keys(*changes: str, file: str = "rich.yaml") -> dict[str, str]:
    return keys_of(runner_of(*changes, file=file))


def identity_of(stage: str, *changes: str, file: str = "rich.yaml") -> Identity:
    return runner_of(*changes, file=file).identity(next(each for each in STAGES if each.name == stage))


def finish(runner: Runner) -> None:
    """All its stages' folders as if they had been run, each with one small file."""
    for stage in runner.stages:
        if (runner.folder(stage) / "manifest.json").exists():
            continue
        folder = RunFolder(runner.folder(stage))
        write(folder.path / GROUPS, '{"train": [], "heldout": []}')
        built_on = {need.name: FinishedFolder(runner.folder(need)).root for need in runner.needs(stage)}
        folder.seal(stage.folder, fingerprint(runner.identity(stage)), runner.identity(stage), built_on, {}, {})
        folder.close()


def settings_of_shards(runner: Runner) -> str:
    (stage,) = (stage for stage in runner.stages if stage.pieces)
    return settings_digest(runner.identity(stage), stage.not_in_pieces)


# --- every input that can change a value changes the key, and is named -------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """One change of what the experiment is made from."""

    what: str
    stage: str
    """The first whose key it must change."""
    names: tuple[str, ...]
    """What must be said to differ, wherever it counts."""
    changes: tuple[str, ...] = ()
    """As after --set."""
    given: tuple[str, ...] = ()
    """Set on both sides: of which experiment this is a change."""
    file: str | None = None
    """Of which one byte is another."""
    edit: Callable[[Path], Any] | None = None
    module: str | None = None
    """Whose stages' version is raised."""
    spares_control: bool = False
    """Whether the training without the teacher stays as it is."""

    def __str__(self) -> str:
        return self.what


def setting(where: str, text: str, stage: str | None = None, also: tuple[str, ...] = (), more: tuple[str, ...] = (), given: tuple[str, ...] = (), spares_control: bool = False) -> Mutation:
    """also: what must be named beside it; more: what has to be set with it."""
    usual = {"data": "prepare-data", "teacher": "cache-teacher", "targets": "cache-teacher", "projection": "fit-projection", "training": "train-student", "evaluation": "evaluate"}
    return Mutation(where, stage or usual[where.partition(".")[0]], (where, *also), (f"{where}={text}", *more), given, spares_control=spares_control)


def of_datasets(place: str, other: str) -> list[Mutation]:
    return [
        setting(f"{place}.2.dataset", "jsonl"),
        setting(f"{place}.0.limit", "3"),
        setting(f"{place}.0.skip", "1"),
        setting(f"{place}.1.weight", "2.0"),
        setting(f"{place}.2.incomplete", "drop"),
        setting(f"{place}.0.path", other),
        setting(f"{place}.0.fields.user", "title"),
        setting(f"{place}.1.repo", "some/others"),
        setting(f"{place}.1.revision", OTHER_COMMIT),
        setting(f"{place}.1.split", "test"),
        setting(f"{place}.1.subset", "en"),
        setting(f"{place}.2.questions", "choice"),
        setting(f"{place}.2.options", "5"),
    ]


TEACHERS = "training.more_teachers=[{cache: tiny/cache, projection: tiny/projection, weight: 0.5, specialties: {eye: 1.0}}]"


SETTINGS = [
    *of_datasets("data.train", "tiny/other.jsonl"),
    *of_datasets("data.heldout.datasets", "tiny/other.jsonl"),
    setting("data.heldout.fraction", "0.3"),
    setting("data.template", "chat"),
    setting("data.max_tokens", "127"),
    setting("data.records_per_shard", "8"),
    setting("teacher.model", "tiny/other_config_teacher"),
    setting("teacher.revision", OTHER_COMMIT, also=("teacher.model",), given=("teacher.model=some/teacher", f"teacher.revision={COMMIT}")),
    setting("teacher.quantization", "nf4"),
    setting("teacher.double_quantization", "false"),
    setting("teacher.dtype", "bfloat16"),
    setting("targets.positions", "all"),
    setting("targets.text", "omit"),
    setting("targets.logits.method", "sampled"),
    setting("targets.logits.threshold", "0.001"),
    setting("targets.logits.min", "5"),
    setting("targets.logits.keep", "17"),
    setting("targets.logits.step.0", "0.03", more=("targets.logits.step=[0.03, 0.5]",)),
    setting("targets.logits.temperatures.1", "4.0", more=("targets.logits.temperatures=[1.0, 4.0, 8.0]",)),
    setting("targets.logits.hidden", "int8"),
    setting("targets.logits.boundary", "true"),
    setting("targets.logits.logsumexp", "true"),
    setting("targets.attention.matched", "1", given=("targets.attention={matched: 2}",)),
    setting("targets.attention.layers.0", "1", given=("targets.attention={layers: [0]}",)),
    setting("targets.attention.keys", "8", given=("targets.attention={matched: 2}",)),
    setting("targets.attention.heads", "each", given=("targets.attention={matched: 2}",)),
    setting("student.model", "tiny/other_tokenizer_student", stage="fit-projection"),
    replace(setting("student.model", "tiny/other_config_student", stage="train-student"), what="student.model with the same tokenizer"),
    setting(
        "student.revision",
        OTHER_COMMIT,
        stage="fit-projection",
        also=("student.model",),
        given=("student.model=some/student", f"student.revision={COMMIT}"),
    ),
    setting("student.layers.1", "3", stage="train-student"),
    *(
        setting(f"student.lora.{option}", value, stage="train-student", given=("student.lora={rank: 4, targets: [q_proj]}",))
        for option, value in (("rank", "8"), ("alpha", "8"), ("dropout", "0.1"), ("targets.0", "v_proj"), ("rslora", "true"))
    ),
    setting("student.quantization", "nf4", stage="train-student", given=("student.lora={rank: 4}",)),
    setting("student.double_quantization", "false", stage="train-student", given=("student.lora={rank: 4}", "student.quantization=nf4")),
    setting("student.dtype", "bfloat16", stage="train-student", given=("student.lora={rank: 4}",)),
    setting("projection.method", "first_token"),
    setting("projection.depth", "2"),
    setting("projection.inside", "false"),
    setting("projection.least_mass", "0.1"),
    setting("projection.least_count", "3"),
    setting("projection.least_share", "0.2"),
    setting("projection.rank", "8", given=("projection.method=low_rank",)),
    setting("projection.keep", "8", given=("projection.method=low_rank",)),
    setting("projection.epochs", "2", given=("projection.method=learned",)),
    setting("projection.learning_rate", "0.1", given=("projection.method=learned",)),
    setting("projection.seed", "1", given=("projection.method=learned",)),
    setting("training.objective.0.loss", "cross_entropy"),
    setting("training.objective.1.weight", "0.4", spares_control=True),
    setting("training.objective.0.tail", "calibrated", spares_control=True),
    setting("training.objective.0.temperature_squared", "false", spares_control=True),
    setting("training.objective.0.temperature", "10.0", spares_control=True, given=("training.objective.0={loss: alm, weight: 0.7}",)),
    setting("training.objective.0.beta", "0.3", spares_control=True, given=("training.objective.0={loss: jensen_shannon, weight: 0.7}",)),
    setting("training.objective.0.alpha", "0.3", spares_control=True, given=("training.objective.0={loss: skew_kl, weight: 0.7}",)),
    setting("training.objective.0.head", "0.3", spares_control=True, given=("training.objective.0={loss: adaptive_kl, weight: 0.7}",)),
    setting("training.objective.0.boundary", "true", spares_control=True, given=("targets.logits.boundary=true", "training.objective.0={loss: alm, weight: 0.7}")),
    *(
        setting(f"training.objective.0.{option}", value, spares_control=True, given=("targets.attention={matched: 2}", "training.objective.0={loss: attention_match, weight: 0.7, layers: [[1, 0]]}"))
        for option, value in (("form", "kl"), ("heads", "grouped"), ("layers.0.1", "1"))
    ),
    setting("training.temperature.from", "3.0", spares_control=True),
    setting("training.temperature.to", "1.5", spares_control=True),
    setting("training.temperature.schedule", "cosine", spares_control=True),
    setting("training.specialty_weights.eye", "2.0", also=("training.specialty_weights",)),
    setting("training.specialty_weights", "inverse_frequency"),
    setting("training.objective.0.weight.from", "0.6", spares_control=True, given=("training.objective.0.weight={from: 0.7, to: 0.3}",)),
    setting("training.objective.0.weight.to", "0.2", spares_control=True, given=("training.objective.0.weight={from: 0.7, to: 0.3}",)),
    setting("training.objective.0.weight.schedule", "cosine", spares_control=True, given=("training.objective.0.weight={from: 0.7, to: 0.3}",)),
    setting("training.own_teacher.weight", "0.4", spares_control=True, given=(TEACHERS,)),
    setting("training.own_teacher.specialties.eye", "0.4", also=("training.own_teacher.specialties",), spares_control=True, given=(TEACHERS,)),
    *(
        setting(f"training.more_teachers.0.{key}", value, spares_control=True, given=(TEACHERS,))
        for key, value in (("weight", "0.4"), ("specialties.eye", "0.4"), ("cache", "tiny/other_cache"), ("projection", "tiny/other_projection"))
    ),
    setting("training.token_temperature.strength", "0.4", spares_control=True, given=("training.token_temperature={strength: 0.5}",)),
    setting("training.curriculum.by", "cross_entropy", given=("training.curriculum={by: entropy, order: ascending}",)),
    setting("training.curriculum.order", "descending", given=("training.curriculum={by: entropy, order: ascending}",)),
    *(
        setting(f"training.curriculum.share.{end}", value, given=("training.curriculum={by: entropy, share: {from: 0.5, to: 0.9}}",))
        for end, value in (("from", "0.4"), ("to", "1.0"), ("schedule", "cosine"))
    ),
    setting("training.curriculum.epochs.0.0", "eye", given=("training.curriculum={by: specialty, epochs: [[ear]]}",)),
    setting("training.steps", "13"),
    setting("training.epochs", "2.0", also=("training.steps",), more=("training.steps=null",)),
    setting("training.batch_records", "4"),
    setting("training.learning_rate.from", "2.0e-3"),
    setting("training.learning_rate.to", "2.0e-4"),
    setting("training.learning_rate.schedule", "linear"),
    setting("training.warmup_steps", "1"),
    setting("training.optimizer", "adamw_8bit"),
    setting("training.weight_decay", "0.1"),
    setting("training.max_gradient_norm", "2.0"),
    setting("training.precision", "fp32"),
    setting("training.seed", "1"),
    setting("training.validation.every", "3"),
    setting("training.validation.records", "8"),
    setting("training.validation.keep", "last"),
    setting("evaluation.benchmarks.0.benchmark", "fidelity"),
    setting("evaluation.benchmarks.1.path", "tiny/other.jsonl"),
    setting("evaluation.benchmarks.1.fields.user", "title"),
    setting("evaluation.control", "false"),
    setting("evaluation.ask_teacher", "false"),
    setting("evaluation.benchmarks.2.max_tokens", "9", "evaluate-teacher"),
    setting("evaluation.benchmarks.2.records", "5", "evaluate-teacher"),
    *(
        setting(f"evaluation.benchmarks.2.{option}", value, "evaluate-teacher", given=("evaluation.benchmarks.2={benchmark: mmlu_medical}",))
        for option, value in (("shots", "1"), ("limit", "9"), ("split", "dev"), ("revision", OTHER_COMMIT))
    ),
    setting("evaluation.benchmarks.2.tasks.0", "arc_hard", "evaluate-teacher", given=("evaluation.benchmarks.2={benchmark: harness, tasks: [arc_easy]}",)),
    setting("evaluation.published.path", "tiny/other.jsonl", given=("evaluation.published={path: tiny/choice.jsonl}",)),
]


def of_file(file: str, stage: str, *named_as: str) -> Mutation:
    return Mutation(f"one byte of {file}", stage, named_as, file=file)


FILES = [
    of_file("train.jsonl", "prepare-data", "data.train.0.path"),
    of_file("train.obo", "prepare-data", "data.train.2.path"),
    of_file("heldout.jsonl", "prepare-data", "data.heldout.datasets.0.path"),
    of_file("heldout.obo", "prepare-data", "data.heldout.datasets.2.path"),
    *(of_file(f"teacher/{name}", "cache-teacher", "teacher.model") for name in ("model.safetensors", "config.json", "generation_config.json")),
    *(of_file(f"teacher/{name}", "cache-teacher", "teacher.model") for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
    *(of_file(f"student/{name}", "fit-projection", "student.model") for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
    *(of_file(f"student/{name}", "train-student", "student.model") for name in ("model.safetensors", "config.json", "generation_config.json")),
    of_file("choice.jsonl", "evaluate", "evaluation.benchmarks.1.path"),
    Mutation("an adapter beside the teacher", "cache-teacher", ("teacher.model",), edit=lambda tiny: (tiny / "teacher" / "adapter_config.json").write_text("{}")),
    Mutation("no generation_config.json", "cache-teacher", ("teacher.model",), edit=lambda tiny: (tiny / "teacher" / "generation_config.json").unlink()),
    Mutation("another name for the weights", "train-student", ("student.model",), edit=lambda tiny: (tiny / "student" / "model.safetensors").rename(tiny / "student" / "other.safetensors")),
    Mutation("added tokens", "fit-projection", ("student.model",), edit=lambda tiny: (tiny / "student" / "added_tokens.json").write_text("{}")),
    Mutation("a chat template in a folder", "cache-teacher", ("teacher.model",), edit=lambda tiny: write(tiny / "teacher" / "additional_chat_templates" / "default.jinja", "{{ messages }}")),
]


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


FIRST_OF_MODULE = {stage.module: stage for stage in reversed(STAGES)}
VERSIONS = [Mutation(f"version of {stage.name}", stage.name, (f"{stage.name}.version",), module=module) for module, stage in FIRST_OF_MODULE.items()]
MUTATIONS = [*SETTINGS, *FILES, *VERSIONS]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation beside the finished folders of what it is a mutation of."""

    before: dict[str, str]
    after: dict[str, str]
    rows: dict[str, dict[str, Any]]
    """Of `pipeline status`, by stage."""
    shards: tuple[str, str]
    """What the keys of shards are made with, before and after."""
    refused: str | None
    """What a stage says that builds on one that the mutation has made unfinished."""


def apply(mutation: Mutation, place: Path) -> None:
    """To the files; what is set and which stages there are is for the runner."""
    if mutation.file:
        change(place / "tiny" / mutation.file)
    if mutation.edit:
        mutation.edit(place / "tiny")


def stages_of(mutation: Mutation) -> tuple[Stage, ...]:
    return tuple(replace(stage, version=stage.version + 1) if stage.module == mutation.module else stage for stage in STAGES)


ASKED = {"prepare-data": "cache-teacher", "cache-teacher": "train-student", "fit-projection": "evaluate", "train-student": "evaluate"}


def outcome_of(mutation: Mutation, place: Path) -> Outcome:
    """In a place that is finished; files are changed there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("stages.fit_projection.run", lambda student_tokenizer, projection, inputs, out: {})
        runner = runner_of(*mutation.given)
        if mutation.given:
            finish(runner)
        before, shards = keys_of(runner), settings_of_shards(runner)
        apply(mutation, place)
        runner = runner_of(*mutation.given, *mutation.changes, of=stages_of(mutation))
        rows = {row["stage"]: row for row in runner.status()}
        refused = None
        if mutation.stage in ASKED:
            with pytest.raises(NotFinished) as raised:
                runner.run(ASKED[mutation.stage])
            refused = str(raised.value)
            assert raised.value.exit_status == 2
        if mutation.stage == "fit-projection":  # made on the way
            shutil.rmtree(Path("runs", "fit-projection", keys_of(runner)["fit-projection"]))
        return Outcome(before, keys_of(runner), rows, (shards, settings_of_shards(runner)), refused)


@pytest.fixture(scope="module")
def rich_done(rich: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rich.yaml with all its folders finished. Not to be changed."""
    place = tmp_path_factory.mktemp("done") / "here"
    shutil.copytree(rich, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        finish(runner_of())
    return place


@pytest.fixture(scope="module")
def outcome(rich_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mutation], Outcome]:
    """Each mutation is tried once; in a place of its own if it leaves something there."""

    @functools.cache
    def of(mutation: Mutation) -> Outcome:
        place = rich_done
        if mutation.file or mutation.edit or mutation.given:
            place = tmp_path_factory.mktemp("mutation") / "here"
            shutil.copytree(rich_done, place)
        return outcome_of(mutation, place)

    return of


SECTIONS = {"student_tokenizer": "student", "asked": "evaluation"}
"""What a section that is in no YAML is made from."""


def upstream(stage: str) -> set[str]:
    """It and all that it builds on."""
    (found,) = (each for each in STAGES if each.name == stage)
    return {stage}.union(*map(upstream, found.needs))


def must_change(mutation: Mutation) -> set[str]:
    first = {mutation.stage} | ({"train-control"} if mutation.stage == "train-student" and not mutation.spares_control else set())
    return {stage.name for stage in STAGES if upstream(stage.name) & first}


def wrong_keys(mutation: Mutation, before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The stages whose key should have changed and has not, or the other way round."""
    return {stage for stage in before if before[stage] != after[stage]} ^ must_change(mutation)


def names_at(mutation: Mutation, stage: str) -> set[str]:
    """What must be said to differ of a stage: what it or what it builds on reads."""
    above = [each for each in STAGES if each.name in upstream(stage)]
    known = {SECTIONS.get(section, section) for each in above for section in each.reads} | {each.folder for each in above}
    return {name for name in mutation.names if name.partition(".")[0] in known}


def as_in_the_yaml(said: list[str]) -> set[str]:
    """The section student_tokenizer is made from the section student, and asked from evaluation: from its third benchmark on."""
    said = [re.sub(r"^asked\.benchmarks\.(\d+)", lambda found: f"evaluation.benchmarks.{int(found[1]) + 2}", name) for name in said]
    return {re.sub(r"^student_tokenizer\.", "student.", name).replace("student.tokenizer", "student.model") for name in said}


OBJECTIVE = "training.objective."


def wrong_names(mutation: Mutation, row: dict[str, Any]) -> set[str]:
    """What is said to differ of a stage and does not, or the other way round."""
    if row["stage"] not in must_change(mutation):
        return set() if row["state"] == "done" else {row["state"]}
    if row["state"] != "missing" or row["nearest"] is None:
        return {row["state"]}
    said = as_in_the_yaml(row["nearest"]["differs"])
    wanted = names_at(mutation, row["stage"])
    if any(name.startswith(OBJECTIVE) for name in wanted) and row["stage"] == "train-control":
        return set() if any(name.startswith(OBJECTIVE) for name in said) else wanted  # its objective is made from the experiment's: other parts
    if row["stage"] == "evaluate":
        said = {name for name in said if name in wanted or not name.startswith(OBJECTIVE)}
    return said ^ wanted


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_one_change_changes_the_key_of_its_stage_and_of_what_is_built_on_it_and_of_nothing_before(outcome: Callable[[Mutation], Outcome], mutation: Mutation):
    assert not wrong_keys(mutation, outcome(mutation).before, outcome(mutation).after)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_status_names_what_changed_and_nothing_else(outcome: Callable[[Mutation], Outcome], mutation: Mutation):
    for stage, row in outcome(mutation).rows.items():
        if stage != "evaluate":
            assert not wrong_names(mutation, row), stage


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_status_names_what_changed_through_both_students_that_are_evaluated(outcome: Callable[[Mutation], Outcome], mutation: Mutation):
    assert not wrong_names(mutation, outcome(mutation).rows["evaluate"])


@pytest.mark.parametrize("mutation", [mutation for mutation in MUTATIONS if mutation.stage in ASKED], ids=str)
def test_what_is_built_on_it_is_refused_and_the_message_names_what_changed(outcome: Callable[[Mutation], Outcome], mutation: Mutation):
    refused = outcome(mutation).refused
    missing = "train-student" if mutation.stage == "fit-projection" else mutation.stage
    assert refused is not None
    assert f"Run `pipeline {missing}`" in refused
    assert as_in_the_yaml(re.findall(r"differs in: (.*)\.\)", refused)[0].split(", ")) == names_at(mutation, missing)


def test_there_are_at_least_sixty_mutations_each_of_its_own_name():
    assert len(MUTATIONS) >= 60
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)


KINDS: dict[type[BaseModel], str] = {Dataset: "datasets", Projection: "projections", Objective: "losses", Benchmark: "benchmarks"}


def settings_of(model: type[BaseModel], place: str = "") -> set[str]:
    """Every setting, dotted, with * for the place in a list; also the options of the functions that can be named."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        where = f"{place}{field.alias or name}"
        inner = models_in(field)
        if inner:
            in_list = "list" in str(field.annotation)
            for each in inner:
                found |= settings_of(each, f"{where}.*." if in_list else f"{where}.")
        else:
            found.add(where)
    if kind := KINDS.get(model):
        found |= {f"{place}{option}" for name in names(kind) for option in parameters(kind, name)[1]}
    return found


def models_in(field: FieldInfo) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    to_see: list[Any] = [field.annotation]
    while to_see:
        kind = to_see.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        to_see.extend(getattr(kind, "__args__", ()))
    return found


def pattern_of(where: str, settings: set[str]) -> str:
    """data.train.0.fields.user -> data.train.*.fields"""
    parts = ["*" if part.isdigit() else part for part in where.split(".")]
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in settings), where)


def not_mutated(settings: set[str]) -> set[str]:
    return {each for each in settings if not re.match(r"(name$|machine\.)", each)} - {pattern_of(mutation.names[0], settings) for mutation in SETTINGS}


def test_every_setting_has_a_mutation():
    assert set(Named.__subclasses__()) == KINDS.keys()
    settings = settings_of(Experiment)
    assert {"data.heldout.datasets.*.questions", "targets.logits.step", "training.learning_rate.from", "projection.method"} < settings
    assert not not_mutated(settings)


def test_control_a_new_setting_without_a_mutation_is_caught():
    class More(Data):
        new: int = 0

    class Wider(Experiment):
        data: More

    assert not_mutated(settings_of(Wider)) == {"data.new"}


def test_every_setting_is_in_some_section_that_a_stage_reads():
    read = {section for stage in STAGES for section in stage.reads} | {"student_tokenizer", "asked"}
    assert set(Experiment.model_fields) - read == {"name", "machine"}


def test_stages_of_one_module_have_one_version():
    for module in FIRST_OF_MODULE:
        assert len({stage.version for stage in STAGES if stage.module == module}) == 1, module


def without_section(section: str) -> Callable[[Identity], str]:
    def kept(identity: Identity) -> Identity:
        sections = {name: value for name, value in identity["sections"].items() if name != section}
        return identity | {"sections": sections, "needs": {name: kept(need) for name, need in identity["needs"].items()}}

    return lambda identity: fingerprint(kept(identity))


def by_name_alone(identity: Identity) -> str:
    return fingerprint(identity | {"sections": with_names(identity["sections"]), "needs": {}})


FORGETFUL: dict[str, tuple[Callable[[Identity], str], str]] = {
    "data": (without_section("data"), "data.max_tokens"),
    "teacher": (without_section("teacher"), "teacher.dtype"),
    "targets": (without_section("targets"), "targets.text"),
    "student_tokenizer": (without_section("student_tokenizer"), "one byte of student/tokenizer.json"),
    "projection": (without_section("projection"), "projection.method"),
    "student": (without_section("student"), "student.layers.1"),
    "training": (without_section("training"), "training.seed"),
    "evaluation": (without_section("evaluation"), "evaluation.benchmarks.1.path"),
    "asked": (without_section("asked"), "evaluation.benchmarks.2.records"),
    "the version": (lambda identity: fingerprint(identity | {"version": 0}), "version of train-student"),
    "what a stage is built on": (lambda identity: fingerprint(identity | {"needs": {}}), "teacher.dtype"),
    "what a file contains": (by_name_alone, "one byte of train.jsonl"),
}


def mutation_named(what: str) -> Mutation:
    return next(mutation for mutation in MUTATIONS if mutation.what == what)


@pytest.mark.parametrize("left_out", FORGETFUL)
def test_control_a_fingerprint_that_leaves_something_out_is_caught(here: Path, monkeypatch: pytest.MonkeyPatch, left_out: str):
    forgetful, what = FORGETFUL[left_out]
    monkeypatch.setattr(running, "fingerprint", forgetful)
    mutation = mutation_named(what)
    before = keys()
    apply(mutation, here)
    assert wrong_keys(mutation, before, keys_of(runner_of(*mutation.changes, of=stages_of(mutation))))


def test_control_each_section_that_a_stage_reads_is_left_out_once():
    assert {section for stage in STAGES for section in stage.reads} < FORGETFUL.keys()


def test_control_a_stage_that_takes_in_too_much_is_caught(here: Path):
    greedy = tuple(replace(stage, reads=(*stage.reads, "training")) if stage.name == "cache-teacher" else stage for stage in STAGES)
    seed = mutation_named("training.seed")
    assert wrong_keys(seed, keys_of(runner_of(of=greedy)), keys_of(runner_of(*seed.changes, of=greedy))) == {"cache-teacher", "fit-projection", "evaluate-teacher"}


def own_sections_only(one: Identity, other: Identity) -> list[str]:
    return differing_keys(one | {"needs": {}}, other | {"needs": {}})


SILENT: dict[str, Callable[[Identity, Identity], list[str]]] = {
    "names nothing": lambda one, other: [],
    "names what is not different, too": lambda one, other: [*differing_keys(one, other), "teacher.model"],
    "names sections only": lambda one, other: sorted({key.partition(".")[0] for key in differing_keys(one, other)}),
    "does not look at what a stage is built on": own_sections_only,
}


@pytest.mark.parametrize("fault", SILENT)
def test_control_a_status_that_names_the_wrong_thing_is_caught(rich_done: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    monkeypatch.setattr(running, "differing_keys", SILENT[fault])
    dtype = mutation_named("teacher.dtype")
    found = outcome_of(dtype, rich_done)
    assert [stage for stage, row in found.rows.items() if wrong_names(dtype, row)]


def test_pipeline_status_and_the_refusal_say_it_on_the_command_line(here: Path):
    finish(runner_of())
    place = Place(here)
    told = place.pipeline("status", "rich.yaml", "--set", "teacher.quantization=int8", "--set", "training.seed=3")
    assert re.findall("differs in (.*)", told) == ["teacher.quantization"] * 2 + ["teacher.quantization, training.seed"] * 2 + ["teacher.quantization", "teacher.quantization, training.seed"]
    refused = place.pipeline("train-student", "rich.yaml", "--set", "teacher.quantization=int8", status=2)
    assert "differs in: teacher.quantization.)" in refused
    assert "Run `pipeline cache-teacher`" in refused


def test_the_differing_keys_are_named_through_the_upstream(here: Path):
    changes = ("teacher.quantization=int8", "training.seed=3")
    assert differing_keys(identity_of("train-student"), identity_of("train-student", *changes)) == ["teacher.quantization", "training.seed"]


def test_what_is_named_stands_in_the_yaml(here: Path):
    settings = settings_of(Experiment)
    said = differing_keys(identity_of("fit-projection"), identity_of("fit-projection", "student.model=tiny/other_tokenizer_student"))
    assert {pattern_of(name, settings) for name in said} <= settings


def test_an_identity_read_from_a_manifest_has_the_same_key(here: Path):
    finish(runner_of())
    for stage in STAGES:
        folder = runner_of().folder(stage)
        assert fingerprint(read_manifest(folder)["identity"]) == folder.name
        assert not differing_keys(read_manifest(folder)["identity"], runner_of().identity(stage))


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        (["teacher.model=tiny/teacher", f"teacher.revision={COMMIT}"], "teacher/model.safetensors"),
        (["student.model=tiny/student", f"student.revision={COMMIT}"], "student/tokenizer.json"),
    ],
)
def test_a_folder_that_hides_what_is_named_on_the_hub_counts_or_is_refused(here: Path, changes: list[str], file: str):
    try:
        before = keys(*changes)
    except InputError:
        return
    change(here / "tiny" / file)
    assert keys(*changes) != before


def test_a_dataset_of_the_hub_is_never_a_folder_of_that_name(here: Path):
    (here / "some" / "rows").mkdir(parents=True)
    shutil.copy(here / "tiny" / "train.jsonl", here / "some" / "rows")
    with pytest.raises(InputError, match="some/rows"):
        next(hub(repo="some/rows", revision=COMMIT))


def another_model_type(student: Path) -> None:
    """As in many older models, the tokenizer's kind is in no file but config.json."""
    config = json.loads((student / "config.json").read_text())
    write(student / "config.json", json.dumps(config | {"model_type": "qwen2"}))


def another_template(student: Path) -> None:
    write(student / "additional_chat_templates" / "default.jinja", "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}")


def another_tekken(student: Path) -> None:
    write(student / "tekken.json", (student / "tekken.json").read_text().replace("aGU=", "ZWE="))


def tekken(student: Path) -> None:
    """A tokenizer as Mistral publishes it."""
    (student / "tokenizer.json").unlink()
    tokens = [{"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for i, token in enumerate([*(bytes([i]) for i in range(256)), b"he"])]
    specials = [{"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(("<unk>", "<s>", "<|end|>"))]
    about = {"pattern": "[^\\r\\n]+", "num_vocab_tokens": 257, "default_vocab_size": 260, "default_num_special_tokens": 3, "version": "v3"}
    write(student / "tekken.json", json.dumps({"config": about, "vocab": tokens, "special_tokens": specials}))


def without_its_kind(student: Path) -> None:
    config = json.loads((student / "tokenizer_config.json").read_text())
    write(student / "tokenizer_config.json", json.dumps({key: value for key, value in config.items() if key not in ("tokenizer_class", "backend")}))


@pytest.mark.parametrize(("first", "then"), [(without_its_kind, another_model_type), (lambda student: None, another_template), (tekken, another_tekken)])
def test_what_changes_how_the_student_reads_changes_the_key_of_the_projection(here: Path, first: Callable[[Path], Any], then: Callable[[Path], Any]):
    student = here / "tiny" / "student"
    first(student)
    reads, key = load_tokenizer(str(student), None, "chat", "student").digest(), keys()["fit-projection"]
    then(student)
    if load_tokenizer(str(student), None, "chat", "student").digest() != reads:
        assert keys()["fit-projection"] != key


def test_weights_in_a_linked_folder_count(here: Path):
    (here / "parts").mkdir()
    (here / "tiny" / "student" / "model.safetensors").rename(here / "parts" / "part.safetensors")
    (here / "tiny" / "student" / "parts").symlink_to(here / "parts")
    write(here / "tiny" / "student" / "model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "parts/part.safetensors"}}')
    before = keys()
    change(here / "parts" / "part.safetensors")
    assert keys() != before


# --- the key of a shard ------------------------------------------------------------------------------------------------


IN_SHARDS = {"data.template", "data.max_tokens"} | {mutation.what for mutation in MUTATIONS if mutation.stage == "cache-teacher"}
"""The records themselves count by their digest, see tests/test_reliability.py."""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_what_can_change_a_shard_changes_its_key_and_nothing_else_does(outcome: Callable[[Mutation], Outcome], mutation: Mutation):
    before, after = outcome(mutation).shards
    assert (before != after) == (mutation.what in IN_SHARDS)


# --- nothing else does -------------------------------------------------------------------------------------------------


OTHER_MACHINE = {
    "device": "auto",
    "teacher_batch_records": "2",
    "student_micro_batch_records": "2",
    "student_micro_batch_tokens": "64",
    "packing": "true",
    "workers": "5",
    "max_rejected": "0.5",
    "numerics": "strict",
    "gradient_checkpointing": "true",
    "checkpoint_steps": "1",
    "measure_cost": "false",
}


def test_every_setting_of_the_machine_is_tried():
    assert OTHER_MACHINE.keys() == Machine.model_fields.keys()


@pytest.mark.parametrize("change", [*(f"machine.{name}={value}" for name, value in OTHER_MACHINE.items()), "name=other"])
def test_what_only_changes_the_speed_changes_no_key(here: Path, change: str):
    assert keys() == keys(change)


def test_paths_order_and_the_way_numbers_are_written_change_no_key(here: Path):
    before = keys()
    (here / "tiny").rename(here / "moved")
    (here / "rich.yaml").write_text(RICH.replace("tiny/", "moved/"))
    assert keys("training.learning_rate={to: 0.0001, schedule: cosine, from: 1e-3}") == before


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        ".gitattributes",
        ".cache/huggingface/download/config.json.metadata",
        ".git/index",
    ],
)
def test_what_hf_download_and_git_leave_beside_a_model_changes_no_key(here: Path, file: str):
    before = keys()
    write(here / "tiny" / "teacher" / file, "1700000000.5")
    assert keys() == before


def test_a_home_a_copy_and_a_link_are_the_same_to_a_key(here: Path, monkeypatch: pytest.MonkeyPatch):
    before = keys()
    shutil.copytree(here / "tiny" / "teacher", here / "home" / "teacher")
    for name in os.listdir(here / "tiny" / "student"):  # as the hub's cache has it: links to files elsewhere
        (here / "blobs").mkdir(exist_ok=True)
        (here / "tiny" / "student" / name).rename(here / "blobs" / f"{len(os.listdir(here / 'blobs'))}")
        (here / "tiny" / "student" / name).symlink_to(here / "blobs" / f"{len(os.listdir(here / 'blobs')) - 1}")
    monkeypatch.setenv("HOME", str(here / "home"))
    assert keys("teacher.model=~/teacher") == before


LOOK = """
import getpass, json, os, socket, sys, time
socket.gethostname = lambda: os.environ["HOSTNAME"]
from click.testing import CliRunner
from pipeline.running import runner
from stages.cli import main

def keys():
    result = CliRunner().invoke(main, sys.argv[1:], catch_exceptions=False)
    return {row["stage"]: row["folder"].rpartition("/")[2] for row in json.loads(result.stdout)["stages"]}

mask = os.umask(0)
os.umask(mask)
seen = {"hash": hash("x"), "folder": os.getcwd(), "home": os.path.expanduser("~"), "host": socket.gethostname(), "user": getpass.getuser(), "zone": time.tzname}
seen |= {"locale": os.environ["LC_ALL"], "umask": mask, "words": sys.argv[1:], "experiment": open("rich.yaml").read(), "linked": os.path.islink("tiny")}
found = {"keys": keys(), "seen": seen, "planted": {}}
right = runner.fingerprint
for name, value in seen.items():
    runner.fingerprint = lambda identity: right(identity | {"version": str(value)})
    found["planted"][name] = keys()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Surroundings:
    folder: str
    seed: str
    home: str
    host: str
    user: str
    zone: str
    locale: str
    umask: int
    write: Callable[[str], str] = lambda text: text
    linked: bool = False
    options: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    more: tuple[tuple[str, str], ...] = ()


def backwards(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: backwards(part) for key, part in reversed(value.items())}
    return [backwards(part) for part in value] if isinstance(value, list) else value


SURROUNDINGS = [
    Surroundings("one", "0", "/a", "h1", "ann", "UTC", "C", 0o022),
    Surroundings("a longer/zwölf 12", "1", "/b", "h2", "bob", "XYZ-9", "C.UTF-8", 0o077, write=lambda text: yaml.safe_dump(backwards(yaml.safe_load(text)), sort_keys=False)),
    Surroundings("three", "2", "/a", "h1", "ann", "UTC", "de_DE.UTF-8", 0o002, write=lambda text: text.replace("1.0e-3", "0.001").replace("1.0e-4", "0.0001"), linked=True),
    Surroundings("four", "3", "/c", "h3", "eve", "ABC+5", "tr_TR.UTF-8", 0o027, write=lambda text: text.replace("1.0e-3", "1e-3").replace("1.0e-4", "1e-4"), options=("--debug",)),
    Surroundings(
        "five",
        "4",
        "/a",
        "h1",
        "ann",
        "UTC",
        "POSIX",
        0o022,
        options=("--runs", "elsewhere"),
        changes=tuple(f"machine.{name}={value}" for name, value in OTHER_MACHINE.items()),
        more=(("TRANSFORMERS_VERBOSITY", "debug"), ("ACCELERATE_LOG_LEVEL", "debug"), ("PYTHONDEVMODE", "1"), ("OMP_NUM_THREADS", "3"), ("CUDA_VISIBLE_DEVICES", "")),
    ),
]


@pytest.fixture(scope="module")
def looks(rich: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a process in each of the surroundings sees, and the keys that it works out."""
    base = tmp_path_factory.mktemp("surroundings")
    found = []
    for around in SURROUNDINGS:
        here = base / around.folder
        shutil.copytree(rich, here)
        if around.linked:
            (here / "tiny").rename(base / "weights")
            (here / "tiny").symlink_to(base / "weights")
        (here / "rich.yaml").write_text(around.write(RICH))
        environment = {"HOME": around.home, "HOSTNAME": around.host, "USER": around.user, "LOGNAME": around.user, "TZ": around.zone, "LC_ALL": around.locale, "PYTHONHASHSEED": around.seed}
        words = [*around.options, "status", "rich.yaml", "--json", *(word for change in around.changes for word in ("--set", change))]
        environment |= {"PYTHONPATH": str(ROOT), "PATH": ""} | dict(around.more)
        process = subprocess.run([sys.executable, "-c", LOOK, *words], cwd=here, env=environment, umask=around.umask, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        found.append(json.loads(process.stdout))
    return found


def test_keys_do_not_depend_on_the_process_the_machine_or_how_the_yaml_is_written(looks: list[dict[str, Any]]):
    assert len({canonical(look["keys"]) for look in looks}) == 1
    assert looks[0]["keys"].keys() == {stage.name for stage in STAGES}


def test_control_the_surroundings_differ_and_a_key_that_takes_in_any_of_them_is_caught(looks: list[dict[str, Any]]):
    for name in looks[0]["seen"]:
        assert len({json.dumps(look["seen"][name]) for look in looks}) > 1, name
        assert len({canonical(look["planted"][name]) for look in looks}) > 1, name
    assert len({look["seen"]["hash"] for look in looks}) == 5


# --- keys stay as they are over releases -------------------------------------------------------------------------------


SMALL: Identity = {"stage": "prepare-data", "version": 1, "sections": {"data": {"path": named("a.jsonl", "sha256:00"), "limit": None}}, "needs": {}}
TEXT: Identity = {"stage": "prepare-data", "version": 2, "sections": {"data": {"template": 'Frage: é 🙂\n\x00"\\', "weights": [1, 1.0, -0.0, 1e-4, 1e300, True, False, ""]}}, "needs": {}}
BUILT: Identity = {"stage": "cache-teacher", "version": "2+0badc0de", "sections": {"teacher": {"model": named("tiny/teacher", "hub:a/b@c"), "revision": "c"}}, "needs": {"prepare-data": SMALL}}
GOLDEN_VALUES: list[tuple[Any, str]] = [
    (None, "74234e98afe7498f"),
    ({"b": [1, 2.5, True], "a": {"z": None, "y": "é"}}, "a6060456132c27a9"),
    ([0.1, 1e-4, 5e-324, 1.7976931348623157e308, -0.0, 2**70], "0b7d9f84b2213e55"),
    ({"10": 1, "9": 2, "A": 3, "a": 4, "ä": 5, "🙂": 6, "": 7}, "3e31d4db4d3a0681"),
    ("\ud800 \u2028 \x7f", "1a84cf8f219ed13c"),
]
GOLDEN_IDENTITIES: list[tuple[Identity, str]] = [
    (SMALL, "778b672872474fd5"),
    (TEXT, "5cf91f7cc64d9287"),
    (BUILT, "faa77730f73448a3"),
    (BUILT | {"stage": "train-student", "needs": {"cache-teacher": BUILT, "prepare-data": SMALL}}, "27c97970193b3020"),
    (
        {"stage": "evaluate", "version": 3, "sections": {"a": {"datasets": [{"path": named("x", "sha256:01")}, {"path": named("y", "sha256:01")}], "empty": {}}, "b": {}}, "needs": {}},
        "2bd873ec539309ae",
    ),
]


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def not_golden(text_of: Callable[[Any], str] = canonical, key_of: Callable[[Identity], str] = fingerprint) -> int:
    """How many of the vectors are not what they have always been."""
    return sum(digest_of(text_of(value)) != wanted for value, wanted in GOLDEN_VALUES) + sum(key_of(identity) != wanted for identity, wanted in GOLDEN_IDENTITIES)


def test_ten_identities_have_the_keys_that_they_have_always_had():
    """Whoever changes these makes every cache there is be forgotten."""
    assert len(GOLDEN_VALUES) + len(GOLDEN_IDENTITIES) == 10
    assert not not_golden()


def test_the_text_that_is_hashed_is_written_out():
    assert canonical({"b": [1, 0.1, True], "a": None, "é": "🙂"}) == '{"a":null,"b":[1,{"float":"0x1.999999999999ap-4"},true],"\\u00e9":"\\ud83d\\ude42"}'
    hashed = '{"needs":{},"sections":{"data":{"limit":null,"path":{"content":"sha256:00"}}},"stage":"prepare-data","version":1}'
    assert fingerprint(SMALL) == digest_of(hashed)


def test_control_another_way_to_write_numbers_keys_or_names_is_caught():
    ways: list[Callable[[Any], str]] = [
        lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")),
        lambda value: canonical(value).replace("0x1.", "0x1"),
        lambda value: json.dumps(json.loads(canonical(value)), separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode("utf-8", "replace").decode(),
        lambda value: canonical(value).replace(":", ": "),
    ]
    assert all(not_golden(text_of=way) for way in ways)
    assert not_golden(key_of=by_name_alone)
    assert not_golden(key_of=lambda identity: fingerprint(identity | {"needs": {}}))


# --- what changes while a stage runs is not kept -----------------------------------------------------------------------


Way = Callable[[Path], Iterator[None]]
"""How a file is changed: up to the first yield before its key is worked out, up to the second before the stage has begun, then before it has ended."""


def written(file: Path) -> Iterator[None]:
    yield
    change(file)


def written_as_the_stage_ends(file: Path) -> Iterator[None]:
    yield
    yield
    change(file)


def with_the_old_times(file: Path) -> Iterator[None]:
    yield
    before = file.stat()
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def one_byte_in_place(file: Path) -> Iterator[None]:
    yield
    before, data = file.stat(), file.read_bytes()
    place = next(i for i, (old, new) in enumerate(zip(data, changed(data), strict=True)) if old != new)
    with file.open("r+b") as there:
        os.pwrite(there.fileno(), changed(data)[place : place + 1], place)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_through_a_map(file: Path) -> None:
    with file.open("r+b") as there, mmap.mmap(there.fileno(), 0) as memory:
        memory[:] = changed(memory[:])


def through_a_map(file: Path) -> Iterator[None]:
    yield
    write_through_a_map(file)


def through_a_map_with_the_old_times(file: Path) -> Iterator[None]:
    yield
    before = file.stat()
    write_through_a_map(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> Iterator[None]:
    yield
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(changed(file.read_bytes()))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def made_longer(file: Path) -> Iterator[None]:
    yield
    with file.open("ab") as there:
        there.write(b"\n")


def written_and_written_back(file: Path) -> Iterator[None]:
    yield
    before = file.read_bytes()
    change(file)
    yield
    file.write_bytes(before)


def written_and_removed(file: Path) -> Iterator[None]:
    yield
    change(file)
    yield
    shutil.rmtree(file.parent) if file.suffix == ".safetensors" else file.unlink()


def through_a_map_that_was_written_through_before(file: Path) -> Iterator[None]:
    with file.open("r+b") as there, mmap.mmap(there.fileno(), 0) as memory:
        memory[:] = memory[:]
        yield
        memory[:] = changed(memory[:])
        yield


WAYS: list[Way] = [written, written_as_the_stage_ends, with_the_old_times, one_byte_in_place, through_a_map, through_a_map_with_the_old_times, replaced, made_longer]
PASSING_WAYS: list[Way] = [written_and_written_back, written_and_removed, through_a_map_that_was_written_through_before]
"""After which the file is what it was, or gone, or still being written."""


def asked_again(data: Any, teacher: Any, targets: Any, machine: Any, inputs: Any, out: RunFolder) -> dict[str, Any]:
    """Like cache-teacher: a piece, made from the weights as they are now, unless it is there."""
    for name in out.pieces(["00000"]):
        write_text(out.path / f"word-{name}.txt", sha256_of(Path(teacher.model) / "model.safetensors"))
        out.commit(name, {f"word-{name}.txt": {}})
    return {}


INPUTS = {"prepare-data": Path("tiny/train.jsonl"), "cache-teacher": Path("tiny/teacher/model.safetensors")}


@pytest.fixture
def tiny_runner(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Runner]:
    """For configs/tiny.yaml, with another, quicker cache-teacher."""
    monkeypatch.setattr("stages.cache_teacher.run", asked_again)
    return lambda: runner_of(file=CONFIG)


def run_while(runner: Runner, stage: str, way: Way | None) -> None:
    """The stage, with its input changed in that way while it runs."""
    steps = way(INPUTS[stage]) if way else iter(())
    next(steps, None)
    if stage != "prepare-data":
        runner.run("prepare-data")
    (about,) = (each for each in STAGES if each.name == stage)
    runner.folder(about)  # from here on the key is known
    module = importlib.import_module(about.module)
    with pytest.MonkeyPatch.context() as patch:
        real = module.run

        @functools.wraps(real)
        def disturbed(**given: Any) -> Any:
            next(steps, None)
            summary = real(**given)
            next(steps, None)
            return summary

        patch.setattr(module, "run", disturbed)
        runner.run(stage)


def maps_change_the_times() -> bool:
    file = Path("probe")
    file.write_bytes(b"probe")
    os.utime(file, ns=(0, 0))
    write_through_a_map(file)
    return file.stat().st_mtime_ns != 0


def finished(stage: str) -> list[Path]:
    return sorted(Path("runs", stage).glob("*/manifest.json"))


@pytest.mark.parametrize("stage", INPUTS)
@pytest.mark.parametrize("way", [*WAYS, *PASSING_WAYS])
def test_a_result_whose_input_changed_while_it_was_made_is_not_finished(tiny_runner: Callable[[], Runner], stage: str, way: Way):
    if way is through_a_map and not maps_change_the_times():
        pytest.xfail("contents.Contents._of trusts times, and on this file system (tmpfs) what is written through a map changes none")
    before = keys(file=CONFIG)[stage]
    with pytest.raises(PipelineError, match=f"{stage} reads changed while it ran"):
        run_while(tiny_runner(), stage, way)
    assert not finished(stage)
    if way in WAYS:  # the file is still there, and another
        runner = tiny_runner()
        runner.run("prepare-data")
        runner.run(stage)
        assert [manifest.parent.name for manifest in finished(stage)] == [keys(file=CONFIG)[stage]] != [before]


def test_a_file_that_is_added_to_a_model_while_it_is_read_is_noticed(tiny_runner: Callable[[], Runner]):
    def added(file: Path) -> Iterator[None]:
        yield
        write(file.with_name("adapter_config.json"), "{}")

    with pytest.raises(PipelineError, match="changed while it ran"):
        run_while(tiny_runner(), "cache-teacher", added)
    assert not finished("cache-teacher")


def test_a_piece_that_was_made_from_changed_weights_is_not_believed_when_the_weights_are_back(tiny_runner: Callable[[], Runner]):
    weights = INPUTS["cache-teacher"]
    right = weights.read_bytes()
    with pytest.raises(PipelineError, match="changed while it ran"):
        run_while(tiny_runner(), "cache-teacher", written)
    weights.write_bytes(right)
    tiny_runner().run("cache-teacher")
    (manifest,) = finished("cache-teacher")
    assert (manifest.parent / "word-00000.txt").read_text() == sha256_of(weights)


@pytest.mark.parametrize("stage", INPUTS)
def test_control_what_does_not_change_is_finished(tiny_runner: Callable[[], Runner], stage: str):
    run_while(tiny_runner(), stage, None)
    assert len(finished(stage)) == 1


@pytest.mark.parametrize("stage", INPUTS)
@pytest.mark.parametrize("way", WAYS)
def test_control_without_a_second_look_a_changed_input_is_finished(tiny_runner: Callable[[], Runner], monkeypatch: pytest.MonkeyPatch, stage: str, way: Way):
    monkeypatch.setattr(Runner, "_recomputed", lambda self, stage: self.identity(stage))
    run_while(tiny_runner(), stage, way)
    assert len(finished(stage)) == 1


# --- what cannot be hashed is an error, never a random key -------------------------------------------------------------


UNHASHABLE: list[Any] = [
    lambda: 0,
    {"a", "b"},
    frozenset("ab"),
    float("nan"),
    float("inf"),
    float("-inf"),
    object(),
    b"x",
    bytearray(b"x"),
    {1: 2},
    {None: 2},
    {("a",): 2},
    {b"a": 2},
    {"a": 1, 2: 3},
    1j,
    Decimal("1.5"),
    date(2026, 1, 1),
    Path("x"),
    range(3),
    iter([1]),
    ...,
    int,
    np.float32(1),
    np.int64(1),
    np.zeros(1),
    torch.zeros(1),
]


def taken(text_of: Callable[[Any], str]) -> list[Any]:
    """What is given a text although it has none that is the same tomorrow."""
    found = []
    for value in UNHASHABLE:
        for place in (value, [value], {"a": {"b": [1, value]}}, {"data": {"path": named("x", value)}}):
            with suppress(TypeError):
                text_of(place)
                found.append(value)
    return found


def test_what_cannot_be_hashed_is_an_error():
    assert not taken(canonical)
    assert not taken(lambda value: fingerprint(SMALL | {"sections": {"data": value}}))
    assert not taken(lambda value: fingerprint(BUILT | {"needs": {"prepare-data": SMALL | {"version": value}}}))


def test_control_a_text_made_of_anything_is_caught():
    assert len(taken(lambda value: json.dumps(value, sort_keys=True, default=repr))) > len(UNHASHABLE)
    assert len(taken(repr)) == 4 * len(UNHASHABLE)


def test_equal_values_have_one_text_and_others_another():
    assert canonical({"b": 1, "a": 0.1}) == canonical({"a": 0.1, "b": 1})
    assert canonical((1, 2)) == canonical([1, 2])
    assert canonical(-0.0) == canonical(0.0)
    assert canonical(np.float64(0.1)) == canonical(0.1)
    different = [None, True, False, 0, 1, 1.0, 0.0, "", "1", "1.0", "null", [], {}, [None], {"": None}, [[]], [{}], {"a": []}, {"a": {}}, 0.1 + 0.2, 0.3, 2**53, 2**53 + 1, float(2**53)]
    assert len({canonical(value) for value in different}) == len(different)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("training.specialty_weights={named: 3.0, content: 2.0}", "training.specialty_weights={named: 4.0, content: 2.0}"),
        ("data.train.2.options=1.0", "data.train.2.options={float: 0x1.0000000000000p+0}"),
    ],
)
def test_two_values_never_have_one_key(here: Path, one: str, other: str):
    found = []
    for change in (one, other):
        with suppress(ConfigError):
            found.append(canonical(keys(change)))
    assert len(set(found)) == len(found)


@dataclass(frozen=True)
class Wrong:
    """A value that must be refused."""

    what: str
    where: str
    text: str

    def __str__(self) -> str:
        return self.what


OPTION = "training.objective.0.temperature_squared"
WRONG = [
    Wrong("not a number", "training.weight_decay", ".nan"),
    Wrong("infinity", "training.learning_rate.from", ".inf"),
    Wrong("a function", OPTION, "!!python/name:builtins.len"),
    Wrong("an object", OPTION, "!!python/object/new:object []"),
    Wrong("not a number, as an option", OPTION, ".nan"),
    Wrong("infinity, as an option", OPTION, "-.inf"),
    Wrong("bytes", "data.train.0.fields.user", "!!binary aGVsbG8="),
    Wrong("a date", "data.train.0.fields.user", "2026-01-01"),
    Wrong("a set", "data.train.0.fields.user", "!!set {a: null, b: null}"),
    Wrong("a list as a key", "data.train.0.fields", "{[user]: question}"),
]
ONLY_AS_SET = [
    Wrong("a number as a key", "data.train.0.fields", "{1: question}"),
    Wrong("a key given twice", "training.learning_rate", "{from: 1.0e-3, to: 1.0e-4, to: 1.0e-5}"),
]


@pytest.mark.parametrize("wrong", WRONG + ONLY_AS_SET, ids=str)
def test_a_setting_that_cannot_be_hashed_is_an_error_of_the_command(here: Path, wrong: Wrong):
    with pytest.raises(ConfigError, match=re.escape(".".join(wrong.where.split(".")[:2]))):
        keys(f"{wrong.where}={wrong.text}")


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_setting_that_cannot_be_hashed_is_an_error_of_the_file(here: Path, wrong: Wrong):
    *above, last = wrong.where.split(".")
    tree = inner = yaml.safe_load(RICH)
    for key in above:
        inner = inner[int(key)] if key.isdigit() else inner[key]
    inner[last] = "HERE"
    (here / "rich.yaml").write_text(yaml.safe_dump(tree).replace("HERE", wrong.text))
    with pytest.raises(ConfigError, match=r"rich.yaml:\d+|is no YAML"):
        keys()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: rich", "name: rich\nname: poor"),
        ("max_tokens: 128", "max_tokens: 128\n  max_tokens: 127"),
        ("dtype: float32", "dtype: float32, dtype: bfloat16"),
        ("weight: 0.7", "weight: 0.7, weight: 0.8"),
        ("fields: {user: question}", "fields: {user: question, user: title}"),
        ("max_tokens: 128", 'max_tokens: 128\n  "max_tokens": 128'),
    ],
)
def test_a_key_that_is_given_twice_is_an_error(here: Path, old: str, new: str):
    assert old in RICH
    (here / "rich.yaml").write_text(RICH.replace(old, new, 1))
    with pytest.raises(ConfigError, match=r"rich.yaml:\d+"):
        keys()


def test_control_the_same_file_without_what_is_wrong_has_keys(here: Path):
    assert len(keys()) == len(STAGES)
    assert yaml.safe_load("{a: 1, a: 2}") == {"a": 2}  # what PyYAML itself makes of a key given twice
