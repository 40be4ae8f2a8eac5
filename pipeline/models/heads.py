"""Logits at chosen positions only: the body once, then the head on the rows that are wanted."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import InputError
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

    def hidden(self, ids: Tensor) -> Tensor:
        """[B*T, H]. Without a padding mask: what is padded on the right is seen by no position before it."""
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)

    def head(self, hidden: Tensor) -> Tensor:
        """[N, V] of hidden [N, H]. Rows of the head beyond the tokenizer's ids are no tokens: they take no part."""
        logits = self.model.get_output_embeddings()(hidden)[:, : self.vocabulary_size]
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
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
