"""What is in a finished folder, in numbers, in text, and whether all of it can be decoded."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from pipeline.cache.reader import Cache, Example
from pipeline.errors import DamageError, InputError
from pipeline.files import read_json
from pipeline.running.folder import FinishedFolder
from pipeline.signals.codec import LOGPROB_ERROR

ROUNDING = 1e-4
"""By which the probabilities of a position may differ from 1 beside what the codec's error adds up to."""


def cache(folder: Path) -> dict[str, Any]:
    """A cache's totals. bytes_per_position is over the logits files, bytes_per_token over all shards' files; the vocabulary, once, is in neither."""
    finished = FinishedFolder(folder)
    reader = Cache(finished.file)
    kept, positions, mass, entropy = 0, 0, 0.0, 0.0
    for split in ("train", "heldout"):
        for example in reader.examples(split):
            positions += len(example.targets.position)
            kept += len(example.targets.ids)
            mass += float(np.exp(example.targets.logprobs.astype(np.float64)).sum())
            entropy += float(example.targets.entropy.sum())
    tokens = finished.summary["tokens"]
    return {
        "teacher": reader.about["teacher"],
        "records": finished.summary["records"],
        "tokens": tokens,
        "positions": positions,
        "shards": len(reader.about["shards"]),
        "bytes_per_position": round(finished.size("logits-") / max(positions, 1), 2),
        "bytes_per_token": round(finished.size(("records-", "logits-")) / max(tokens, 1), 2),
        "mean_kept": round(kept / max(positions, 1), 2),
        "mean_kept_mass": round(mass / max(positions, 1), 4),
        "mean_entropy": round(entropy / max(positions, 1), 4),
    }


def record(folder: Path, id: str) -> dict[str, Any]:
    """One record's targets. `position` t is the index of the token whose NEXT token is described; natural logs at temperature 1."""
    _, example = _find(folder, id)
    targets, ids = example.targets, example.tokens.ids
    ends = np.cumsum(targets.kept.astype(np.int64))
    rows = []
    for i, (position, end) in enumerate(zip(targets.position.tolist(), ends.tolist(), strict=True)):
        here = slice(end - int(targets.kept[i]), end)
        rows.append(
            {
                "position": position,
                "realised_id": int(ids[position + 1]),
                "realised_logprob": float(targets.realised_logprob[i]),
                "kept_ids": targets.ids[here].tolist(),
                "kept_logprobs": [float(value) for value in targets.logprobs[here]],
                "rest_logprob": float(targets.rests[0, i]) if np.isfinite(targets.rests[0, i]) else None,  # null: nothing is left
            }
        )
    return {"id": id, "token_ids": ids.tolist(), "positions": rows}


def record_as_text(folder: Path, id: str, strongest: int = 5) -> str:
    """One line a position: what has been read, what follows, and the tokens that the teacher holds most likely."""
    reader, example = _find(folder, id)
    token_bytes = reader.vocabulary().token_bytes

    def shown(token: int) -> str:
        return repr(token_bytes[token].decode(errors="backslashreplace")) if token_bytes[token] else f"<{token}>"

    lines = [f"{id}: {len(example.tokens)} tokens, {len(example.targets.position)} positions"]
    for row in record(folder, id)["positions"]:
        words = ", ".join(f"{shown(token)} {np.exp(logprob):.3f}" for token, logprob in list(zip(row["kept_ids"], row["kept_logprobs"], strict=True))[:strongest])
        rest = 0.0 if row["rest_logprob"] is None else np.exp(row["rest_logprob"])
        lines.append(f"{row['position']:>5} -> {shown(row['realised_id'])} {np.exp(row['realised_logprob']):.3f} | {words} | others {rest:.3f}")
    return "\n".join(lines)


def as_text(values: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())


def undecodable(folder: Path) -> dict[str, str]:
    """File -> what is wrong with it, for files whose bytes are what was written but whose content is not what it must be."""
    finished = FinishedFolder(folder)
    wrong: dict[str, str] = {}
    for name in finished.names():
        try:
            if name.endswith(".parquet"):
                pq.read_table(folder / name, page_checksum_verification=True).validate(full=True)
            elif name.endswith(".json"):
                read_json(folder / name)
            elif name.endswith(".safetensors"):
                with safe_open(folder / name, "np") as tensors:
                    tensors.keys()
        except (pa.ArrowException, DamageError, SafetensorError, OSError) as error:
            wrong[name] = f"cannot be decoded: {error}"
    if finished.manifest["stage"] == "cache-teacher" and not wrong:
        reader = Cache(finished.file)
        for split in ("train", "heldout"):
            for shard in reader.shards(split):
                try:
                    problems = [problem for example in reader.of_shard(shard) if (problem := _implausible(example, int(reader.about["vocabulary_size"])))]
                except DamageError as error:
                    problems = [str(error)]
                if problems:
                    wrong[f"logits-{shard:05d}.parquet"] = problems[0]
    return wrong


def _implausible(example: Example, vocabulary_size: int) -> str | None:
    """What cannot be true of a record's targets."""
    targets, tokens = example.targets, example.tokens
    if not len(targets.position) == len(targets.kept) == len(targets.realised_logprob) == len(targets.entropy) == targets.rests.shape[1]:
        return f"has columns of unequal length in record {example.record.id}"
    if len(targets.ids) != int(targets.kept.sum()) or len(targets.logprobs) != len(targets.ids):
        return f"has not as many tokens as it says in record {example.record.id}"
    if len(targets.position) and not (targets.position.min() >= 0 and targets.position.max() < len(tokens) - 1):
        return f"describes positions that do not exist in record {example.record.id}"
    if len(targets.ids) and not 0 <= targets.ids.min() <= targets.ids.max() < vocabulary_size:
        return f"has tokens that are not in the vocabulary in record {example.record.id}"
    owner = np.repeat(np.arange(len(targets.kept)), targets.kept)
    logprobs = np.maximum(targets.logprobs.astype(np.float64), -1e3)
    mass = np.bincount(owner, np.exp(logprobs), len(targets.kept)) + np.exp(targets.rests[0].astype(np.float64))
    allowed = LOGPROB_ERROR * np.bincount(owner, np.exp(logprobs) * np.abs(logprobs), len(targets.kept)) + ROUNDING
    if not np.all(np.abs(mass - 1) < allowed):
        return f"has a position in record {example.record.id} whose probabilities do not sum to 1"
    return None


def _find(folder: Path, id: str) -> tuple[Cache, Example]:
    finished = FinishedFolder(folder)
    if finished.manifest["stage"] != "cache-teacher":
        raise InputError(f"{folder} is a folder of {finished.manifest['stage']}; records are shown of a cache (cache-teacher).")
    reader = Cache(finished.file)
    for split in ("train", "heldout"):
        for example in reader.examples(split):
            if example.record.id == id:
                return reader, example
    some = [example.record.id for _, example in zip(range(3), reader.examples("train"), strict=False)]
    raise InputError(f"There is no record '{id}' in {folder}. There are, among others: {', '.join(some)}.")
