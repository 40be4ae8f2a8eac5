"""Every setting of an experiment, as frozen pydantic models, and how a YAML file becomes one.

Values are taken as written: no string is read as a number or the other way round. A key that nobody knows is an error that
names the nearest right one and where it stands. What stands under `machine` changes the speed, never the meaning of a
result, and is in no fingerprint. Some keys always name something outside the YAML, which then counts by its content: `path`
(files or a glob), `model` (a model folder or a hub id), `tokenizer` (the tokenizer's files of such a model), and `cache` and
`projection` where they are text (the folder of a finished run).
"""

import json
import re
from itertools import product
from math import exp, isfinite, log
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.lookup import nearest, option_types, parameters
from pipeline.options import Count, Number, Positive, Share
from pipeline.training.schedules import value_at

SECRET = re.compile(r"://[^/@\s]+@|\b(hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,})\b")
Revision = Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=False, allow_inf_nan=False)


class Named(BaseModel):
    """An entry that names a function in one of the library's folders; every further key is an option of that function."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    kind: ClassVar[str]
    """The folder."""
    field: ClassVar[str]
    """The setting that has the function's name."""

    @property
    def file(self) -> str:
        """Where the function is."""
        return f"pipeline/{self.kind}/{getattr(self, self.field)}.py"

    @model_validator(mode="after")
    def _only_plain_values(self) -> "Named":
        """What YAML can write and JSON cannot (dates, bytes, sets, infinity) has no one way to be hashed."""

        def plain(value: Any) -> bool:
            if isinstance(value, dict):
                return value.keys() != {"float"} and all(isinstance(key, str) and plain(part) for key, part in value.items())  # so a float is hashed
            return all(map(plain, value)) if isinstance(value, list) else value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and isfinite(value))

        for key, value in self.options().items():
            if not plain(value):
                raise ValueError(f"{key} must be made of text, numbers, true, false, lists and mappings")
        return self

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def check(self) -> None:
        name = getattr(self, self.field)
        try:
            _, known = parameters(self.kind, name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for key in self.options():
            if key not in known:
                raise ValueError(f"{name} has no option '{key}'; {nearest(key, [*known, *type(self).model_fields])}")
        for key, required in known.items():
            if required and key not in self.options():
                raise ValueError(f"{name} needs the option '{key}'")
        try:
            types = option_types(self.kind, name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for key, value in self.options().items():
            try:
                # as JSON, which has no tuples: a list is one; and 1 for a float is 1.0, so that both are the same setting
                (self.model_extra or {})[key] = types[key].dump_python(types[key].validate_json(json.dumps(value), strict=True), mode="json")
            except ValidationError as error:
                raise ValueError(f"{key}: {_lower(error.errors()[0]['msg'])} (it is {value!r})") from None


def named_files(value: Any) -> list[str]:
    """The files of the functions that a section names."""
    if isinstance(value, Named):
        return [value.file]
    if isinstance(value, BaseModel):
        return [file for name in type(value).model_fields for file in named_files(getattr(value, name))]
    return [file for part in value for file in named_files(part)] if isinstance(value, list) else []


class Dataset(Named):
    kind, field = "datasets", "dataset"
    dataset: str
    """A file in pipeline/datasets/."""
    limit: Positive | None = None
    """Take only the first so many records."""
    skip: Count = 0
    """Leave out the first so many."""
    weight: Number = 1.0
    """How much each of its records counts in the objective."""
    incomplete: Literal["stop", "drop"] = "stop"
    """What to do with a record without a question or an answer."""

    @model_validator(mode="after")
    def _check(self) -> "Dataset":
        self.check()
        return self


class Heldout(Section):
    fraction: Share | None = None
    """This share of the training records, chosen by content hash."""
    datasets: list[Dataset] = []


class Data(Section):
    train: Annotated[list[Dataset], Field(min_length=1)]
    heldout: Annotated[Heldout, BeforeValidator(lambda v: {"datasets": v} if isinstance(v, list) else v)] = Heldout(fraction=0.02)
    """{fraction: 0.02}, or a list of datasets as under train."""
    template: str = "plain"
    """plain: "Question: ...\\nAnswer: ..."; chat: each model's own chat template; anything else: a Jinja template over `messages`."""
    max_tokens: Positive = 1024
    """In the teacher's tokens. A longer record's context is cut at its end; one that is still longer is left out and counted."""
    records_per_shard: Positive = 256


class Teacher(Section):
    model: str
    """A hub id (then revision is needed), a local folder, or run:train-student/FINGERPRINT."""
    revision: Revision = None
    """The hub commit, 40 hexadecimal digits."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    double_quantization: bool = True
    """Also quantize NF4's own scales."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """In which the teacher computes."""


class Logits(Section):
    method: Literal["head", "sampled"] = "head"
    """head: the most probable tokens, the mass of the others as one number per temperature. sampled: `keep` draws (RS-KD)."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.002
    """Every token at least this probable is kept, within `min` and `keep`. 0: always `keep` tokens."""
    min: Annotated[int, Field(ge=1, le=65535)] = 4
    keep: Annotated[int, Field(ge=1, le=65535)] = 128
    """At most so many tokens are kept per position; with `sampled`, so many are drawn (255 at most)."""
    step: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Number], Field(strict=False)] = (0.02, 0.5)
    """How finely log-probabilities are stored: min(second, first * exp(-logprob / 2)) nats."""
    temperatures: Annotated[list[Number], Field(min_length=1)] = [1.0, 2.0, 8.0]
    """At which the log of the mass that was not kept is stored; in between it is interpolated."""
    hidden: Literal["int8"] | None = None
    """Also keep the last hidden states, and the head once: exact logits at any temperature, at hidden-size bytes a position."""
    boundary: bool = False
    """Also keep the mass of 16 classes of the next token's first byte."""
    logsumexp: bool = False
    """Also keep the log of the sum of the exponentials of the raw logits."""

    @model_validator(mode="after")
    def _check(self) -> "Logits":
        if sorted(set(self.temperatures)) != self.temperatures or self.temperatures[0] != 1.0:
            raise ValueError("temperatures must ascend and begin with 1.0")
        if any(float(f"{temperature:g}") != temperature for temperature in self.temperatures):
            raise ValueError("temperatures name columns: give at most six digits of each")
        if self.threshold == 0 and "min" in self.model_fields_set:
            raise ValueError("min has no effect with threshold: 0, which always keeps `keep` tokens; leave it out")
        if self.min > self.keep and ("min" in self.model_fields_set or self.keep < 1):
            raise ValueError(f"min ({self.min}) must not be above keep ({self.keep})")
        narrow, wide = self.step
        knee = min(-2 * log(wide / narrow), 0.0)
        codes_above = 2 / narrow * (1 - exp(knee / 2))
        if codes_above >= 255 or knee - wide * (255 - codes_above) > -12:
            raise ValueError(f"step {list(self.step)} is too fine: 256 codes do not reach down to a log-probability of -12. Give larger numbers, such as [0.02, 0.5]")
        if self.method == "sampled":
            if self.keep > 255 or "keep" not in self.model_fields_set:
                raise ValueError("method: sampled needs keep, the number of draws, from 1 to 255")
            without = sorted(self.model_fields_set & {"threshold", "min", "step"})
            if without:
                raise ValueError(f"{without[0]} has no effect with method: sampled; leave it out")
        return self

    @property
    def least(self) -> int:
        return min(self.min, self.keep)


class Attention(Section):
    layers: Annotated[list[Count], Field(min_length=1)] | None = None
    """Of the teacher, 0 is the first."""
    matched: Positive | None = None
    """Instead of layers: so many, spread evenly; those that see the whole text before those with a sliding window."""
    keys: Annotated[int, Field(ge=1, le=255)] = 16
    """At most so many keys are kept of a row."""
    heads: Literal["mean", "each"] = "mean"
    """Whether a layer has one row a position, the mean of its heads, or one for each head."""

    @model_validator(mode="after")
    def _check(self) -> "Attention":
        if (self.layers is None) == (self.matched is None):
            raise ValueError("give either layers or matched")
        if self.layers is not None and sorted(set(self.layers)) != self.layers:
            raise ValueError("layers must ascend, each once")
        return self


class Targets(Section):
    positions: Literal["answer", "all"] = "answer"
    logits: Logits = Logits()
    attention: Attention | None = None
    """Which attention weights are kept beside the logits; null: none."""
    text: Literal["keep", "omit"] = "keep"
    """omit: only digests of the records' text are stored (a student with another tokenizer then cannot be trained)."""


class Lora(Section):
    """Low-rank adapters: W + (alpha / rank) * B A, of which only A and B are trained."""

    rank: Positive = 16
    alpha: Number = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's input that a training step leaves out."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """The linear modules that get an adapter, by the ends of their names, such as [q_proj, v_proj]; all-linear: all but the head."""
    rslora: bool = False
    """Scaled by alpha / sqrt(rank) instead."""


class Student(Section):
    model: str
    revision: Revision = None
    layers: Annotated[list[Count], Field(min_length=1)] | None = None
    """Keep only these decoder layers of the model, in this order."""
    lora: Lora | None = None
    """Train adapters and leave the model's own weights as they are; null: train all weights."""
    quantization: Literal["nf4", "int8", "none"] = "none"
    """Of the linear weights that `lora` leaves as they are (QLoRA)."""
    double_quantization: bool = True
    """Also quantize NF4's own scales."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the other weights that `lora` leaves as they are, of products with quantized ones, and of the student that is written. What is trained is float32."""

    @model_validator(mode="after")
    def _check(self) -> "Student":
        if self.lora is None and self.quantization != "none":
            raise ValueError(f"quantization: {self.quantization} leaves nothing that could be trained; add lora, such as `lora: {{rank: 16}}`, or leave quantization out")
        if self.lora is None and self.dtype != "float32":
            raise ValueError(f"dtype: {self.dtype} is for weights that lora leaves as they are, and without lora all are trained, in float32; add lora, or leave dtype out")
        if self.quantization != "nf4" and "double_quantization" in self.model_fields_set:
            raise ValueError("double_quantization has no effect without quantization: nf4; leave it out")
        return self


class TokenizerSource(Section):
    """What the stages that only need the student's tokenizer are told of the student."""

    tokenizer: str
    revision: Revision = None


class Projection(Named):
    kind, field = "projections", "method"
    method: str = "contextual"
    """A file in pipeline/projections/. With equal tokenizers it is always `identity`."""

    @model_validator(mode="after")
    def _check(self) -> "Projection":
        self.check()
        return self


class Schedule(Section):
    start: float = Field(alias="from", gt=0)
    end: float = Field(alias="to", ge=0)
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "linear"

    @classmethod
    def constant(cls, value: float) -> "Schedule":
        return cls.model_validate({"from": value, "to": value, "schedule": "constant"})

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.schedule == "exponential" and self.end <= 0:
            raise ValueError("an exponential schedule cannot reach 0; give a small 'to' instead")
        return self


class Weights(Section):
    """A schedule that may begin at 0."""

    start: float = Field(alias="from", ge=0, le=1e6)
    end: float = Field(alias="to", ge=0, le=1e6)
    schedule: Literal["linear", "cosine", "exponential"] = "linear"

    @model_validator(mode="after")
    def _check(self) -> "Weights":
        if self.schedule == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError("an exponential schedule cannot begin at 0 or reach it; give a small number instead")
        return self


def _number_or_schedule(value: Any) -> str:
    return "a schedule" if isinstance(value, dict | Weights) else "a number"


def _name_or_table(value: Any) -> str:
    return "a table" if isinstance(value, dict) else "a name"


def _number_is_constant(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"from": float(value), "to": float(value), "schedule": "constant"}
    return value


Scheduled = Annotated[Schedule, BeforeValidator(_number_is_constant)]


class Objective(Named):
    kind, field = "losses", "loss"
    loss: str
    """A file in pipeline/losses/."""
    weight: Annotated[Annotated[float, Field(ge=0, le=1e6), Tag("a number")] | Annotated[Weights, Tag("a schedule")], Discriminator(_number_or_schedule)] = 1.0
    """A number, or a schedule of one over the steps."""
    tail: Literal["rest", "calibrated", "hidden"] = "rest"
    """How the mass that the teacher gives to unkept tokens is shared out among them: as the student does; so that each token's
    average is the teacher's; or exactly, from hidden states that were kept."""

    @model_validator(mode="after")
    def _check(self) -> "Objective":
        self.check()
        if self.tail != "rest" and not self.takes("teacher"):
            raise ValueError(f"tail has no effect on {self.loss}, which does not compare tokens with the teacher's; leave it out")
        return self

    @property
    def most(self) -> float:
        """Its weight where that is largest; 0: it takes no part."""
        return self.weight if isinstance(self.weight, float) else max(self.weight.start, self.weight.end)

    def weight_at(self, step: int, steps: int) -> float:
        return self.weight if isinstance(self.weight, float) else value_at(step, steps, self.weight.start, self.weight.end, self.weight.schedule)

    def needs_teacher(self) -> bool:
        return any(self.takes(what) for what in ("teacher", "values", "chunks", "attention"))

    def takes(self, what: str) -> bool:
        return what in parameters("losses", self.loss)[0]


class Validation(Section):
    every: Positive
    """Optimizer steps between two looks."""
    records: Positive = 64
    """Training records that are put aside for it, spread over the cache; the held-out ones stay unseen until `evaluate`."""
    keep: Literal["best", "last"] = "best"
    """Which student is the result: the one with the lowest validation loss, or the last."""


class Curriculum(Section):
    """Which records are trained on when. Give one of order, share and epochs."""

    by: Literal["entropy", "cross_entropy", "specialty"]
    """How hard a record is, out of the cache: the teacher's mean entropy, or how unlikely it finds the answer. Or its specialty."""
    order: Literal["ascending", "descending"] | None = None
    """Every pass goes from the easy to the hard (in ten equal parts), or back; by specialty: one after another."""
    share: Scheduled | None = None
    """Only the easiest share of the records, such as {from: 0.2, to: 1.0}, over the steps (competence-based, arXiv 1903.09848)."""
    epochs: Annotated[list[Annotated[list[str], Field(min_length=1)]], Field(min_length=1)] | None = None
    """By specialty: those of each pass ("all": every one); the last ones stay."""

    @model_validator(mode="after")
    def _check(self) -> "Curriculum":
        if sum(way is not None for way in (self.order, self.share, self.epochs)) != 1:
            raise ValueError("give one of order, share and epochs")
        if self.epochs is not None and self.by != "specialty":
            raise ValueError(f"epochs name specialties: take `by: specialty` with them, or order or share with `by: {self.by}`")
        if self.share is not None and self.by == "specialty":
            raise ValueError("no specialty is easier than another: take order or epochs with `by: specialty`, or share with `by: entropy`")
        if self.share is not None and not (self.share.end > 0 and max(self.share.start, self.share.end) <= 1):
            raise ValueError("share goes from above 0 to 1 at most")
        return self


class TokenTemperature(Section):
    strength: Annotated[float, Field(gt=0, le=2)] = 0.5
    """Tokens go from `temperature` times exp(strength) for those that the student has right to exp(-strength) for the hardest; 1 at least."""


class TeacherShare(Section):
    weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Beside the other teachers' weights; at each position those count that say something there."""
    specialties: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    """Its weight on the records of these, instead."""

    def of(self, specialty: str | None) -> float:
        return self.specialties.get(specialty or "", self.weight)


class AnotherTeacher(TeacherShare):
    cache: str
    """The folder of a finished cache-teacher that has the same records."""
    projection: str
    """The folder of the fit-projection from that cache to this student's tokens."""


class Training(Section):
    objective: Annotated[list[Objective], Field(min_length=1)] = [Objective(loss="forward_kl", weight=0.7), Objective(loss="cross_entropy", weight=0.3)]
    own_teacher: TeacherShare = TeacherShare()
    """How much the experiment's teacher counts where there are more."""
    more_teachers: list[AnotherTeacher] = []
    """Further teachers that the losses over tokens compare with, each out of its own cache."""
    temperature: Scheduled = Schedule.constant(1.0)
    token_temperature: TokenTemperature | None = None
    """Each token a temperature of its own, lower where teacher and student are far apart (AdaKD, arXiv 2510.11615, IDTS)."""
    specialty_weights: Annotated[
        Annotated[Literal["inverse_frequency", "current_loss"], Tag("a name")] | Annotated[dict[str, Annotated[float, Field(ge=0, le=1e6)]], Tag("a table")], Discriminator(_name_or_table)
    ] = {}
    """Factor on the records of a specialty; 1 for those not named. inverse_frequency: all weigh the same together; current_loss: in
    proportion to the student's loss on each lately. Both have a mean of 1 over the records."""
    curriculum: Curriculum | None = None
    steps: Positive | None = None
    epochs: Number | None = None
    """Instead of steps: passes over the training records."""
    batch_records: Positive = 16
    """Records in one optimizer step, over all devices."""
    learning_rate: Scheduled = Schedule.constant(1e-5)
    warmup_steps: Count = 0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: its moments in one byte each (bitsandbytes), of tensors with at least 4,096 elements."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_gradient_norm: Number = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: matrix products in bfloat16 (autocast), weights and optimizer in float32."""
    seed: Count = 0
    validation: Validation | None = None
    """The objective, at the last temperature and weights and with `tail: rest`, on records that are not trained on."""

    @property
    def hottest(self) -> float:
        """The highest temperature that any token can have."""
        return max(self.temperature.start, self.temperature.end) * (exp(self.token_temperature.strength) if self.token_temperature else 1.0)

    @model_validator(mode="after")
    def _check(self) -> "Training":
        if min(self.temperature.start, self.temperature.end) < 1:
            raise ValueError("temperature must be at least 1 throughout: the cache holds the unkept mass at 1 and above")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if not any(part.most > 0 for part in self.objective):
            raise ValueError("every weight of the objective is 0")
        if self.token_temperature and any(part.tail == "calibrated" for part in self.objective if part.most > 0):
            raise ValueError("token_temperature has no one temperature for `tail: calibrated` to be calibrated at; take `tail: rest` or `hidden`")
        if self.token_temperature and any(part.takes("values") for part in self.objective if part.most > 0):
            raise ValueError("token_temperature asks which tokens the student has right, and uld knows no tokens; leave one of them out")
        if self.more_teachers and (self.token_temperature or any(part.tail != "rest" for part in self.objective if part.most > 0)):
            raise ValueError("more_teachers are compared at one temperature and with `tail: rest`; leave token_temperature and other tails out")
        compares = any(part.takes("teacher") or part.takes("values") for part in self.objective if part.most > 0)
        if not compares and (wrong := next((name for name in ("token_temperature", "more_teachers") if getattr(self, name)), None)):
            raise ValueError(f"{wrong} has no effect on an objective that compares no tokens with a teacher's; leave it out")
        shares = [self.own_teacher, *self.more_teachers]
        if not any(max([share.weight, *share.specialties.values()]) for share in shares):
            raise ValueError("every teacher weighs 0; leave some weight")
        if self.validation and not any(part.weight_at(1, 2) for part in self.objective):
            raise ValueError("validation has the objective's last weights, and they are all 0; let one end above 0")
        if self.specialty_weights == "current_loss" and all(part.takes("attention") for part in self.objective if part.most > 0):
            raise ValueError("specialty_weights: current_loss follows the losses over tokens, and the objective has none; leave it out")
        if not self.more_teachers and self.own_teacher != TeacherShare():
            raise ValueError("own_teacher has no effect without more_teachers; leave it out")
        if sum(part.takes("attention") for part in self.objective if part.most > 0) > 1:
            raise ValueError("only one loss of the objective can compare attention")
        return self


class Benchmark(Named):
    kind, field = "benchmarks", "benchmark"
    benchmark: str
    """A file in pipeline/benchmarks/."""

    @model_validator(mode="after")
    def _check(self) -> "Benchmark":
        self.check()
        return self

    @property
    def live(self) -> bool:
        """Whether it asks what no cache holds."""
        return parameters("benchmarks", self.benchmark)[0][0] == "live"


def _by_name(value: Any) -> Any:
    """{mmlu_medical: {path: ...}} is a list of one."""
    return [{"benchmark": name, **(options or {})} for name, options in value.items()] if isinstance(value, dict) and all(isinstance(part, dict | None) for part in value.values()) else value


class Published(Section):
    path: str
    """A JSON file as configs/distilllm_med/published.json."""


class Evaluation(Section):
    benchmarks: Annotated[list[Benchmark], Field(min_length=1), BeforeValidator(_by_name)] = [
        Benchmark(benchmark="perplexity"),
        Benchmark(benchmark="fidelity"),
        Benchmark(benchmark="multiple_choice"),
        Benchmark(benchmark="calibration"),
    ]
    """A list, or {name: options}."""
    control: bool = True
    """Also train and evaluate the same student without the teacher (train-control)."""
    ask_teacher: bool = True
    """Ask the teacher, too, what its cache cannot answer (evaluate-teacher); false: there it has no figures."""
    published: Published | None = None
    """Figures of others that stand beside ours, marked as theirs."""

    @model_validator(mode="after")
    def _check(self) -> "Evaluation":
        names = [name for entry in self.benchmarks for name in (entry.options().get("tasks", []) if entry.benchmark == "harness" else [entry.benchmark])]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} stands twice among the benchmarks, and one would hide the other; leave one of them out, or evaluate them apart")
        if not self.ask_teacher and not self.live:
            raise ValueError("ask_teacher has no effect without a benchmark that the cache cannot answer (the harness's, text_quality); leave it out")
        return self

    @property
    def live(self) -> list[Benchmark]:
        """Those that ask what no cache holds."""
        return [entry for entry in self.benchmarks if entry.live]


class Asked(Section):
    """What the stage that asks the teacher is told of the evaluation."""

    benchmarks: list[Benchmark]


class Machine(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    teacher_batch_records: Positive = 8
    student_micro_batch_records: Positive = 4
    student_micro_batch_tokens: Positive | None = None
    """Instead of records: so many tokens, padding included, go through the student at a time."""
    packing: bool = False
    """Records of a micro-batch are put into one row, none seeing another, so that nothing is padded."""
    workers: Count = 1
    """Threads that make the next batches ready while the model computes."""
    max_rejected: Share = 0.001
    """When the teacher's logits are not finite on more than this share of the records, cache-teacher stops."""
    numerics: Literal["tolerant", "strict"] = "tolerant"
    """strict: cache-teacher adds no shard to a cache whose other shards were made on another kind of device, with another batch
    size, number of threads or version of torch. tolerant: it does, and the manifest says so."""
    gradient_checkpointing: bool = False
    checkpoint_steps: Positive = 100
    """Optimizer steps between two checkpoints."""
    measure_cost: bool = True
    """Measure how fast the models write and how much memory they take: the teacher's once in cache-teacher, the students' in evaluate."""


class Experiment(Section):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The evaluation's results.json, table and curves are also put under this name in the runs folder."""
    data: Data
    teacher: Teacher
    targets: Targets = Targets()
    student: Student
    projection: Projection = Projection()
    training: Training
    evaluation: Evaluation = Evaluation()
    machine: Machine = Machine()

    @property
    def student_tokenizer(self) -> TokenizerSource:
        return TokenizerSource(tokenizer=self.student.model, revision=self.student.revision)

    @property
    def asked(self) -> Asked:
        return Asked(benchmarks=self.evaluation.live)

    def check_cache_suffices(self) -> None:
        """ConfigError if training asks for what a cache of these targets will not hold: better now than after the teacher has run."""
        logits = self.targets.logits
        tails = {part.tail for part in self.training.objective if part.most > 0}
        taught = any(part.takes("teacher") or part.takes("values") for part in self.training.objective if part.most > 0)
        if not logits.boundary and any(part.loss == "alm" and part.options().get("boundary") for part in self.training.objective if part.most > 0):
            raise ConfigError("training.objective has alm with `boundary: true`, which needs `targets.logits.boundary: true`. Add that, or leave `boundary` out.")
        if self.targets.text == "omit" and any(entry.benchmark == "text_quality" for entry in self.evaluation.benchmarks):
            raise ConfigError("evaluation.benchmarks has text_quality, which needs the text of the held-out records. Set `targets.text: keep`, or leave text_quality out.")
        for part in self.training.objective:
            if part.most > 0 and part.takes("attention"):
                self._check_attention(part)
        if "hidden" in tails and logits.hidden is None:
            raise ConfigError("training.objective has `tail: hidden`, which needs `targets.logits.hidden: int8`. Add that, or take `tail: calibrated`.")
        if logits.method == "sampled" and (shaped := sorted(tails - {"rest"})):
            raise ConfigError(f"training.objective has `tail: {shaped[0]}`, and with `targets.logits.method: sampled` there is no tail. Take `tail: rest`.")
        if logits.method == "sampled" and taught and self.training.hottest > 1:
            raise ConfigError("training.temperature is above 1, and draws (`targets.logits.method: sampled`) are unbiased at 1 only. Set it to 1, or take `method: head`.")

    def _check_attention(self, part: Objective) -> None:
        kept = self.targets.attention
        if kept is None:
            raise ConfigError(f"training.objective has {part.loss}, which needs `targets.attention`. Add that, such as `attention: {{matched: 4}}`, or leave {part.loss} out.")
        asked = [pair[0] for pair in part.options().get("layers") or [] if pair]
        if kept.layers is not None and (missing := sorted(set(asked) - set(kept.layers))):
            raise ConfigError(f"training.objective compares the teacher's layer {missing[0]}, and targets.attention.layers keeps {kept.layers}. Add it there, or compare another.")

    def without_teacher(self) -> "Experiment":
        """The SFT-only control: the losses that need no teacher, their weights constant and made to sum to 1 so that variants share one; all else is equal."""
        rest = [part for part in self.training.objective if part.most > 0 and not part.needs_teacher()] or [Objective(loss="cross_entropy")]
        alone: dict[str, Any] = {"temperature": Schedule.constant(1.0), "token_temperature": None, "own_teacher": TeacherShare(), "more_teachers": []}
        share = 1 / sum(part.most for part in rest)
        rest = [part.model_copy(update={"weight": part.most * share}) for part in rest]
        return self.model_copy(update={"training": self.training.model_copy(update={"objective": rest, **alone})})


class Ablation(Section):
    """Changes to one experiment, each with each seed."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The tables are put under this name in the runs folder."""
    base: str
    """The experiment's file, beside this one."""
    seeds: Annotated[list[Count], Field(min_length=1)] = [0]
    """training.seed."""
    variants: Annotated[dict[str, dict[str, Any] | None], Field(min_length=1)] | None = None
    """Name -> what it changes: {section.key: value, ...}; nothing: the experiment as it is."""
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)] | None = None
    """Instead of variants: every combination of these values."""

    @model_validator(mode="after")
    def _check(self) -> "Ablation":
        if (self.variants is None) == (self.grid is None):
            raise ValueError("give either variants or grid")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        return self

    def changes(self) -> dict[str, dict[str, Any]]:
        """Of each variant, by its name."""
        if self.variants is not None:
            return {name: changes or {} for name, changes in self.variants.items()}
        keys, values = list(self.grid or {}), list((self.grid or {}).values())
        return {", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, each, strict=True)): dict(zip(keys, each, strict=True)) for each in product(*values)}


# --- from YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-4 is a number, a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$|^[-+]?\.?[0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)

Place = tuple[str | int, ...]


def load_experiment(file: str | Path, changes: list[str] | None = None) -> Experiment:
    """The experiment in a YAML file, with `extends:` merged in and each "section.key=value" of `changes` set."""
    tree, lines = _read(Path(file), ())
    for change in changes or []:
        _set(tree, lines, change)
    _refuse_secrets(tree, lines, (), str(file))
    if "name" not in tree:
        tree["name"] = Path(file).stem
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, lines, str(file)) for problem in error.errors())) from None


