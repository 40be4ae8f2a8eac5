"""Attention weights against eager attention's own maps, and their gradient against dense float64."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.errors import InputError
from pipeline.losses.attention_match import attention_match
from pipeline.models import attention as module
from pipeline.models.attention import Attending, Capture, Scene
from pipeline.signals.attention import LEAST, Attended, AttentionTarget, Matched, Rows, attention_target, decode_weights, encode_weights

SIZES = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
NAMES = ("llama", "gemma3", "qwen3", "gemma2")


@cache
def made(name: str, implementation: str, twin: bool = False) -> PreTrainedModel:
    """Random weights, large enough for attention that is not flat; the same for both implementations, and for a twin."""
    torch.manual_seed(0)
    kinds = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=16, attn_logit_softcapping=3.0)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    }
    model = kinds[name]().eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(("q_proj.weight", "k_proj.weight")):
                value.mul_(12)
            if "q_norm" in key or "k_norm" in key:
                value.add_(0.7)
    model.set_attn_implementation(implementation)
    return model


def own(name: str) -> PreTrainedModel:
    """With the implementation that transformers would take."""
    return made(name, "eager" if name == "gemma2" else "sdpa")


def ids(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(1, 70, (rows, length), generator=torch.Generator().manual_seed(1))


def maps(name: str, **inputs: torch.Tensor) -> list[np.ndarray]:
    """Eager attention's, [B, heads, T, T] of each layer."""
    with torch.inference_mode():
        return [layer.double().numpy() for layer in made(name, "eager", twin=True)(**inputs, output_attentions=True, use_cache=False).attentions]


INPUTS = {
    "plain": {"input_ids": ids()},
    "long": {"input_ids": ids(2, 150)},
    "padded on the right": {"input_ids": ids(), "attention_mask": (torch.arange(40) < torch.tensor([40, 29, 7])[:, None]).long()},
    "padded on the left": {"input_ids": ids(), "attention_mask": (torch.arange(40) >= torch.tensor([0, 11, 30])[:, None]).long()},
    "packed": {"input_ids": ids(1, 60), "position_ids": torch.cat([torch.arange(n) for n in (25, 10, 25)])[None]},
}


def real(inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Every second row that is no padding."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return mask.flatten().nonzero()[:, 0].numpy()[::2]


def check(found: Rows, wanted: np.ndarray, keys: int) -> None:
    """wanted: [rows, T]."""
    first = 0
    for kept, rest, row in zip(found.kept.tolist(), found.rest, wanted, strict=True):
        key, weight = found.key[first : first + kept], found.weight[first : first + kept]
        first += kept
        order = np.argsort(-row, kind="stable")[:keys]
        order = order[row[order] >= LEAST]
        assert sorted(key.tolist()) == sorted(order.tolist())
        assert (np.diff(key) < 0).all()  # the nearest first
        stored = decode_weights(encode_weights(weight))
        half = (255 * np.sqrt(stored) + 0.5) / 255**2
        assert (np.abs(stored - row[key]) <= half + 1e-6).all()
        assert abs(rest - (1 - row[order].sum())) < 1e-5


@pytest.mark.parametrize("each_head", [False, True])
@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("name", NAMES)
def test_kept_keys_and_weights_are_those_of_eager_attention(name: str, which: str, each_head: bool):
    inputs, model = INPUTS[which], own(name)
    with torch.inference_mode():
        before = model(**inputs, use_cache=False).logits
        capture = Capture(model, name, [0, 1, 3], keys=6, each_head=each_head)
        query = real(inputs)
        capture.rows(query)
        after = model(**inputs, use_cache=False).logits
    assert torch.equal(before, after)
    b, t = np.divmod(query, inputs["input_ids"].shape[1])
    dense = maps(name, **inputs)
    taken = capture.taken()
    assert sorted(taken) == [0, 1, 3]
    for layer, rows in taken.items():
        here = dense[layer][b, :, t]  # [rows, heads, T]
        check(rows, here.reshape(-1, here.shape[-1]) if each_head else here.mean(1), 6)


def test_control_a_causal_mask_that_is_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch):
    real_weights = module._weights

    def off_by_one(scene: Scene, b: int, t: torch.Tensor, width: int):
        return real_weights(scene, b, t - 1, width)

    monkeypatch.setattr(module, "_weights", off_by_one)
    with pytest.raises(AssertionError):
        test_kept_keys_and_weights_are_those_of_eager_attention("qwen3", "plain", False)
    monkeypatch.undo()
    test_kept_keys_and_weights_are_those_of_eager_attention("qwen3", "plain", False)


