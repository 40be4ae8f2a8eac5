"""The cache to a student: align, project, objective, optimizer. The loop is here, in sight."""

import hashlib
import math
import time
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.cache.order import Order
from pipeline.cache.projected import StudentView
from pipeline.cache.reader import Cache, Example, Place
from pipeline.config import AnotherTeacher, Machine, Student, Training
from pipeline.errors import DamageError, InputError, NumericsError, PipelineError, Stopped
from pipeline.lookup import nearest
from pipeline.models.adapters import add_adapters, merge_adapters, save_adapter, sizes
from pipeline.models.attention import Attending
from pipeline.models.heads import KeptHead, row_logits, rows_that_are_tokens
from pipeline.models.loading import device_named, load_student
from pipeline.models.memory import PeakMemory
from pipeline.models.optimizers import optimizer_named
from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer
from pipeline.reporting.model_card import model_card
from pipeline.reporting.progress import Progress
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.running.stopping import asked, one_by_one
from pipeline.signals.attention import Attended, head_groups, proportional
from pipeline.signals.projection import at_temperature
from pipeline.signals.tail import placed_logits, placed_means
from pipeline.signals.vocabulary import begins_anew
from pipeline.training.batches import Batch, made_ahead
from pipeline.training.calibration import Calibration
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.lessons import Another, Lessons
from pipeline.training.log import Log, best_of, lines_of
from pipeline.training.objective import Part, attention_loss_of, loss_of, mass, parts
from pipeline.training.schedules import learning_rate_at, value_at
from pipeline.training.specialties import Specialties
from pipeline.training.token_temperature import TokenTemperature