def load_ablation(file: str | Path, instead: dict[str, str | None] | None = None) -> Ablation:
    """The ablation in a YAML file, with other values where they are not None."""
    tree, lines = _read(Path(file), ())
    tree |= {key: value for key, value in (instead or {}).items() if value is not None}
    _refuse_secrets(tree, lines, (), str(file))
    try:
        return Ablation.model_validate({"name": Path(file).stem} | tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, lines, str(file), Ablation) for problem in error.errors())) from None


def _read(file: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Place, str]]:
    if file.resolve() in seen:
        raise ConfigError(f"{file} extends itself: {' -> '.join(str(f) for f in (*seen, file))}")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The experiment file {file} cannot be read: {error.strerror}. Give the path of a YAML file, such as configs/demo.yaml.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"The experiment file {file} is no UTF-8 text: {error}.") from None
    lines: dict[Place, str] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = _build(node, (), lines, file) if node else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must be a mapping of sections (data, teacher, ...).")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, lines
    base, base_lines = _read(file.parent / str(parent), (*seen, file.resolve()))
    return _merge(base, tree), base_lines | lines


def _build(node: yaml.Node, place: Place, lines: dict[Place, str], file: Path) -> Any:
    lines[place] = f"{file}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise ConfigError(f"{lines[place]}: {node.tag} cannot be a setting. Give a list or a mapping.")
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{file}:{key_node.start_mark.line + 1}: a key must be text, and {key!r} is not. Put it in quotes.")
            if key in result:
                raise ConfigError(f"{file}:{key_node.start_mark.line + 1}: the key '{key}' is given twice.")
            result[key] = _build(value_node, (*place, key), lines, file)
            lines[(*place, key)] = f"{file}:{key_node.start_mark.line + 1}"
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*place, i), lines, file) for i, child in enumerate(node.value)]
    return None if node.tag == "tag:yaml.org,2002:null" else yaml.load(yaml.serialize(node), Loader=_Loader)


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base.get(key), value) for key, value in over.items()}
    return over


