"""Projections of tiny and real tokenizers, teachers' words that are made up, and what a target looks like when it is dense."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.lookup import find, parameters
from pipeline.models.tokenizers import RecordTokenizer
from pipeline.signals.counts import Counts, counted
from pipeline.signals.fitting import Layer
from pipeline.signals.projection import Projected, Projection, SparseTarget, at_temperature, meet, projected
from pipeline.signals.records import ANSWER, END, TEMPLATE, Record, Segment, Tokens
from pipeline.signals.targets import Targets, with_realised
from pipeline.signals.vocabulary import Vocabulary
from tests.models import real
from tests.signals.dense import asked, log_softmax, log_sum, student, targets_of, teacher
from tests.tiny import questions

TEMPERATURES = [1.0, 2.0, 8.0]
ACROSS = ("exact_bytes", "first_token", "count_transport", "contextual", "learned")
STATIC = ACROSS[:3]
RECORDS = [
    asked("What is it?", "thinning 12345 of the kidney 12 of 100."),
    asked("What is 🙂?", "🙂 sign \n\n\n fibrosé 👩‍👩‍👧 123456789   x\ty"),
    asked("And?", "a cyst of the heart, seen in 4 of 100.", context="A context."),
    asked("Nothing?", ""),
    asked("One?", "A"),
    Record("d", (Segment("user", "What is 12?"), Segment("assistant", "A cyst 🙂."), Segment("user", "And 12345?"), Segment("assistant", "fibrosé\n\n in 4 of 100."))),
    *(asked(row["question"], row["answer"]) for row in list(questions(48))[5::20]),
]


def sides(pair: str) -> tuple[RecordTokenizer, RecordTokenizer]:
    """A teacher's and a student's."""
    if pair == "tiny":
        return teacher(), student()
    if pair == "tiny, turned around":
        return student(), teacher()
    name = {"gemma to smollm": real.SMOLLM, "gemma to llama": real.LLAMA3, "gemma to qwen": real.QWEN3}[pair]
    return real.tokenizer(real.GEMMA), real.tokenizer(name)


@cache
def counts_of(pair: str) -> Counts:
    one, other = sides(pair)
    records = [*RECORDS, *(asked(row["question"], row["answer"]) for row in questions(48))]
    return counted(((one.render(record), other.render(record)) for record in records), len(one.vocabulary))


def spaced(kind: str) -> PreTrainedTokenizerFast:
    """SentencePiece-like, with a space of its own before each text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "prepended":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<eos>"]
    texts = [row[part].encode("ascii", "ignore").decode() for row in questions(48) for part in ("question", "answer")]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=[*specials, *fallback], show_progress=False))
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<eos>", unk_token="<unk>")


