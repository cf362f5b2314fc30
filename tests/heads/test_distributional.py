"""Distributional heads: the expectation and its relatives against a float64 twin, in files, and in models."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.modeling.tiny_models import batch, build
from vhead import AutoModelForCausalLMWithValueHead, Support, ValueHead, ValueHeadModel, formats
from vhead.errors import HeadError, HeadFileError, HeadMismatchError

CONFIG = SimpleNamespace(hidden_size=16)
SUPPORT = Support(-2.0, 3.0, 21)
SUPPORTS = [SUPPORT, Support(-2.0, 3.0, 21, kind="two_hot")]


def head_with(support=SUPPORT, **arguments):
    torch.manual_seed(7)
    arguments = {"v_head_init_strategy": "normal", "summary_dropout_prob": 0.0, **arguments}
    return ValueHead(CONFIG, support=support, **arguments)


def twin(head, states):
    """Probabilities and returns of the bins, float64."""
    linears = [m for m in head.summary.modules() if isinstance(m, torch.nn.Linear)]
    hidden = states.double()
    for index, linear in enumerate(linears):
        hidden = hidden.relu() if index else hidden
        hidden = torch.nn.functional.linear(hidden, linear.weight.double(), linear.bias.double())
    inset = head.support.bin_width / 2 if head.support.kind == "hl_gauss" else 0.0
    low, high = head.support.low + inset, head.support.high - inset
    return hidden.softmax(-1), torch.linspace(low, high, head.support.bins, dtype=torch.float64)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("intermediate", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_expectation_and_gradients_are_its(support, intermediate, dtype):
    head = head_with(support, intermediate_size=intermediate)
    states = torch.randn(4, 5, 16).to(dtype)
    values = head(states)
    assert values.shape == (4, 5, 1)
    assert values.dtype == torch.float32
    probabilities, returns = twin(head, states)
    expected = (probabilities * returns).sum(-1, keepdim=True)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01
    wanted = torch.randn(4, 5, 1)
    (values - wanted).square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in head.parameters()]
    head.zero_grad()
    (expected - wanted).square().mean().backward()
    for gradient, parameter in zip(gradients, head.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
        assert gradient.any()


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_distribution_and_variance_are_the_twin_s(support):
    head, states = head_with(support), torch.randn(30, 16)
    probabilities, returns = twin(head, states)
    torch.testing.assert_close(head.distribution(states).double(), probabilities, rtol=1e-5, atol=1e-6)
    mean = (probabilities * returns).sum(-1, keepdim=True)
    variance = (probabilities * (returns - mean).square()).sum(-1, keepdim=True)
    torch.testing.assert_close(head.variance(states).double(), variance, rtol=1e-4, atol=1e-5)
    head.variance(states).sum().backward()
    assert head.summary.weight.grad.any()


def test_quantiles_are_the_first_bins_that_reach_their_share():
    head, states = head_with(), torch.randn(30, 16)
    probabilities, returns = twin(head, states)
    shares = [0.0, 0.03, 0.5, 0.9, 1.0]
    quantiles = head.quantile(states, shares)
    for row, own in zip(probabilities, quantiles, strict=True):
        for share, quantile in zip(shares, own, strict=True):
            below = row[returns <= quantile.item() + 1e-6].sum()
            assert below >= share - 1e-5
            assert below - row[(returns - quantile.item()).abs() < 1e-5].sum() <= share + 1e-5
    assert torch.equal(head.quantile(states, 0.5), quantiles[:, 2:3])
    assert not torch.equal(quantiles[:, 1], quantiles[:, 3])
    sure = head.requires_grad_(False)
    sure.summary.weight.zero_()
    sure.summary.bias.fill_(-200.0)[4] = 200.0
    assert sure.quantile(states, [0.5, 1.0]).unique().tolist() == [SUPPORT.centers()[4].item()]
    assert sure.quantile(states * torch.nan, 0.5).isnan().all()


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan"), [], [0.5, 2.0]])
def test_a_share_outside_the_range_is_refused(q):
    with pytest.raises(HeadError, match="q: expected a share in"):
        head_with().quantile(torch.randn(2, 16), q)


def test_a_head_without_a_support_has_no_distribution():
    head, states = ValueHead(CONFIG, num_outputs=3), torch.randn(2, 16)
    for ask in (head.logits, head.distribution, head.variance, lambda s: head.quantile(s, 0.5)):
        with pytest.raises(HeadError, match="support: expected a head with one"):
            ask(states)


def test_a_row_s_value_does_not_depend_on_the_batch():
    head, states = head_with().eval(), torch.randn(17, 16)
    together = head(states)
    assert all(torch.equal(head(states[row : row + 1])[0], together[row]) for row in range(17))
    assert not torch.equal(head(states[:1] * 1.01)[0], together[0])


def test_a_head_learns_the_returns_of_its_states():
    head, states = head_with(v_head_init_strategy="zeros"), torch.randn(64, 16)
    returns = (states[:, 0] * 0.6).clamp(-1.5, 2.5)
    assert torch.allclose(head(states), torch.tensor(0.5)), "a head of zeros begins in the middle"
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        head.support.cross_entropy(head.logits(states), returns).mean().backward()
        optimizer.step()
    assert (head(states).squeeze(-1) - returns).square().mean() < 0.2 * returns.var()


def test_an_output_is_one_number_whatever_the_bins():
    head = head_with()
    assert (head.num_outputs, head.summary.out_features, head.weights().num_outputs) == (1, 21, 1)
    with pytest.raises(HeadError, match="num_outputs: expected 1 for a head with a support"):
        head_with(num_outputs=2)
    with pytest.raises(HeadError, match=r"support: expected a vhead.Support or None, got \(0, 1\)"):
        head_with((0, 1))
    with pytest.raises(HeadError, match="activation: expected None for a head with a support"):
        head_with(activation="softmax")
    with pytest.raises(HeadError, match='activation: expected None or "softmax"'):
        ValueHead(CONFIG, num_outputs=2, activation="sigmoid")


# Files


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return one.support == other.support and one.activation == other.activation and all(torch.equal(*p) for p in pairs)


@pytest.mark.parametrize("intermediate", [None, 6])
def test_the_support_travels_in_the_head_s_own_file(tmp_path, intermediate):
    head = head_with(intermediate_size=intermediate)
    formats.save(head.weights(), tmp_path / "head.safetensors", format="vhead")
    read = formats.load(tmp_path / "head.safetensors")
    assert (read.support, read.num_outputs, read.format) == (SUPPORT, 1, "vhead")
    assert same(ValueHead.like(read, CONFIG), head)


def test_the_activation_travels_in_the_head_s_own_file(tmp_path):
    head = ValueHead(CONFIG, num_outputs=2, activation="softmax")
    formats.save(head.weights(), tmp_path / "head.safetensors", format="vhead")
    assert same(ValueHead.like(formats.load(tmp_path / "head.safetensors"), CONFIG), head)
    with pytest.raises(HeadError, match="a pickled file has no place for the support or the activation"):
        formats.save(head.weights(), tmp_path / "head.bin", format="vhead")
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]


def test_a_head_that_is_its_weights_alone_says_nothing_more(tmp_path):
    formats.save(ValueHead(CONFIG).weights(), tmp_path / "head.safetensors")
    with safe_open(tmp_path / "head.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["trl", "llama-factory", "nemo", "hf-token-classification", "qwen"])
def test_other_formats_refuse_a_support(tmp_path, name):
    with pytest.raises(
        HeadError,
        match=f"{name} cannot hold the support of a distributional head; vhead does|{name} cannot hold a head of 1",
    ):
        formats.save(head_with().weights(), tmp_path / "head.safetensors", format=name)


def rewritten(path, metadata, state=None):
    state = load_file(path) if state is None else state
    save_file(state, path, metadata={"format": "pt", **metadata})
    return path


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ("[]", "expected a JSON object, got a list"),
        ('{"v_head_support": 3}', "expected an object with bins"),
        ('{"v_head_support": {"low": 0, "high": 1, "bins": 21, "kind": "three_hot"}}', "kind: expected one of"),
        ('{"v_head_support": {"low": NaN, "high": 1, "bins": 21, "kind": "two_hot"}}', "low: expected a finite number"),
        ('{"v_head_activation": "relu"}', "v_head_activation: expected null or"),
        (
            json.dumps({"v_head_support": SUPPORT.settings(), "v_head_activation": "softmax"}),
            "v_head_activation: expected null beside",
        ),
    ],
)
def test_a_hostile_statement_is_an_error_that_names_the_file(tmp_path, text, word):
    formats.save(head_with().weights(), tmp_path / "head.safetensors", format="vhead")
    path = rewritten(tmp_path / "head.safetensors", {"v_head": text})
    for look in (formats.load, formats.detect, formats.find_head):
        with pytest.raises(HeadFileError, match=word) as error:
            look(path)
        assert str(path) in str(error.value)


def test_a_support_of_other_bins_than_outputs_is_refused(tmp_path):
    other = Support(-2.0, 3.0, 20)
    formats.save(head_with().weights(), tmp_path / "head.safetensors", format="vhead")
    path = rewritten(tmp_path / "head.safetensors", {"v_head": json.dumps({"v_head_support": other.settings()})})
    for look in (formats.load, formats.detect, formats.find_head):
        with pytest.raises(HeadMismatchError, match="a support of 20 bins for a head of 21 outputs"):
            look(path)


# Models


@pytest.fixture
def model():
    torch.manual_seed(8)
    return AutoModelForCausalLMWithValueHead(build("llama"), support=SUPPORT, v_head_init_strategy="normal").eval()


def values_of(model):
    with torch.no_grad():
        return model.values(**batch(model.pretrained_model))


def test_a_model_gives_one_value_a_token(model):
    inputs = batch(model.pretrained_model)
    assert model(**inputs).value.shape == inputs["input_ids"].shape
    assert torch.equal(values_of(model), model.v_head.eval()(states_of(model)).squeeze(-1))


def states_of(model):
    with torch.no_grad():
        return model.pretrained_model.model(**batch(model.pretrained_model)).last_hidden_state


def test_a_saved_model_keeps_the_support_and_its_configuration_stays_as_it_was(tmp_path, model):
    before = dict(model.pretrained_model.config.__dict__)
    model.save_pretrained(tmp_path)
    assert model.pretrained_model.config.__dict__.keys() - before.keys() <= {"architectures", "dtype", "torch_dtype"}
    assert json.loads((tmp_path / "config.json").read_text())["v_head_support"] == SUPPORT.settings()
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert same(again.v_head, model.v_head)
    assert torch.equal(values_of(again), values_of(model))


def test_another_head_is_not_saved_with_the_old_one_s_support(tmp_path, model):
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "first")
    again.v_head = ValueHead(again.config, num_outputs=4)
    again.save_pretrained(tmp_path / "second")
    assert "v_head_support" not in json.loads((tmp_path / "second" / "config.json").read_text())
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "second")
    assert (loaded.v_head.support, loaded.v_head.num_outputs) == (None, 4)


def test_a_configuration_that_does_not_fit_the_head_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["v_head_support"]["bins"] = 20
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadMismatchError, match="a support of 20 bins for a head of 21 outputs"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_a_support_can_be_asked_for_and_must_be_the_checkpoint_s(tmp_path, model):
    model.save_pretrained(tmp_path)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    assert load(tmp_path, support=SUPPORT).v_head.support == SUPPORT
    with pytest.raises(HeadMismatchError, match=r"support: expected Support.*bins=20"):
        load(tmp_path, support=Support(-2.0, 3.0, 20))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["v_head_support"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).v_head.num_outputs == 21
    assert same(load(tmp_path, support=SUPPORT).v_head, model.v_head)
    with pytest.raises(HeadMismatchError, match="found a head of 21 outputs without one"):
        load(tmp_path, support=Support(-2.0, 3.0, 20))


def test_a_fresh_head_gets_the_support_that_is_asked_for(tmp_path):
    build("llama").save_pretrained(tmp_path)
    head = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, support=SUPPORT).v_head
    assert (head.support, head.summary.out_features) == (SUPPORT, 21)


def test_the_pretrained_form_keeps_the_support(tmp_path, model):
    expected = values_of(model)
    ValueHeadModel.from_wrapper(model).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert same(again.v_head, model.v_head)
    assert torch.equal(values_of(again.eval()), expected)
    assert torch.equal(values_of(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)), expected)
    assert again.to_wrapper().v_head.support == SUPPORT


def test_the_pretrained_form_of_other_bins_is_refused(tmp_path, model):
    ValueHeadModel.from_wrapper(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["v_head_support"]["bins"] = 20
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadMismatchError, match="a support of 20 bins for a head of 21 outputs"):
        AutoModel.from_pretrained(tmp_path)


def test_the_activation_of_a_classifier_travels_with_models(tmp_path):
    torch.manual_seed(9)
    model = AutoModelForCausalLMWithValueHead(build("llama"))
    model.v_head = ValueHead(model.config, num_outputs=2, activation="softmax")
    model.save_pretrained(tmp_path / "wrapper")
    ValueHeadModel.from_wrapper(model).save_pretrained(tmp_path / "pretrained")
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "wrapper").v_head.activation == "softmax"
    assert AutoModel.from_pretrained(tmp_path / "pretrained").v_head.activation == "softmax"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_s_folder_keeps_the_support(tmp_path, model):
    peft = pytest.importorskip("peft")
    body = model.pretrained_model
    body.save_pretrained(tmp_path / "base")
    body = type(body).from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(body, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with_adapter = AutoModelForCausalLMWithValueHead(adapted, support=SUPPORT, v_head_init_strategy="normal").eval()
    with_adapter.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert same(again.v_head, with_adapter.v_head)
    assert not (tmp_path / "adapter" / "pytorch_model.bin").exists()


def test_a_conversion_keeps_the_support_or_says_that_it_cannot(tmp_path, model):
    model.save_pretrained(tmp_path / "critic")
    done = formats.convert(tmp_path / "critic", tmp_path / "copy")
    assert done.format == "vhead"
    assert formats.load(tmp_path / "copy").support == SUPPORT
    formats.convert(tmp_path / "critic", tmp_path / "head.safetensors")
    assert formats.load(tmp_path / "head.safetensors").support == SUPPORT
    with pytest.raises(HeadError, match="hf-token-classification cannot hold the support"):
        formats.convert(tmp_path / "critic", tmp_path / "other", "hf-token-classification")
    assert not (tmp_path / "other").exists()
