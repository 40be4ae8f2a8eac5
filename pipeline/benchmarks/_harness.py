"""The tasks of lm-evaluation-harness, its prompts and its scoring, asked of our models: from the hub, or from a local file."""

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pipeline.benchmarks._local import Question, questions_of
from pipeline.benchmarks._questions import Answered, figures_of, rows_of
from pipeline.benchmarks._records import DIGEST
from pipeline.benchmarks._scores import Live
from pipeline.errors import Disagreement, InputError, NumericsError
from pipeline.lookup import nearest

try:
    import lm_eval.api.task
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise InputError(f"This benchmark needs lm-evaluation-harness ({error}). Install it with `pip install 'distillation-pipeline[eval]'`.") from None

SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}
"""The harness's own defaults. Only `fewshot` matters to most tasks: it draws the examples where these are not the first ones."""

About = Callable[[Any, Mapping[str, Any]], tuple[str, Sequence[str], str | None]]
"""The harness's task and one of its documents -> the question, its options, its specialty."""


@dataclass(frozen=True)
class Benchmark:
    """Tasks of the harness to which the questions of a local file can be put as well."""

    name: str
    tasks: Mapping[str, str | None]
    """The harness's name -> the specialty of its questions in a file; None: it takes them all."""
    folder: str
    """Of the harness's tasks, where these are defined: to look through all of them takes seconds."""
    split: str
    """That the harness evaluates."""
    examples: str
    """The split that the harness shows examples from."""
    columns: Callable[[Question], dict[str, Any]]
    """A file's question as the hub has it: the columns that prompt and scoring read."""
    about: About
    options: tuple[str, ...] | None = None
    """What a question's options are; None: any four."""
    context: bool = False
    """Whether a question has a text that it is about."""

    def measure(self, live: Live, *, path: str | None, revision: str | None, split: str | None, shots: int, limit: int | None) -> dict[str, Any]:
        """Figures and rows (see `measured`), and in a file how many questions are left out as of other subjects.

        revision: the commit of the hub's questions; None: the newest.
        """
        if path is not None and revision is not None:
            raise InputError(f"{self.name}: `revision` is a commit on the hub, and with `path` the questions are a file's. Leave one of them out.")
        # where a split is named, that of the examples is, too, so that the harness shows no question as its own example
        other = {} if split is None else {"test_split": split, "fewshot_split": self.examples}
        pinned: dict[str, Any] = {} if revision is None else {"dataset_kwargs": {"revision": revision}}
        members: list[dict[str, Any]] = [{"task": task, **other, **pinned} for task in self.tasks]
        ignored = 0
        if path is not None:
            splits = (split or self.split, *([self.examples] if shots else []))
            found, ignored = questions_of(path, splits, [specialty for specialty in self.tasks.values() if specialty], self.options, self.context)
            asked = {task: {name: [self.columns(one) for one in questions if specialty in (None, one.specialty)] for name, questions in found.items()} for task, specialty in self.tasks.items()}
            members = [member | {"custom_dataset": _given({self.examples: []} | asked[member["task"]])} for member in members if asked[member["task"]][splits[0]]]
        figures = measured(live, self.name, {"group": self.name, "task": members}, self.about, folder=self.folder, source="hub" if path is None else "file", shots=shots, limit=limit)
        if ignored and "records" in figures:
            figures["tasks"][self.name]["ignored_questions"] = ignored
        return figures


class _Unasked(Exception):
    """The model has not been asked."""


