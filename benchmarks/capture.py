"""What keeping the teacher's word costs beside its bare forward pass: tokens/s of both on the same batches, in one run.

    python benchmarks/capture.py MODEL_FOLDER [--quantization nf4] [--records 32] [--length 64] [--keep 64]

The bare pass makes the logits of the same positions in the same chunks and throws them away. Random tokens: the
arithmetic does not know. Prints one JSON object; the ratio is pair by pair, median of the rounds with the extremes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.models.heads import RowLogits
from pipeline.models.loading import device_named, load_teacher
from pipeline.models.memory import PeakMemory
from pipeline.models.teacher import CHUNK_BYTES, said_of
from pipeline.signals.records import ANSWER, CONTENT, Tokens


def random_records(count: int, length: int, vocabulary: int) -> list[Tokens]:
    """The second half of each is its answer."""
    draw = np.random.default_rng(0)
    start = np.arange(length, dtype=np.int32)
    kind = np.where(start >= length // 2, ANSWER, CONTENT).astype(np.uint8)
    return [Tokens(draw.integers(5, vocabulary, length).astype(np.int32), start, start + 1, kind, np.zeros(length, np.int64)) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "int8", "none"])
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    device = device_named("auto")
    model = load_teacher(str(given.model), None, given.quantization, True, "bfloat16", device)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    teacher = RowLogits(model, vocabulary)
    records = random_records(given.records, given.length, vocabulary)
    tokens = given.records * given.length
    chunk = max(1, CHUNK_BYTES // (4 * vocabulary))

    def bare() -> None:
        with torch.inference_mode():
            for begin in range(0, len(records), given.batch):
                batch = records[begin : begin + given.batch]
                hidden = teacher.hidden(torch.from_numpy(np.stack([record.ids for record in batch]).astype(np.int64)).to(device))
                rows = torch.from_numpy(np.concatenate([i * given.length + record.answer_positions() for i, record in enumerate(batch)])).to(device)
                for first in range(0, len(rows), chunk):
                    teacher.head(hidden[rows[first : first + chunk]])

    def capture() -> None:
        said_of(teacher, records, everywhere=False, keep=given.keep, temperatures=[1.0, 2.0, 8.0], batch_records=given.batch)

    def measured(work: object) -> tuple[float, float]:
        memory = PeakMemory(device)
        started = time.monotonic()
        work()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return tokens / (time.monotonic() - started), memory.megabytes()

    bare(), capture()
    pairs = [(measured(bare), measured(capture)) for _ in range(given.rounds)]
    ratios = sorted(there[0] / plain[0] for plain, there in pairs)
    print(
        json.dumps(
            {
                "device": str(device),
                "bare_tokens_per_second": round(statistics.median(plain[0] for plain, _ in pairs), 1),
                "capture_tokens_per_second": round(statistics.median(there[0] for _, there in pairs), 1),
                "ratio": [round(ratio, 3) for ratio in (ratios[0], statistics.median(ratios), ratios[-1])],
                "extra_peak_memory_mb": round(max(there[1] for _, there in pairs) - max(plain[1] for plain, _ in pairs), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
