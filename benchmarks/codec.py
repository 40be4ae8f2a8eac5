"""Size, fidelity and speed of ways to keep a teacher's word, side by side, on any local model and text, in one run.

    python benchmarks/codec.py MODEL_FOLDER TEXT.jsonl[.gz] [--field context] [--tokens 20000] [--length 256] [--json FILE]

Every layout is written to disk and read back before anything is computed from it. Sizes are of all positions, fidelity of
evenly spread ones. p is the teacher, q the student: the same model with noise on its weights. The gradient of the KL by the
student's logits at a temperature is q - p; from what a layout decodes to it is q - p'.

    error      root mean square norm of the gradients' difference, over that of the true gradient
    bias       norm of the mean difference over positions, over that of the mean gradient: what more positions do not take away
    rest       unkept tokens share the stored mass as the student does
    calibrated the same, times one ratio per token and temperature: the cache's mean tail over the student's at OTHER positions
"""

import argparse
import copy
import gzip
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.cache.reader import Decoded, decode, read_table
from pipeline.cache.schema import RANKS, Logits, hidden_schema, tail_schema
from pipeline.cache.writer import Shard
from pipeline.models.heads import RowLogits, row_logits, rows_that_are_tokens
from pipeline.models.loading import device_named, load_teacher
from pipeline.models.teacher import Tail, shared_out
from pipeline.models.tokenizers import load_tokenizer
from pipeline.signals.codec import decode_hidden, decode_rests
from pipeline.signals.records import Record, Tokens
from pipeline.signals.selection import Kept, concatenated, drawn, strongest
from pipeline.signals.tail import log_ratio, means_at
from pipeline.signals.targets import rest_at

TEMPERATURES = [1.0, 2.0, 4.0, 8.0]
STORED = [1.0, 2.0, 8.0]
OURS = {  # threshold, least, most
    "default (threshold 0.002)": (0.002, 4, 128),
    "small (threshold 0.005)": (0.005, 4, 128),
    "threshold 0.001": (0.001, 4, 128),
    "k = 32": (0.0, 32, 32),
    "k = 64": (0.0, 64, 64),
    "k = 128": (0.0, 128, 128),
}
DRAWS = 50
CHUNK = 64
"""Positions whose logits exist at once. Always so many: in bfloat16 a product's bits depend on its shape."""
BLOCK = 4
"""Positions that are compared at once, so that the many passes over them find them in the CPU's cache."""
STUDENT_KL = 0.55
NOTE = "(layout written here from its description)"


@dataclass(frozen=True)
class Word:
    """What a layout decodes to: kept tokens of N positions, flat, and the log mass of the others at a temperature."""

    kept: np.ndarray  # int64 [N]
    ids: np.ndarray  # int [sum of kept]
    logprobs: np.ndarray  # float32 [sum of kept] at temperature 1
    rest: Callable[[float], np.ndarray]  # float64 [N]


@dataclass(frozen=True)
class Row:
    """A line of the table: what files hold, and what is made of the unkept tokens."""

    name: str
    bytes: float  # a position
    word: Word | None  # None: hidden states
    tail: str  # dropped, rest, calibrated, even or hidden
    bytes_kept: float | None = None  # without realised_logprob and entropy
    log_means: np.ndarray | None = None  # [S, V] of the tail file
    speed: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class Widest:
    """The 128 strongest of every position, strongest first: what other tools' layouts are made from."""

    ids: np.ndarray  # int64 [N, 128]
    logprobs: np.ndarray  # float32 [N, 128]
    vocabulary_size: int

    @classmethod
    def of(cls, kept: Kept, vocabulary_size: int) -> "Widest":
        values, order = kept.logprobs.view(len(kept.kept), -1).sort(descending=True, stable=True)
        return cls(kept.ids.view(values.shape).gather(1, order).cpu().numpy(), values.cpu().numpy(), vocabulary_size)


# --- text, teacher, student ---


