"""Attention weights of chosen layers and rows, computed beside the model's own attention and without ever holding a whole map.

A model computes as it always does (SDPA, flash or eager); the function that does it is wrapped (transformers' attention
interface), and where somebody looks, the queries and keys are also multiplied row by row, in blocks.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.errors import InputError
from pipeline.models.loading import decoder_layers
from pipeline.signals.attention import LEAST, AttentionTarget, Rows

PREFIX = "watched_"
LOOK = "_pipeline_looks"
"""The attribute of an attention module that is looked at."""
BLOCK_BYTES = 8 << 20
"""Of weights that exist at once; twice or three times that is needed in all."""


@dataclass(frozen=True)
class Scene:
    """What a layer's attention is computed from."""

    query: Tensor  # [B, heads, T, D]
    key: Tensor  # [B, key heads, T, D]
    mask: Tensor | None  # bool, or added to the scores: [B or 1, heads or 1, T, T]; None: causal, if `causal`
    scaling: float
    softcap: float | None
    window: int | None
    causal: bool


def watch(model: PreTrainedModel, name: str, layers: Sequence[int], look: Callable[[int, Scene], None]) -> None:
    """Have look(layer, scene) called whenever one of these layers computes its attention. The model's own results do not change by a bit."""
    blocks = decoder_layers(model, name)
    if wrong := [layer for layer in layers if not 0 <= layer < len(blocks)]:
        raise InputError(f"{name} has the layers 0 to {len(blocks) - 1}, and the attention of layer {wrong[0]} is wanted.")
    for layer in layers:
        found = [module for module in blocks[layer].modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]
        if len(found) != 1:
            raise InputError(f"Layer {layer} of {name} ({type(model).__name__}) has no softmax attention that pipeline could find. Name other layers.")
        setattr(found[0], LOOK, partial(look, layer))
    inner = model.config.get_text_config()._attn_implementation.removeprefix(PREFIX)
    if PREFIX + inner not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(PREFIX + inner, partial(_attention, inner))
        AttentionMaskInterface.register(PREFIX + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    model.set_attn_implementation(PREFIX + inner)


def sees_everything(model: PreTrainedModel) -> list[bool]:
    """Of each layer, whether its attention has no window."""
    text = model.config.get_text_config()
    return [kind == "full_attention" for kind in getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers]


def _attention(inner: str, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any) -> Any:
    own: Callable[..., Any] = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)  # type: ignore[assignment]
    result = ALL_ATTENTION_FUNCTIONS.get_interface(inner, own)(module, query, key, value, attention_mask, **how)
    look = getattr(module, LOOK, None)
    if look is not None:
        if strange := [name for name in ("position_bias", "s_aux") if how.get(name) is not None]:
            raise InputError(f"The attention of {type(module).__name__} has {strange[0]}, which pipeline does not know: its weights cannot be read. Leave targets.attention out.")
        scaling = how.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        causal = bool(getattr(module, "is_causal", True)) and query.shape[2] == key.shape[2]
        look(Scene(query, key, attention_mask, scaling, how.get("softcap"), how.get("sliding_window"), causal))
    return result


def _refuse_others(name: str, layers: Sequence[int], seen: Counter[int]) -> None:
    """What is no softmax of queries and keys calls the function never, or more than once."""
    if wrong := [layer for layer in layers if seen[layer] != 1]:
        raise InputError(
            f"Layer {wrong[0]} of {name} computed its attention {seen[wrong[0]]} times in one forward pass through transformers' attention interface, and once is what pipeline knows: "
            "its weights cannot be read. Leave out targets.attention and attention_match, or choose another model."
        )


