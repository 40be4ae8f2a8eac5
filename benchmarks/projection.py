"""How fast two tokenizers are aligned and a cache is compiled into shares of student tokens, on one core, and in how much memory.

    TOKENIZERS_PARALLELISM=false taskset -c 0 python benchmarks/projection.py CACHE STUDENT [--method contextual] [--rounds 3]

CACHE: a finished cache's folder. STUDENT: a model's folder. Prints one JSON object: tokens/s of the alignment (both sides' tokens;
the records one by one, and eight joined to one), student positions/s of each round over the training records (the first one fills the
memory of what the student's tokenizer answered), both with what it takes to render and decode, and the peak of resident memory.
"""

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.lookup import find, parameters
from pipeline.models.tokenizers import load_tokenizer
from pipeline.running.folder import FinishedFolder
from pipeline.signals.alignment import align
from pipeline.signals.counts import counted
from pipeline.signals.projection import meet
from pipeline.signals.records import Tokens
from pipeline.signals.targets import with_realised


def joined(records: list[Tokens]) -> Tokens:
    """One long record out of several, as one conversation."""
    ends = np.cumsum([0, *(int(tokens.end[-1]) for tokens in records)])
    moved = [replace(tokens, start=tokens.start + first, end=tokens.end + first) for tokens, first in zip(records, ends.tolist(), strict=False)]
    return Tokens(*(np.concatenate([getattr(tokens, name) for tokens in moved]) for name in ("ids", "start", "end", "kind", "lead")))


def tokens_per_second(pairs: list[tuple[Tokens, Tokens]]) -> float:
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for one, other in pairs:
            align(one, other)
        best = min(best, time.perf_counter() - begin)
    return sum(len(one) + len(other) for one, other in pairs) / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("student")
    parser.add_argument("--method", default="contextual")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    cache = Cache(FinishedFolder(options.cache).file)
    teacher = cache.vocabulary()
    student = load_tokenizer(options.student, None, cache.about["template"], options.student)
    examples = list(cache.examples("train"))
    rendered = [student.render(example.record) for example in examples]
    pairs = [(example.tokens, tokens) for example, tokens in zip(examples, rendered, strict=True)]
    eights = [(joined([one for one, _ in pairs[i : i + 8]]), joined([other for _, other in pairs[i : i + 8]])) for i in range(0, len(pairs), 8)]
    told = {"records": len(pairs), "align_tokens_per_second": round(tokens_per_second(pairs)), "align_long_tokens_per_second": round(tokens_per_second(eights))}

    given = {"teacher": teacher, "student": student.vocabulary, "encode": student.encode, "counts": counted(pairs, len(teacher))}
    begin = time.perf_counter()
    method = find("projections", options.method)(*(given[name] for name in parameters("projections", options.method)[0]))
    told["fit_seconds"] = round(time.perf_counter() - begin, 2)
    del examples, rendered, pairs, eights, given

    rates = []
    for _ in range(options.rounds):
        positions, begin = 0, time.perf_counter()
        for example in cache.examples("train"):
            tokens = student.render(example.record)
            targets = with_realised(example.targets, example.tokens.ids[example.targets.position + 1], cache.temperatures)
            method.shares(meet(example.record.content, example.tokens, targets, tokens))
            positions += len(tokens.answer_positions())
        rates.append(round(positions / (time.perf_counter() - begin)))
    told |= {"student_positions": positions, "student_positions_per_second": rates, "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
