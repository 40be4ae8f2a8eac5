"""How fast and in how much memory a cache is read: a synthetic one of any size, through the reader that training uses.

    python benchmarks/reader.py [--positions 2000000] [--shards 1000] [--kept 30] [--keep FOLDER]

Writes the cache (Zipf-like log-probabilities, ids by frequency; what is timed does not depend on their meaning), then prints one
JSON object: opening it and the order of an epoch; decoding to flat arrays and the whole feed (decoded, shuffled, batched at a
temperature, same tokenizer) in positions/s on one core; resident memory over a full epoch, beside the interpreter with torch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline.cache.projected import Fitted, StudentView
from pipeline.cache.reader import Cache
from pipeline.cache.schema import FORMAT, Logits
from pipeline.cache.writer import Shard
from pipeline.files import write_json
from pipeline.running.fingerprint import fingerprint
from pipeline.running.folder import FinishedFolder, RunFolder
from pipeline.signals.projection import Projection
from pipeline.signals.records import ANSWER, CONTENT, Record, Segment, Tokens
from pipeline.signals.targets import Targets
from pipeline.training.batches import make_batch

VOCABULARY = 128_256
TEMPERATURES = [1.0, 2.0, 8.0]
ANSWER_TOKENS = 100


def example(number: int, kept: int) -> tuple[Record, Tokens, Targets]:
    """A record of 150 tokens, the last 100 an answer."""
    draw = np.random.default_rng(number)
    length = ANSWER_TOKENS + 50
    text = "".join(chr(97 + c) for c in draw.integers(0, 26, length))
    start = np.arange(length, dtype=np.int32)
    kind = np.where(start >= 50, ANSWER, CONTENT).astype(np.uint8)
    tokens = Tokens(draw.integers(0, VOCABULARY, length).astype(np.int32), start, start + 1, kind, np.zeros(length, np.int64))
    counts = np.clip(draw.geometric(1 / kept, ANSWER_TOKENS), 4, 128).astype(np.uint16)
    ids = [np.unique((VOCABULARY ** draw.random(count * 2)).astype(np.int32))[:count] for count in counts]
    counts = np.array([len(part) for part in ids], np.uint16)
    logprobs = np.concatenate([np.log(0.9 * draw.dirichlet(np.full(count, 0.3)) + 1e-4) for count in counts]).astype(np.float32)
    rests = np.log(np.array([[0.1], [100.0], [100000.0]])) + draw.normal(0, 0.3, (3, ANSWER_TOKENS))
    realised = draw.uniform(-5, 0, ANSWER_TOKENS).astype(np.float32)
    among = np.flatnonzero(draw.random(ANSWER_TOKENS) < 0.85)  # what follows is mostly one of the kept
    tokens.ids[50 + among] = np.concatenate(ids)[(np.cumsum(counts) - counts)[among]]
    targets = Targets(tokens.answer_positions(), counts, np.concatenate(ids), logprobs, rests.astype(np.float32), realised, entropy=-realised)
    return Record(f"r{number}", (Segment("user", text[:50]), Segment("assistant", text[50:]))), tokens, targets


def make(folder: Path, positions: int, shards: int, kept: int) -> None:
    out = RunFolder(folder)
    form = Logits.of("head", TEMPERATURES, (0.02, 0.5), 0.002, 4, 128, VOCABULARY)
    records = positions // ANSWER_TOKENS
    some = [example(number, kept) for number in range(min(records, 2000))]  # told apart by their ids
    listed = []
    out.plan("shards", shards)
    for name in out.pieces([f"{shard:05d}" for shard in range(shards)]):
        shard = int(name)
        numbers = range(shard * records // shards, (shard + 1) * records // shards)
        examples = [(Record(f"r{number}", some[number % len(some)][0].segments), *some[number % len(some)][1:]) for number in numbers]
        written = Shard(folder, shard, examples, form, keep_text=True)
        out.commit(name, written.write())
        listed.append({"split": "train", "records": len(examples), "groups": written.groups()})
    about = {"format": FORMAT, "text": "keep", "method": "head", "temperatures": TEMPERATURES, "extras": ["entropy"], "vocabulary": "synthetic", "rendering": "synthetic"}
    write_json(folder / "cache.json", about | {"vocabulary_size": VOCABULARY, "end_ids": [0], "tail_shards": [], "shards": listed})
    out.keep("cache.json")
    identity = {"stage": "cache-teacher", "version": 0, "sections": {}, "needs": {}}
    out.seal("cache-teacher", fingerprint(identity), identity, {}, {}, {})
    out.close()


def resident() -> float:
    """MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def read(folder: Path, batch_records: int) -> dict[str, object]:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    before = resident()
    started = time.perf_counter()
    finished = FinishedFolder(folder)
    finished.check_sizes()
    cache = Cache(finished.file)
    order = cache.order("train", 0, 0)
    cache.example(order[0])
    opening = time.perf_counter() - started

    shards = [(shard, group) for shard in cache.shards("train") for group in range(len(cache.about["shards"][shard]["groups"]))]
    for shard, _ in shards:
        for name in ("records", "logits", "ranks"):
            finished.file(f"{name}-{shard:05d}.parquet")  # hashed once, whatever is read then
    decoded = 0
    started = time.perf_counter()
    for shard, group in shards[: max(len(shards) // 5, 1)]:
        decoded += len(cache.logits(shard, group).position)
    decoding = decoded / (time.perf_counter() - started)

    view = StudentView(cache, Fitted(Projection(np.arange(VOCABULARY, dtype=np.int32)), "identity", "synthetic"), lambda record: None, "synthetic")  # type: ignore[arg-type, return-value]
    positions, peaks = 0, []
    started = time.perf_counter()
    for begin in range(0, len(order), batch_records):
        examples = [cache.example(place) for place in order[begin : begin + batch_records]]
        tokens = [view.tokens(one) for one in examples]
        words = [view.projected(one, own) for one, own in zip(examples, tokens, strict=True)]
        batch = make_batch(tokens, words, [1.0] * len(tokens), cache.temperatures, 2.0)
        positions += len(batch.known)
        if begin // batch_records % 50 == 0:
            peaks.append(resident() - before)
    feed = positions / (time.perf_counter() - started)
    tenths = [round(max(part), 1) for part in np.array_split(np.array(peaks), 10) if len(part)]
    size = finished.size(("logits-", "ranks-"))
    return {
        "positions": positions,
        "bytes_per_position": round(size / positions, 2),
        "open_seconds": round(opening, 3),
        "decode_positions_per_second": round(decoding),
        "feed_positions_per_second": round(feed),
        "extra_resident_mb_by_tenth_of_the_epoch": tenths,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--kept", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--keep", type=Path, help="make the cache here, or read the one that is here")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read(given.read, given.batch)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch) / "cache"
        if not (folder / "manifest.json").exists():
            make(folder, given.positions, given.shards, given.kept)
        # a process of its own: what making it took is not counted
        subprocess.run([sys.executable, __file__, "--read", str(folder), "--batch", str(given.batch)], check=True)


if __name__ == "__main__":
    main()
