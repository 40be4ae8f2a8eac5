"""What a model costs to use: size, memory, time to the first token, tokens per second."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.models.live import greedy
from pipeline.models.memory import PeakMemory

PROMPT_TOKENS = 128
NEW_TOKENS = 32
ROUNDS = 3
BATCHES = (1, 8)
LONG = 5.0
"""Seconds: what takes longer is done once."""


def cost_of(model: PreTrainedModel, vocabulary_size: int) -> dict[str, Any]:
    """Medians of three rounds after one that is not counted (of what takes more than five seconds: once), with prompts of 128 tokens and
    32 new ones, always the most likely.

    `parameters`; `weights_mb`: parameters and buffers as they are stored; of each batch size (1 and 8) `forward_seconds`: one pass
    over the prompts, and the head at their ends; `first_token_seconds`: until the first token is there; `tokens_per_second`: of all records
    together, after the first token; `peak_memory_mb` over all of it (on CUDA what was allocated, otherwise the process).
    """
    device = next(model.parameters()).device
    memory = PeakMemory(device)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT_TOKENS + NEW_TOKENS
    prompt = max(min(PROMPT_TOKENS, most - NEW_TOKENS), 1)
    new = max(min(NEW_TOKENS, most - prompt), 2)
    batches = {}
    for batch in BATCHES:
        ids = torch.randint(0, vocabulary_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
        mask = torch.ones_like(ids)

        def forward(ids: torch.Tensor = ids) -> None:
            with torch.inference_mode():
                model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1:])

        def generate(count: int, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            greedy(model, ids, mask, count, [0], vocabulary_size, least=count)

        passing, first, all = (_seconds(work, device) for work in (forward, lambda generate=generate: generate(1), lambda generate=generate: generate(new)))
        batches[str(batch)] = {"forward_seconds": passing, "first_token_seconds": first, "tokens_per_second": batch * (new - 1) / (all - first) if all > first else batch * new / all}
    return {
        "parameters": sum(_elements(weight) for weight in model.parameters()),
        "weights_mb": sum(weight.numel() * weight.element_size() for weight in [*model.parameters(), *model.buffers()]) / 1e6,
        "peak_memory_mb": memory.megabytes(),
        "prompt_tokens": prompt,
        "new_tokens": new,
        "batches": batches,
    }


def _elements(weight: torch.nn.Parameter) -> int:
    """Of a quantized weight those that it stands for."""
    state: Any = getattr(weight, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else weight.numel()


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - started)
        if times[0] > LONG:
            break
    return median(times[1:] or times)