def pieces_of(path: Path, field: str, encode: Callable[[str], list[int]], bos: list[int], length: int, tokens: int) -> list[np.ndarray]:
    """Token ids, at most `length` a piece, until there are `tokens`; no piece goes over the end of a document."""
    pieces: list[np.ndarray] = []
    for text in _documents(path, field):
        ids = encode(text)
        pieces += [np.array([*bos, *ids[begin : begin + length - len(bos)]], np.int32) for begin in range(0, len(ids), length - len(bos))]
        if sum(map(len, pieces)) >= tokens:
            break
    return [piece for piece in pieces if len(piece) > 1]


def _documents(path: Path, field: str) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        if ".jsonl" not in path.suffixes:
            yield file.read()
            return
        for record in map(json.loads, file):
            yield record.get(field) or "\n".join(part for name in ("question", "answer") if (part := record.get(name)))


def hidden_states(model: RowLogits, pieces: list[np.ndarray]) -> Tensor:
    """[N, H] of every position that has a next token, piece after piece."""
    states = []
    width = max(map(len, pieces))
    device = next(model.parameters()).device
    for begin in range(0, len(pieces), 16):
        ids = np.stack([np.pad(piece, (0, width - len(piece))) for piece in pieces[begin : begin + 16]]).astype(np.int64)
        hidden = model.hidden(torch.from_numpy(ids).to(device)).unflatten(0, ids.shape)
        states += [row[: len(piece) - 1] for row, piece in zip(hidden, pieces[begin:], strict=False)]
    return torch.cat(states)


def logits_of(model: RowLogits, hidden: Tensor) -> Tensor:
    """[n, V] of at most CHUNK states, through a product of CHUNK rows."""
    padded = hidden.new_zeros((CHUNK, hidden.shape[1]))
    padded[: len(hidden)] = hidden
    return model.head(padded)[: len(hidden)]


def perturbed(teacher: RowLogits, pieces: list[np.ndarray], wanted: float) -> tuple[RowLogits, float]:
    """A student: the teacher with noise on every matrix in proportion to its spread, scaled to a mean KL on four pieces; and that KL."""
    student = RowLogits(copy.deepcopy(teacher.model), teacher.vocabulary_size)
    few = pieces[:: max(1, len(pieces) // 4)][:4]
    true = hidden_states(teacher, few)
    scale, kl = 0.08, 0.0
    for _ in range(6):
        draw = torch.Generator().manual_seed(0)
        for there, weight in zip(teacher.model.parameters(), student.model.parameters(), strict=True):
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=draw).to(weight.device).mul_(scale * there.float().std()).add_(there))
        kl = 0.0
        for p_state, q_state in zip(true.split(CHUNK), hidden_states(student, few).split(CHUNK), strict=True):
            p, q = (logits_of(*given).float().log_softmax(-1) for given in ((teacher, p_state), (student, q_state)))
            kl += float((p.exp() * (p - q)).sum()) / len(true)
        if abs(kl / wanted - 1) < 0.02:
            break
        scale *= (wanted / kl) ** 0.5  # while it is small the KL goes with its square
    return student, kl


# --- what our pipeline keeps ---


def capture(teacher: RowLogits, hidden: Tensor, realised: Tensor, vocabulary_size: int) -> tuple[dict[str, Kept], dict[str, np.ndarray]]:
    """With each setting, and the log means of each one's tail; logits of one chunk at a time."""
    kept: dict[str, list[Kept]] = {name: [] for name in (*OURS, "sampled")}
    tails = {name: Tail(STORED, teacher.vocabulary_size, hidden.device) for name in OURS}
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=0)).random((len(hidden), DRAWS)))
    for begin in range(0, len(hidden), CHUNK):
        here = slice(begin, begin + CHUNK)
        logits = logits_of(teacher, hidden[here])
        for name, setting in OURS.items():
            kept[name].append(strongest(logits, realised[here], *setting, STORED))
            tails[name].add(logits, kept[name][-1], STORED)
        kept["sampled"].append(drawn(logits, realised[here], uniform[here], STORED))
    means = {name: tail.log_means(vocabulary_size)[0] for name, tail in tails.items()}
    return {name: concatenated(parts) for name, parts in kept.items()}, means


