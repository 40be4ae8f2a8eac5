"""Every YAML in configs/ is valid, and a wrong one is told where it is wrong and what would be right."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import lookup
from pipeline.config import Experiment, Objective, load_ablation, load_experiment
from pipeline.errors import ConfigError
from pipeline.running.ablation import trials
from pipeline.running.fingerprint import canonical
from stages import STAGES

CONFIGS = Path(__file__).parent.parent / "configs"

SMALL = """
name: small
data: {train: [{dataset: jsonl, path: a.jsonl}]}
teacher: {model: t}
student: {model: s}
training: {steps: 10}
"""


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.relative_to(CONFIGS).as_posix())
def test_every_config_is_valid(file: Path, tmp_path: Path):
    if file.parent.name == "ablations":
        found = trials(load_ablation(file), file.parent, STAGES, tmp_path, {}, ())
        assert len({(trial.variant, trial.seed) for trial in found}) == len(found)
        for trial in found:
            trial.runner.experiment.check_cache_suffices()
    else:
        load_experiment(file).check_cache_suffices()


@pytest.mark.parametrize("name", ["distilllm_med", "temperature", "losses"])
def test_an_ablation_of_the_demo_is_one_of_the_studys_pair_too(name: str, tmp_path: Path):
    ablation = load_ablation(CONFIGS / "ablations" / f"{name}.yaml", {"base": str(CONFIGS / "distilllm_med" / "med42_to_llama32_1b.yaml"), "name": None})
    found = trials(ablation, CONFIGS / "ablations", STAGES, tmp_path, {}, (), ("targets.attention={matched: 4}",))
    assert len(found) > 6
    for trial in found:
        trial.runner.experiment.check_cache_suffices()
        assert trial.runner.experiment.student.model == "meta-llama/Llama-3.2-1B"
        assert trial.runner.experiment.training.steps == 50000


def error_of(tmp_path: Path, text: str, *changes: str) -> str:
    file = tmp_path / "e.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_experiment(file, list(changes))
    assert raised.value.exit_status == 2
    return str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("steps: 10", "step: 10, steps: 5", ["e.yaml:6", "training.step", "did you mean 'steps'"]),
        ("teacher:", "techer:", ["e.yaml:4", "techer", "did you mean 'teacher'", "'teacher' is missing"]),
        ("steps: 10", "steps: ten", ["e.yaml:6", "training.steps", "'ten'"]),
        ("steps: 10", "steps: '10'", ["training.steps", "'10'"]),
        ("steps: 10", "steps: 0", ["training.steps"]),
        ("steps: 10", "steps: 10, epochs: 1", ["either steps or epochs"]),
        ("dataset: jsonl", "dataset: jsonn", ["e.yaml:3", "did you mean 'jsonl'"]),
        ("path: a.jsonl", "path: a.jsonl, feilds: {}", ["e.yaml:3", "no option 'feilds'", "did you mean 'fields'"]),
        ("{dataset: jsonl, path: a.jsonl}", "{dataset: jsonl}", ["needs the option 'path'"]),
        ("path: a.jsonl", "path: 5", ["e.yaml:3", "path", "string", "(it is 5)"]),
        ("path: a.jsonl", "path: a.jsonl, fields: id", ["fields", "object"]),
        ("path: a.jsonl", "path: a.jsonl, fields: {user: 3}", ["fields", "string"]),
        ("path: a.jsonl", "path: a.jsonl, fields: {user: [[a]]}", ["fields", "string"]),
        ("path: a.jsonl", "path: a.jsonl, limit: 99999999999999999999999", ["limit", "less than"]),
        ("name: small", "projection: {method: learned, seed: 99999999999999999999999}", ["seed", "less than"]),
        ("name: small", "projection: {method: low_rank, learning_rate: 1.0e+300}", ["learning_rate", "less than"]),
        ("jsonl, path: a.jsonl", "hpo, path: a.obo, questions: choose", ["questions", "'definition' or 'choice'"]),
        ("name: small", "projection: {method: low_rank, rank: true}", ["projection", "rank", "integer", "(it is True)"]),
        ("name: small", "projection: {method: low_rank, keep: 0}", ["keep", "greater than or equal to 1"]),
        ("name: small", "projection: {method: low_rank, keep: 65536}", ["keep", "less than or equal to 65535"]),
        ("name: small", "projection: {method: low_rank, epochs: -3}", ["epochs", "greater"]),
        ("name: small", "projection: {method: learned, learning_rate: 0}", ["learning_rate", "greater than 0"]),
        ("name: small", "projection: {least_share: abc}", ["least_share", "number", "'abc'"]),
        ("name: small", "projection: {least_share: 2}", ["least_share", "less than or equal to 1"]),
        ("name: small", "projection: {inside: maybe}", ["inside", "boolean"]),
        ("name: small", "projection: {depth: 1.5}", ["depth", "integer"]),
        ("steps: 10", "steps: 10, objective: [{loss: alm, temperature: 0}]", ["temperature", "greater than or equal to 0.01"]),
        ("steps: 10", "steps: 10, objective: [{loss: uld, tail: calibrated}]", ["tail has no effect on uld"]),
        ("steps: 10", "steps: 10, objective: [{loss: forwrd_kl}]", ["did you mean 'forward_kl'"]),
        ("steps: 10", "steps: 10, temperature: {from: 8, too: 1}", ["training.temperature.too", "did you mean 'to'"]),
        ("steps: 10", "steps: 10, temperature: {from: 8, to: 0, schedule: exponential}", ["exponential"]),
        ("{model: t}", "{model: t, quantization: int4}", ["e.yaml:4", "teacher.quantization", "nf4"]),
        ("{model: t}", "{model: t, revision: main}", ["teacher.revision"]),
        ("{model: t}", "{model: t, model: u}", ["e.yaml:4", "given twice"]),
        ("{model: t}", "{model: no}", ["teacher.model"]),
        ("name: small", "name: ../up", ["name"]),
        ("name: small", "name: [", ["no YAML"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_place_and_the_way_out(tmp_path: Path, old: str, new: str, wanted: list[str]):
    assert old in SMALL
    message = error_of(tmp_path, SMALL.replace(old, new))
    assert all(part in message for part in wanted), message


def test_set_changes_nested_settings_and_entries_of_lists(tmp_path: Path):
    file = tmp_path / "e.yaml"
    file.write_text(SMALL)
    changed = load_experiment(file, ["training.learning_rate=1e-4", "data.train.0.limit=5", "teacher.quantization=int8", "training.temperature.from=8", "training.temperature.to=1"])
    assert changed.training.learning_rate.start == 1e-4
    assert changed.data.train[0].limit == 5
    assert changed.teacher.quantization == "int8"
    assert (changed.training.temperature.start, changed.training.temperature.end) == (8, 1)


def test_a_wrong_set_is_named(tmp_path: Path):
    assert "--set training.stepz=5" in error_of(tmp_path, SMALL, "training.stepz=5")
    assert "section.key=value" in error_of(tmp_path, SMALL, "training.steps")
    assert "no entry 3" in error_of(tmp_path, SMALL, "data.train.3.limit=5")


def test_extends_merges_deeply_and_errors_point_into_the_right_file(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(SMALL)
    file = tmp_path / "over.yaml"
    file.write_text("extends: base.yaml\nname: over\ntraining: {learning_rate: 1e-3}\n")
    experiment = load_experiment(file)
    assert (experiment.name, experiment.training.steps, experiment.training.learning_rate.end) == ("over", 10, 1e-3)
    (tmp_path / "base.yaml").write_text(SMALL.replace("steps: 10", "stepz: 10"))
    with pytest.raises(ConfigError, match=r"base\.yaml:6"):
        load_experiment(file)
    file.write_text("extends: over.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_experiment(file)


def test_the_control_has_a_weight_of_one_and_no_teacher(tmp_path: Path):
    file = tmp_path / "e.yaml"
    file.write_text(SMALL)
    control = load_experiment(file, ["training.temperature=4"]).without_teacher().training
    assert [(part.loss, part.weight) for part in control.objective] == [("cross_entropy", 1.0)]
    more = load_experiment(file, ["training.objective=[{loss: forward_kl, weight: 3.0}, {loss: cross_entropy, weight: 0.25}]"]).without_teacher().training
    assert more.objective == control.objective
    assert control.temperature.start == control.temperature.end == 1.0


def test_options_of_ones_own_are_what_their_annotations_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "losses").mkdir()
    options = "alpha=1.0, betas: tuple[float, float] = (0.9, 0.99), names: list[str] | None = None, part: Optional[float] = None, wrong: Literal.x = None"
    (tmp_path / "losses" / "mine.py").write_text(f"def mine(student, *, {options}): ...\ndef not_this(): ...")
    (tmp_path / "losses" / "fine.py").write_text(f"def fine(student, *, {options.rpartition(',')[0]}): ...")
    monkeypatch.setattr(lookup, "HERE", tmp_path)
    for cached in (lookup.parameters, lookup.option_types):
        cached.cache_clear()
    try:
        fine = Objective.model_validate({"loss": "fine", "alpha": [1, "x"], "betas": [1, 0.5], "names": ["a"], "part": 2})
        assert fine.options() == {"alpha": [1, "x"], "betas": [1.0, 0.5], "names": ["a"], "part": 2.0}
        for wrong in ({"betas": [1.0]}, {"names": "a"}, {"part": "2"}, {"part": True}):
            with pytest.raises(ValidationError):
                Objective.model_validate({"loss": "fine", **wrong})
        with pytest.raises(ValidationError, match=r"wrong is annotated with Literal.x, which is no type of an option"):
            Objective.model_validate({"loss": "mine"})
    finally:
        for cached in (lookup.parameters, lookup.option_types):
            cached.cache_clear()


def test_one_and_one_point_zero_are_the_same_setting():
    one, other = (Objective.model_validate({"loss": "alm", "temperature": value}) for value in (100, 100.0))
    assert canonical(one.model_dump()) == canonical(other.model_dump())


@pytest.mark.parametrize("loss", ["uld", "forward_kl", "alm", "attention_match"])
def test_the_control_is_without_everything_that_asks_the_teacher(loss: str):
    training = {"steps": 1, "objective": [{"loss": loss}, {"loss": "cross_entropy"}]}
    experiment = Experiment.model_validate({"name": "a", "data": {"train": [{"dataset": "jsonl", "path": "a"}]}, "teacher": {"model": "t"}, "student": {"model": "s"}, "training": training})
    assert [part.loss for part in experiment.without_teacher().training.objective] == ["cross_entropy"]


@pytest.mark.parametrize(
    ("objective", "temperature", "said"), [("{loss: uld}", 2.0, "unbiased at 1 only"), ("{loss: forward_kl, tail: hidden}", 1.0, "tail: hidden"), ("{loss: forward_kl}", 1.0, None)]
)
def test_draws_have_no_tail_and_one_temperature(tmp_path: Path, objective: str, temperature: float, said: str | None):
    file = tmp_path / "e.yaml"
    file.write_text(SMALL.replace("steps: 10", f"steps: 10, temperature: {temperature}, objective: [{objective}]") + "targets: {logits: {method: sampled, keep: 20, hidden: int8}}")
    if said:
        with pytest.raises(ConfigError, match=said):
            load_experiment(file).check_cache_suffices()
    else:
        load_experiment(file).check_cache_suffices()


@pytest.mark.parametrize(
    ("training", "wanted"),
    [
        ("objective: [{loss: forward_kl, weight: {from: 1}}]", "'training.objective.0.weight.to' is missing"),
        ("objective: [{loss: forward_kl, weight: {from: 1, to: 2, shedule: linear}}]", "unknown key 'training.objective.0.weight.shedule'; did you mean 'schedule'?"),
        ("objective: [{loss: forward_kl, weight: -1}]", "training.objective.0.weight: input should be greater than or equal to 0 (it is -1)"),
        ("objective: [{loss: forward_kl, weight: {from: 1, to: 0}}], validation: {every: 1}", "they are all 0"),
        ("objective: [{loss: cross_entropy}], token_temperature: {}", "token_temperature has no effect"),
        ("objective: [{loss: cross_entropy}], more_teachers: [{cache: a, projection: b}]", "more_teachers has no effect"),
        ("own_teacher: {weight: 0}, more_teachers: [{cache: a, projection: b, weight: 0}]", "every teacher weighs 0"),
        ("objective: [{loss: attention_match}], specialty_weights: current_loss", "current_loss follows the losses over tokens"),
        ("specialty_weights: {heart: -1}", "training.specialty_weights.heart: input should be greater than or equal to 0 (it is -1)"),
        ("specialty_weights: balanced", "input should be 'inverse_frequency' or 'current_loss' (it is 'balanced')"),
    ],
)
def test_a_way_to_train_that_makes_no_sense_is_told(tmp_path: Path, training: str, wanted: str):
    said = error_of(tmp_path, SMALL.replace("steps: 10", f"steps: 10, {training}"))
    assert wanted in said
    assert "function-after" not in said


def test_an_empty_value_is_nothing(tmp_path: Path):
    file = tmp_path / "e.yaml"
    file.write_text("base: x.yaml\nvariants:\n  plain:\n  other: {training.steps: 3}\n")
    assert load_ablation(file).changes() == {"plain": {}, "other": {"training.steps": 3}}