KEEP_CHECKPOINTS = 2
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Of float32 logits that exist at a time: several times that is needed for a loss and its gradient."""


def run(student: Student, training: Training, machine: Machine, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    started = time.monotonic()
    accelerator = Accelerator(mixed_precision="bf16" if training.precision == "bf16" else "no", cpu=device_named(machine.device).type == "cpu")
    memory = PeakMemory(accelerator.device)
    objective = parts([(part.loss, part.most, part.options(), part.tail) for part in training.objective])
    counting = [part for part in training.objective if part.most > 0]
    tails = {part.tail for part in objective}
    cached = inputs["cache-teacher"]
    looks = next((part for part in objective if "attention" in part.asks_for), None)
    extras = {"hidden": "hidden" in tails, "boundary": any(part.options.get("boundary") for part in objective if "chunks" in part.asks_for), "attention": looks is not None}
    cache = Cache(cached.file, tuple(name for name, wanted in extras.items() if wanted))
    source = inputs.model(student.model, student.revision)
    tokenizer = load_tokenizer(source, student.revision, cache.about["template"], student.model)
    view = StudentView(cache, inputs["fit-projection"].file, tokenizer.render, tokenizer.digest())
    refused = {tuple(place) for place in inputs["fit-projection"].summary.get("refused", {}).values()}
    watched = _put_aside(cache, training, refused)
    order = Order(cache, training.seed, training.batch_records, refused | set(watched), training.curriculum)
    with_teacher = any(part.needs_teacher for part in objective)
    with_targets, with_chunks = any(part.where_known for part in objective), any("chunks" in part.asks_for for part in objective)
    if view.fitted.form == "values" and (shaped := tails - {"rest"}):
        raise InputError(f"projection.method {view.fitted.method} gives distributions of its own, whose tail is not the teacher's: `tail: {min(shaped)}` cannot shape it. Use `tail: rest`.")
    others = [_another(teacher, inputs, tokenizer) for teacher in training.more_teachers] if with_targets else []
    specialty_of = cache.column("train", "specialty")
    for each in [view, *(other.view for other in others)] if with_targets else []:
        _check_view(each, objective, training.hottest)
    specialties = Specialties((name for place, name in specialty_of.items() if place not in refused), training.specialty_weights, accelerator.device)
    _check_specialties(training, specialties.names)
    steps = _steps(training, order)

    model = load_student(source, student.revision, student.layers, accelerator.device, student.dtype, student.quantization, student.double_quantization)
    if student.lora:
        add_adapters(model, student.model, **student.lora.model_dump(), seed=training.seed)
    parameters, trained = sizes(model)
    if machine.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = row_logits(model, student.model, rows_that_are_tokens(model, student.model, tokenizer.vocabulary))
    if machine.packing:
        module.check_packing(student.model)
        if looks:
            raise InputError("machine.packing puts records into one row, and attention_match reads each record's own. Leave one of them out.")
    module.train()
    text = model.config.get_text_config()
    pairs, groups = _compared_layers(cache.about["attention"], looks, text.num_hidden_layers, text.num_attention_heads) if looks else ([], 1)
    attending = Attending(model, student.model, [ours for _, ours in pairs]) if pairs else None
    calibration = _calibration(cache, view.fitted.student_id, module.vocabulary_size, accelerator.device) if "calibrated" in tails else None
    teacher_head = KeptHead(cached.file("head.safetensors"), accelerator.device) if "hidden" in tails else None
    rows_at_once = max(1, LOGITS_BYTES[accelerator.device.type] // (4 * module.vocabulary_size))
    begins = torch.from_numpy(begins_anew(tokenizer.vocabulary))[: module.vocabulary_size]
    student_id = torch.from_numpy(view.fitted.student_id.astype("int64")).to(accelerator.device)
    adaptive = TokenTemperature(training.token_temperature.strength, max(cache.temperatures), accelerator.device) if training.token_temperature and with_targets else None
    lessons = Lessons(view, others, training.own_teacher, with_targets, with_chunks, pairs, groups, specialties.index, specialty_of, begins, adaptive is not None, rows_at_once, machine)
    optimizer = optimizer_named(training.optimizer, _groups(model, training.weight_decay))

    def losses_of(batch: Batch, total: torch.Tensor, objective: list[Part], temperature: float, learns: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch's share of the loss, of each part of the objective, and the sums by specialty. Where the student learns, what else it says is kept, too."""
        shares: dict[str, torch.Tensor] = {}
        by_specialty = torch.zeros((len(objective), len(specialties.names), 2), device=accelerator.device)
        hidden_tail = any(part.tail == "hidden" for part in objective)

        def of_rows(i: int, logits: torch.Tensor) -> torch.Tensor:
            part = batch.part(batch.cuts[i])
            if adaptive and part.teacher is not None and part.words is not None:
                wanted = adaptive.of_rows(logits[part.known], part.teacher, temperature) if learns else torch.full_like(part.known_weights, temperature)
                part = replace(part, teacher=at_temperature([part.words], cache.temperatures, wanted.double().cpu().numpy()).to(accelerator.device))
            log_tail = None
            if teacher_head and hidden_tail and part.states and part.teacher:
                states = part.states
                log_tail = placed_logits(teacher_head(states.hidden, states.scale), (states.row, states.id), part.teacher.column, student_id, module.vocabulary_size)
            loss, found = loss_of(objective, part, logits, total, calibration.log_ratio() if calibration else None, log_tail, by_specialty)
            if calibration and learns and part.teacher is not None:
                calibration.add(logits[part.known], part.teacher)
            for name, share in found.items():
                shares[name] = shares.get(name, 0) + share
            return loss

        if attending and batch.attention:
            attending.to(batch.attention)
        with accelerator.autocast():
            hidden = module.hidden(batch.ids, batch.positions)[batch.rows]
            loss = module.loss(hidden, [(cut.rows.start, cut.rows.stop) for cut in batch.cuts], of_rows)
        if attending and batch.attention:
            looked, found = attention_loss_of(objective, batch, Attended(len(batch.rows), list(zip(batch.attention, attending.masses(), strict=True))), total)
            loss, shares = loss + looked, shares | found
        return loss, torch.stack([shares.get(part.name, loss.new_zeros(())) for part in objective]), by_specialty

    def of_this_process(places: list[Place]) -> list[Example]:
        return [cache.example(place) for place in places[accelerator.process_index :: accelerator.num_processes]]

    def batches_of_step(step: int) -> list[Batch]:
        return lessons.batches(of_this_process(order.of_step(step, steps)), _temperature(training, step, steps))

    def objective_at(step: int) -> list[Part]:
        return [replace(part, weight=given.weight_at(step, steps)) for part, given in zip(objective, counting, strict=True)]

    def total_of(batches: list[Batch]) -> torch.Tensor:
        none = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        return accelerator.reduce(sum((mass(batch) for batch in batches), none), "sum")

    @torch.no_grad()
    def validated() -> float:
        """The objective on what was put aside."""
        module.eval()
        here = [batch.to(accelerator.device).weighted(specialties.constant) for batch in aside]
        total, loss = total_of(here), torch.zeros((), device=accelerator.device)
        last = [replace(part, tail="rest") for part in objective_at(steps - 1)]
        for batch in here:
            loss += losses_of(batch, total, last, training.temperature.end, learns=False)[0]
        module.train()
        value = float(accelerator.reduce(loss, "sum"))
        if not math.isfinite(value):
            raise NumericsError(f"The validation loss is {value}. The last checkpoint is kept. Try a lower training.learning_rate, or `precision: fp32`.")
        return value

    out.plan("steps", steps)
    state = specialties.state | (calibration.state if calibration else {}) | (adaptive.state if adaptive else {})
    with accelerator.main_process_first():  # it takes away what is damaged, and the others then see the same
        begin = _resume(out, module, optimizer, state, accelerator.is_main_process)
    if accelerator.reduce(torch.tensor(begin, device=accelerator.device), "sum") != begin * accelerator.num_processes:
        raise PipelineError(f"The processes do not see the same checkpoints in {out.path}: this one has step {begin}. Run the command again when every machine's file system shows the same.")
    before = float(out.info(_name(begin)).get("seconds", 0.0)) if begin else 0.0
    aside = lessons.batches(of_this_process(watched), training.temperature.end)
    if watched and total_of([batch.to(accelerator.device).weighted(specialties.constant) for batch in aside])[0] == 0:
        raise InputError("training.validation: all records that are put aside weigh 0, so that nothing would be measured. Put more aside, or give other weights.")
    log = Log(out.path, begin, writes=accelerator.is_main_process)
    progress = Progress("train-student" if with_teacher else "train-control", steps, begin, "steps", silent=not accelerator.is_main_process)

    for step, batches in one_by_one(zip(range(begin, steps), made_ahead(batches_of_step, range(begin, steps), machine.workers), strict=True)):
        torch.manual_seed(_seed(training.seed, step, accelerator.process_index))
        now, temperature = objective_at(step), _temperature(training, step, steps)
        here = [batch.to(accelerator.device).weighted(specialties.factors()) for batch in batches]
        total = total_of(here)
        sums = torch.zeros(len(objective) + 2, device=accelerator.device)
        by_specialty = torch.zeros((len(objective), len(specialties.names), 2), device=accelerator.device)
        for batch in here:
            loss, shares, of_specialty = losses_of(batch, total, now, temperature, learns=True)
            loss.backward()
            sums[:-1] += torch.cat([loss.detach()[None], shares])
            by_specialty += of_specialty
        sums[-1] = asked()  # any process may have been told to stop
        sums, by_specialty = accelerator.reduce(sums, "sum"), accelerator.reduce(by_specialty, "sum")
        if accelerator.num_processes > 1:
            _sum_gradients(model)
        if not torch.isfinite(sums[0]):
            raise NumericsError(f"The loss is {sums[0].item()} at step {step + 1}. The checkpoint before it is kept. Try a lower training.learning_rate, more warmup_steps, or `precision: fp32`.")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_gradient_norm)
        if not torch.isfinite(norm):
            raise NumericsError(
                f"The gradient's norm is {float(norm)} at step {step + 1}. The checkpoint before it is kept. Try a lower training.learning_rate, smaller weights, or `precision: fp32`."
            )
        rate = training.learning_rate
        lr = learning_rate_at(step, steps, training.warmup_steps, rate.start, rate.end, rate.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if calibration:
            calibration.step(temperature, accelerator)
        if adaptive:
            adaptive.step(accelerator)
        factors = specialties.factors()
        of_each = specialties.step(by_specialty * torch.tensor([part.weight for part in now], device=accelerator.device)[:, None, None])

        losses = {part.name: value for part, value in zip(objective, sums[1:-1].tolist(), strict=True)}
        if training.validation and ((step + 1) % training.validation.every == 0 or step + 1 == steps):
            losses["validation"] = validated()
        if len(specialties.names) > 1:
            losses |= {f"specialty/{name or '(none)'}": value for name, value in of_each.items()}
        if training.specialty_weights == "current_loss":
            losses |= {f"specialty_weight/{name or '(none)'}": float(factors[specialties.index[name]]) for name in of_each}
        losses |= {f"weight/{part.name}": part.weight for part, given in zip(now, counting, strict=True) if not isinstance(given.weight, float)}
        log.write(step + 1, loss=sums[0].item(), **losses, learning_rate=lr, temperature=temperature, gradient_norm=float(norm))
        progress.advance(1, sum(batch.tokens for batch in here), f"loss {sums[0].item():.3f}")
        stops = bool(sums[-1] > 0) and step + 1 < steps
        if accelerator.is_main_process and ((step + 1) % machine.checkpoint_steps == 0 or step + 1 in (steps, log.best) or stops):
            log.flush()
            _checkpoint(out, step + 1, module, optimizer, state, log.best, before + time.monotonic() - started)
        if stops:
            accelerator.wait_for_everyone()  # a launcher kills the others half a minute after one has ended
            raise Stopped
    log.close()

    if accelerator.is_main_process:
        if log.best and training.validation and training.validation.keep == "best":
            load_checkpoint(_file(out, log.best), module, optimizer, state)
        out.keep("metrics.jsonl")
        if student.lora:
            with out.result("adapter") as folder:
                save_adapter(model, folder, student.model if student.layers is None else None, student.revision)
            merge_adapters(model)
        with out.result("student") as folder:
            model.save_pretrained(folder)
            tokenizer.tokenizer.save_pretrained(folder)
            identity = {"student": student.model_dump(mode="json"), "training": training.model_dump(mode="json", by_alias=True)}
            (folder / "README.md").write_text(model_card(student.model, cached.summary["teacher"] if with_teacher else None, identity), encoding="utf-8")
    accelerator.wait_for_everyone()
    summary = {
        "steps": steps,
        "records": order.count,
        "parameters": parameters,
        "trained_parameters": trained,
        "seconds": round(before + time.monotonic() - started, 1),
        "peak_memory_mb": round(memory.megabytes(), 1),
        "last": log.last(),
    }
    return summary | ({"best_step": log.best} if log.best else {})


def _another(teacher: AnotherTeacher, inputs: Inputs, tokenizer: RecordTokenizer) -> Another:
    cached, fitted = inputs.finished(teacher.cache, "cache-teacher"), inputs.finished(teacher.projection, "fit-projection")
    cache = Cache(cached.file)
    if cache.about["template"] != tokenizer.template:
        raise InputError(f"training.more_teachers: {teacher.cache} was made with data.template {cache.about['template']!r}, and this experiment's is {tokenizer.template!r}. Make both with one.")
    return Another(teacher, StudentView(cache, fitted.file, tokenizer.render, tokenizer.digest()))


def _check_view(view: StudentView, objective: list[Part], hottest: float) -> None:
    """InputError if a cache or projection does not have what the objective asks for."""
    cache = view.cache
    if hottest > max(cache.temperatures):
        raise InputError(
            f"training.temperature goes up to {hottest:.3g}, and this cache has the unkept mass at {cache.temperatures}. Stay within, or make the cache with higher `targets.logits.temperatures`."
        )
    if hottest > 1 and cache.about["method"] == "sampled":
        raise InputError("This cache holds draws (targets.logits.method: sampled), which are unbiased at temperature 1 only. Set training.temperature to 1, or make a cache with method: head.")
    if view.fitted.form == "ranks" and (wrong := [part.name for part in objective if "teacher" in part.asks_for]):
        raise InputError(f"projection.method {view.fitted.method} keeps values and no tokens: the loss {wrong[0]} has nothing to compare. Use the loss `uld` with it, or another projection.method.")


def _check_specialties(training: Training, there: list[str]) -> None:
    weights = training.specialty_weights
    if there == [""] and (isinstance(weights, str) or (training.curriculum and training.curriculum.by == "specialty")):
        raise InputError(
            "training.specialty_weights and curriculum by specialty need specialties, and no training record of the cache has one. Leave them out, or give `specialty` among the data's fields."
        )
    named = {"specialty_weights": weights if isinstance(weights, dict) else {}, "own_teacher.specialties": training.own_teacher.specialties}
    named |= {f"more_teachers.{n}.specialties": teacher.specialties for n, teacher in enumerate(training.more_teachers)}
    for where, names in named.items():
        if unknown := [name for name in names if name not in there]:
            hint = nearest(unknown[0], [name for name in there if name]) if there != [""] else "no record has one."
            raise InputError(f"training.{where}: no training record of the cache has the specialty '{unknown[0]}'; {hint}")
    passes = [list(names) for names in (training.curriculum.epochs if training.curriculum else None) or [["all"]]]
    for trained_on in passes:
        if isinstance(weights, dict) and all(weights.get(name, 1.0) == 0 for name in (there if "all" in trained_on else trained_on)):
            raise InputError("training.specialty_weights: every record that is trained on weighs 0. Leave some specialty in.")


def _steps(training: Training, order: Order) -> int:
    if not order.count:
        raise InputError("The cache has no training records. Look at data.train, data.heldout and data.max_tokens.")
    return training.steps or math.ceil(order.records_in(training.epochs or 0) / training.batch_records)


def _temperature(training: Training, step: int, steps: int) -> float:
    return value_at(step, steps, training.temperature.start, training.temperature.end, training.temperature.schedule)


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _sum_gradients(model: torch.nn.Module) -> None:
    """Micro-batches may be unevenly many per process, and the loss is divided by the global mass: gradients are summed.

    In place and all at once, which takes 60 % of the time of one after another, and one large buffer no less.
    """
    waiting = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            waiting.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
    for one in waiting:
        one.wait()


def _seed(seed: int, step: int, process: int) -> int:
    return int(hashlib.sha256(repr((seed, step, process)).encode()).hexdigest()[:15], 16)


def _compared_layers(cached: dict[str, Any], looks: Part, student_layers: int, student_heads: int) -> tuple[list[tuple[int, int]], int]:
    """The pairs of a teacher's and a student's layer, and into how many groups the heads go."""
    given: Any = looks.options.get("layers")
    pairs = [(layer, proportional(layer, cached["of"], student_layers)) for layer in cached["layers"]] if given is None else [(theirs, ours) for theirs, ours in given]
    if missing := [theirs for theirs, _ in pairs if theirs not in cached["layers"]]:
        raise InputError(f"training.objective compares the teacher's layer {missing[0]}, and this cache has {cached['layers']}. Compare one of these, or make a cache with that layer.")
    return pairs, head_groups(str(looks.options.get("heads", "mean")), cached["heads"], student_heads)


def _calibration(cache: Cache, student_id: np.ndarray, student_size: int, device: torch.device) -> Calibration:
    tail = cache.tail()
    if tail is None:
        raise InputError("training.objective: tail: calibrated needs a cache with tail marginals, and this one has none (targets.logits.method: sampled keeps no tail). Use `tail: rest`.")
    return Calibration(placed_means(tail.log_means, student_id, student_size), cache.temperatures, device)


def _resume(out: RunFolder, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor], writes: bool) -> int:
    """Go on from the newest checkpoint that is what was written, as the best one up to it must be; gives the number of steps done."""
    names = [name for name in out.committed() if _is_of_this_run(out, name, writes)]
    while names:
        step = int(names[-1].removeprefix("step-"))
        lines = lines_of(out.path)[:step]
        if out.info(names[-1]).get("metrics") != _digest(lines):
            raise DamageError(f"{out.path / 'metrics.jsonl'} is not the log that belongs to {names[-1]}. Put it back, or remove {out.path} to train anew.")
        best, _ = best_of(lines)
        if best is None or _name(best) in names:
            load_checkpoint(_file(out, step), module, optimizer, state)
            return step
        if writes:  # the best one was damaged, and is made again
            out.withdraw(names[-1])
        names.pop()
    return 0


