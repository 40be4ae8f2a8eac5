import types

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.errors import InputError
from pipeline.models.heads import row_logits
from tests.models import real

SMALL = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}


def llama(**more) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | more)).eval()


def gemma(**more) -> PreTrainedModel:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL | {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]} | more)).eval()


MODELS = {"llama": llama, "llama, tied": lambda: llama(tie_word_embeddings=True), "gemma": gemma, "gemma, capped": lambda: gemma(final_logit_softcapping=2.0)}


def check(model: PreTrainedModel, rows_to_ours=lambda rows: rows) -> None:
    """The rows of a padded batch, against the model's own logits of each record alone."""
    module = row_logits(model, "tiny", 70)
    lengths, width = (9, 5, 16), 16
    records = [torch.randint(0, 70, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    ids = torch.stack([torch.nn.functional.pad(record, (0, width - len(record))) for record in records])
    wanted = [(b, t) for b, length in enumerate(lengths) for t in range(length) if t % 3 != 1]
    rows = torch.tensor([b * width + t for b, t in wanted])
    with torch.inference_mode():
        ours = module(ids, rows_to_ours(rows))
        theirs = torch.stack([model(input_ids=records[b][None]).logits[0, t] for b, t in wanted])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_rows_are_the_models_own_there(name: str):
    check(MODELS[name]())


def test_rows_of_the_head_beyond_the_tokenizers_are_left_out():
    model = llama()
    ids, rows = torch.arange(8)[None], torch.tensor([0, 5])
    assert torch.equal(row_logits(model, "tiny", 60)(ids, rows), row_logits(model, "tiny", 70)(ids, rows)[:, :60])


def test_control_rows_shifted_by_one_are_caught():
    with pytest.raises(AssertionError):
        check(llama(), lambda rows: (rows - 1).clamp(min=0))


def test_a_model_that_scales_its_logits_after_the_head_is_refused():
    model = llama()
    forward = model.forward

    def scaled(self, *args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    row_logits(model, "tiny", 70)
    model.forward = types.MethodType(scaled, model)
    with pytest.raises(InputError, match="after the head"):
        row_logits(model, "tiny", 70)


def test_an_architecture_that_scales_its_logits_is_refused():
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)).eval()
    with pytest.raises(InputError, match="Granite"):
        row_logits(model, "tiny", 70)


def test_a_cap_that_is_forgotten_is_refused(monkeypatch):
    model = gemma(final_logit_softcapping=2.0)
    monkeypatch.setattr("pipeline.models.heads.RowLogits.head", lambda self, hidden: self.model.get_output_embeddings()(hidden)[:, :70])
    with pytest.raises(InputError, match="after the head"):
        row_logits(model, "tiny", 70)


def test_logits_of_a_real_model_are_its_own():
    model = AutoModelForCausalLM.from_pretrained(real.folder(real.SMOLLM), dtype=torch.float32).eval()
    module = row_logits(model, "SmolLM", model.config.vocab_size)
    ids = torch.arange(1000, 1012)[None]
    with torch.inference_mode():
        torch.testing.assert_close(module(ids, torch.tensor([3, 11])), model(input_ids=ids).logits[0, [3, 11]], rtol=1e-4, atol=1e-3)
