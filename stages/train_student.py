"""The cache to a student: align, project, objective, optimizer. The loop is here, in sight."""

import hashlib
import json
import math
import os
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter

from pipeline.cache.projected import StudentView, read_projection
from pipeline.cache.reader import Cache, Place
from pipeline.config import Machine, Student, Training
from pipeline.errors import InputError, NumericsError, Stopped
from pipeline.files import appears_whole
from pipeline.lookup import nearest
from pipeline.models.heads import KeptHead, row_logits, rows_that_are_tokens
from pipeline.models.loading import device_named, load_student
from pipeline.models.memory import PeakMemory
from pipeline.models.tokenizers import load_tokenizer
from pipeline.reporting.model_card import model_card
from pipeline.reporting.progress import Progress
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.running.stopping import asked, one_by_one
from pipeline.signals.projection import Projection
from pipeline.signals.tail import placed_logits, placed_means
from pipeline.training.batches import Batch, made_ahead, make_batch
from pipeline.training.calibration import Calibration
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.objective import loss_of, mass, parts
from pipeline.training.schedules import learning_rate_at, value_at

KEEP_CHECKPOINTS = 2


def run(student: Student, training: Training, machine: Machine, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    accelerator = Accelerator(mixed_precision="bf16" if training.precision == "bf16" else "no", cpu=device_named(machine.device).type == "cpu")
    memory = PeakMemory(accelerator.device)
    objective = parts([(part.loss, part.weight, part.options(), part.tail) for part in training.objective])
    tails = {part.tail for part in objective}
    cached = inputs["cache-teacher"]
    cache = Cache(cached.file, ("hidden",) if "hidden" in tails else ())
    source = inputs.model(student.model, student.revision)
    tokenizer = load_tokenizer(source, student.revision, cache.about["template"], student.model)
    fitted = read_projection(inputs["fit-projection"].file("projection.parquet"))
    view = StudentView(cache, fitted, tokenizer.render, tokenizer.digest())
    order = Order(cache, training.seed, training.batch_records)
    with_teacher = any(part.needs_teacher for part in objective)
    hottest = max(training.temperature.start, training.temperature.end)
    if with_teacher and hottest > max(cache.temperatures):
        raise InputError(
            f"training.temperature goes up to {hottest:g}, and this cache has the unkept mass at {cache.temperatures}. Stay within, or make the cache with higher `targets.logits.temperatures`."
        )
    if with_teacher and hottest > 1 and cache.about["method"] == "sampled":
        raise InputError("This cache holds draws (targets.logits.method: sampled), which are unbiased at temperature 1 only. Set training.temperature to 1, or make a cache with method: head.")
    _check_specialties(training, cache.about["specialties"])
    steps = _steps(training, cache.count("train"))

    model = load_student(source, student.revision, student.layers, accelerator.device)
    if machine.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = row_logits(model, student.model, rows_that_are_tokens(model, student.model, tokenizer.vocabulary)).train()
    calibration = _calibration(cache, fitted.projection, module.vocabulary_size, accelerator.device) if "calibrated" in tails else None
    teacher_head = KeptHead(cached.file("head.safetensors"), accelerator.device) if "hidden" in tails else None
    student_id = torch.from_numpy(fitted.projection.student_id.astype("int64")).to(accelerator.device)
    optimizer = torch.optim.AdamW(_groups(model, training.weight_decay), lr=0.0)

    def batches_of(step: int) -> list[Batch]:
        """This process's micro-batches of a step, records of like length together."""
        examples = [cache.example(place) for place in order.of_step(step)[accelerator.process_index :: accelerator.num_processes]]
        rendered = sorted(((view.tokens(example), example) for example in examples), key=lambda pair: len(pair[0]))
        batches = []
        for begin_at in range(0, len(rendered), machine.student_micro_batch_records):
            micro = rendered[begin_at : begin_at + machine.student_micro_batch_records]
            words = [view.projected(example, tokens) if with_teacher else None for tokens, example in micro]
            weights = [example.record.weight * training.specialty_weights.get(example.record.specialty or "", 1.0) for _, example in micro]
            batches.append(make_batch([tokens for tokens, _ in micro], words, weights, cache.temperatures, _temperature(training, step, steps)))
        return batches

    out.plan("steps", steps)
    state = calibration.state if calibration else {}
    begin = _resume(out, module, optimizer, state)
    log = Log(out.path, begin, writes=accelerator.is_main_process)
    progress = Progress("train-student" if with_teacher else "train-control", steps, begin, "steps", silent=not accelerator.is_main_process)

    for step, batches in one_by_one(zip(range(begin, steps), made_ahead(batches_of, range(begin, steps), machine.workers), strict=True)):
        torch.manual_seed(_seed(training.seed, step, accelerator.process_index))
        here = [batch.to(accelerator.device) for batch in batches]
        total = torch.stack([mass(batch) for batch in here]).sum(0) if here else torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        total = accelerator.reduce(total, "sum")
        sums = torch.zeros(len(objective) + 2, device=accelerator.device)
        for batch in here:
            with accelerator.autocast():
                logits = module(batch.ids, batch.rows)
            log_tail = placed_logits(teacher_head(*batch.hidden), batch.teacher.temperature, student_id, module.vocabulary_size) if teacher_head and batch.hidden and batch.teacher else None
            loss, shares = loss_of(objective, batch, logits, total, calibration.log_ratio() if calibration else None, log_tail)
            if calibration and batch.teacher is not None:
                calibration.add(logits[batch.known], batch.teacher)
            loss.backward()
            sums[:-1] += torch.stack([loss.detach(), *(shares.get(part.name, loss.new_zeros(())) for part in objective)])
        sums[-1] = asked()  # any process may have been told to stop
        sums = accelerator.reduce(sums, "sum")
        if accelerator.num_processes > 1:
            _sum_gradients(model, accelerator)
        if not torch.isfinite(sums[0]):
            raise NumericsError(f"The loss is {sums[0].item()} at step {step + 1}. The checkpoint before it is kept. Try a lower training.learning_rate, more warmup_steps, or `precision: fp32`.")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_gradient_norm)
        rate = training.learning_rate
        lr = learning_rate_at(step, steps, training.warmup_steps, rate.start, rate.end, rate.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if calibration:
            calibration.step(_temperature(training, step, steps), accelerator)

        losses = {part.name: value for part, value in zip(objective, sums[1:-1].tolist(), strict=True)}
        log.write(step + 1, loss=sums[0].item(), **losses, learning_rate=lr, temperature=_temperature(training, step, steps), gradient_norm=float(norm))
        progress.advance(1, sum(batch.tokens for batch in here), f"loss {sums[0].item():.3f}")
        stops = bool(sums[-1] > 0) and step + 1 < steps
        if accelerator.is_main_process and ((step + 1) % machine.checkpoint_steps == 0 or step + 1 == steps or stops):
            log.flush()
            _checkpoint(out, step + 1, module, optimizer, state)
        if stops:
            raise Stopped
    log.close()

    if accelerator.is_main_process:
        with appears_whole(out.path / "student") as folder:
            model.save_pretrained(folder)
            tokenizer.tokenizer.save_pretrained(folder)
            identity = {"student": student.model_dump(mode="json"), "training": training.model_dump(mode="json", by_alias=True)}
            out.keep("student", "metrics.jsonl")
            (folder / "README.md").write_text(model_card(student.model, cache.about["teacher"] if with_teacher else None, identity), encoding="utf-8")
    accelerator.wait_for_everyone()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"steps": steps, "records": cache.count("train"), "parameters": parameters, "peak_memory_mb": round(memory.megabytes(), 1), "last": log.last()}