def _blocks(scene: Scene, query: np.ndarray) -> Iterator[tuple[int, int, int, Tensor, int]]:
    """The rows query[first:last], all of batch row b: (first, last, b, their tokens int64 [n], how many keys they could see)."""
    heads, length = scene.query.shape[1:3]
    b, t = np.divmod(query, length)
    begin = 0
    while begin < len(query):
        of_record = int(np.searchsorted(b, b[begin], side="right"))
        # as many rows as fit, if each could see as far as the last
        seen = np.maximum.accumulate(t[begin:of_record]) + 1 if scene.causal else np.full(of_record - begin, scene.key.shape[2])
        fits = int(np.searchsorted(seen * np.arange(1, len(seen) + 1) * heads * 4, BLOCK_BYTES, side="right"))
        last = begin + max(fits, 1)
        yield begin, last, int(b[begin]), torch.from_numpy(t[begin:last]).to(scene.query.device), int(seen[last - begin - 1])
        begin = last


def _weights(scene: Scene, b: int, t: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """float32 [heads, n, width]: the weights of the first `width` keys; and what the soft cap made the scores' slope, if there is one."""
    heads, key_heads = scene.query.shape[1], scene.key.shape[1]
    with torch.autocast(scene.query.device.type, enabled=False):
        query = scene.query[b][:, t].float().reshape(key_heads, -1, scene.query.shape[3])
        scores = torch.matmul(query, scene.key[b, :, :width].float().transpose(1, 2)).view(heads, len(t), width).mul_(scene.scaling)
    slope = None
    if scene.softcap is not None:
        bent = torch.tanh_(scores.div_(scene.softcap))
        slope = 1 - bent.square()
        scores = bent * scene.softcap
    if scene.mask is None:
        if scene.causal:
            key = torch.arange(width, device=t.device)
            hidden = key > t[:, None]
            if scene.window is not None:
                hidden |= key <= t[:, None] - scene.window
            scores.masked_fill_(hidden, -torch.inf)
    else:
        mask = scene.mask[b if len(scene.mask) > 1 else 0][:, t, :width]
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else scores.add_(mask)
    return torch.softmax(scores, -1), slope


# --- the teacher's: what is kept ---------------------------------------------------------------------------------------


class Capture:
    """Of chosen layers of a model, the strongest keys of the rows that are wanted."""

    def __init__(self, model: PreTrainedModel, name: str, layers: Sequence[int], keys: int, each_head: bool) -> None:
        self.layers = list(layers)
        self.each_head = each_head
        self._name, self._keys = name, keys
        self._query = np.zeros(0, dtype=np.int64)
        self._seen: Counter[int] = Counter()
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        watch(model, name, layers, self._look)

    def rows(self, query: np.ndarray) -> None:
        """Which rows of the next forward are wanted. query: int64, ascending, indices into B*T."""
        self._query = query
        self._seen.clear()
        self._found = {layer: [] for layer in self.layers}

    def taken(self) -> dict[int, Rows]:
        """By layer, of all rows that were wanted. InputError for a model that computes its attention otherwise."""
        _refuse_others(self._name, self.layers, self._seen)
        found, self._found, self._query = self._found, {}, self._query[:0]
        return {layer: _kept([(weight.cpu().numpy(), key.cpu().numpy()) for weight, key in parts]) for layer, parts in found.items()}

    @torch.no_grad()
    def _look(self, layer: int, scene: Scene) -> None:
        self._seen[layer] += 1
        for _, _, b, t, width in _blocks(scene, self._query):
            weights, _ = _weights(scene, b, t, width)
            rows = weights.transpose(0, 1).flatten(0, 1) if self.each_head else weights.mean(0)
            top = rows.topk(min(self._keys, width), sorted=True)
            missing = (0, self._keys - top.values.shape[1])
            self._found[layer].append((torch.nn.functional.pad(top.values, missing), torch.nn.functional.pad(top.indices, missing)))


def _kept(parts: list[tuple[np.ndarray, np.ndarray]]) -> Rows:
    """parts: weights and keys [rows, keys]; a weight that would be stored as 0 is left with the others."""
    if not parts:
        return Rows(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.float32))
    weight, key = (np.concatenate(column) for column in zip(*parts, strict=True))
    there = weight >= LEAST
    order = np.argsort(np.where(there, -key, 1), axis=-1, kind="stable")
    weight, key, there = (np.take_along_axis(values, order, -1) for values in (weight, key, there))
    rest = 1 - np.where(there, weight, 0).sum(-1, dtype=np.float64)
    return Rows(there.sum(-1), key[there].astype(np.int32), weight[there].astype(np.float32), rest.clip(0, 1).astype(np.float32))