def shard_of(folder: Path, name: str, kept: Kept, lengths: list[int], vocabulary_size: int, log_means: np.ndarray | None = None, hidden: Tensor | None = None) -> Shard:
    """As the pipeline would write it: a record a piece, but without its text and tokens."""
    none = np.zeros(0, np.int32)
    nothing = Tokens(none, none, none, none.astype(np.uint8), none.astype(np.int64))
    said = shared_out(kept, [np.arange(length, dtype=np.int32) for length in lengths], states=None if hidden is None else hidden.float().cpu().numpy())
    examples = [(Record(str(number), ()), nothing, targets) for number, targets in enumerate(said)]
    folder.mkdir(exist_ok=True)
    form = Logits.of("head" if name in OURS else "sampled", STORED, (0.02, 0.5), *OURS.get(name, (0.0, 0, DRAWS)), vocabulary_size)
    return Shard(folder, 0, examples, form, True, None if log_means is None else (log_means, sum(lengths)))


# --- layouts, on disk and back ---


def ours(name: str, shard: Shard, rounds: int) -> list[Row]:
    """Through the pipeline's writer and reader: a row for each way to treat the unkept tokens."""
    folder = shard.folder
    positions = sum(len(targets.position) for _, _, targets in shard.examples)
    speed = {"encode": timed(replace(shard, tail=None).write, positions, rounds)}
    shard.write()
    speed["decode"] = timed(lambda: csr(folder), positions, rounds)
    decoded = csr(folder)
    kept = decoded.kept.astype(np.int64)
    word = Word(kept, decoded.ids, decoded.logprobs, lambda temperature: rest_at(decoded.rests, STORED, shard.form.vocabulary_size - kept, temperature))
    size = sum((folder / f"{content}-00000.parquet").stat().st_size for content in ("logits", "ranks"))
    size_kept = size - sum(bytes_of_column(folder / "logits-00000.parquet", column) for column in ("realised_logprob", "entropy"))
    row = Row(name, size / positions, word, "rest", size_kept / positions, speed=speed)
    if shard.tail is None:
        return [replace(row, name=f"RS-KD, {DRAWS} draws (our method sampled)", tail="dropped")]
    means = np.stack([decode_rests(column.to_numpy()) for column in read_table(folder / "tail-00000.parquet", tail_schema(STORED)).columns])
    return [replace(row, name=f"{name}, rest"), replace(row, name=f"{name}, calibrated", tail="calibrated", log_means=means.astype(np.float64))]


def csr(folder: Path) -> Decoded:
    """All of a logits file, from Parquet to numpy, on one thread."""
    order = np.cumsum(read_table(folder / "ranks-00000.parquet", RANKS)["id_gap"].to_numpy()).astype(np.int32)
    with pq.ParquetFile(folder / "logits-00000.parquet", page_checksum_verification=True) as file:
        form = Logits.from_metadata({key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}, file.schema_arrow.names)
        return decode(file.read(use_threads=False), form, order)


def hidden_int8(shard: Shard, head: Tensor) -> tuple[Row, Tensor]:
    """The last hidden states as they are read back; the head's weights are kept once, as they are."""
    shard.write()
    file = shard.folder / "hidden-00000.parquet"
    table = read_table(file, hidden_schema(head.shape[1]))
    states = np.frombuffer(b"".join(table["state"].combine_chunks().flatten().to_pylist()), np.int8).reshape(-1, head.shape[1])
    hidden = decode_hidden(states, table["scale"].combine_chunks().flatten().to_numpy())
    row = Row(f"hidden states int8 (and the head once, {head.nbytes / 1e6:.0f} MB)", file.stat().st_size / len(hidden), None, "hidden")
    return row, torch.from_numpy(hidden).to(head)


