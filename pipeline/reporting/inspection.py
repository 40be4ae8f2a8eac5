"""What is in a finished folder, in numbers, in text, and whether all of it can be decoded and be true."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.bar import Bar
from rich.console import Console, RenderableType
from rich.table import Table
from safetensors import SafetensorError, safe_open

from pipeline.cache.digest import rows_digest
from pipeline.cache.reader import Cache, Decoded, Example, decode, decode_attention, read_rows, read_table, record_of
from pipeline.cache.schema import PREPARED, RANKS, RECORDS, SHARD_FILES, Logits, attention_schema, hidden_schema, rest_column, tail_schema
from pipeline.errors import DamageError, InputError
from pipeline.files import read_json
from pipeline.running.folder import FinishedFolder, left_behind
from pipeline.signals.attention import decode_weight_rests, heads_of, weight_error
from pipeline.signals.codec import CODES, NO_REST, REST_STEP, decode_rests
from pipeline.signals.records import ANSWER
from pipeline.signals.vocabulary import first_byte_classes

MASS_BINS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
ROUNDING = 1e-4
"""By which float32 sums may miss what they must be, beside what the codec's error adds up to."""
TAIL_ERROR = 0.06
"""By which the tail marginals' sum may differ from the rests' mean, as a share: both are in steps of 0.05 nats, and codes enter at other temperatures."""
SPREADS = 6
"""The marginals are of a part of a shard's positions: so many standard errors their mean may be off."""


# ---- what is in it ---------------------------------------------------------------------------------------------------


def cache(folder: Path) -> dict[str, Any]:
    """A cache's totals, read row group by row group.

    bytes_per_position is over the logits and ranks files, and so is what `columns` adds up to; bytes_per_token is over those that every shard has.
    The vocabulary and the head, once a cache, are in neither.
    """
    finished = _finished_cache(folder)
    about = Cache(finished.file).about
    kept_counts = np.zeros(1 << 16, dtype=np.int64)
    bins = np.zeros(len(MASS_BINS) - 1, dtype=np.int64)
    mass, entropy = 0.0, 0.0
    columns: Counter[str] = Counter()
    form = None
    for name in finished.names("logits-"):
        with pq.ParquetFile(finished.file(name), page_checksum_verification=True) as file:
            form = form_of(file)
            columns.update(column_bytes(file.metadata))
            columns["file footers"] += finished.size(name)
            for group in range(file.num_row_groups):
                table = read_rows(file, group, ["kept", "logprob_code", "rest_1", "entropy"])
                kept = flat(table["kept"])
                shares = _kept_shares(form, kept, flat(table["logprob_code"]), flat(table["rest_1"]))
                kept_counts += np.bincount(kept, minlength=len(kept_counts))
                bins += np.histogram(np.minimum(shares, 1.0), MASS_BINS)[0]
                mass += float(shares.sum())
                entropy += float(flat(table["entropy"]).astype(np.float64).sum())
    columns["file footers"] -= sum(columns.values()) - columns["file footers"]
    columns["ranks (a file a shard)"] = finished.size("ranks-")
    positions, tokens = int(kept_counts.sum()), finished.summary["tokens"]
    n = max(positions, 1)
    files = {kind.rstrip("-"): finished.size(kind) for kind in (*SHARD_FILES, "tail-", "attention-")}
    files["once a cache"] = finished.size() - sum(files.values())
    total = max(sum(columns.values()), 1)
    return {
        "teacher": finished.summary["teacher"],
        "method": about["method"],
        "records": finished.summary["records"],
        "tokens": tokens,
        "positions": positions,
        "shards": len(about["shards"]),
        "bytes_per_position": round(total / n, 2) if positions else 0.0,
        "bytes_per_token": round(finished.size(SHARD_FILES) / max(tokens, 1), 2),
        "mean_kept": round(float(kept_counts @ np.arange(len(kept_counts))) / n, 2),
        "mean_kept_mass": round(mass / n, 4),
        "mean_entropy": round(entropy / n, 4),
        "kept": _distribution(kept_counts, form),
        "kept_mass": [{"from": low, "to": high, "positions": int(count), "share": round(count / n, 4)} for (low, high), count in zip(pairwise(MASS_BINS), bins, strict=True)],
        "columns": [{"column": name, "bytes": size, "per_position": round(size / n, 3), "share": round(size / total, 4)} for name, size in columns.most_common()],
        "files": [{"files": kind, "bytes": size, "per_position": round(size / n, 3)} for kind, size in files.items()],
        "attention": _attention(finished, about, n),
    }