class _Asked(LM):
    """Passes on to a model what the harness asks of one."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live
        self.requests: list[Any] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.requests = list(requests)
        found = self._live.loglikelihoods([request.args for request in requests])
        if found is None:
            raise _Unasked
        assert len(found) == len(requests)
        for request, (logprob, _) in zip(requests, found, strict=True):
            if math.isnan(logprob):
                raise NumericsError(f"The log-probability of {request.args[1]!r} in question {request.doc_id} of {request.task_name} is no number. Look at the model's weights.")
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise _no_choice(requests[0].task_name)

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise _no_choice(requests[0].task_name)


def measured(
    live: Live, name: str, spec: str | dict[str, Any], about: About | None = None, *, folder: str = "", source: str = "hub", shots: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Figures under tasks and name, over all questions and by subtask, and a row of each question; no figures if nobody has asked this model.

    spec: a task, group or tag of the harness, or a group that is made of tasks. shots: None is what the task says.
    limit: the first so many questions of each subtask. Prompts, choice and `acc` are the harness's.
    """
    model = _Asked(live)
    with _quietly_seeded():
        tasks = _loaded(name, spec, folder, source)
        for task_name, task in tasks.items():
            _prepare(task_name, task, shots)
        try:
            found = evaluate(lm=model, task_dict={"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
        except _Unasked:
            return {"tasks": {name: {"accuracy": None, "accuracy_interval": None, "questions": len({(one.task_name, one.doc_id) for one in model.requests})}}}
    answered: dict[str, list[Answered]] = {}
    normalized: dict[str, list[float]] = {}
    for task_name, task in tasks.items():
        samples = found["samples"][task_name]
        answered[task_name] = [_answered(task_name, task, sample, about or _as_prompted) for sample in samples]
        _check(task_name, answered[task_name], samples, found["results"][task_name])
        normalized[task_name] = [sample["acc_norm"] for sample in samples if "acc_norm" in sample]
    every = [one for questions in answered.values() for one in questions]
    subtasks = {task_name: _with_norm(figures_of(questions), normalized[task_name]) for task_name, questions in answered.items()}
    used = {task_name: task.config.num_fewshot or 0 for task_name, task in tasks.items()}
    figures = _with_norm(figures_of(every), [each for values in normalized.values() for each in values]) | {
        "mean_of_subtasks": float(np.mean([figures["accuracy"] for figures in subtasks.values()])),
        "subtasks": {task_name: {key: value for key, value in figures.items() if key != "calibration"} for task_name, figures in subtasks.items()},
        "prompts": _digest_of(model.requests),
        "shots": used if len(set(used.values())) > 1 else next(iter(used.values())),
        "source": source,
        "harness": {"version": lm_eval.__version__, "task_versions": {task_name: found["versions"][task_name] for task_name in tasks}},
        "seeds": dict(SEEDS),
    }
    return {"tasks": {name: figures}, "records": rows_of(every)}


def _loaded(name: str, spec: str | dict[str, Any], folder: str, source: str) -> dict[str, Any]:
    """The harness's tasks with their documents."""
    wanted = [spec] if isinstance(spec, str) else [member["task"] for member in spec["task"]]
    manager = _tasks_in(folder)
    if not all(task in manager.task_index for task in wanted):
        manager = _tasks_in("")
    for task in wanted:
        if task not in manager.task_index:
            raise InputError(f"lm-evaluation-harness {lm_eval.__version__} has no task '{task}'; {_nearest(task, manager.all_tasks)} `lm_eval ls tasks` lists them.")
    try:
        return manager.load(spec)["tasks"]
    except Exception as error:  # of the hub, of the connection, or of a loading script: they have no class in common
        if source == "file":
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        way = "give `path`, a local file of its questions" if isinstance(spec, dict) else "load it once where there is a connection"
        raise InputError(f"{name} cannot be loaded from the hub: {why[:300]} Check the connection (and `split`, where it is given), or {way}.") from error


@cache
def _tasks_in(folder: str) -> Any:
    """What the harness defines there, or everywhere."""
    place = Path(lm_eval.tasks.__file__).parent / folder
    return TaskManager(include_path=str(place), include_defaults=False)


def _nearest(wrong: str, right: list[str]) -> str:
    hint = nearest(wrong, right)
    return hint if hint.startswith("did you mean") else f"there are {len(right)} others."


def _prepare(name: str, task: Any, shots: int | None) -> None:
    """Set the number of examples and their seed; InputError, before any model is asked, if the task is none that can be."""
    if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "MULTIMODAL", False):
        raise _no_choice(name)
    if "acc" not in task.aggregation() or task.config.process_results or task.multiple_target:
        raise InputError(f"{name} has several right options a question, or scores in a way of its own; only the harness's `acc` with one right option is supported. Leave it out.")
    if shots is not None and task.config.num_fewshot == 0 and shots:
        raise InputError(f"{name} is asked without examples, by its own definition, and shots is {shots}. Leave `shots` out.")
    if shots is not None:
        task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])
    if needed := task.config.num_fewshot or 0:
        there = len(task.fewshot_docs() or ())
        own = task.fewshot_cfg.split == task.config.test_split
        if there < needed + own:
            but = ", one of which is the question itself" if own else ""
            where = task.fewshot_cfg.split or task.config.training_split or task.config.validation_split
            raise InputError(f"{name} has {there} examples in the split {where}{but}, and shots is {needed}. Give fewer `shots`, or a file with more rows whose split is {where}.")