def plain_top_k(k: int, folder: Path, widest: Widest) -> Row:
    """int32 ids and float16 log-probabilities; what is not kept is forgotten."""
    size, ids, logprobs = through_parquet(folder / f"plain-{k}.parquet", "zstd", widest.ids[:, :k].astype(np.int32), widest.logprobs[:, :k].astype(np.float16))
    return Row(f"plain top-k float16, k = {k}, tail dropped", size, _fixed(ids, logprobs), "dropped")


def distillkit(name: str, k: int, exact: int, powers: list[float], solve: Callable[[np.ndarray], np.ndarray], folder: Path, widest: Widest) -> list[Row]:
    """DistillKit's logprob_compressor: `exact` bfloat16 log-probabilities, float32 coefficients of a least-squares fit to the
    others by rank, bit-packed ids, strongest first; Parquet with snappy, as its writer has it. Neither of its README's
    settings has residual bins.

    Three readings of the same bytes, by its name for them: unkept tokens forgotten (`zero`, its default); one outcome of
    mass (1 - sum)^(1 / temperature) beside the kept ones, shared out as the student does (`symmetric_uniform` in its KL);
    the missing mass spread evenly, then tempered (`symmetric_uniform` in its dense losses).
    """
    bits = int(np.ceil(np.log2(widest.vocabulary_size)))
    basis = np.stack([np.arange(k - exact) ** power for power in powers], 1)
    head = torch.from_numpy(widest.logprobs[:, :exact]).bfloat16().view(torch.int16).numpy()
    coefficients = (widest.logprobs[:, exact:k].astype(np.float64) @ solve(basis).T).astype(np.float32)
    bits_of_ids = np.unpackbits(widest.ids[:, :k].astype(">u4").view(np.uint8).reshape(-1, k, 4), axis=-1)[..., 32 - bits :]
    columns = np.concatenate([head.view(np.uint8), coefficients.view(np.uint8)], 1), np.packbits(bits_of_ids.reshape(-1, k * bits), axis=-1)
    zstd, *_ = through_parquet(folder / f"distillkit-{k}.parquet", "zstd", *columns)
    size, stored, packed = through_parquet(folder / f"distillkit-{k}.parquet", "snappy", *columns)

    ids = np.unpackbits(packed, axis=-1, count=k * bits).reshape(-1, k, bits).astype(np.int64) @ (1 << np.arange(bits)[::-1])
    head, coefficients = stored[:, : 2 * exact].copy().view(np.int16), stored[:, 2 * exact :].copy().view(np.float32)
    logprobs = np.concatenate([torch.from_numpy(head).view(torch.bfloat16).float().numpy(), coefficients.astype(np.float64) @ basis.T], 1)
    name = f"DistillKit {name} ({zstd:.0f} B with zstd)"
    word, unkept = _fixed(ids, logprobs), np.log(widest.vocabulary_size - k)
    with np.errstate(divide="ignore"):
        missing = np.log(np.clip(1 - np.exp(logprobs).sum(1), 0, 1))
    return [
        Row(f"{name}, tail dropped {NOTE}", size, word, "dropped"),
        Row(f"{name}, rest as in its KL {NOTE}", size, replace(word, rest=lambda t: missing / t), "rest"),
        Row(f"{name}, tail spread evenly {NOTE}", size, replace(word, rest=lambda t: unkept + (missing - unkept) / t), "even"),
    ]


def inverse_in_float32(basis: np.ndarray) -> np.ndarray:
    """As DistillKit solves its fit: torch's SVD in float32. Powers of 0 to 111 up to the fourth are too far apart for it."""
    u, s, v = torch.linalg.svd(torch.from_numpy(basis).float(), full_matrices=False)
    return (v.T / s @ u.T).numpy()


