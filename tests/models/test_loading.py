import pytest
import torch
from transformers import PreTrainedModel

from pipeline.errors import InputError
from pipeline.models.loading import device_named, keep_layers, load_student, load_teacher
from tests.models.test_heads import gemma, llama

FOUR = {
    "llama": lambda: llama(num_hidden_layers=4),
    "llama, tied": lambda: llama(num_hidden_layers=4, tie_word_embeddings=True),
    "gemma": lambda: gemma(num_hidden_layers=4, layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]),
}
CPU = torch.device("cpu")
EACH = pytest.mark.parametrize("name", FOUR)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(1, 21)[None]).logits


def check(model: PreTrainedModel, smaller: PreTrainedModel, layers: list[int]) -> None:
    """The kept layers are the originals' and so is everything else."""
    assert len(smaller.model.layers) == smaller.config.num_hidden_layers == len(layers)
    for new, old in enumerate(layers):
        ours, theirs = smaller.model.layers[new].state_dict(), model.model.layers[old].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rest = {key: value for key, value in model.state_dict().items() if ".layers." not in key}
    assert rest
    assert all(torch.equal(smaller.state_dict()[key], value) for key, value in rest.items())


@EACH
@pytest.mark.parametrize("layers", [[0], [2], [0, 3], [3, 1], [0, 1, 2, 3], [1, 1]])
def test_the_kept_layers_are_the_originals(name: str, layers: list[int]):
    model = FOUR[name]()
    smaller = keep_layers(model, layers, "tiny")
    check(model, smaller, layers)
    assert logits(smaller).isfinite().all()
    assert (smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_control_the_first_layers_instead_of_those_named_are_caught():
    model = FOUR["llama"]()
    with pytest.raises(AssertionError):
        check(model, keep_layers(model, [0, 1], "tiny"), [0, 3])


@EACH
def test_with_all_layers_the_logits_are_identical_and_without_one_they_are_not(name: str):
    model = FOUR[name]()
    assert torch.equal(logits(keep_layers(model, [0, 1, 2, 3], "tiny")), logits(model))
    assert not torch.allclose(logits(keep_layers(model, [0, 1, 3], "tiny")), logits(model), atol=1e-2)


@EACH
def test_kept_layers_do_what_the_model_does_with_the_others_skipped(name: str):
    """Each layer keeps its kind of attention and its rotary embedding, wherever it comes to stand."""
    model, layers = FOUR[name](), [0, 2, 3]
    smaller = keep_layers(model, layers, "tiny")
    skipped = model.model.layers[1]
    skipped.forward = lambda hidden_states, *args, **kwargs: hidden_states
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layers", "kinds"), [([2, 3], ["full_attention", "sliding_attention"]), ([2], ["full_attention"]), ([3, 2, 0], ["sliding_attention", "full_attention", "sliding_attention"])])
def test_each_layer_takes_its_kind_of_attention_along(layers: list[int], kinds: list[str]):
    smaller = keep_layers(FOUR["gemma"](), layers, "tiny")
    assert smaller.config.layer_types == kinds
    assert [layer.self_attn.is_sliding for layer in smaller.model.layers] == [kind == "sliding_attention" for kind in kinds]


@EACH
def test_a_smaller_model_saved_and_loaded_is_the_same(name: str, tmp_path):
    smaller = keep_layers(FOUR[name](), [3, 0], "tiny")
    smaller.save_pretrained(tmp_path)
    assert torch.equal(logits(load_student(str(tmp_path), None, None, CPU)), logits(smaller))


@EACH
@pytest.mark.parametrize("layers", [[], [4], [0, 17], [-1], [0, -2]])
def test_layers_that_are_not_there_are_an_error(name: str, layers: list[int]):
    with pytest.raises(InputError, match="layers 0 to 3"):
        keep_layers(FOUR[name](), layers, "tiny")


def test_changing_the_smaller_model_leaves_the_original_as_it_was():
    model = FOUR["llama, tied"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smaller = keep_layers(model, [0, 2], "tiny")
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_student_is_loaded_in_float32_with_the_layers_asked_for(tmp_path):
    FOUR["gemma"]().bfloat16().save_pretrained(tmp_path)
    model = load_student(str(tmp_path), None, [1, 2], CPU)
    assert len(model.model.layers) == 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_is_loaded_for_inference(tmp_path):
    FOUR["llama"]().save_pretrained(tmp_path)
    model = load_teacher(str(tmp_path), None, "none", False, "bfloat16", CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.bfloat16


def test_a_folder_without_a_model_and_damaged_weights_are_errors(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_student(str(tmp_path / "nothing"), None, None, CPU)
    FOUR["llama"]().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="SafetensorError"):
        load_student(str(tmp_path), None, None, CPU)


def test_cuda_where_there_is_none_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto").type == device_named("cpu").type == "cpu"
    with pytest.raises(InputError, match=r"machine\.device"):
        device_named("cuda")