def _set(tree: dict[str, Any], lines: dict[Place, str], change: str) -> None:
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {change}: give it as section.key=value.")
    keys: list[str | int] = [int(key) if key.isdigit() else key for key in path.split(".")]
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = _build(node, (), {}, Path(f"--set {path}")) if node else None
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: the value is no YAML: {error}") from None
    here: Any = tree
    for key in keys[:-1]:
        if isinstance(here, list):
            if not isinstance(key, int) or key >= len(here):
                raise ConfigError(f"--set {change}: there is no entry {key} in that list.")
        elif not isinstance(here.get(key), dict | list):
            here[key] = {}
        here = here[key]
    if isinstance(here, list) and not (isinstance(keys[-1], int) and keys[-1] < len(here)):
        raise ConfigError(f"--set {change}: there is no entry {keys[-1]} in that list.")
    here[keys[-1]] = value
    for n in range(1, len(keys) + 1):
        lines.setdefault(tuple(keys[:n]), f"--set {change}")
    lines[tuple(keys)] = f"--set {change}"


def _refuse_secrets(value: Any, lines: dict[Place, str], place: Place, file: str) -> None:
    if isinstance(value, str) and SECRET.search(value):
        raise ConfigError(
            f"{lines.get(place, file).partition('=')[0]}: {'.'.join(map(str, place))} looks like it holds a password or a token, and settings are written into every result. "
            "Leave it out: hub and clouds read theirs from the environment or from a login."
        )
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _refuse_secrets(key, lines, (*place, "..."), file)
        _refuse_secrets(part, lines, (*place, key), file)