def _attention(finished: FinishedFolder, about: dict[str, Any], positions: int) -> dict[str, Any] | None:
    """By layer: how many keys a row has on the average, how much weight they keep, and their bytes a position. None: there is none here."""
    names = finished.names("attention-")
    if not names or left_behind(finished.path, names):
        return None
    layers = about["attention"]["layers"]
    keys, rows, sizes = Counter[int](), Counter[int](), Counter[str]()
    rests = dict.fromkeys(layers, 0.0)
    for name in names:
        with pq.ParquetFile(finished.file(name), page_checksum_verification=True) as file:
            sizes.update(column_bytes(file.metadata))
            for group in range(file.num_row_groups):
                for layer in layers:
                    table = read_rows(file, group, [f"kept_{layer}", f"rest_{layer}"])
                    kept, rest = (flat(column) for column in table.columns)
                    keys[layer] += int(kept.sum(dtype=np.int64))
                    rests[layer] += float(decode_weight_rests(rest).sum(dtype=np.float64))
                    rows[layer] += len(kept)
    return {
        "heads": about["attention"]["heads"],
        "layers": [
            {
                "layer": layer,
                "mean_keys": round(keys[layer] / max(rows[layer], 1), 2),
                "mean_kept_weight": round(1 - rests[layer] / max(rows[layer], 1), 4),
                "per_position": round(sum(size for name, size in sizes.items() if name.rpartition("_")[2] == str(layer)) / positions, 2),
            }
            for layer in layers
        ],
    }


def _distribution(counts: np.ndarray, form: Logits | None) -> dict[str, Any]:
    """Of the number of kept tokens, from how many positions have each. A share's value is the lowest that so many positions do not exceed."""
    there = np.flatnonzero(counts)
    if not len(there) or form is None:
        return {}
    ends = np.cumsum(counts)
    median, most_positions = (int(np.searchsorted(ends, share * ends[-1])) for share in (0.5, 0.9))
    return {
        "min": int(there[0]),
        "median": median,
        "mean": round(float(counts @ np.arange(len(counts))) / int(ends[-1]), 2),
        "p90": most_positions,
        "max": int(there[-1]),
        "setting_min": form.least,
        "setting_keep": form.most,
        "at_min": int(counts[form.least]),
        "at_keep": int(counts[form.most]),
    }


