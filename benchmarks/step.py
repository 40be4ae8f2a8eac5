"""What a distillation step costs beside plain fine-tuning and beside a teacher in every step. Random weights: no step's time depends on them.

    python benchmarks/step.py [--hidden 512] [--layers 4] [--batch 4] [--length 512] [--rounds 5] [--teacher 4]
    python benchmarks/step.py --llama-1b            # on a GPU: the shape of Llama-3.2-1B, bfloat16 autocast

One process for each kind of step, alone, in turns: `sft`, transformers' own loss on the same model and tokens; `kd`, forward_kl
with weight 0.7 and cross_entropy with 0.3 from made-up targets of 30 tokens at every position, as train-student computes it; `at_once`,
the same with all rows' logits at a time; `online`, a teacher so many times as deep and its full distribution in every step,
compared as usual (log_softmax of both, kl_div). Prints one JSON object: seconds a step (the best of three in a process; median of the rounds, and the
range), peak memory, of which `step_mb` is what a step adds to the model, its gradients and its optimizer, ratios round by round,
and the gradients' norms of `kd` and `at_once`, which are equal.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.losses.cross_entropy import cross_entropy
from pipeline.losses.forward_kl import forward_kl
from pipeline.models.heads import RowLogits
from pipeline.models.memory import PeakMemory
from pipeline.signals.projection import SparseTarget
from stages.train_student import LOGITS_BYTES

VOCABULARY = 128_256
KEPT = 30
STEPS = 3
KINDS = ("sft", "kd", "at_once", "online")
LLAMA_1B = {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "key_heads": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--llama-1b", action="store_true")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--teacher", type=int, default=4, help="times as many layers as the student")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.llama_1b:
        vars(given).update(LLAMA_1B)
    if given.one:
        print(json.dumps(measured(given)))
        return
    kinds = given.kinds.split(",")
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(given.rounds):
        for kind in kinds:  # each in a process of its own: what one has allocated helps no other
            command = [sys.executable, *sys.argv, "--one", kind]
            rounds[kind].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
    told: dict[str, Any] = {"device": rounds[kinds[0]][0]["device"], "threads": torch.get_num_threads(), "parameters": rounds[kinds[0]][0]["parameters"]}
    for kind in kinds:
        told[kind] = {what: _spread([row[what] for row in rounds[kind]]) for what in ("seconds", "peak_mb", "step_mb")}
    for a, b in (("kd", "sft"), ("kd", "at_once"), ("online", "kd")):
        if a in kinds and b in kinds:
            told[f"{a}/{b}"] = {what: _spread([x[what] / y[what] for x, y in zip(rounds[a], rounds[b], strict=True)]) for what in ("seconds", "peak_mb", "step_mb")}
    if {"kd", "at_once"} <= set(kinds):
        told["gradient_norms"] = {kind: rounds[kind][0]["gradient_norm"] for kind in ("kd", "at_once")}
    print(json.dumps(told, indent=1))


def measured(given: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    student = model_of(given, given.layers, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    ids = torch.randint(0, VOCABULARY, (given.batch, given.length), device=device)
    step = {"sft": sft, "kd": kd, "at_once": kd, "online": online}[given.one](given, student, ids)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def whole() -> float:
        with autocast:
            step().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return norm

    norm = whole()  # the optimizer's state and all gradients are there from now on
    _wait(device)
    memory = PeakMemory(device)
    before = memory.megabytes()
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        whole()
        _wait(device)
        times.append(time.perf_counter() - begun)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    parameters = sum(parameter.numel() for parameter in student.parameters())
    peak = memory.megabytes()
    return {"seconds": min(times), "peak_mb": peak, "step_mb": peak - before, "device": name, "parameters": parameters, "gradient_norm": norm}


def model_of(given: argparse.Namespace, layers: int, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.key_heads,
        max_position_embeddings=given.length,
        tie_word_embeddings=not given.untied,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).train()


def sft(given: argparse.Namespace, student: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: student(input_ids=ids, labels=ids, use_cache=False).loss


def kd(given: argparse.Namespace, student: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    module = RowLogits(student, VOCABULARY)
    positions = torch.arange(given.batch * given.length, device=ids.device).view(ids.shape)
    rows, realised = positions[:, :-1].flatten(), ids[:, 1:].flatten()
    count = len(rows)
    probs = torch.rand(count, KEPT, device=ids.device)
    target = SparseTarget(torch.rand(count, VOCABULARY // 64, device=ids.device).topk(KEPT).indices * 64, 0.9 * probs / probs.sum(-1, keepdim=True), torch.full((count,), 0.1, device=ids.device), 1.0)
    at_once = count if given.one == "at_once" else max(1, LOGITS_BYTES[ids.device.type] // (4 * VOCABULARY))
    parts = list(pairwise([*range(0, count, at_once), count]))

    def loss_of(i: int, logits: Tensor) -> Tensor:
        part = slice(*parts[i])
        return (0.7 * forward_kl(logits, target.rows(part)).sum() + 0.3 * cross_entropy(logits, realised[part]).sum()) / count

    return lambda: module.loss(module.hidden(ids)[rows], parts, loss_of)


def online(given: argparse.Namespace, student: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    teacher = model_of(given, given.layers * given.teacher, ids.device).eval().requires_grad_(False).to(torch.bfloat16 if ids.device.type == "cuda" else torch.float32)

    def step() -> Tensor:
        with torch.no_grad():
            theirs = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        ours = student(input_ids=ids, labels=ids, use_cache=False)
        kl = torch.nn.functional.kl_div(ours.logits[:, :-1].float().log_softmax(-1), theirs, log_target=True, reduction="sum") / theirs[..., 0].numel()
        return 0.7 * kl + 0.3 * ours.loss

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "lowest": round(min(values), 3), "highest": round(max(values), 3)}


if __name__ == "__main__":
    main()