def megatron(folder: Path, widest: Widest) -> Row:
    """Megatron-LM's offline logits: 64 times float16, 16 bits of the id and a byte, zstd; what is not kept is forgotten.

    Its own files end at 131,072 tokens; here the byte has two bits of the id where they are needed.
    """
    ids = widest.ids[:, :64]
    raw: list[np.ndarray] = [widest.logprobs[:, :64].astype(np.float16), (ids & 0xFFFF).astype(np.uint16), (ids >> 16).astype(np.uint8)]
    file = folder / "megatron.zst"
    with pa.CompressedOutputStream(pa.OSFile(str(file), "wb"), "zstd") as out:
        for values in raw:
            out.write(values.tobytes())
    with pa.CompressedInputStream(pa.OSFile(str(file), "rb"), "zstd") as stream:
        logprobs, low, high = (np.frombuffer(stream.read(values.nbytes), values.dtype).reshape(values.shape) for values in raw)
    return Row(f"Megatron-LM, k = 64, tail dropped {NOTE}", file.stat().st_size / len(ids), _fixed(low.astype(np.int64) | high.astype(np.int64) << 16, logprobs), "dropped")


def through_parquet(file: Path, compression: str, *columns: np.ndarray) -> list:
    """Bytes a position, and what is read back: [N, any] each, with pyarrow's own choices but for the compression."""
    names = [str(i) for i in range(len(columns))]
    pq.write_table(pa.table([pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1]) for values in columns], names), file, compression=compression)
    table = pq.read_table(file)
    return [file.stat().st_size / len(table), *(table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1) for name in names)]


def bytes_of_column(path: Path, name: str) -> int:
    about = pq.read_metadata(path)
    columns = [about.row_group(group).column(i) for group in range(about.num_row_groups) for i in range(about.num_columns)]
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.split(".")[0] == name)


def _fixed(ids: np.ndarray, logprobs: np.ndarray) -> Word:
    nothing = np.full(len(ids), -np.inf)
    return Word(np.full(len(ids), ids.shape[1]), ids.ravel(), logprobs.astype(np.float32).ravel(), lambda temperature: nothing)


def timed(work: Callable[[], object], positions: int, rounds: int) -> list[float]:
    """Positions/s: the lowest, the median and the highest of the rounds, after one that does not count."""
    speeds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        speeds.append(positions / (time.perf_counter() - started))
    return [min(speeds[1:]), statistics.median(speeds[1:]), max(speeds[1:])]


# --- fidelity ---


@dataclass(frozen=True)
class Measured:
    """Of n positions. The first axis of all but true_square is the table's rows."""

    true_square: np.ndarray  # [tau, n] squared norm of the true gradient
    square: np.ndarray  # [row, tau, n] the same of what the row's gradient differs by
    bias: np.ndarray  # [row, tau]
    kl: np.ndarray  # [row] at temperature 1
    variation: np.ndarray  # [row] total variation at temperature 1

    def error(self, row: int, part: slice = slice(None)) -> np.ndarray:
        """[tau] over some of the positions."""
        return np.sqrt(self.square[row][:, part].mean(1) / self.true_square[:, part].mean(1))


