"""What keeping the teacher's word costs beside its bare forward pass: tokens/s of both on the same batches, in one run.

    python benchmarks/capture.py MODEL_FOLDER TEXT.jsonl.gz [--quantization nf4] [--positions answer] [--threshold 0.002]
    python benchmarks/capture.py --random 8 [...]     a Llama-like model of about so many billion parameters, random weights

Capture is what `cache-teacher` does from tokens on: forward, selection, tail marginals, encoding and writing of whole shards beside
the next forward. The bare pass makes the logits of the same positions in the same chunks and throws them away; `whole` is
transformers' own forward of the same batches, which makes the logits of every token. Texts are cut into pieces; of each the second
half is the answer. Prints one JSON object: ratios are pair by pair, with the lowest, the median and the highest of the rounds.
"""

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.cache.schema import Logits
from pipeline.cache.writer import Background, Shard
from pipeline.models.heads import RowLogits
from pipeline.models.loading import device_named, load_teacher
from pipeline.models.memory import PeakMemory
from pipeline.models.teacher import Question, Tail, positions_at_once, said_of
from pipeline.signals.records import ANSWER, CONTENT, Record, Segment, Tokens

TEMPERATURES = [1.0, 2.0, 8.0]
RANDOM = {1: (2048, 8192, 16, 32, 8), 3: (3072, 8192, 28, 24, 8), 8: (4096, 14336, 32, 32, 8)}
"""Hidden size, feed-forward size, layers, heads and key-value heads of Llama 3's 1, 3 and 8 billion."""


def pieces(model: Path, text: Path, count: int, length: int) -> list[Tokens]:
    """Real text, or random tokens where there is none."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: list[Tokens] = []
    with gzip.open(text, "rt") if text.suffix == ".gz" else text.open() as lines:
        for line in lines:
            row = json.loads(line)
            ids = tokenizer(row.get("context") or f"{row.get('question')} {row.get('answer')}").input_ids
            found += [tokens_of(np.array(ids[a : a + length])) for a in range(0, len(ids) - length + 1, length)]
            if len(found) >= count:
                return found[:count]
    raise SystemExit(f"{text} has only {len(found)} pieces of {length} tokens.")


def tokens_of(ids: np.ndarray) -> Tokens:
    start = np.arange(len(ids), dtype=np.int32)
    kind = np.where(start >= len(ids) // 2, ANSWER, CONTENT).astype(np.uint8)
    return Tokens(ids.astype(np.int32), start, start + 1, kind, np.zeros(len(ids), np.int64))


def random_folder(billions: int, folder: Path) -> None:
    hidden, inner, layers, heads, pairs = RANDOM[billions]
    config = LlamaConfig(vocab_size=128_256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=pairs, head_dim=hidden // heads)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--random", type=int, choices=sorted(RANDOM))
    parser.add_argument("--quantization", default="none", choices=["nf4", "int8", "none"])
    parser.add_argument("--positions", default="answer", choices=["answer", "all"])
    parser.add_argument("--threshold", type=float, default=0.002)
    parser.add_argument("--keep", type=int, default=128)
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shard", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = device_named("auto")
    with tempfile.TemporaryDirectory() as scratch:
        if given.random:
            random_folder(given.random, Path(scratch) / "model")
            given.model = Path(scratch) / "model"
            draw = np.random.default_rng(0)
            records = [tokens_of(draw.integers(5, 128_000, given.length)) for _ in range(given.records)]
        else:
            records = pieces(given.model, given.text, given.records, given.length)
        model = load_teacher(str(given.model), None, given.quantization, True, "bfloat16", device)
        print(json.dumps(measure(model, records, given, device, Path(scratch) / "cache")))


def measure(model: torch.nn.Module, records: list[Tokens], given: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, object]:
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    teacher = RowLogits(model, vocabulary)  # type: ignore[arg-type]
    everywhere = given.positions == "all"
    question = Question(TEMPERATURES, given.threshold, 4, given.keep)
    form = Logits.of("head", TEMPERATURES, (0.02, 0.5), given.threshold, 4, given.keep, vocabulary)
    named = Record("r", (Segment("user", "a"), Segment("assistant", "b")))
    chunk = positions_at_once(vocabulary)

    def batches() -> list[list[Tokens]]:
        return [records[a : a + given.batch] for a in range(0, len(records), given.batch)]

    def rows_of(batch: list[Tokens]) -> np.ndarray:
        return np.concatenate([i * given.length + (np.arange(given.length - 1) if everywhere else tokens.answer_positions()) for i, tokens in enumerate(batch)]).astype(np.int64)

    @torch.inference_mode()
    def bare() -> None:
        for first in range(0, len(records), given.shard):
            waiting = []
            for begin in range(first, min(first + given.shard, len(records)), given.batch):
                batch = records[begin : begin + given.batch]
                hidden = teacher.hidden(torch.from_numpy(np.stack([tokens.ids for tokens in batch]).astype(np.int64)).to(device))
                waiting.append(hidden[torch.from_numpy(rows_of(batch)).to(device)])
                states = torch.cat(waiting)
                full = len(states) // chunk * chunk
                for part in range(0, full, chunk):
                    teacher.head(states[part : part + chunk])
                waiting = [states[full:]]
            if len(waiting[0]):
                teacher.head(torch.nn.functional.pad(waiting[0], (0, 0, 0, chunk - len(waiting[0]))))

    @torch.inference_mode()
    def whole() -> None:
        for batch in batches():
            model(input_ids=torch.from_numpy(np.stack([tokens.ids for tokens in batch]).astype(np.int64)).to(device), use_cache=False)

    def capture() -> None:
        with Background() as writing:
            for number, first in enumerate(range(0, len(records), given.shard)):
                tail = Tail(TEMPERATURES, vocabulary, device)
                here = records[first : first + given.shard]
                said = said_of(teacher, here, question, everywhere=everywhere, batch_records=given.batch, tail=tail, after_batch=writing.check)
                examples = [(named, tokens, word) for tokens, word in zip(here, said, strict=True)]
                writing.do(Shard(folder, number, examples, form, keep_text=True, tail=tail.log_means(vocabulary)).write)  # type: ignore[arg-type]

    def measured(work: Callable[[], None]) -> tuple[float, float]:
        memory = PeakMemory(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return len(records) * given.length / (time.perf_counter() - started), memory.megabytes()

    capture(), bare()
    rounds = [(measured(whole), measured(bare), measured(capture)) for _ in range(given.rounds)]

    def ratio(over: int) -> list[float]:
        found = sorted(each[2][0] / each[over][0] for each in rounds)
        return [round(value, 3) for value in (found[0], statistics.median(found), found[-1])]

    speeds = {name: round(statistics.median(each[i][0] for each in rounds), 1) for i, name in enumerate(("whole", "bare", "capture"))}
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "positions": sum(len(rows_of(batch)) for batch in batches()),
        "tokens": len(records) * given.length,
        "tokens_per_second": speeds,
        "capture_to_bare": ratio(1),
        "capture_to_whole": ratio(0),
        "extra_peak_memory_mb": round(max(each[2][1] for each in rounds) - max(each[1][1] for each in rounds), 1),
    }


if __name__ == "__main__":
    main()
