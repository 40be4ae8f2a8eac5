"""Whether the loader keeps up: tokens/s of batches out of a cache beside tokens/s of the training that eats them, on one core.

    python benchmarks/feeding.py TEACHER STUDENT TEXT.jsonl.gz [--tokens 1000000] [--shards 100] [--rounds 3] [--keep FOLDER]

TEACHER, STUDENT: folders of models with different tokenizers. TEXT: any .jsonl or .jsonl.gz whose records have a question and an
answer, or a context. The text is rendered by the teacher's tokenizer and written as a cache of so many tokens; the targets are drawn
(about 30 kept a position, the log-probabilities Zipf-like, the tokens as often as in the text, what follows mostly among them):
what is timed does not depend on their meaning. `fit-projection` then runs as it is, once a method; for `identity` the cache is
one of the student's own tokens. All in processes of their own, bound to one core, round after round:

feed: an epoch as train-student reads it (seeded order, decode, align, project, batches at a temperature), without a model: tokens/s
of the student, padding not counted, by the clock and by the processor's time (other processes may have the core, too); seconds from
the first line after the imports to the first batch, and from the start of the process; resident memory beyond the imports.
train: `pipeline train-student` on that cache, some steps of 8 records: the tokens/s that it tells, with all and with a third of the
student's layers. The ratio is round by round, lowest, median, highest. `on_gpus` is computed, not measured: a student of 1.2 billion
parameters at 6 operations a parameter and token and 40 % of the peak, and how many times that one core here feeds.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

TEMPERATURES = [1.0, 2.0, 8.0]
METHODS = ("contextual", "first_token", "exact_bytes", "identity")
DRAWN = 8192
"""Positions that are drawn; the cache's are these again and again."""
LONGEST = 1024
PEAKS = {"T4, fp16": 65e12, "A100, bf16": 312e12, "H100, bf16": 989e12}
PARAMETERS = 1.2e9
BATCH, MICRO = 8, 4
ROOT = Path(__file__).parent.parent
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def texts(file: Path) -> Iterator[tuple[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            question, answer = row.get("question") or "What is known?", row.get("answer") or row.get("context")
            if answer:
                yield question, answer


def make(folder: Path, model: str, text: Path, tokens: int, shards: int, kept: int) -> None:
    """A finished cache of real text and drawn targets."""
    from pipeline.cache.schema import FORMAT, Logits
    from pipeline.cache.writer import Shard, write_vocabulary
    from pipeline.files import write_json
    from pipeline.models.tokenizers import NotKept, load_tokenizer
    from pipeline.running.fingerprint import fingerprint
    from pipeline.running.folder import RunFolder
    from pipeline.signals.records import Record, Segment
    from pipeline.signals.targets import Targets

    tokenizer = load_tokenizer(model, None, "plain", model)
    rendered, total = [], 0
    for number, (question, answer) in enumerate(cycle(texts(text))):
        record = Record(f"r{number}", (Segment("user", question), Segment("assistant", answer)))
        try:
            own = tokenizer.render(record)
        except NotKept:
            continue
        if len(own) <= LONGEST:
            rendered.append((record, own))
            total += len(own)
        if total >= tokens:
            break

    draw = np.random.default_rng(0)
    usual = np.concatenate([own.ids for _, own in rendered])
    bank_ids = [np.unique(draw.choice(usual, count * 2))[:count] for count in np.clip(draw.geometric(1 / kept, DRAWN), 4, 128)]
    bank_logprobs = [np.log(0.9 * draw.dirichlet(np.full(len(ids), 0.3)) + 1e-4).astype(np.float32) for ids in bank_ids]

    def drawn(own: Any) -> Targets:
        position = own.answer_positions()
        chosen = draw.integers(0, DRAWN, len(position))
        ids = [bank_ids[number] for number in chosen.tolist()]
        for row in np.flatnonzero(draw.random(len(position)) < 0.85).tolist():
            follows = own.ids[position[row] + 1]
            if follows not in ids[row]:
                ids[row] = np.append(ids[row][1:], follows)
        rests = np.log(np.array([[0.1], [100.0], [100000.0]])) + draw.normal(0, 0.3, (3, len(position)))
        realised = draw.uniform(-5, 0, len(position)).astype(np.float32)
        logprobs = np.concatenate([bank_logprobs[number] for number in chosen.tolist()])
        counts = np.array([len(part) for part in ids], np.uint16)
        return Targets(position, counts, np.concatenate(ids).astype(np.int32), logprobs, rests.astype(np.float32), realised, entropy=-realised)

    vocabulary = tokenizer.vocabulary
    out = RunFolder(folder)
    form = Logits.of("head", TEMPERATURES, (0.02, 0.5), 0.002, 4, 128, len(vocabulary))
    out.plan("shards", shards)
    listed = []
    for name in out.pieces([f"{shard:05d}" for shard in range(shards)]):
        shard = int(name)
        here = rendered[shard * len(rendered) // shards : (shard + 1) * len(rendered) // shards]
        written = Shard(folder, shard, [(record, own, drawn(own)) for record, own in here], form, keep_text=True)
        out.commit(name, written.write())
        listed.append({"split": "train", "records": len(here), "groups": written.groups()})
    write_vocabulary(folder / "vocabulary.parquet", vocabulary)
    about = {"format": FORMAT, "template": "plain", "text": "keep", "positions": "answer", "method": "head", "temperatures": TEMPERATURES, "extras": ["entropy"], "attention": None}
    about |= {"vocabulary_size": len(vocabulary), "vocabulary": vocabulary.digest(), "rendering": tokenizer.digest(), "end_ids": list(vocabulary.end_ids)}
    write_json(folder / "cache.json", about | {"tail_shards": [], "specialties": {"none": len(rendered)}, "rejected": [], "shards": listed})
    out.keep("cache.json", "vocabulary.parquet")
    identity = {"stage": "cache-teacher", "version": 0, "sections": {}, "needs": {}}
    out.seal("cache-teacher", fingerprint(identity), identity, {}, {"teacher": model, "tokens": total}, {})
    out.close()


def feed(cache_folder: Path, projection: Path, student: str, batch_records: int, begun: float) -> dict[str, Any]:
    """An epoch in this process."""
    import pyarrow as pa
    import torch

    from pipeline.cache.projected import StudentView
    from pipeline.cache.reader import Cache
    from pipeline.models.tokenizers import load_tokenizer
    from pipeline.running.folder import FinishedFolder
    from pipeline.training.batches import Batch, made_ahead, make_batch
    from stages.train_student import Order

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    before, imports, started, worked = resident(), time.time() - begun, time.perf_counter(), time.process_time()
    finished, fitted = FinishedFolder(cache_folder), FinishedFolder(projection)
    cache = Cache(finished.file)
    tokenizer = load_tokenizer(student, None, cache.about["template"], student)
    view = StudentView(cache, fitted.file, tokenizer.render, tokenizer.digest())
    order = Order(cache, 0, batch_records, set())

    def batch_of(step: int) -> Batch:
        examples = [cache.example(place) for place in order.of_step(step)]
        rendered = sorted(((view.tokens(example), example) for example in examples), key=lambda pair: len(pair[0]))
        words = [view.projected(example, tokens) for tokens, example in rendered]
        return make_batch([tokens for tokens, _ in rendered], words, [1.0] * len(rendered), cache.temperatures, 3.0)

    tokens = positions = 0
    first, first_worked, held = 0.0, 0.0, []
    for step, batch in enumerate(made_ahead(batch_of, range(order.count // batch_records), 0)):
        if not step:
            first, first_worked = time.perf_counter() - started, time.process_time() - worked
        tokens, positions = tokens + batch.tokens, positions + len(batch.known)
        if step % 10 == 0:
            held.append(resident() - before)
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    thirds = [round(float(max(part)), 1) for part in np.array_split(np.array(held), 3)]
    return {
        "tokens": tokens,
        "positions": positions,
        "tokens_per_second": round(tokens / seconds),
        "tokens_per_processor_second": round(tokens / worked),
        "first_batch_seconds": round(first, 2),
        "first_batch_processor_seconds": round(first_worked, 2),
        "with_imports": round(imports + first, 2),
        "extra_resident_mb_by_third": thirds,
    }


def resident() -> float:
    """MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def experiment(folder: Path, teacher: str, student: str, text: Path, method: str) -> Path:
    """What `pipeline` is given. As JSON, which is YAML."""
    file = folder / f"{method}.yaml"
    settings: dict[str, Any] = {
        "name": "feeding",
        "data": {"train": [{"dataset": "jsonl", "path": str(text)}], "heldout": {"fraction": 0.01}},
        "teacher": {"model": teacher},
        "student": {"model": student},
        "projection": {"method": method},
        "training": {
            "objective": [{"loss": "forward_kl", "weight": 0.7}, {"loss": "cross_entropy", "weight": 0.3}],
            "temperature": 3.0,
            "steps": 1,
            "batch_records": BATCH,
            "learning_rate": 1e-5,
            "precision": "fp32",
        },
        "machine": {"device": "cpu", "workers": 0, "student_micro_batch_records": MICRO, "checkpoint_steps": 1000},
    }
    file.write_text(json.dumps(settings), encoding="utf-8")
    return file


def pipeline(folder: Path, *words: str) -> str:
    """Its stderr."""
    done = subprocess.run([sys.executable, "-m", "pipeline", "--runs", str(folder / "runs"), *words], env=os.environ | ALONE, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def projection_of(folder: Path, cache: Path, file: Path) -> Path:
    """Made with `pipeline fit-projection`, or found."""
    place = folder / f"projection-{file.stem}"
    if not place.exists():
        pipeline(folder, "fit-projection", str(file), "--use", f"cache-teacher={cache}")
        (made,) = (folder / "runs" / "fit-projection").glob("*")
        made.rename(place)
    return place


def train(folder: Path, cache: Path, projection: Path, file: Path, layers: list[int], steps: int) -> float:
    """Tokens/s."""
    words = ["--set", f"training.steps={steps}", "--set", f"student.layers={layers}", "--use", f"cache-teacher={cache}", "--use", f"fit-projection={projection}"]
    shutil.rmtree(folder / "runs" / "train-student", ignore_errors=True)
    told = pipeline(folder, "train-student", str(file), *words)
    return float(re.findall(r"([\d,]+) tokens/s", told)[-1].replace(",", ""))


def spread(values: list[float], digits: int | None = None) -> list[float]:
    """Lowest, median, highest."""
    return [round(value, digits) for value in (min(values), statistics.median(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--kept", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of training in each round; 0: no training")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--keep", type=Path, help="make the caches and projections here, or read those that are here")
    parser.add_argument("--feed", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.feed:
        cache, projection, begun = given.feed
        print(json.dumps(feed(Path(cache), Path(projection), given.student, given.batch, float(begun))))
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ |= ALONE
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(compared(folder, given), indent=1))


def compared(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    methods = given.methods.split(",")
    caches, projections, files = {}, {}, {}
    for method in methods:
        teacher = given.student if method == "identity" else given.teacher
        caches[method] = folder / ("cache-own" if method == "identity" else "cache")
        if not (caches[method] / "manifest.json").exists():
            make(caches[method], teacher, given.text, given.tokens, given.shards, given.kept)
        files[method] = experiment(folder, teacher, given.student, given.text.absolute(), method)
        projections[method] = projection_of(folder, caches[method], files[method])
    count = json.loads((Path(given.student) / "config.json").read_text())["num_hidden_layers"]
    students = {f"{count} layers": list(range(count)), f"{count // 3} layers": list(range(0, count, 3))} if given.steps else {}

    fed: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    trained: dict[str, list[float]] = {name: [] for name in students}
    for _ in range(given.rounds):
        for method in methods:
            command = [sys.executable, __file__, given.teacher, given.student, str(given.text), "--batch", str(given.batch)]
            done = subprocess.run([*command, "--feed", str(caches[method]), str(projections[method]), str(time.time())], check=True, stdout=subprocess.PIPE, text=True)
            fed[method].append(json.loads(done.stdout))
        for name, layers in students.items():
            trained[name].append(train(folder, caches[methods[0]], projections[methods[0]], files[methods[0]], layers, given.steps))

    found: dict[str, Any] = {"train_tokens_per_second": {name: spread(rates) for name, rates in trained.items()}}
    for method, rounds in fed.items():
        rates = [one["tokens_per_second"] for one in rounds]
        found[method] = {
            "tokens": rounds[0]["tokens"],
            "tokens_per_second": spread(rates),
            "tokens_per_processor_second": spread([one["tokens_per_processor_second"] for one in rounds]),
            "times_what_training_takes": {name: spread([rate / taken for rate, taken in zip(rates, those, strict=True)], 1) for name, those in trained.items()},
            "first_batch_seconds": spread([one["first_batch_seconds"] for one in rounds], 2),
            "first_batch_processor_seconds": spread([one["first_batch_processor_seconds"] for one in rounds], 2),
            "first_batch_seconds_with_imports": spread([one["with_imports"] for one in rounds], 2),
            "extra_resident_mb_by_third": [one["extra_resident_mb_by_third"] for one in rounds],
            "on_gpus": {name: round(statistics.median(one["tokens_per_processor_second"] for one in rounds) / (peak * 0.4 / (6 * PARAMETERS)), 1) for name, peak in PEAKS.items()},
        }
    found["on_gpus_tokens_per_second"] = {name: round(peak * 0.4 / (6 * PARAMETERS)) for name, peak in PEAKS.items()}
    return found


if __name__ == "__main__":
    main()