class Comparison:
    """Teacher, student and every row's reconstruction at chosen positions, a few at a time."""

    def __init__(self, rows: list[Row], teacher: RowLogits, student: RowLogits, states: tuple[Tensor, Tensor, Tensor]) -> None:
        """states: [N, H] of the teacher, of the student, and of the teacher as kept in int8."""
        self._rows, self._models, self._states = rows, (teacher, student, teacher), states
        self._vocabulary_size, self._device = teacher.vocabulary_size, states[0].device
        self._rests = [[row.word.rest(temperature) for temperature in TEMPERATURES] if row.word else [] for row in rows]
        self._begins = [np.cumsum(row.word.kept) - row.word.kept if row.word else np.zeros(0) for row in rows]

    def log_ratios(self, positions: np.ndarray) -> dict[tuple[int, int], Tensor]:
        """float32 [V] for every calibrated row and temperature: its cache's tail means against the student's at these positions."""
        sums = {
            (i, t): torch.zeros(self._vocabulary_size, device=self._device)
            for i, row in enumerate(self._rows)
            if row.log_means is not None and row.tail == "calibrated"
            for t in range(len(TEMPERATURES))
        }
        for where, _, student, _ in self._blocks(positions):
            for t, temperature in enumerate(TEMPERATURES):
                q = torch.softmax(student / temperature, -1)
                for i in [i for i, at in sums if at == t]:
                    kept, _, rest = self._said(i, t, where)
                    tail = q.index_put(kept, q.new_zeros(()))
                    sums[i, t].addmv_(tail.T, rest / tail.sum(-1))
        result = {}
        for (i, t), total in sums.items():
            means = means_at(self._rows[i].log_means, STORED, TEMPERATURES[t])[: self._vocabulary_size]  # type: ignore[arg-type]
            result[i, t] = log_ratio(torch.from_numpy(np.exp(means)).to(total), total / len(positions))
        return result

    def measure(self, positions: np.ndarray, log_ratios: dict[tuple[int, int], Tensor]) -> Measured:
        rows, taus = len(self._rows), len(TEMPERATURES)
        true_square, square = np.zeros((taus, len(positions))), np.zeros((rows, taus, len(positions)))
        kl, variation = np.zeros(rows), np.zeros(rows)
        true_sum, sums = (torch.zeros((*shape, taus, self._vocabulary_size), device=self._device) for shape in ((), (rows,)))
        for block, (where, *logits) in enumerate(self._blocks(positions)):
            here = slice(block * BLOCK, block * BLOCK + len(where))  # CHUNK is a multiple of BLOCK
            guess, difference = torch.empty_like(logits[0]), torch.empty_like(logits[0])
            for t, temperature in enumerate(TEMPERATURES):
                p, q, exact = (torch.softmax(values / temperature, -1) for values in logits)
                torch.sub(q, p, out=difference)
                true_square[t, here] = torch.linalg.vector_norm(difference, dim=-1).square().cpu()
                true_sum[t] += difference.sum(0)
                for i, row in enumerate(self._rows):
                    if row.tail == "hidden":
                        guess.copy_(exact)
                    else:
                        self._reconstruct(guess, i, t, where, q, log_ratios)
                    torch.sub(p, guess, out=difference)
                    square[i, t, here] = torch.linalg.vector_norm(difference, dim=-1).square().cpu()
                    sums[i, t] += difference.sum(0)
                    if t == 0:
                        variation[i] += float(difference.abs_().sum()) / 2
                        # where p is 0 it counts nothing, whatever it is divided by
                        kl[i] += torch.inf if row.tail == "dropped" else float(torch.div(p, guess, out=difference).log_().mul_(p).nan_to_num_(0.0, 0.0, 0.0).sum())
        bias = (sums.norm(dim=-1) / true_sum.norm(dim=-1)).cpu().numpy()
        return Measured(true_square, square, bias, kl / len(positions), variation / len(positions))

    def _reconstruct(self, out: Tensor, i: int, t: int, where: np.ndarray, q: Tensor, log_ratios: dict[tuple[int, int], Tensor]) -> None:
        kept, probs, rest = self._said(i, t, where)
        tail = self._rows[i].tail
        if tail == "calibrated":
            torch.mul(q, log_ratios[i, t].exp(), out=out)
        elif tail == "rest":
            out.copy_(q)
        else:
            out.fill_(tail == "even")
        out.index_put_(kept, out.new_zeros(()))
        out *= (rest / out.sum(-1).clamp(min=1e-30))[:, None]
        out.index_put_(kept, probs)

    def _said(self, i: int, t: int, where: np.ndarray) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Which entries of [n, V] a row knows at some positions, their probabilities at a temperature, and the mass of the others."""
        word = self._rows[i].word
        assert word is not None
        counts = word.kept[where]
        owner = np.repeat(np.arange(len(where)), counts)
        flat = np.arange(len(owner)) + (self._begins[i][where] - (np.cumsum(counts) - counts))[owner]
        mass, rest = np.exp(word.logprobs[flat].astype(np.float64) / TEMPERATURES[t]), np.exp(self._rests[i][t][where])
        total = np.bincount(owner, mass, len(where)) + rest
        at_row, ids, probs, others = (torch.from_numpy(values).to(self._device) for values in (owner, word.ids[flat].astype(np.int64), mass / total[owner], rest / total))
        return (at_row, ids), probs.float(), others.float()

    def _blocks(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
        """Positions with the float32 logits of teacher, student and kept hidden states."""
        for begin in range(0, len(positions), CHUNK):
            where = positions[begin : begin + CHUNK]
            logits = [logits_of(model, states[torch.from_numpy(where)]) for model, states in zip(self._models, self._states, strict=True)]
            for block in range(0, len(where), BLOCK):
                here = slice(block, block + BLOCK)
                yield where[here], logits[0][here].float(), logits[1][here].float(), logits[2][here].float()


# --- what is printed ---


def markdown(titles: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---", *["---:"] * (len(titles) - 1)], *lines))


def at_each(name: str) -> list[str]:
    return [f"{name} tau {temperature:g}" for temperature in TEMPERATURES]


def table(rows: list[Row], measured: Measured) -> str:
    lines = []
    for i, row in enumerate(rows):
        sizes = [f"{row.word.kept.mean():.1f}" if row.word else "–", f"{row.bytes:.1f}", f"{row.bytes_kept:.1f}" if row.bytes_kept else "–"]
        fidelity = [f"{value:.3g}" for value in (*measured.error(i), *measured.bias[i])]
        divergences = [f"{measured.variation[i]:.4f}", f"{measured.kl[i]:.4f}" if np.isfinite(measured.kl[i]) else "∞"]
        lines.append([row.name, *sizes, *fidelity, *divergences, *(f"{row.speed[way][1]:,.0f}" if row.speed else "–" for way in ("encode", "decode"))])
    titles = ["layout", "kept", "B/position", "B kept + tails", *at_each("error"), *at_each("bias"), "TV tau 1", "KL tau 1", "encode/s", "decode/s"]
    return markdown(titles, lines)


def ratios(rows: list[Row], measured: Measured) -> str:
    """DistillKit's recommended setting over ours, calibrated: bytes and errors, with the extremes of five parts of the positions."""
    parts = [slice(*bounds) for bounds in pairwise(np.linspace(0, measured.square.shape[2], 6).astype(int).tolist())]
    lines = []
    for j, theirs in enumerate(rows):
        for i, mine in enumerate(rows):
            if theirs.name.startswith("DistillKit recommended") and mine.tail == "calibrated" and mine.name.startswith(("default", "small")):
                whole, *each = (measured.error(j, part) / measured.error(i, part) for part in (slice(None), *parts))
                errors = [f"{ratio:.3g} ({low:.3g}–{high:.3g})" for ratio, low, high in zip(whole, np.min(each, 0), np.max(each, 0), strict=True)]
                lines.append([f"{theirs.name.removesuffix(NOTE)}/ {mine.name}", f"{theirs.bytes / mine.bytes:.2f}", *errors])
    return markdown(["theirs / ours", "bytes", *at_each("error")], lines)