def unigram(fallback: bool) -> PreTrainedTokenizerFast:
    """As T5's: the most likely way to cut a word, a space before each text. fallback: bytes for what it has no letters for."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = ["<pad>", "</s>", "<unk>"]
    texts = [row[part].encode("ascii", "ignore").decode() for row in questions(48) for part in ("question", "answer")]
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=400, initial_alphabet=[chr(letter) for letter in range(33, 127)], special_tokens=specials, unk_token="<unk>", show_progress=False)
    )
    data = json.loads(tokenizer.to_str())
    if fallback:
        data["model"]["vocab"] += [[f"<0x{byte:02X}>", -30.0] for byte in range(256)]
        data["model"]["byte_fallback"] = True
        data["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, data["decoder"]]}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def no_counts(size: int) -> Counts:
    nothing = np.zeros(0, dtype=np.int32)
    return Counts.of_pairs(nothing, nothing, nothing, size)


def untrained(layer: Layer, **how: Any) -> None:
    pass


def shaken(layer: Layer, **how: Any) -> None:
    """Instead of training: every weight somewhere else."""
    random = torch.Generator().manual_seed(how["seed"])
    with torch.no_grad():
        for weight in layer.parameters():
            weight += torch.randn(weight.shape, generator=random)


def build(method: str, one: RecordTokenizer, other: RecordTokenizer, counts: Counts | None = None, trained: Callable[..., None] = shaken, **options: Any) -> Any:
    """The method with what it asks for by name."""
    given = {"teacher": one.vocabulary, "student": other.vocabulary, "encode": other.encode, "counts": no_counts(len(one.vocabulary)) if counts is None else counts, "trained": trained}
    return find("projections", method)(*(given[name] for name in parameters("projections", method)[0]), **options)


@cache
def made(method: str, pair: str = "tiny") -> Any:
    return build(method, *sides(pair), counts_of(pair))


class Toy:
    """A tokenizer of a few letters, `a` always among them. Token 0 begins a text and ends an answer."""

    def __init__(self, letters: str, merges: list[tuple[str, str]]) -> None:
        tokens = [*dict.fromkeys(letters + "a"), *(one + other for one, other in merges)]
        self._tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens, 1)}, merges))
        self.vocabulary = Vocabulary([b"", *(token.encode() for token in tokens)], np.array([True, *[False] * len(tokens)]), end_ids=(0,))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def id(self, token: str) -> int:
        return self.vocabulary.id_of_bytes[token.encode()]

    def render(self, record: Record) -> Tokens:
        """Of answers alone."""
        rows, at = [(0, 0, 0, TEMPLATE)], 0
        for segment in record.segments:
            for id in self.encode([segment.text])[0]:
                rows.append((id, at, at + len(self.vocabulary.token_bytes[id]), ANSWER))
                at = rows[-1][2]
            rows.append((0, at, at, END))
        ids, start, end, kind = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        return Tokens(ids, start, end, kind.astype(np.uint8), np.zeros(len(ids), np.int64))


def answers(*texts: str) -> Record:
    return Record("toy", tuple(Segment("assistant", text) for text in texts))


@dataclass(frozen=True)
class Said:
    """A teacher's word on a record, and what is behind it."""

    targets: Targets
    at: Callable[[float], list[tuple[dict[int, float], float]]]
    """Per described position at a temperature: the mass of the kept tokens (the realised one with them), and of all others."""


def said(tokenizer: RecordTokenizer, record: Record, keep: int, seed: int, *, onto_realised: float = 2.0, near: float = 1.0, everywhere: bool = True) -> Said:
    """The realised token is more likely than others, and so is what begins as the text goes on (`near` for each byte of it)."""
    tokens, vocabulary = tokenizer.render(record), tokenizer.vocabulary
    position = np.arange(len(tokens) - 1, dtype=np.int32) if everywhere else tokens.answer_positions()
    logits = np.random.default_rng(seed).normal(0, 2, (len(position), len(vocabulary)))
    for row, at in enumerate(position.tolist()):
        logits[row] += near * likeness(vocabulary.token_bytes, following(tokenizer, tokens, at))
    logits[np.arange(len(position)), tokens.ids[position + 1]] += onto_realised
    targets = targets_of(logits, tokens, position, keep, TEMPERATURES)
    kept = [{*ids.tolist(), int(id)} for ids, id in zip(np.split(targets.ids, np.cumsum(targets.kept)[:-1].astype(int)), tokens.ids[position + 1], strict=True)]

    def at(temperature: float) -> list[tuple[dict[int, float], float]]:
        p = np.exp(log_softmax(logits, temperature))
        return [({id: float(row[id]) for id in ids}, max(0.0, 1 - float(row[sorted(ids)].sum()))) for row, ids in zip(p, kept, strict=True)]

    return Said(targets, at)


def said_of_few(tokenizer: RecordTokenizer, record: Record, keep: int, seed: int) -> Said:
    """As `said`, for large vocabularies: all but the kept tokens are equally likely."""
    tokens, vocabulary = tokenizer.render(record), tokenizer.vocabulary
    position, random = tokens.answer_positions(), np.random.default_rng(seed)
    ids, logprobs, outside, kept = [], [], [], []
    for at in position.tolist():
        text = following(tokenizer, tokens, at)
        near = [vocabulary.id_of_bytes[text[:n]] for n in range(1, 12) if text[:n] in vocabulary.id_of_bytes]
        few = sorted({*near, *random.integers(0, len(vocabulary), keep).tolist(), int(tokens.ids[at + 1]), vocabulary.end_ids[0]})
        mass = random.dirichlet(np.ones(len(few) + 1)) + 1e-6
        logprobs.append(np.log(mass / mass.sum()).astype(np.float32))
        ids.append(few)
        outside.append(len(vocabulary) - len(few))
        kept.append(len(few))

    def tempered(temperature: float) -> list[tuple[np.ndarray, float]]:
        return [(logs[:-1].astype(np.float64) / temperature, float((logs[-1] - np.log(n)) / temperature + np.log(n))) for logs, n in zip(logprobs, outside, strict=True)]

    def at(temperature: float) -> list[tuple[dict[int, float], float]]:
        rows = []
        for few, (logs, rest) in zip(ids, tempered(temperature), strict=True):
            total = log_sum(np.append(logs, rest))
            rows.append(({id: float(np.exp(log - total)) for id, log in zip(few, logs, strict=True)}, float(np.exp(rest - total))))
        return rows

    targets = Targets(
        position=position,
        kept=np.array(kept, np.uint16),
        ids=np.array([id for few in ids for id in few], np.int32),
        logprobs=np.concatenate([logs[:-1] for logs in logprobs]),
        rests=np.array([[rest for _, rest in tempered(t)] for t in TEMPERATURES], np.float32),
        realised_logprob=np.array([logs[few.index(int(tokens.ids[at + 1]))] for few, logs, at in zip(ids, logprobs, position.tolist(), strict=True)], np.float32),
    )
    return Said(targets, at)


