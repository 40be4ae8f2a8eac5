"""What attention weights cost: to capture them, to keep them, to train on them. Ratios are pair by pair, side by side in one run.

    python benchmarks/attention.py capture MODEL TEXT.jsonl.gz [--length 1024] [--layers 4] [--quantization none] [--dtype bfloat16]
    python benchmarks/attention.py storage MODEL TEXT.jsonl.gz [--records 64] [--length 512]
    python benchmarks/attention.py train   MODEL [--lengths 512,1024,2048] [--layers 4]

capture: one forward of the body without, with the strongest 16 keys of every second half's rows, and of every row; beside it the
same model's eager attention that gives all maps. Peak memory is what it takes beyond what was there before, each in a process of its own.
storage: 4, 8, 16, 32 keys of the answers' rows as they lie in a shard: bytes a position and layer, the weight they keep, and the
distance of what is read back from the whole row (root of the summed squares over kept keys and rest).
train: forward, cross entropy on the second half's rows, backward and AdamW of the student, without and with attention_match.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from capture import pieces

from pipeline.cache.writer import attention_table, write_table
from pipeline.losses.attention_match import attention_match
from pipeline.models.attention import Attending, Capture, sees_everything
from pipeline.models.heads import RowLogits
from pipeline.models.loading import device_named, load_student, load_teacher
from pipeline.models.memory import PeakMemory
from pipeline.signals.attention import Attended, Matched, Rows, attention_target, decode_weight_rests, decode_weights, encode_weight_rests, encode_weights, matched_layers
from pipeline.signals.records import Tokens
from pipeline.signals.targets import Targets

KEYS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["capture", "storage", "train"])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--quantization", default="none", choices=["nf4", "int8", "none"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = parser.parse_args()
    found = {"capture": capture, "storage": storage, "train": train}[given.what](given)
    print(json.dumps(found, indent=1))


def capture(given: argparse.Namespace) -> dict[str, Any]:
    device = device_named("auto")
    teacher, capturing = _teacher(given, device)
    plain, _ = _teacher(given, device)
    eager, _ = _teacher(given, device)
    eager.model.set_attn_implementation("eager")
    [tokens] = pieces(given.model, given.text, 1, given.length)
    ids = torch.from_numpy(tokens.ids.astype(np.int64))[None].to(device)

    def looking(rows: np.ndarray) -> Callable[[], Any]:
        def run() -> Any:
            capturing.rows(rows)
            teacher.hidden(ids)
            return capturing.taken()

        return run

    every = np.arange(given.length)
    runs = {
        "without": lambda: plain.hidden(ids),
        "half the rows": looking(every[given.length // 2 :]),
        "every row": looking(every),
        "eager, all maps": lambda: eager.model.base_model(input_ids=ids, use_cache=False, output_attentions=True),
    }
    with torch.inference_mode():
        return {f"{given.length} tokens": _beside(runs, given.rounds, device, given.length, given.memory)}


def storage(given: argparse.Namespace) -> dict[str, Any]:
    device = device_named("auto")
    records = pieces(given.model, given.text, given.records, given.length)
    found: dict[str, Any] = {}
    for keys in (4, 8, 16, 32):
        teacher, capturing = _teacher(given, device, keys)
        whole_teacher, whole = _teacher(given, device, given.length)
        targets, errors = [], []
        for tokens in records:
            position = tokens.answer_positions()
            rows, all_rows = (_rows_of(module, looks, tokens, position, device) for module, looks in ((teacher, capturing), (whole_teacher, whole)))
            targets.append(_empty(position, rows))
            errors += [_distance(rows[layer], all_rows[layer], given.length) for layer in rows]
        with tempfile.TemporaryDirectory() as folder:
            write_table(Path(folder) / "a.parquet", attention_table(pa.array([str(i) for i in range(len(records))]), targets), {})
            size = (Path(folder) / "a.parquet").stat().st_size
        rests = {layer: np.concatenate([t.attention[layer].rest for t in targets if t.attention]) for layer in capturing.layers}
        positions = sum(len(t.position) for t in targets)
        found[f"{keys} keys"] = {
            "bytes_per_position_and_layer": round(size / positions / len(capturing.layers), 1),
            "retained": {layer: round(float(1 - rest.mean()), 4) for layer, rest in rests.items()} | {"mean": round(1 - float(np.mean([rest.mean() for rest in rests.values()])), 4)},
            "distance": round(float(np.concatenate(errors).mean()), 5),
        }
    return found | {"positions": positions, "layers": capturing.layers}


def train(given: argparse.Namespace) -> dict[str, Any]:
    device = device_named("auto")
    model = load_student(str(given.model), None, None, device).train()
    count = model.config.get_text_config().num_hidden_layers
    layers = matched_layers(given.layers, [True] * count)
    student = RowLogits(model, int(model.get_output_embeddings().weight.shape[0]))
    attending = Attending(model, str(given.model), layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    found: dict[str, Any] = {}
    for length in map(int, given.lengths.split(",")):
        draw = np.random.default_rng(0)
        ids = torch.from_numpy(draw.integers(5, 40_000, length))[None].to(device)
        rows = torch.arange(length // 2, length - 1, device=device)
        targets = [_some_target(draw, length).to(device) for _ in layers]

        def step(looks: bool, ids: torch.Tensor = ids, rows: torch.Tensor = rows, targets: list[Any] = targets) -> Callable[[], None]:
            def run() -> None:
                attending.to(targets if looks else [])
                logits = student(ids, rows)
                loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, rows + 1])
                if looks:
                    loss = loss + attention_match(Attended(len(rows), list(zip(targets, attending.masses(), strict=True)))).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return run

        found[f"{length} tokens"] = _beside({"without": step(False), "with": step(True)}, given.rounds, device, length, given.memory)
    return found


def _teacher(given: argparse.Namespace, device: torch.device, keys: int = KEYS) -> tuple[RowLogits, Capture]:
    model = load_teacher(str(given.model), None, given.quantization, True, given.dtype, device)
    layers = matched_layers(given.layers, sees_everything(model))
    return RowLogits(model, int(model.get_output_embeddings().weight.shape[0])), Capture(model, str(given.model), layers, keys, each_head=False)


@torch.inference_mode()
def _rows_of(teacher: RowLogits, capturing: Capture, tokens: Tokens, position: np.ndarray, device: torch.device) -> dict[int, Rows]:
    capturing.rows(position.astype(np.int64))
    teacher.hidden(torch.from_numpy(tokens.ids.astype(np.int64))[None].to(device))
    return capturing.taken()


def _empty(position: np.ndarray, rows: dict[int, Rows]) -> Targets:
    """What is written of a record's attention, and nothing else."""
    none = np.zeros(0, dtype=np.float32)
    return Targets(position, none.astype(np.uint16), none.astype(np.int32), none, none[None], none, attention=rows)