def _checkpoint(out: RunFolder, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor], best: int | None, seconds: float) -> None:
    """seconds: what has been worked for it, over all sittings."""
    save_checkpoint(_file(out, step), module, optimizer, state)
    out.commit(_name(step), {f"checkpoints/{_name(step)}.safetensors": {}}, run=out.path.name, step=step, metrics=_digest(lines_of(out.path)), seconds=round(seconds, 1))
    for old in out.names()[:-KEEP_CHECKPOINTS]:
        if best is None or old != _name(best):
            out.withdraw(old)


def _is_of_this_run(out: RunFolder, name: str, writes: bool) -> bool:
    """A checkpoint that was brought here from another run, or under another step's name, goes to the quarantine."""
    said = out.info(name)
    fits = said.get("run") == out.path.name and isinstance(said.get("step"), int) and _name(said["step"]) == name
    if not fits and writes:
        out.quarantine([f"commits/{name}.json", f"checkpoints/{name}.safetensors"])
    return fits


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _file(out: RunFolder, step: int) -> Path:
    return out.path / "checkpoints" / f"{_name(step)}.safetensors"


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _put_aside(cache: Cache, training: Training, refused: Set[Place]) -> list[Place]:
    """The training records to validate on: spread over the cache, and the same for every seed."""
    if training.validation is None:
        return []
    places = [place for place in cache.order("train", 0, 0) if place not in refused]
    wanted, there = training.validation.records, len(places)
    if wanted >= there:
        raise InputError(f"training.validation.records: {wanted} are to be put aside, and the cache has {there} training records. Ask for fewer.")
    return places[:: there // wanted][:wanted]