def test_more_keys_than_a_byte_can_count():
    """As for a drawing of whole rows."""
    tokens = ids(1, 300)
    capture = Capture(made("llama", "sdpa"), "llama", [0], keys=300, each_head=False)
    capture.rows(np.array([10, 299]))
    with torch.inference_mode():
        made("llama", "sdpa")(input_ids=tokens, use_cache=False)
    rows = capture.taken()[0]
    check(rows, maps("llama", input_ids=tokens)[0][0].mean(0)[[10, 299]], 300)
    assert rows.kept[1] > 255


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch):
    inputs = INPUTS["long"]
    capture = Capture(made("llama", "sdpa"), "llama", [2], keys=4, each_head=False)
    found = []
    for size in (1, 5000, 1 << 30):
        monkeypatch.setattr(module, "BLOCK_BYTES", size)
        capture.rows(real(inputs))
        with torch.inference_mode():
            made("llama", "sdpa")(**inputs, use_cache=False)
        found.append(capture.taken()[2])
    for other in found[1:]:
        assert (other.key == found[0].key).all()
        np.testing.assert_allclose(other.weight, found[0].weight, atol=1e-6)


def falcon() -> PreTrainedModel:
    """Its attention calls nothing that could be wrapped."""
    return FalconForCausalLM(FalconConfig(vocab_size=70, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)).eval()


def difference() -> PreTrainedModel:
    """Its attention is a difference of two."""
    return DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize("make", [falcon, difference])
def test_attention_that_is_computed_otherwise_is_refused(make):
    model = make()
    capture = Capture(model, "odd", [1], 4, each_head=False)
    capture.rows(np.array([3]))
    with torch.inference_mode():
        model(input_ids=ids(1, 8), use_cache=False)
    with pytest.raises(InputError, match="Layer 1 of odd computed its attention"):
        capture.taken()
    student = make()
    attending = Attending(student, "odd", [1])
    attending.to([a_target([8], 8, 1)])
    student(input_ids=ids(1, 8), use_cache=False)
    with pytest.raises(InputError, match="Layer 1 of odd computed its attention"):
        attending.masses()


@pytest.mark.parametrize("layers", [[4], [-1]])
def test_a_layer_that_is_not_there_is_told(layers: list[int]):
    with pytest.raises(InputError, match="layers 0 to 3"):
        Capture(made("llama", "sdpa"), "llama", layers, 4, each_head=False)


# --- the student's, and its gradient ---