def figures(row: Row, i: int, measured: Measured) -> dict[str, object]:
    kl = measured.kl[i] if np.isfinite(measured.kl[i]) else None
    fidelity = {"error": measured.error(i).tolist(), "bias": measured.bias[i].tolist(), "total_variation": measured.variation[i], "kl": kl}
    return {"layout": row.name, "kept": row.word and row.word.kept.mean(), "bytes": row.bytes, "bytes_kept_and_tails": row.bytes_kept, **fidelity, "speed": row.speed}


def machine() -> str:
    about = Path("/proc/cpuinfo")
    named = [line.split(":", 1)[1].strip() for line in about.read_text().splitlines() if line.startswith("model name")] if about.exists() else []
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "pyarrow", "numpy", "transformers"))
    return f"{named[0] if named else platform.processor()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help=".jsonl or .txt, or either as .gz")
    parser.add_argument("--field", default="context", help="of a record; question and answer where it is empty")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--length", type=int, default=256, help="tokens of a piece at most")
    parser.add_argument("--fidelity", type=int, default=2000, help="positions that are compared; as many others calibrate")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    started = time.monotonic()

    tokenizer = load_tokenizer(str(given.model), None, "plain", given.model.name)
    model = load_teacher(str(given.model), None, "none", True, "bfloat16", device_named("auto"))
    teacher = row_logits(model, given.model.name, rows_that_are_tokens(model, given.model.name, tokenizer.vocabulary))
    size = len(tokenizer.vocabulary)
    bos = [id for id in (tokenizer.tokenizer.bos_token_id,) if id in tokenizer.tokenizer("").input_ids]
    pieces = pieces_of(given.text, given.field, lambda text: tokenizer.encode([text])[0], bos, given.length, given.tokens)
    lengths = [len(piece) - 1 for piece in pieces]
    realised = torch.from_numpy(np.concatenate([piece[1:] for piece in pieces]).astype(np.int64)).to(model.device)

    with torch.inference_mode(), tempfile.TemporaryDirectory() as temporary:
        hidden = hidden_states(teacher, pieces)
        kept, log_means = capture(teacher, hidden, realised, size)
        folder, threads = Path(temporary), torch.get_num_threads()
        torch.set_num_threads(1)
        pa.set_cpu_count(1)
        rows = [row for name in kept for row in ours(name, shard_of(folder / name, name, kept[name], lengths, size, log_means.get(name)), given.rounds)]
        torch.set_num_threads(threads)
        widest = Widest.of(kept["k = 128"], size)
        rows += [plain_top_k(k, folder, widest) for k in (64, 128)]
        recommended, budget = (128, 16, [0, 1, 2, 3, 4, 0.5]), (50, 1, [0, 1, 0.5])
        rows += distillkit("recommended, k = 128", *recommended, inverse_in_float32, folder, widest)
        rows += distillkit("recommended, k = 128, fit better than its own (float64)", *recommended, np.linalg.pinv, folder, widest)
        rows += distillkit("budget, k = 50", *budget, inverse_in_float32, folder, widest)
        rows.append(megatron(folder, widest))
        row, kept_states = hidden_int8(shard_of(folder, "k = 32", kept["k = 32"], lengths, size, hidden=hidden), model.get_output_embeddings().weight)
        rows.append(row)

        student, kl = perturbed(teacher, pieces, STUDENT_KL)
        comparison = Comparison(rows, teacher, student, (hidden, hidden_states(student, pieces), kept_states))
        chosen = np.unique(np.linspace(0, len(hidden) - 1, min(2 * given.fidelity, len(hidden))).astype(int))
        measured = comparison.measure(chosen[::2], comparison.log_ratios(chosen[1::2]))

    about = (
        f"{given.model.name}, {size:,} tokens; {given.text.name}: {len(hidden):,} positions in {len(pieces)} pieces; fidelity of {len(chosen[::2]):,} of them, the student's tail "
        f"means from {len(chosen[1::2]):,} others. Student: KL(p || q) = {kl:.3f} nats. {machine()}; speeds on one thread, median of {given.rounds} rounds. Bytes are with the ranks file; "
        f"the cache's tail means, for `calibrated`, come on top: {size * 2 * len(STORED) / 1e6:.1f} MB raw for each of 16 shards at most. {time.monotonic() - started:.0f} s in all."
    )
    print(about, table(rows, measured), ratios(rows, measured), sep="\n\n")
    if given.json:
        found = {"about": about, "temperatures": TEMPERATURES, "rows": [figures(row, i, measured) for i, row in enumerate(rows)]}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
