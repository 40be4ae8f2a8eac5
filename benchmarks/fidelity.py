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

import numpy as np
import torch
from transformers import DynamicCache

from pipeline.cache.reader import Cache, Example
from pipeline.config import Machine, Teacher
from pipeline.lookup import find, parameters
from pipeline.models.loading import device_named, load_teacher
from pipeline.models.tokenizers import load_tokenizer
from pipeline.running.fingerprint import with_names
from pipeline.running.folder import FinishedFolder
from pipeline.signals.counts import counted
from pipeline.signals.first_tokens import NONE, FirstTokens
from pipeline.signals.projection import at_temperature, meet, projected
from pipeline.signals.records import ANSWER, number_as_lead
from pipeline.signals.targets import with_realised

ENOUGH, MOST = 0.004, 16
NEXT = 64
"""Continuations of an expanded token that are read off; the others are taken to be like these."""
UNIFORM = 0.001


class Reference:
    """The expanded distribution over the student's tokens."""

    def __init__(self, model: torch.nn.Module, device: torch.device, teacher, student, first: FirstTokens) -> None:
        self._model, self._device, self._teacher, self._student, self._first = model, device, teacher, student, first
        self._plain = np.array([bool(token) for token in teacher.token_bytes])

    def at(self, prefix: np.ndarray, left: bytes) -> np.ndarray:
        """float64 [V_student]; sums to 1."""
        p, memory = self._after(prefix[None])
        p = p[0]
        q = np.zeros(len(self._student))
        order = np.argsort(-p, kind="stable")
        expanded = [int(id) for id in order[:MOST] if p[id] >= ENOUGH and self._plain[id]]
        after = self._after(np.array(expanded)[:, None], memory)[0] if expanded else []
        for id, further in zip(expanded, after, strict=True):
            nexts = np.argsort(-further, kind="stable")[:NEXT]
            share = further[nexts] / further[nexts].sum()
            token = self._teacher.token_bytes[id]
            alone = self._first.of([(left, token)])[0]
            bytes_of = [self._teacher.token_bytes[next] for next in nexts.tolist()]
            answers = self._first.of([(left, token + more) if more else (left, token) for more in bytes_of])
            answers = np.where(self._plain[nexts], answers, alone)
            np.add.at(q, answers[answers != NONE] >> 1, (p[id] * share)[answers != NONE])
        others = np.setdiff1d(np.flatnonzero(p > 1e-7), expanded)
        plain = others[self._plain[others]]
        answers = self._first.of([(left, self._teacher.token_bytes[id]) for id in plain.tolist()])
        np.add.at(q, answers[answers != NONE] >> 1, p[plain][answers != NONE])
        q[self._student.end_ids[0]] += p[list(self._teacher.end_ids)].sum()
        return q / q.sum()

    @torch.inference_mode()
    def _after(self, tokens: np.ndarray, memory: DynamicCache | None = None) -> tuple[np.ndarray, DynamicCache]:
        """float64 [n, V_teacher]: what the teacher says after these tokens [n, T], that follow what one row of `memory` is of."""
        if memory is not None:
            memory.batch_repeat_interleave(len(tokens))
        out = self._model(input_ids=torch.from_numpy(tokens.astype(np.int64)).to(self._device), past_key_values=memory or DynamicCache(config=self._model.config), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1, : len(self._teacher)].float().softmax(-1).double().cpu().numpy(), out.past_key_values


def compared(reference: np.ndarray, ids: np.ndarray, probs: np.ndarray, rest: float) -> tuple[float, float, bool]:
    """Total variation and KL(reference || target) over the target's tokens and one outcome for the others, and whether the strongest are one."""
    there, first = np.unique(ids[probs > 0], return_index=True)
    q = np.append(probs[probs > 0][first], rest)
    r = np.append(reference[there], max(1 - reference[there].sum(), 0.0))
    u = np.append(np.full(len(there), 1 / len(reference)), 1 - len(there) / len(reference))
    q = (1 - UNIFORM) * q / q.sum() + UNIFORM * u
    kl = float((r[r > 0] * np.log(r[r > 0] / q[r > 0])).sum())
    return 0.5 * float(np.abs(r - q).sum()), kl, bool(there[q[:-1].argmax()] == reference.argmax())


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
    reference = Reference(model, device, teacher, student.vocabulary, FirstTokens(student.vocabulary, student.encode))
    counts = counted(((example.tokens, student.render(example.record)) for example in cache.examples("train")), len(teacher))
    given = {"teacher": teacher, "student": student.vocabulary, "encode": student.encode, "counts": counts}
    methods = {name: find("projections", name)(*(given[each] for each in parameters("projections", name)[0])) for name in options.methods.split(",")}

    places = [(example, int(position)) for example in _heldout(cache) for position in _starts(example, student)]
    drawn = [places[i] for i in np.random.default_rng(0).permutation(len(places))[: options.positions].tolist()]
    found: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    for example, position in drawn:
        tokens = student.render(example.record)
        targets = with_realised(example.targets, example.tokens.ids[example.targets.position + 1], cache.temperatures)
        meeting = meet(example.record.content, example.tokens, targets, tokens)
        index = int(np.flatnonzero(meeting.at_student == position)[0])
        at_teacher = int(targets.position[meeting.row[index]])
        expanded = reference.at(example.tokens.ids[: at_teacher + 1], _left(reference._first, example, tokens, position))
        for name, method in methods.items():
            word = projected(targets, method.shares(meeting), len(teacher))
            here = int(np.flatnonzero(word.position == position)[0]) if position in word.position else None
            if here is None:
                continue
            target = at_temperature([word], cache.temperatures, 1.0)
            found[name].append(compared(expanded, target.ids[here].numpy(), target.probs[here].numpy().astype(np.float64), float(target.rest[here])))
    print(f"{len(drawn)} positions of {len({example.record.id for example, _ in drawn})} held-out records\n")
    print("| method | TV | KL (nats) | strongest the same | positions |\n|---|---:|---:|---:|---:|")
    for name, rows in found.items():
        tv, kl, same = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
        error = [values.std() / np.sqrt(len(values)) for values in (tv, kl)]
        print(f"| {name} | {tv.mean():.3f} ± {error[0]:.3f} | {kl.mean():.3f} ± {error[1]:.3f} | {same.mean():.3f} | {len(rows)} |")


def _heldout(cache: Cache) -> list[Example]:
    return [example for example in cache.examples("heldout") if not example.record.choice_of]


def _starts(example: Example, student) -> np.ndarray:
    """The student's positions at which both begin a token that the cache describes."""
    meeting = meet(example.record.content, example.tokens, example.targets, student.render(example.record))
    return meeting.at_student


def _left(first: FirstTokens, example: Example, tokens, position: int) -> bytes:
    """All of the answer before the position, with the template's bytes that its first token begins with."""
    begin = position + 1
    while begin > 0 and tokens.kind[begin - 1] == ANSWER:
        begin -= 1
    text = example.record.content[tokens.start[begin] : tokens.start[position + 1]]
    return number_as_lead(int(tokens.lead[begin])) + text if text else b""


if __name__ == "__main__":
    main()