def a_target(lengths: list[int], width: int, groups: int, seed: int = 0) -> AttentionTarget:
    """Random cells of one to three tokens each at random rows."""
    rng = np.random.default_rng(seed)
    records, positions = [], []
    for length in lengths:
        position = np.sort(rng.choice(length, length // 2, replace=False))
        cells, keys, key = [], [], []
        for t in position:
            for _ in range(groups):
                order = rng.permutation(t + 1)[:6]
                sizes = [len(part) for part in np.split(order, [1, 3]) if len(part)]
                cells.append(len(sizes))
                keys += sizes
                key += order.tolist()
        weight = rng.random(sum(cells)).astype(np.float32) / 6
        records.append(Matched(position, np.array(cells), weight, rng.random(len(cells)).astype(np.float32) / 2, np.array(keys), np.array(key)))
        positions.append(np.arange(length, dtype=np.int32))
    return attention_target(records, positions, width, groups)


def dense_masses(query: torch.Tensor, key: torch.Tensor, scene: Scene, target: AttentionTarget) -> torch.Tensor:
    """float64, from whole maps."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(2, 3) * scene.scaling
    if scene.softcap:
        scores = torch.tanh(scores / scene.softcap) * scene.softcap
    length = query.shape[2]
    at = torch.arange(length)
    allowed = at[None] <= at[:, None]
    if scene.window:
        allowed &= at[None] > at[:, None] - scene.window
    maps = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    maps = maps.view(len(maps), target.groups, -1, length, length).mean(2)
    row = torch.from_numpy(target.query)[target.entry_row]
    picked = maps[row // length, target.entry_group, row % length, target.entry_key]
    return torch.zeros(len(target.weight), dtype=torch.float64).index_add(0, target.entry_cell, picked)


@pytest.mark.parametrize("block", [3000, 1 << 23])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("softcap", "window", "mask"), [(None, None, None), (3.0, None, None), (None, 7, None), (None, None, "bool"), (None, 7, "added")])
def test_the_students_weights_and_their_gradient_are_those_of_whole_maps(softcap, window, mask, groups: int, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    torch.manual_seed(0)
    query, key = (torch.randn(2, heads, 24, 8, requires_grad=True) for heads in (4, 2))
    at = torch.arange(24)
    allowed = (at[None] <= at[:, None]) & (at[None] > at[:, None] - (window or 100))
    given = {None: None, "bool": allowed[None, None], "added": torch.zeros(2, 1, 24, 24).masked_fill(~allowed, torch.finfo(torch.float32).min)}[mask]
    scene = Scene(query, key, given, 0.7, softcap, window, causal=True)
    target = a_target([24, 17], 24, groups)
    found = module.CellMass.apply(query, key, scene, target)
    wanted = dense_masses(query, key, scene, target)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    toward = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found * toward).sum(), (query, key))
    theirs = torch.autograd.grad((wanted * toward).sum(), (query, key))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_a_model_is_gone_back_through_as_with_eager_maps(name: str, checkpointing: bool):
    """The loss on two layers at once; with gradient checkpointing the layers are computed once more on the way back."""
    model, eager = deepcopy(made(name, "sdpa")).train(), deepcopy(made(name, "eager", twin=True)).double()
    model.set_attn_implementation("sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    attending = Attending(model, name, [1, 3, 1])
    targets = [a_target([40, 29], 40, groups, seed) for groups, seed in ((1, 0), (2, 1), (4, 2))]
    tokens = ids(2, 40)
    attending.to(targets)
    model(input_ids=tokens, use_cache=False)
    masses = attending.masses()
    rows = 40 + 29
    loss = attention_match(Attended(rows, list(zip(targets, masses, strict=True)))).sum()
    loss.backward()

    whole = eager(input_ids=tokens, output_attentions=True, use_cache=False).attentions
    total = torch.zeros((), dtype=torch.float64)
    for layer, target in zip([1, 3, 1], targets, strict=True):
        maps = whole[layer]
        length = maps.shape[-1]
        maps = maps.view(len(maps), target.groups, -1, length, length).mean(2)
        row = torch.from_numpy(target.query)[target.entry_row]
        mass = torch.zeros(len(target.weight), dtype=torch.float64).index_add(0, target.entry_cell, maps[row // length, target.entry_group, row % length, target.entry_key])
        rest = 1 - torch.zeros(len(target.rest), dtype=torch.float64).index_add(0, target.cell_row, mass)
        total = total + ((mass - target.weight) ** 2).sum() / target.groups + ((rest - target.rest) ** 2).sum() / target.groups
    (total / 3).backward()
    assert loss.item() == pytest.approx(total.item() / 3, rel=1e-5)
    theirs = dict(eager.named_parameters())
    moved = 0
    for key, value in model.named_parameters():
        if value.grad is None:
            assert theirs[key].grad is None or theirs[key].grad.norm() == 0, key
            continue
        if theirs[key].grad is not None and theirs[key].grad.norm() > 0:
            moved += 1
            assert (value.grad - theirs[key].grad).norm() < 2e-5 * theirs[key].grad.norm(), key
    assert moved > 10
