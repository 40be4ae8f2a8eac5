"""Logits at chosen positions only: the body once, then the head on the rows that are wanted, all at once or some at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import InputError
from pipeline.models.in_parts import LossOf, in_parts
from pipeline.signals.vocabulary import Vocabulary


class RowLogits(nn.Module):
    """A causal LM as a module from token ids and flat row indices to logits [N, V]."""

    def __init__(self, model: PreTrainedModel, vocabulary_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size = vocabulary_size

    def forward(self, ids: Tensor, rows: Tensor) -> Tensor:
        """ids: int64 [B, T], padded on the right; rows: int64 [N], indices into B*T. Logits [N, V] in the model's type."""
        return self.head(self.hidden(ids)[rows])

    def hidden(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B*T, H]. Without a padding mask: what is padded on the right is seen by no position before it.

        positions: int64 [1, T] of records in one row, from 0 in each: none sees another (`check_packing`).
        """
        given = {} if positions is None else {"position_ids": positions}
        return self.model.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state.flatten(0, 1)

    def check_packing(self, name: str) -> None:
        """InputError for an architecture in which records in one row see each other."""
        device = next(self.model.parameters()).device
        ids = torch.arange(1, 10, device=device) % self.vocabulary_size
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]], device=device)
        with torch.inference_mode():
            alone = torch.cat([self.hidden(part[None]) for part in ids.split([5, 4])])
            packed = self.hidden(ids[None], positions)
        if not torch.allclose(packed, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
            raise InputError(f"{name} ({type(self.model).__name__}) does not keep records apart that are packed into one row. Set machine.packing to false.")

    def head(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, V] of hidden [N, H]. Rows of the head beyond the tokenizer's ids are no tokens: they take no part. out: what `space` gave."""
        head = self.model.get_output_embeddings()
        logits = head(hidden) if out is None else torch.mm(hidden, head.weight.t(), out=out)
        return _capped(logits[:, : self.vocabulary_size], self.softcap)

    def space(self, rows: int) -> Tensor | None:
        """Memory for the logits of so many rows, to be used again: fresh memory costs a CPU a tenth of the product. None where the head is no plain matrix."""
        head = self.model.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None
        return head.weight.new_empty((rows, len(head.weight))) if plain else None

    def loss(self, hidden: Tensor, parts: Sequence[tuple[int, int]], loss_of: LossOf) -> Tensor:
        """As `in_parts`: the loss of the logits of hidden [N, H], of which only one part's exist at a time. In autocast's type where that is on."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            return in_parts(hidden, self.model.get_output_embeddings(), self.vocabulary_size, dtype, parts, lambda i, logits: loss_of(i, _capped(logits, self.softcap)))

    @property
    def softcap(self) -> float | None:
        """The logits are softcap * tanh(logits / softcap), as in Gemma 2."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def keep_head(self, path: Path) -> None:
        """Write what `KeptHead` reads: weight [V, H], bias [V] where there is one, and the soft cap."""
        head = self.model.get_output_embeddings()
        rows = {name: getattr(head, name, None) for name in ("weight", "bias")}
        tensors = {name: tensor[: self.vocabulary_size].detach().cpu().contiguous() for name, tensor in rows.items() if tensor is not None}
        save_file(tensors, path, {"softcap": str(self.softcap or 0.0)})


class KeptHead:
    """The teacher's head out of a cache: logits of the hidden states that are kept there."""

    def __init__(self, path: Path, device: torch.device) -> None:
        with safe_open(path, "pt", device=str(device)) as file:
            self._weight: Tensor = file.get_tensor("weight")
            self._bias: Tensor | None = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118
            self._softcap = float(file.metadata()["softcap"])

    def __call__(self, states: Tensor, scale: Tensor) -> Tensor:
        """float32 [N, V] of hidden states [N, H], int8 in units of scale [N]."""
        hidden = (states.float() * scale[:, None]).to(self._weight.dtype)
        return _capped(nn.functional.linear(hidden, self._weight, self._bias), self._softcap).float()


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return torch.tanh(logits / cap) * cap if cap else logits


def rows_that_are_tokens(model: PreTrainedModel, name: str, vocabulary: Vocabulary) -> int:
    """How many rows of the model's head stand for tokens; InputError if the tokenizer has more tokens than that."""
    head_rows = int(model.get_output_embeddings().weight.shape[0])
    if any(vocabulary.token_bytes[head_rows:]):
        raise InputError(f"The tokenizer of {name} has {len(vocabulary)} tokens and the model's head {head_rows} rows: they are not of the same model.")
    return min(len(vocabulary), head_rows)


def row_logits(model: PreTrainedModel, name: str, vocabulary_size: int) -> RowLogits:
    """RowLogits, once it is seen to give what the model itself gives; InputError for an architecture that does more."""
    module = RowLogits(model, vocabulary_size)
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)[None] % vocabulary_size
    with torch.inference_mode():
        theirs = model(input_ids=ids, use_cache=False).logits[0, :, :vocabulary_size].float()
        ours = module(ids, torch.arange(8, device=device)).float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.nan_to_num(0, 0, 0).abs().max()), equal_nan=True):
        raise InputError(f"{name} ({type(model).__name__}) does something to its logits after the head that pipeline does not know, so they cannot be made in parts. Choose another architecture.")
    return module