def _explain(problem: Any, lines: dict[Place, str], file: str, model: Any = Experiment) -> str:
    place: Place = ()
    for part in problem["loc"]:
        if (*place, part) in lines:  # parts that pydantic adds stand in no YAML
            place = (*place, part)
    where = lines.get(place, file)
    dotted = ".".join(str(part) for part in place) or "the file"
    if problem["type"] == "extra_forbidden":
        for part in problem["loc"][:-1]:
            model = _inside(model, part)
        fields = [field.alias or name for name, field in model.model_fields.items()] if model else []
        dotted = ".".join(map(str, place if problem["loc"][-1] in place[-1:] else (*place, problem["loc"][-1])))
        return f"{where}: unknown key '{dotted}'; {nearest(str(problem['loc'][-1]), fields)}"
    if problem["type"] == "missing":
        missing = ".".join(str(part) for part in (*place, problem["loc"][-1]))
        return f"{where}: '{missing}' is missing."
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = f" (it is {value!r})" if isinstance(value, str | int | float | bool | None) else ""
    return f"{where}: {dotted}: {_lower(message)}{shown}"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _inside(model: Any, part: str | int) -> Any:
    """The model class that a field's annotation holds, through lists, unions and annotations."""
    if model is None or isinstance(part, int):
        return model
    field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
    if field is None:
        return model
    found = [field.annotation]
    while found:
        kind = found.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        found.extend(getattr(kind, "__args__", ()))
    return None
