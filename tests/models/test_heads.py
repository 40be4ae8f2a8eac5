import types
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from pipeline.errors import InputError
from pipeline.models.heads import KeptHead, row_logits
from pipeline.signals.codec import encode_hidden
from tests.models import real

SMALL = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}


def llama(**more) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | more)).eval()


def gemma(**more) -> PreTrainedModel:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL | {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]} | more)).eval()


def phi(**more) -> PreTrainedModel:
    """With a bias in its head."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SMALL | {"num_key_value_heads": 2} | more)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


MODELS = {"llama": llama, "llama, tied": lambda: llama(tie_word_embeddings=True), "gemma": gemma, "gemma, capped": lambda: gemma(final_logit_softcapping=2.0), "phi, with a bias": phi}


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


@pytest.mark.parametrize("name", MODELS)
def test_memory_that_is_used_again_changes_no_logit(name: str):
    """And a head with a bias has none of it."""
    model = MODELS[name]()
    module = row_logits(model, "tiny", 60)
    space = module.space(16)
    assert (space is None) == (model.get_output_embeddings().bias is not None)
    with torch.inference_mode():
        for first in (0, 16):
            hidden = module.hidden(torch.arange(first, first + 16)[None])
            torch.testing.assert_close(module.head(hidden, space), module.head(hidden), rtol=0, atol=1e-5)


def check_kept_head(model: PreTrainedModel, file: Path, bits: float = 0.5) -> None:
    """Logits of int8 states and the head that was kept: off by what rounding each element by half its scale can make."""
    module = row_logits(model, "tiny", 60)
    module.keep_head(file)
    with torch.inference_mode():
        hidden = module.hidden(torch.arange(16)[None])
        theirs = module.head(hidden).float()
        states, scale = encode_hidden(hidden.float().numpy())
        ours = KeptHead(file, torch.device("cpu"))(torch.from_numpy(states), torch.from_numpy(scale))
        allowed = bits * torch.from_numpy(scale)[:, None] * model.get_output_embeddings().weight[:60].abs().sum(-1)[None]
    assert ours.shape == (16, 60)
    assert ours.dtype == torch.float32
    assert ((ours - theirs).abs() <= allowed + 1e-4).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_kept_head_gives_the_models_logits_of_int8_states(name: str, tmp_path: Path):
    check_kept_head(MODELS[name](), tmp_path / "head.safetensors")


def test_control_a_kept_head_without_its_cap_or_its_bias_and_a_bound_a_tenth_as_wide_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AssertionError):
        check_kept_head(llama(), tmp_path / "head.safetensors", bits=0.05)
    real = KeptHead.__init__

    def forgets(self, *arguments):
        real(self, *arguments)
        self._bias, self._softcap = None, 0.0

    monkeypatch.setattr(KeptHead, "__init__", forgets)
    for model in (gemma(final_logit_softcapping=2.0), phi()):
        with pytest.raises(AssertionError):
            check_kept_head(model, tmp_path / "head.safetensors")


def test_logits_of_a_real_model_are_its_own():
    model = AutoModelForCausalLM.from_pretrained(real.folder(real.SMOLLM), dtype=torch.float32).eval()
    module = row_logits(model, "SmolLM", model.config.vocab_size)
    ids = torch.arange(1000, 1012)[None]
    with torch.inference_mode():
        torch.testing.assert_close(module(ids, torch.tensor([3, 11])), model(input_ids=ids).logits[0, [3, 11]], rtol=1e-4, atol=1e-3)