class Order:
    """Which examples an optimizer step takes: epoch after epoch in a seeded order, batches running across their ends."""

    def __init__(self, cache: Cache, seed: int, batch_records: int) -> None:
        self._cache, self._seed, self._size = cache, seed, batch_records
        self._count = cache.count("train")
        self._epochs: dict[int, list[Place]] = {}
        self._lock = Lock()

    def of_step(self, step: int) -> list[Place]:
        with self._lock:
            return [self._at(index) for index in range(step * self._size, (step + 1) * self._size)]

    def _at(self, index: int) -> Place:
        epoch, inside = divmod(index, self._count)
        if epoch not in self._epochs:
            self._epochs = {e: places for e, places in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = self._cache.order("train", self._seed, epoch)
        return self._epochs[epoch][inside]


class Log:
    """metrics.jsonl and TensorBoard, cut back to the step that is gone on from."""

    def __init__(self, folder: Path, begin: int, writes: bool) -> None:
        self._path = folder / "metrics.jsonl"
        self._writes = writes
        if writes:
            lines = self._path.read_text(encoding="utf-8").splitlines()[:begin] if self._path.exists() else []
            with appears_whole(self._path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=begin + 1)

    def write(self, step: int, **values: float) -> None:
        if self._writes:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Onto the disk: a checkpoint that is there must not lack what was logged before it."""
        if self._writes:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._board.close()

    def last(self) -> dict[str, float]:
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._writes else []
        return dict(json.loads(lines[-1])) if lines else {}


def _check_specialties(training: Training, there: dict[str, int]) -> None:
    unknown = [name for name in training.specialty_weights if name not in there]
    if unknown:
        raise InputError(f"training.specialty_weights: no record of the cache has the specialty '{unknown[0]}'; {nearest(unknown[0], [name for name in there if name])}")
    if all(training.specialty_weights.get(name, 1.0) == 0 for name in there):
        raise InputError("training.specialty_weights: every record of the cache weighs 0. Leave some specialty in.")


def _steps(training: Training, records: int) -> int:
    if not records:
        raise InputError("The cache has no training records. Look at data.train, data.heldout and data.max_tokens.")
    return training.steps or math.ceil((training.epochs or 0) * records / training.batch_records)


def _temperature(training: Training, step: int, steps: int) -> float:
    return value_at(step, steps, training.temperature.start, training.temperature.end, training.temperature.schedule)


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _sum_gradients(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Micro-batches may be unevenly many per process, and the loss is divided by the global mass: gradients are summed."""
    for parameter in model.parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(gradient, "sum")


def _seed(seed: int, step: int, process: int) -> int:
    return int(hashlib.sha256(repr((seed, step, process)).encode()).hexdigest()[:15], 16)


def _calibration(cache: Cache, projection: Projection, student_size: int, device: torch.device) -> Calibration:
    tail = cache.tail()
    if tail is None:
        raise InputError("training.objective: tail: calibrated needs a cache with tail marginals, and this one has none (targets.logits.method: sampled keeps no tail). Use `tail: rest`.")
    return Calibration(placed_means(tail.log_means, projection, student_size), cache.temperatures, device)


def _resume(out: RunFolder, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> int:
    """Go on from the newest checkpoint that is what was written; gives the number of steps done."""
    names = out.committed()
    if not names:
        return 0
    load_checkpoint(out.path / "checkpoints" / f"{names[-1]}.safetensors", module, optimizer, state)
    return int(names[-1].removeprefix("step-"))


def _checkpoint(out: RunFolder, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    name = f"step-{step:07d}"
    save_checkpoint(out.path / "checkpoints" / f"{name}.safetensors", module, optimizer, state)
    out.commit(name, {f"checkpoints/{name}.safetensors": {}})
    for old in out.names()[:-KEEP_CHECKPOINTS]:
        out.withdraw(old)