def following(tokenizer: RecordTokenizer, tokens: Tokens, at: int) -> bytes:
    """What the tokens after position `at` stand for, as far as any single token could reach."""
    return b"".join(tokenizer.vocabulary.token_bytes[id] for id in tokens.ids[at + 1 : at + 9].tolist())


def likeness(token_bytes: list[bytes], text: bytes) -> np.ndarray:
    """How many bytes each token begins with as the text does."""
    alike = np.zeros(len(token_bytes))
    for id, token in enumerate(token_bytes):
        if token[:1] == text[:1]:
            alike[id] = next((n for n in range(len(token), 0, -1) if token[:n] == text[:n]), 0)
    return alike


def put(method: Projection, one: RecordTokenizer, other: RecordTokenizer, record: Record, targets: Targets) -> Projected:
    """The targets at the student's positions."""
    return put_tokens(method, one.render(record), other.render(record), targets, len(one.vocabulary), record.content)


def put_tokens(method: Projection, a: Tokens, b: Tokens, targets: Targets, vocabulary_size: int, content: bytes = b"") -> Projected:
    targets = with_realised(targets, a.ids[targets.position + 1], TEMPERATURES)
    return projected(targets, method.shares(meet(content, a, targets, b)), vocabulary_size)


def without_last(targets: Targets) -> Targets:
    """Without the last position."""
    entries = len(targets.ids) - int(targets.kept[-1])
    flat = {"ids": targets.ids[:entries], "logprobs": targets.logprobs[:entries], "rests": targets.rests[:, :-1]}
    optional = {name: value[:-1] for name in ("entropy",) if (value := getattr(targets, name)) is not None}
    return replace(targets, **flat, **optional, **{name: getattr(targets, name)[:-1] for name in ("position", "kept", "realised_logprob")})


def dense(target: SparseTarget, vocabulary: int) -> np.ndarray:
    """float64 [N, V + 1]: the last column is the rest."""
    q = torch.zeros(len(target.rest), vocabulary + 1, dtype=torch.float64)
    q.scatter_add_(1, target.ids, target.probs.double())
    q[:, -1] = target.rest.double()
    return q.numpy()


def distributions(found: Projected, temperature: float, vocabulary: int) -> dict[int, np.ndarray]:
    """Student position -> its distribution over the student's tokens and, last, the rest."""
    if not len(found.position):
        return {}
    return dict(zip(found.position.tolist(), dense(at_temperature([found], TEMPERATURES, temperature), vocabulary), strict=True))


def check(found: Projected, wanted: dict[int, np.ndarray], temperature: float, vocabulary: int) -> None:
    q = distributions(found, temperature, vocabulary)
    assert list(q) == list(wanted)
    for position, true in wanted.items():
        np.testing.assert_allclose(q[position], true, rtol=1e-4, atol=3e-6, err_msg=f"position {position}")


def check_sums(target: SparseTarget) -> None:
    """Every row is a distribution."""
    assert torch.isfinite(target.probs).all()
    assert torch.isfinite(target.rest).all()
    assert (target.probs >= 0).all()
    assert (target.rest >= 0).all()
    assert torch.allclose(target.probs.double().sum(-1) + target.rest.double(), torch.ones(len(target.rest), dtype=torch.float64), atol=1e-6)