# --- the student's: how much goes to each cell -------------------------------------------------------------------------


class Attending:
    """The student's weights of the cells that the teacher's rows are of, as a part of the graph that is gone back through."""

    def __init__(self, model: PreTrainedModel, name: str, layers: Sequence[int]) -> None:
        """layers: the student's, one for each of the teacher's; some may be the same."""
        self._name, self._layers = name, list(layers)
        self._seen: Counter[int] = Counter()
        self._targets: Sequence[AttentionTarget] = ()
        self._found: dict[int, Tensor] | None = None
        watch(model, name, sorted(set(layers)), self._look)

    def to(self, targets: Sequence[AttentionTarget]) -> None:
        """What is wanted of the next forward: one target for each layer."""
        self._targets = targets
        self._seen.clear()
        self._found = {}

    def masses(self) -> list[Tensor]:
        """float32 [M] for each layer. InputError for a model that computes its attention otherwise."""
        _refuse_others(self._name, self._layers, self._seen)
        found, self._found = self._found or {}, None
        return [found[i] for i in range(len(self._layers))]

    def _look(self, layer: int, scene: Scene) -> None:
        self._seen[layer] += 1
        for i, (of, target) in enumerate(zip(self._layers, self._targets, strict=False)):
            if of == layer:
                mass = CellMass.apply(scene.query, scene.key, scene, target)
                # with gradient checkpointing a layer is computed once more on the way back: the same, for nobody
                if self._found is not None:
                    self._found[i] = mass


class CellMass(torch.autograd.Function):
    """float32 [M] of queries and keys: the sums of weights, averaged over the heads of a group. Maps exist block by block, forward and backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, scene: Scene, target: AttentionTarget) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.scene, ctx.target = (scene.mask, scene.scaling, scene.softcap, scene.window, scene.causal), target  # type: ignore[attr-defined]
        mass = torch.zeros(len(target.weight), device=query.device)
        for first, last, b, t, width in _blocks(scene, target.query):
            weights, _ = _weights(scene, b, t, width)
            here = slice(int(target.begin[first]), int(target.begin[last]))
            grouped = weights.view(target.groups, -1, *weights.shape[1:]).mean(1)
            mass.index_add_(0, target.entry_cell[here], grouped[target.entry_group[here], target.entry_row[here] - first, target.entry_key[here]])
        return mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key = ctx.saved_tensors
        scene, target = Scene(query, key, *ctx.scene), ctx.target
        heads, key_heads, size = query.shape[1], key.shape[1], query.shape[3]
        to_query, to_key = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, key))
        for first, last, b, t, width in _blocks(scene, target.query):
            weights, slope = _weights(scene, b, t, width)
            here = slice(int(target.begin[first]), int(target.begin[last]))
            share = heads // target.groups
            wanted = torch.zeros((target.groups, len(t), width), device=query.device)
            wanted.index_put_((target.entry_group[here], target.entry_row[here] - first, target.entry_key[here]), gradient[target.entry_cell[here]].float() / share, accumulate=True)
            # of a softmax: p * (g - sum of p * g)
            scores = weights.view(target.groups, share, *weights.shape[1:])
            pulled = scores * wanted[:, None]
            scores = pulled.sub_(scores * pulled.sum(-1, keepdim=True)).view_as(weights)
            if slope is not None:
                scores = scores * slope
            scores = scores.mul_(scene.scaling).reshape(key_heads, -1, width)
            with torch.autocast(query.device.type, enabled=False):
                rows = query[b][:, t].float().reshape(key_heads, -1, size)
                to_query[b].index_add_(1, t, torch.matmul(scores, key[b, :, :width].float()).view(heads, len(t), size))
                to_key[b, :, :width] += torch.matmul(scores.transpose(1, 2), rows)
        return to_query.to(query.dtype), to_key.to(key.dtype), None, None