def _no_choice(name: str) -> InputError:
    return InputError(f"{name} is no multiple-choice task over text; of lm-evaluation-harness only these are supported. Name another task, or leave it out.")


def _answered(name: str, task: Any, sample: Mapping[str, Any], about: About) -> Answered:
    doc = sample["doc"]
    choices = list(task.doc_to_choice(doc))
    logprobs = [float(logprob) for logprob, _ in sample["filtered_resps"][: len(choices)]]
    right = task.doc_to_text(doc) if task.multiple_input else sample["target"]
    if isinstance(right, str) and right in choices:
        right = choices.index(right)
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise InputError(f"{name}: the right option of question {sample['doc_id']} is {right!r}, and there are {len(choices)}. Ask another `split`, or leave the task out.")
    question, options, specialty = about(task, doc)
    digest = hashlib.sha256(json.dumps([question, list(options), right]).encode()).hexdigest()[:DIGEST]
    return Answered(f"{name}/{sample['doc_id']}", digest, specialty, question, logprobs, int(np.argmax(logprobs)), right, name)


def _as_prompted(task: Any, doc: Mapping[str, Any]) -> tuple[str, Sequence[str], str | None]:
    """Of a task that we know nothing of: what its prompt asks."""
    text, choices = task.doc_to_text(doc), list(task.doc_to_choice(doc))
    return "\n".join(choices) if isinstance(text, int) else text, choices, None


def _check(name: str, answered: Sequence[Answered], samples: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Disagreement if the harness has another accuracy than we have, of any question or of all."""
    accuracy = sum(one.right for one in answered) / len(answered)
    theirs = result[f"acc,{samples[0]['filter']}"]
    if [bool(sample["acc"]) for sample in samples] != [one.right for one in answered] or not math.isclose(theirs, accuracy, abs_tol=1e-9):
        raise Disagreement(f"{name}: lm-evaluation-harness {lm_eval.__version__} has an accuracy of {theirs}, and its answers give {accuracy}. Use the version in constraints.txt.")


def _with_norm(figures: dict[str, Any], normalized: Sequence[float]) -> dict[str, Any]:
    """With the harness's `acc_norm` (log-likelihoods per character), where it has it of all."""
    return figures | ({"acc_norm": float(np.mean(normalized))} if len(normalized) == figures["questions"] else {})


def _digest_of(requests: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps(request.args).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _given(by_split: Mapping[str, list[dict[str, Any]]]) -> Callable[..., datasets.DatasetDict]:
    """What gives the harness these documents instead of the hub's; a split without any has the columns of the others."""
    every = datasets.Dataset.from_list([row for rows in by_split.values() for row in rows])
    ends = np.cumsum([0, *map(len, by_split.values())]).tolist()
    documents = datasets.DatasetDict({split: every.select(range(ends[n], ends[n + 1])) for n, split in enumerate(by_split)})
    return lambda **_: documents


@contextmanager
def _quietly_seeded() -> Iterator[None]:
    """The harness says nothing, finds its own seeds (tasks that shuffle their options draw from them), and leaves all as it was."""
    log, bar, bars = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm, datasets.is_progress_bar_enabled()
    level, drawn, drawn_by_numpy = log.level, random.getstate(), np.random.get_state()
    log.setLevel(logging.CRITICAL)
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    datasets.disable_progress_bars()
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    try:
        yield
    finally:
        log.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