def _kept_shares(form: Logits, kept: np.ndarray, codes: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """float64 [N]: the mass of the kept tokens at temperature 1, of a position's whole mass."""
    mass = _summed(np.exp(form.table)[codes], kept)
    return mass / (mass + np.exp(decode_rests(rest).astype(np.float64)))


def column_bytes(metadata: pq.FileMetaData) -> Counter[str]:
    """Compressed bytes of each column of a file; the columns of the boundary classes together."""
    sizes: Counter[str] = Counter()
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for i in range(row_group.num_columns):
            name = row_group.column(i).path_in_schema.removesuffix(".list.element")
            sizes["boundary_*" if name.startswith("boundary_") else name] += row_group.column(i).total_compressed_size
    return sizes


def as_text(values: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())


def cache_as_text(shown: dict[str, Any]) -> str:
    """What `cache` gives, for people: totals, kept tokens, kept mass and bytes with bars."""
    plain = {key: value for key, value in shown.items() if not isinstance(value, dict | list)}
    plain["bytes_per_position"] = f"{plain['bytes_per_position']} (logits and ranks files)"
    plain["bytes_per_token"] = f"{plain['bytes_per_token']} (records, logits, ranks and hidden files)"
    parts: list[RenderableType] = [as_text(plain)]
    kept, n = shown["kept"], max(shown["positions"], 1)
    if kept:
        parts.append("\nkept tokens a position")
        parts.append("  " + "   ".join(f"{name} {kept[key]}" for name, key in (("min", "min"), ("median", "median"), ("mean", "mean"), ("90 %", "p90"), ("max", "max"))))
        hits = [(name, kept[f"at_{name}"]) for name in ("min", "keep") if kept[f"setting_{name}"]]
        parts += [f"  at `{name}` ({kept[f'setting_{name}']}): {count:,} positions, {count / n:.1%}" for name, count in hits]
    bars = _bars("kept mass", "positions", "share")
    for row in shown["kept_mass"]:
        bars.add_row(f"{row['from']:g} to {row['to']:g}", f"{row['positions']:,}", f"{row['share']:.1%}", Bar(1, 0, row["share"], width=30))
    parts += ["", bars]
    if shown["method"] == "sampled":
        parts.append("(drawn tokens stand for the whole distribution: their mass is 1 by definition)")
    bars = _bars("column (logits, ranks)", "bytes", "a position", "share")
    for row in shown["columns"]:
        bars.add_row(row["column"], f"{row['bytes']:,}", f"{row['per_position']:.2f}", f"{row['share']:.1%}", Bar(1, 0, row["share"], width=30))
    parts += ["", bars]
    files = _bars("files", "bytes", "a position")
    for row in shown["files"]:
        if row["bytes"]:
            files.add_row(row["files"], f"{row['bytes']:,}", f"{row['per_position']:.2f}", "")
    parts += ["", files]
    if shown["attention"]:
        table = _bars("attention layer", "keys a row", "bytes a position", "kept weight")
        for row in shown["attention"]["layers"]:
            table.add_row(str(row["layer"]), f"{row['mean_keys']:.1f}", f"{row['per_position']:.1f}", f"{row['mean_kept_weight']:.1%}", Bar(1, 0, row["mean_kept_weight"], width=30))
        parts += ["", table]
    return _printed(parts)


def _bars(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(titles[0])
    for title in titles[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    return table


def _printed(parts: list[RenderableType]) -> str:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))


# ---- one record ------------------------------------------------------------------------------------------------------


def record(folder: Path, id: str) -> dict[str, Any]:
    """One record's targets, each position's strongest token first. `position` t is the index of the token whose NEXT token is described; natural logs at temperature 1."""
    _, example = find(folder, id)
    targets, ids = example.targets, example.tokens.ids
    ends = np.cumsum(targets.kept.astype(np.int64))
    rows = []
    for i, (position, end) in enumerate(zip(targets.position.tolist(), ends.tolist(), strict=True)):
        here = slice(end - int(targets.kept[i]), end)
        order = np.lexsort((targets.ids[here], -targets.logprobs[here]))
        rows.append(
            {
                "position": position,
                "realised_id": int(ids[position + 1]),
                "realised_logprob": float(targets.realised_logprob[i]),
                "kept_ids": targets.ids[here][order].tolist(),
                "kept_logprobs": [float(value) for value in targets.logprobs[here][order]],
                "rest_logprob": float(targets.rests[0, i]) if np.isfinite(targets.rests[0, i]) else None,  # null: nothing is left
            }
        )
    return {"id": id, "token_ids": ids.tolist(), "positions": rows}


def record_as_text(folder: Path, id: str, strongest: int = 5) -> str:
    """One line a position: what has been read, what follows, and the tokens that the teacher holds most likely."""
    reader, example = find(folder, id)
    token_bytes = reader.vocabulary().token_bytes

    def shown(token: int) -> str:
        return repr(token_bytes[token].decode(errors="backslashreplace")) if token_bytes[token] else f"<{token}>"

    lines = [f"{id}: {len(example.tokens)} tokens, {len(example.targets.position)} positions"]
    for row in record(folder, id)["positions"]:
        words = ", ".join(f"{shown(token)} {np.exp(logprob):.3f}" for token, logprob in list(zip(row["kept_ids"], row["kept_logprobs"], strict=True))[:strongest])
        rest = 0.0 if row["rest_logprob"] is None else np.exp(row["rest_logprob"])
        lines.append(f"{row['position']:>5} -> {shown(row['realised_id'])} {np.exp(row['realised_logprob']):.3f} | {words} | others {rest:.3f}")
    return "\n".join(lines)


def find(folder: Path, id: str, extras: tuple[str, ...] = ()) -> tuple[Cache, Example]:
    """The cache, and the record of that id in it; InputError if there is none."""
    reader = Cache(_finished_cache(folder).file, extras)
    for split in ("train", "heldout"):
        for example in reader.examples(split):
            if example.record.id == id:
                return reader, example
    some = [example.record.id for _, example in zip(range(3), reader.examples("train"), strict=False)]
    raise InputError(f"There is no record '{id}' in {folder}. There are, among others: {', '.join(some)}.")


def _finished_cache(folder: Path) -> FinishedFolder:
    finished = FinishedFolder(folder)
    if finished.manifest["stage"] != "cache-teacher":
        raise InputError(f"{folder} is a folder of {finished.manifest['stage']}, not a cache. Give the folder of a finished cache-teacher.")
    return finished


# ---- whether it can be true ------------------------------------------------------------------------------------------


def undecodable(folder: Path) -> dict[str, str]:
    """File -> what is wrong with it, for files whose bytes are what was written but whose content is not what it must be."""
    finished = FinishedFolder(folder)
    wrong: dict[str, str] = {}
    for name in sorted(set(finished.names()) - left_behind(folder, finished.names())):
        try:
            if name.endswith(".parquet"):
                with pq.ParquetFile(folder / name, page_checksum_verification=True) as file:
                    for group in range(file.num_row_groups):
                        read_rows(file, group).validate(full=True)
            elif name.endswith(".json"):
                read_json(folder / name)
            elif name.endswith(".safetensors"):
                with safe_open(folder / name, "np") as tensors:
                    tensors.keys()
        except (pa.ArrowException, DamageError, SafetensorError, OSError, ValueError) as error:
            wrong[name] = f"cannot be decoded: {error}"
    if finished.manifest["stage"] == "cache-teacher" and not wrong:
        try:
            reader = Cache(finished.file)
            vocabulary = reader.vocabulary()
        except DamageError as error:
            return {"cache.json": str(error)}
        classes = read_table(folder / "vocabulary.parquet", pq.read_schema(folder / "vocabulary.parquet"))["first_byte_class"].to_numpy()
        if len(vocabulary) != reader.about["vocabulary_size"] or vocabulary.digest() != reader.about["vocabulary"] or not np.array_equal(classes, first_byte_classes(vocabulary)):
            wrong["vocabulary.parquet"] = "is not the vocabulary that cache.json names"
        for number in range(len(reader.about["shards"])):
            shard = _Shard(finished, reader, number)
            try:
                for name, problem in shard.problems():
                    wrong.setdefault(name, problem)
            except DamageError as error:
                wrong.setdefault(shard.at_hand, str(error))
    return wrong


def other_rows(folder: Path) -> dict[str, str]:
    """File -> what is wrong with it, for files whose rows are not those of the digest that was written with them."""
    finished = FinishedFolder(folder)
    wrong = {}
    absent = left_behind(folder, finished.names())
    for name, entry in finished.manifest["files"].items():
        if "rows_digest" in entry and name not in absent:
            table = pq.read_table(finished.file(name), page_checksum_verification=True)
            if (len(table), rows_digest(table)) != (entry["rows"], entry["rows_digest"]):
                wrong[name] = "does not have the rows that its digest is of"
    return wrong


class _Shard:
    """Looks for what cannot be true of a shard's files. `at_hand` is the file that is being read."""

    def __init__(self, finished: FinishedFolder, reader: Cache, number: int) -> None:
        self._finished = finished
        self._about = reader.about
        self._told = reader.about["shards"][number]
        self._vocabulary_size = int(reader.about["vocabulary_size"])
        self._temperatures = reader.temperatures
        self._number = number
        self.at_hand = ""

    def problems(self) -> Iterator[tuple[str, str]]:
        """File, and what is wrong with it as the end of a sentence."""
        order = np.cumsum(self._read("ranks", RANKS)["id_gap"].to_numpy(), dtype=np.int64)
        if len(order) and not 0 <= order.min() <= order.max() < self._vocabulary_size:
            yield self.at_hand, "has tokens that are not in the vocabulary"
            return
        if len(np.unique(order)) != len(order):
            yield self.at_hand, "has a token twice"
            return
        form = self._form()
        if (form.method, form.temperatures, form.vocabulary_size) != (self._about["method"], self._temperatures, self._vocabulary_size):
            yield self.at_hand, "is of another method, other temperatures or another vocabulary than cache.json says"
            return
        has_hidden = "hidden" in self._about["extras"] and any(self._told["groups"])  # without a record there are no states
        has_attention = self._about.get("attention") is not None and any(self._told["groups"]) and self._name("attention") not in left_behind(self._finished.path, self._finished.names())
        more = [content for content, there in (("hidden", has_hidden), ("attention", has_attention)) if there]
        cuts = {content: self._cut(content) for content in ("records", "logits", *more)}
        for content, cut in cuts.items():
            if cut != [rows for rows in self._told["groups"] if rows]:
                yield self._name(content), "does not have the row groups that cache.json says"
                return
        tokens, positions, tail_sums = 0, 0, np.zeros((2, len(self._temperatures)))
        for group in range(len(cuts["records"])):
            records = self._read("records", RECORDS, group)
            yield from ((self.at_hand, problem) for problem in _of_records(records, self._vocabulary_size, self._about["text"] == "keep"))
            table = self._read("logits", form.schema(), group)
            unequal = _unequal_lists(table)
            if unequal:
                yield self.at_hand, f"has as many values in {unequal} as not in kept in some record"
                return
            try:
                decoded = decode(table, form, order)
            except (ValueError, IndexError) as error:
                yield self.at_hand, f"cannot be decoded: {error}"
                return
            if decoded.records != records["id"].to_pylist():
                yield self.at_hand, f"is not of the same records as {self._name('records')}"
                return
            problem = _of_positions(records, decoded, self._about["positions"])
            if problem:
                yield self.at_hand, problem
                return
            yield from ((self.at_hand, problem) for problem in _of_logits(records, table, decoded, form))
            tokens += len(flat(records["token_id"]))
            positions += len(decoded.position)
            masses = _tail_masses(decoded, self._temperatures)
            tail_sums += [masses.sum(1), np.square(masses).sum(1)]
            if has_hidden:
                yield from self._of_hidden(group, decoded)
            if has_attention:
                yield from self._of_attention(group, decoded)
        if (tokens, positions) != (self._told["tokens"], self._told["positions"]):
            yield self._name("logits"), f"has {positions} positions of {tokens} tokens; cache.json says {self._told['positions']} of {self._told['tokens']}"
        if self._number in self._about["tail_shards"]:
            yield from self._of_tail(positions, *(tail_sums / max(positions, 1)))

    def _of_hidden(self, group: int, decoded: Decoded) -> Iterator[tuple[str, str]]:
        with safe_open(self._finished.file("head.safetensors"), "np") as head:
            size = int(head.get_slice("weight").get_shape()[1])
        table = self._read("hidden", hidden_schema(size), group)
        counts = np.diff(decoded.ends)
        if table["record"].to_pylist() != decoded.records or any(not np.array_equal(pc.list_value_length(table[name]).to_numpy(), counts) for name in ("state", "scale")):
            yield self.at_hand, f"does not have the records and positions of {self._name('logits')}"
        elif not np.all(np.isfinite(flat(table["scale"])) & (flat(table["scale"]) >= 0)):
            yield self.at_hand, "has a scale that is no scale"

    def _of_attention(self, group: int, decoded: Decoded) -> Iterator[tuple[str, str]]:
        table = self._read("attention", attention_schema(self._about["attention"]["layers"]), group)
        try:
            found = decode_attention(table, decoded)
        except (ValueError, IndexError) as error:
            yield self.at_hand, f"cannot be decoded: {error}"
            return
        for layer, rows in found.items():
            if heads_of(rows, decoded.position) != self._about["attention"]["heads"] and len(decoded.position):
                yield self.at_hand, f"has {heads_of(rows, decoded.position)} rows a position in layer {layer}; cache.json says {self._about['attention']['heads']}"
                return
            # each weight is off by half a step at most
            allowed = _summed(weight_error(rows.weight), rows.kept) + ROUNDING
            off = np.abs(_summed(rows.weight, rows.kept) + rows.rest - 1) > allowed
            if off.any():
                yield self.at_hand, f"has weights that do not sum to 1 in layer {layer} (position {np.repeat(decoded.position, self._about['attention']['heads'])[np.argmax(off)]})"

    def _of_tail(self, positions: int, means: np.ndarray, squares: np.ndarray) -> Iterator[tuple[str, str]]:
        """The marginals of a shard add up to what its positions leave to their tails on the average, at each temperature."""
        table = self._read("tail", tail_schema(self._temperatures))
        looked_at = int(table.schema.metadata[b"positions"])
        if len(table) != self._vocabulary_size or not looked_at <= positions:
            yield self.at_hand, "does not have a row for each token, or is of more positions than its shard has"
            return
        sums = np.array([np.exp(decode_rests(column.to_numpy()).astype(np.float64)).sum() for column in table.columns])
        allowed = TAIL_ERROR * means + SPREADS * np.sqrt(np.maximum(squares - means**2, 0) / max(looked_at, 1)) + ROUNDING
        if looked_at and not np.all(np.abs(sums - means) <= allowed):
            yield self.at_hand, f"adds up to other masses ({', '.join(f'{s:.4f}' for s in sums)}) than the rests of its shard ({', '.join(f'{m:.4f}' for m in means)})"

    def _name(self, content: str) -> str:
        return f"{content}-{self._number:05d}.parquet"

    def _path(self, content: str) -> Path:
        self.at_hand = self._name(content)
        return self._finished.file(self.at_hand)

    def _read(self, content: str, schema: pa.Schema, group: int | None = None) -> pa.Table:
        return read_table(self._path(content), schema, group)

    def _form(self) -> Logits:
        try:
            with pq.ParquetFile(self._path("logits")) as file:
                form = form_of(file)
        except (KeyError, ValueError) as error:
            raise DamageError(f"has metadata that says not how it is coded: {error}") from None
        if form.table.shape != (CODES,) or not (np.all(np.diff(form.table) > 0) if form.method == "sampled" else form.table[0] == 0 and np.all(np.diff(form.table) < 0)):
            raise DamageError("has a code table that is none")
        return form

    def _cut(self, content: str) -> list[int]:
        metadata = pq.read_metadata(self._path(content))
        return [rows for group in range(metadata.num_row_groups) if (rows := metadata.row_group(group).num_rows)]


def _of_records(table: pa.Table, vocabulary_size: int, has_text: bool) -> Iterator[str]:
    lengths = pc.list_value_length(table["token_id"])
    if any(not pc.list_value_length(table[name]).equals(lengths) for name in ("start", "end", "kind", "lead")):
        yield "has columns of unequal length"
    ids = flat(table["token_id"])
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary_size:
        yield "has tokens that are not in the vocabulary"
    for row in table.select(PREPARED.names).to_pylist() if has_text else []:
        if record_of(row).digest() != row["digest"]:
            yield f"has another text than was hashed in record {row['id']}"
            return


def _of_positions(records: pa.Table, decoded: Decoded, wanted: str) -> str | None:
    """The positions that are described are those that the records' tokens ask for."""
    for id, kind, (a, b) in zip(decoded.records, records["kind"], pairwise(decoded.ends.tolist()), strict=True):
        next_kind = kind.values.to_numpy()[1:]
        if not np.array_equal(decoded.position[a:b], np.flatnonzero(next_kind >= ANSWER) if wanted == "answer" else np.arange(len(next_kind))):
            return f"describes other positions than the answer's in record {id}" if wanted == "answer" else f"does not describe every position in record {id}"
    return None


def _of_logits(records: pa.Table, table: pa.Table, decoded: Decoded, form: Logits) -> Iterator[str]:
    """What cannot be true of a row group's numbers as they are stored (decoding divides a wrong sum out)."""
    kept, codes, gaps = decoded.kept.astype(np.int64), flat(table["logprob_code"]).astype(np.int64), flat(table["id_gap"])
    stored = np.stack([flat(table[rest_column(temperature)]) for temperature in form.temperatures])
    owner = np.repeat(np.arange(len(kept)), kept)
    of_record = np.repeat(np.arange(len(decoded.records)), np.diff(decoded.ends))

    def found(wrong: np.ndarray, what: str) -> Iterator[str]:
        """`wrong`: bool [N]."""
        if wrong.any():
            where = int(np.argmax(wrong))
            yield f"{what} (record {decoded.records[of_record[where]]}, position {decoded.position[where]})"

    least, most = (1, form.most) if form.method == "sampled" else (min(form.least, form.vocabulary_size), form.most)
    yield from found((kept < least) | (kept > most), f"keeps fewer than {least} or more than {most} tokens somewhere")
    least_gap = np.ones(len(gaps), dtype=np.int64)
    least_gap[(np.cumsum(kept) - kept)[kept > 0]] = 0  # the first is the rank itself
    yield from found(_any(owner, gaps < least_gap, len(kept)), "keeps a token twice somewhere")

    tokens = flat(records["token_id"])
    token_ends = np.cumsum(pc.list_value_length(records["token_id"]).to_numpy())
    realised = tokens[np.concatenate([[0], token_ends])[of_record] + decoded.position + 1]
    is_realised = decoded.ids == realised[owner]
    realised_logprob = decoded.realised_logprob.astype(np.float64)
    yield from found(np.isnan(realised_logprob) | (realised_logprob > ROUNDING), "has a log-probability above 0 for a token that follows")
    if form.method == "sampled":
        yield from found((np.bincount(owner, codes, len(kept)) != form.most) | _any(owner, codes == 0, len(kept)), f"has tokens drawn other than {form.most} times altogether")
        yield from found((stored != NO_REST).any(0), "leaves a rest to tokens that were not drawn")
    else:
        low, high = _interval(codes, kept, form.table)
        half = REST_STEP / 2
        rest = np.exp(decode_rests(stored[0]).astype(np.float64))
        smallest, largest = _summed(np.exp(low), kept) + rest * np.exp(-half), _summed(np.exp(high), kept) + rest * np.exp(half)
        yield from found((smallest > 1 + ROUNDING) | (largest < 1 - ROUNDING), "has probabilities that do not sum to 1 within the codec's error")
        off = is_realised & ((realised_logprob[owner] < low - ROUNDING) | (realised_logprob[owner] > high + ROUNDING))
        yield from found(_any(owner, off, len(kept)), "keeps the token that follows with another log-probability than realised_logprob")
        left_out = ~_any(owner, is_realised, len(kept))
        yield from found(left_out & (np.exp(realised_logprob) > rest * np.exp(half) + ROUNDING), "leaves less to all others than to the token that follows, which it does not keep")
        with np.errstate(divide="ignore"):
            most_left = np.log(np.maximum(form.vocabulary_size - kept, 0)) + half + ROUNDING
        bounds = np.concatenate([np.where(stored == NO_REST, -np.inf, stored * REST_STEP), most_left[None]])
        yield from found(np.asarray(np.any(bounds[1:] < bounds[:-1] - REST_STEP, axis=0)), "has rests that fall with the temperature, or exceed what so many tokens can have")
    entropy = flat(table["entropy"]).astype(np.float64)
    yield from found(~((entropy >= -0.01) & (entropy <= np.log(form.vocabulary_size) * 1.001 + 0.01)), "has an entropy that no distribution has")
    if decoded.logsumexp is not None:
        yield from found(~np.isfinite(decoded.logsumexp), "has a logsumexp that is not finite")
    if decoded.boundary is not None:
        yield from found(np.logical_not(np.abs(np.exp(decoded.boundary.astype(np.float64)).sum(1) - 1) < 0.005), "has first-byte classes that do not sum to 1")


def _interval(codes: np.ndarray, kept: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which log-probabilities each code's true one lies; that of a token that gave way to its position's strongest may be as high as that."""
    between = (table[1:] + table[:-1]) / 2
    strongest = np.minimum.reduceat(codes, (np.cumsum(kept) - kept)[kept > 0]) if len(codes) else codes
    gave_way = codes == np.repeat(strongest, kept[kept > 0]) + 1
    return np.append(between, -np.inf)[codes], np.insert(between, 0, 0.0)[codes - gave_way]


def _tail_masses(decoded: Decoded, temperatures: list[float]) -> np.ndarray:
    """float64 [S, N]: the probability of all tokens not kept, at each stored temperature."""
    masses = []
    for temperature, log_rest in zip(temperatures, decoded.rests.astype(np.float64), strict=True):
        rest = np.exp(log_rest)
        masses.append(rest / (rest + _summed(np.exp(decoded.logprobs.astype(np.float64) / temperature), decoded.kept)))
    return np.stack(masses)


def _unequal_lists(table: pa.Table) -> str | None:
    """The name of a column that has not one value for each position of each record."""
    lengths = pc.list_value_length(table["kept"])
    entries = ("first_position", "positions", "id_gap", "logprob_code")
    return next((name for name in table.column_names if pa.types.is_list(table.schema.field(name).type) and name not in entries and not pc.list_value_length(table[name]).equals(lengths)), None)


def form_of(file: pq.ParquetFile) -> Logits:
    """How the numbers of a logits file are coded, from its own metadata."""
    return Logits.from_metadata({key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}, file.schema_arrow.names)


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """All rows' values of a list column."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _summed(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """float64 [N]: sums of what lies flat, position after position."""
    return np.bincount(np.repeat(np.arange(len(kept)), kept), values, len(kept))


def _any(owner: np.ndarray, entries: np.ndarray, count: int) -> np.ndarray:
    """bool [count]: whether one of a position's entries is true."""
    result = np.zeros(count, dtype=bool)
    result[owner[entries]] = True
    return result