def _distance(rows: Rows, whole: Rows, length: int) -> np.ndarray:
    """Of each row: the root of the summed squares between what is read back, spread over nothing, and the whole row."""
    dense = np.zeros((len(rows.rest), length + 1))
    back = np.zeros_like(dense)
    owner, all_owner = (np.repeat(np.arange(len(each.rest)), each.kept) for each in (rows, whole))
    dense[all_owner, whole.key] = whole.weight
    back[owner, rows.key] = decode_weights(encode_weights(rows.weight))
    kept = np.zeros(dense.shape, dtype=bool)
    kept[owner, rows.key] = True
    dense[:, length], back[:, length] = np.where(kept, 0, dense).sum(1) + whole.rest, decode_weight_rests(encode_weight_rests(rows.rest))
    kept[:, length] = True
    return np.sqrt(np.where(kept, np.square(dense - back), 0).sum(1))


def _some_target(draw: np.random.Generator, length: int) -> Any:
    """KEYS keys of each row of the second half."""
    position = np.arange(length // 2, length - 1)
    key = np.concatenate([draw.choice(t + 1, KEYS, replace=False) for t in position])
    weight = draw.dirichlet(np.ones(KEYS + 1), len(position)).astype(np.float32)
    record = Matched(position, np.full(len(position), KEYS), weight[:, :KEYS].ravel(), weight[:, KEYS], np.ones(len(key), dtype=np.int64), key)
    return attention_target([record], [position.astype(np.int32)], length, 1)


def _beside(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device, length: int, only: str | None) -> dict[str, Any]:
    """Seconds, how many times those of the first of `runs`, pair by pair, and MB; of `only` one of them the MB of one run."""
    if only:
        memory = PeakMemory(device)
        before = memory.megabytes()
        runs[only]()
        return {"megabytes": memory.megabytes() - before}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
    first = next(iter(runs))
    found: dict[str, Any] = {}
    for name in runs:
        command = [sys.executable, *sys.argv, "--memory", name, "--length", str(length), "--lengths", str(length)]
        alone = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)[f"{length} tokens"]
        found[name] = {"seconds": round(statistics.median(seconds[name]), 3), "megabytes": round(alone["megabytes"], 1)}
        if name != first:
            ratios = sorted(ours / theirs for ours, theirs in zip(seconds[name], seconds[first], strict=True))
            found[name] |= {
                "times": [round(ratio, 3) for ratio in (ratios[0], statistics.median(ratios), ratios[-1])],
                "more_megabytes": round(found[name]["megabytes"] - found[first]["megabytes"], 1),
            }
    return found


if __name__ == "__main__":
    main()
