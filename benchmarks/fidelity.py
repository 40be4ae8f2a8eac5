"""How near projected targets come to what the teacher says of the student's next token: total variation and KL to an expanded reference.

    python benchmarks/fidelity.py CACHE STUDENT [--positions 200] [--methods exact_bytes,first_token,count_transport,contextual]

CACHE: a finished cache's folder, whose teacher must be there. STUDENT: a model's folder. At positions of held-out records at which
both begin a token, drawn at random: the teacher's whole distribution, each of its tokens with a probability of at least 0.004 (at most 16)
expanded one token further with the teacher itself, and the student's tokens read off by its own tokenizer; what it cannot read
as beginning there is left out. A target is compared over its tokens and one outcome for all others, mixed with 0.1 % of the
uniform distribution. Prints a table: means over the positions, with the standard error, and how often the strongest tokens are the same.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.config import Machine, Teacher
from pipeline.lookup import find, parameters
from pipeline.models.expanded import ask, compared
from pipeline.models.loading import device_named, load_teacher
from pipeline.models.tokenizers import load_tokenizer
from pipeline.running.fingerprint import with_names
from pipeline.running.folder import FinishedFolder
from pipeline.signals.counts import counted
from pipeline.signals.fitting import Layer, Places, fit
from pipeline.signals.projection import at_temperature, meet, projected
from pipeline.signals.targets import with_realised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("student")
    parser.add_argument("--positions", type=int, default=200)
    parser.add_argument("--methods", default="exact_bytes,first_token,count_transport,contextual")
    options = parser.parse_args()

    finished = FinishedFolder(options.cache)
    cache = Cache(finished.file)
    teacher = cache.vocabulary()
    settings = Teacher.model_validate(with_names(finished.identity["sections"])["teacher"])
    device = device_named(Machine().device)
    model = load_teacher(settings.model, settings.revision, settings.quantization, settings.double_quantization, settings.dtype, device)
    student = load_tokenizer(options.student, None, cache.about["template"], options.student)

    def meeting_of(example):
        targets = with_realised(example.targets, example.tokens.ids[example.targets.position + 1], cache.temperatures)
        return meet(example.record.content, example.tokens, targets, student.render(example.record))

    def trained(layer: Layer, **how: Any) -> None:
        print(fit(layer, Places.joined(places[:tenth]), Places.joined(places[tenth:]), **how))

    examples = list(cache.examples("train"))
    places, pairs = [Places.of(meeting_of(example)) for example in examples], [(example.tokens, student.render(example.record)) for example in examples]
    tenth = len(examples) * 9 // 10  # what is trained is counted and trained without the last tenth
    given = {"teacher": teacher, "student": student.vocabulary, "encode": student.encode, "trained": trained}
    methods = {}
    for name in options.methods.split(","):
        asks_for = parameters("projections", name)[0]
        given["counts"] = counted(pairs[:tenth] if "trained" in asks_for else pairs, len(teacher))
        methods[name] = find("projections", name)(*(given[each] for each in asks_for))

    heldout = [example for example in cache.examples("heldout") if not example.record.choice_of]
    found: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    records = set()
    for asked in ask(model, device, teacher, student, heldout, options.positions):
        records.add(asked.example.record.id)
        meeting = meeting_of(asked.example)
        for name, method in methods.items():
            word = method.values(meeting, cache.temperatures) if method.form == "values" else projected(meeting.targets, method.shares(meeting), len(teacher))
            here = np.flatnonzero(word.position == asked.position)
            if len(here):
                found[name].append(compared(asked, at_temperature([word], cache.temperatures, 1.0), int(here[0])))
    print(f"{options.positions} positions of {len(records)} held-out records\n")
    print("| method | TV | KL (nats) | strongest the same | positions |\n|---|---:|---:|---:|---:|")
    for name, rows in found.items():
        tv, kl, same = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
        error = [values.std() / np.sqrt(len(values)) for values in (tv, kl)]
        print(f"| {name} | {tv.mean():.3f} ± {error[0]:.3f} | {kl.mean():.3f} ± {error[1]:.3f} | {same.mean():.3f} | {len(rows)} |")


if __name__ == "__main__":
    main()
