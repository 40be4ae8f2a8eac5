"""What the tests of signals, projections, losses and training are held against: everything dense, in float64, in plain loops."""

from functools import cache
from itertools import pairwise

import numpy as np

from pipeline.models.tokenizers import RecordTokenizer
from pipeline.signals.records import ANSWER, CONTENT, END, TEMPLATE, Record, Segment, Tokens
from pipeline.signals.targets import Targets
from tests.tiny import byte_level, questions, sentencepiece

NASTY_TEXTS = {
    "emoji joined": "👩‍👩‍👧‍👦 and 🏳️‍🌈🇩🇪",
    "combining marks": "e\u0301 n\u0303 \u0301alone a\u0308\u0323",
    "Chinese, Japanese, Korean": "患者は発熱し、咳がある。病人发烧。환자",
    "Arabic": "المريض يعاني من الحمى ٣٩",
    "four bytes": "𝔘𝔫𝔦 𐍈 𠜎",
    "NUL": "a\0b\0",
    "CRLF": "one\r\ntwo\r\n\r\nthree\n",
    "tabs": "\tif x:\n\t\treturn\t1",
    "numbers": "1 12 123 1234 12345 123456 1234567 12345678 123456789",
    "300 spaces": "a" + " " * 300 + "b ",
    "special tokens as text": "<eos> <bos><pad> <unk> <|im_end|><|im_start|> <|end|> <|user|> <end_of_turn> <|endoftext|> <0x0A>",
    "newlines": "\n\n\n1.\n):\n",
    "leading space": " yes",
    "private use": "\ue0000\ue001 \ue0001\ue001",
    "line separators": "a\u2028b\u0085c\u00a0d\ufeffe",
    "empty": "",
}


@cache
def byte_level_tiny():
    return byte_level(_texts())


@cache
def sentencepiece_tiny():
    return sentencepiece(_texts())


@cache
def teacher() -> RecordTokenizer:
    return RecordTokenizer(sentencepiece_tiny(), "plain", "the tiny teacher")


@cache
def student() -> RecordTokenizer:
    return RecordTokenizer(byte_level_tiny(), "plain", "the tiny student")


def _texts() -> list[str]:
    return [text for row in questions(48) for text in (row["question"], row["answer"])] + ["Question: Answer: \n"]


def asked(question: str, answer: str, context: str | None = None, **more) -> Record:
    before = (Segment("context", context),) if context is not None else ()
    return Record("r", (*before, Segment("user", question), Segment("assistant", answer)), **more)


def tokens_of(cuts: list[int], answer_from: int, ids: list[int] | None = None, lead: int = 0, end: int | None = 0, bos: int | None = 0) -> Tokens:
    """Tokens of the content 0..cuts[-1], cut there; a template token before and the answer's end after it. `lead` is the first answer token's."""
    bounds = [0, *cuts]
    rows = [(bos, 0, 0, TEMPLATE, 0)] if bos is not None else []
    for n, (a, b) in enumerate(pairwise(bounds)):
        kind = ANSWER if b > answer_from else CONTENT
        rows.append((ids[n] if ids else n + 1, a, b, kind, lead if kind == ANSWER and a <= answer_from else 0))
    if end is not None:
        rows.append((end, bounds[-1], bounds[-1], END, 0))
    columns = zip(*rows, strict=True)
    return Tokens(*(np.array(column, dtype) for column, dtype in zip(columns, (np.int32, np.int32, np.int32, np.uint8, np.int64), strict=True)))


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def order(row: np.ndarray) -> list[int]:
    """The ids of a row by (value descending, id ascending)."""
    return sorted(range(len(row)), key=lambda id: (-row[id], id))


def log_sum(values: np.ndarray) -> float:
    values = np.asarray(values, np.float64)
    if not len(values) or values.max() == -np.inf:
        return -np.inf
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def kept_of(row: np.ndarray, threshold: float, least: int, most: int) -> list[int]:
    """The ids that are kept of a row of logits, ascending."""
    enough = int((np.exp(log_softmax(row)) >= threshold).sum()) if threshold > 0 else most
    return sorted(order(row)[: min(max(enough, least), most)])


def targets_of(logits: np.ndarray, tokens: Tokens, position: np.ndarray, keep: int, temperatures: list[float], threshold: float = 0.0, least: int = 1) -> Targets:
    """What the teacher's targets should be for logits [P, V], the rows of `position`: `keep` tokens each, or those from `threshold` on."""
    logprobs = log_softmax(logits)
    ids = [kept_of(row, threshold, least, keep) for row in logits]
    outside = [np.setdiff1d(np.arange(logits.shape[-1]), kept) for kept in ids]
    rests = [[log_sum(row[others] / t) for row, others in zip(logprobs, outside, strict=True)] for t in temperatures]
    return Targets(
        position=position,
        kept=np.array([len(kept) for kept in ids], np.uint16),
        ids=np.array([id for kept in ids for id in kept], np.int32),
        logprobs=np.array([row[id] for row, kept in zip(logprobs, ids, strict=True) for id in kept], np.float32),
        rests=np.array(rests, np.float32).reshape(len(temperatures), len(position)),
        realised_logprob=logprobs[np.arange(len(position)), tokens.ids[position + 1]].astype(np.float32),
        entropy=-(np.exp(logprobs) * np.where(np.isfinite(logprobs), logprobs, 0)).sum(-1).astype(np.float32),
    )
