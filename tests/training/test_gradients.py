"""The gradients of a packed pass are those of a padded loop, for every parameter, and as close to float64."""

import copy

import pytest
import torch

from tests.trainers.toy_task import language_model
from tests.training.padded_loop import (
    difference,
    gradients_of,
    loop_loss,
    of_loop,
    of_pass,
    packed_loss,
    rollouts,
    weights_of,
)
from vhead import AutoModelForCausalLMWithValueHead, TrainingPass, freeze, losses

TOLERANCE = 2e-5
# Of peft, about transformers' own new names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def with_head(body, **arguments):
    torch.manual_seed(3)
    return AutoModelForCausalLMWithValueHead(body, summary_dropout_prob=0.0, **arguments).eval()


def in_double(model):
    return copy.deepcopy(model).double()


@pytest.fixture
def given():
    return rollouts()


@pytest.fixture
def weights(given):
    return weights_of(given)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_s_gradient_is_as_close_to_float64_as_a_padded_loop_s(given, weights, tied):
    model = with_head(language_model(tied=tied))
    loss, truth = of_loop(in_double(model), given, weights)
    found_loss, found = of_pass(TrainingPass(model), given, weights)
    of_padding = difference(of_loop(model, given, weights, 4)[1], truth)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert len(found) > 15
    for name, error in difference(found, truth).items():
        assert error <= max(1.5 * of_padding[name], 2e-6), name


@pytest.mark.parametrize("attention", ["segments", "mask"])
@pytest.mark.parametrize("token_budget", [40, 64, 1000])
def test_any_budget_and_attention_gives_the_same_gradients(given, weights, attention, token_budget):
    model = with_head(language_model())
    _, truth = of_loop(in_double(model), given, weights)
    training_pass = TrainingPass(model, token_budget=token_budget, attention=attention)
    assert training_pass.plan.packing.attention == attention
    assert max(difference(of_pass(training_pass, given, weights)[1], truth).values()) < TOLERANCE


def test_tokens_that_are_shared_go_through_the_model_once(given):
    batches = TrainingPass(with_head(language_model()), token_budget=1000).batches(given)
    whole = [(*each.prompt, *each.completion) for each in given]
    assert sum(batch.tokens for batch in batches) == len({row[:end] for row in whole for end in range(1, len(row) + 1)})


def test_the_comparison_sees_a_rollout_that_is_left_out(given, weights):
    model = with_head(language_model())
    training_pass = TrainingPass(model)
    _, truth = of_loop(in_double(model), given, weights)
    assert max(difference(of_pass(training_pass, given[1:], weights[1:])[1], truth).values()) > 100 * TOLERANCE


def test_the_comparison_sees_a_path_that_mixes_rollouts_up(given, weights, monkeypatch):
    from vhead.packing.tree_packing import TreePacking

    model = with_head(language_model())
    _, truth = of_loop(in_double(model), given, weights)
    training_pass = TrainingPass(model)
    own = TreePacking.states
    monkeypatch.setattr(TreePacking, "states", _spoilt(own))
    assert max(difference(of_pass(training_pass, given, weights)[1], truth).values()) > 100 * TOLERANCE


def _spoilt(own):
    from dataclasses import replace

    return lambda self, batch: own(self, replace(batch, content=self.spoilt(batch.content)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attention", ["segments", "mask"])
def test_gradient_checkpointing_gives_the_same_bits(given, weights, attention, reentrant):
    model = with_head(language_model())
    training_pass = TrainingPass(model, attention=attention).train()
    _, expected = of_pass(training_pass, given, weights)
    body = model.pretrained_model
    checkpoint_activations(body, use_reentrant=reentrant)
    body.enable_input_require_grads()
    ran = count_layer_runs(body)
    _, found = of_pass(training_pass, given, weights)
    assert len(ran) == 2 * 2 * len(training_pass.batches(given))
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def checkpoint_activations(body, **arguments):
    # Transformers 5.24 renamed it.
    getattr(body, "activation_checkpointing_enable", body.gradient_checkpointing_enable)(arguments)


def count_layer_runs(body):
    ran = []
    for layer in body.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    return ran


def test_layers_that_are_computed_again_attend_along_their_paths_after_the_model_was_used_otherwise(given, weights):
    model = with_head(language_model())
    training_pass = TrainingPass(model).train()
    _, expected = of_pass(training_pass, given[:4], weights[:4])
    checkpoint_activations(model.pretrained_model, use_reentrant=False)
    (batch,) = training_pass.batches(given[:4])
    out = training_pass(batch)
    model(torch.arange(3, 9)[None])
    training_pass(training_pass.batches(given[4:])[0])
    weight = batch.flat(weights[:4])
    loss = (out.values * weight[:, 0] + out.logprobs * weight[:, 1] + out.entropy * weight[:, 2]).double().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad.double(), expected[name]), name


def test_a_model_in_bfloat16_is_no_further_from_float64_than_a_padded_loop(given, weights):
    model = with_head(language_model()).to(torch.bfloat16)
    _, truth = of_loop(in_double(model), given, weights)
    _, padded = of_loop(model, given, weights, 4)
    training_pass = TrainingPass(model)
    assert training_pass.plan.packing.attention == "segments", str(training_pass.plan)
    _, found = of_pass(training_pass, given, weights)
    far, padded_far = difference(found, truth), difference(padded, truth)
    assert sum(far.values()) <= 1.1 * sum(padded_far.values())


def test_autocast_to_bfloat16_is_no_further_from_float64_than_a_padded_loop(given, weights):
    model = with_head(language_model())
    _, truth = of_loop(in_double(model), given, weights)
    training_pass = TrainingPass(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, padded = of_loop(model, given, weights, 4)
        _, found = of_pass(training_pass, given, weights)
    far, padded_far = difference(found, truth), difference(padded, truth)
    assert 1e-4 < sum(far.values()) <= 1.1 * sum(padded_far.values())


def test_float64_stays_float64(given, weights):
    model = in_double(with_head(language_model()))
    training_pass = TrainingPass(model)
    (batch,) = training_pass.batches(given)
    assert {tensor.dtype for tensor in training_pass(batch) if tensor is not None} == {torch.float64}
    _, truth = of_loop(model, given, weights)
    assert (
        max(difference(of_pass(training_pass, given, weights)[1], truth).values()) < 1e-6
    )  # Llama's norms are float32 in any case.


def adapted(**options):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options
    )
    torch.manual_seed(5)
    return peft.get_peft_model(language_model(tied=False), lora)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "lora and a trained lm_head"])
def test_adapters_get_the_gradients_of_a_padded_loop(given, weights, options):
    model = with_head(adapted(**options))
    training_pass = TrainingPass(model)
    assert training_pass.plan.packing.attention == "segments", str(training_pass.plan)
    _, truth = of_loop(in_double(model), given, weights)
    _, found = of_pass(training_pass, given, weights)
    assert any("lora_A" in name for name in found)
    assert max(difference(found, truth).values()) < TOLERANCE


def test_candidates_have_gradients_too(given):
    body = language_model()
    generator = torch.Generator().manual_seed(1)
    asked = [
        type(each)(
            each.prompt,
            each.completion,
            mask=each.mask,
            candidates=torch.randint(3, 90, (len(each.completion), 4), generator=generator),
        )
        for each in given
    ]
    model = with_head(body)
    weights = [torch.randn(len(each.completion), 4, generator=generator) for each in given]
    training_pass = TrainingPass(model, temperature=0.7)

    def packed():
        for batch in training_pass.batches(asked):
            yield (training_pass(batch, ["logprobs"]).candidate_logprobs * batch.flat(weights)).sum()

    def alone(of):
        for each, weight in zip(asked, weights, strict=True):
            tokens = torch.cat([torch.from_numpy(each.prompt.copy()), torch.from_numpy(each.completion.copy())])
            logits = of(tokens[None])[0][0, len(each.prompt) - 1 : -1]
            chosen = (logits / 0.7).log_softmax(-1).gather(-1, torch.from_numpy(each.candidates.copy()))
            yield (chosen * weight * torch.from_numpy(each.mask.copy())[:, None]).sum()

    copied = in_double(model)
    loss, found = gradients(model, packed())
    expected_loss, expected = gradients(copied, alone(copied))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert max(difference(found, expected).values()) < TOLERANCE


def gradients(model, losses):
    from tests.training.padded_loop import gradients_of

    return gradients_of(model, losses)


class TestFrozenParts:
    @pytest.mark.parametrize("part", ["body", "attention", "embeddings"])
    def test_the_rest_gets_the_same_gradients(self, given, weights, part):
        model = with_head(language_model(tied=False))
        _, truth = of_loop(in_double(model), given, weights)
        frozen = freeze(model, part)
        _, found = of_pass(TrainingPass(model), given, weights)
        assert {*found, *frozen} == {*truth}
        assert not {*found} & {*frozen}
        assert max(difference(found, {name: truth[name] for name in found}).values()) < TOLERANCE

    def test_a_frozen_body_keeps_no_activations(self, given):
        model = with_head(language_model(tied=False))
        training_pass = TrainingPass(model, returns=["values"], keep_states=0)
        (batch,) = training_pass.batches(given)
        kept = {}
        for part in (None, "body"):
            if part:
                freeze(model, part)
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
                training_pass(batch)
            kept[part] = sum(sizes)
        assert kept["body"] <= 3 * len(batch.mask) * 32 + 100 < kept[None] / 10

    def test_a_plain_language_model_gives_log_probabilities_and_no_values(self, given):
        training_pass = TrainingPass(language_model())
        out = training_pass(training_pass.batches(given)[0])
        assert out.values is None
        assert out.logprobs.requires_grad


def test_twenty_steps_of_a_fused_optimiser_give_the_losses_of_a_padded_loop(given, weights):
    packed = with_head(language_model())
    padded = copy.deepcopy(packed)
    training_pass = TrainingPass(packed)

    def losses_of(model, losses):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        found = []
        for _ in range(20):
            optimiser.zero_grad(set_to_none=True)
            total = 0.0
            for loss in losses():
                (loss / 100).backward()
                total += loss.item() / 100
            optimiser.step()
            found.append(total)
        return found

    own = losses_of(packed, lambda: (packed_loss(training_pass, b, weights) for b in training_pass.batches(given)))
    chunks = [slice(at, at + 4) for at in range(0, len(given), 4)]
    expected = losses_of(padded, lambda: (loop_loss(padded, given[chunk], weights[chunk]) for chunk in chunks))
    assert own == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert abs(own[-1] - own[0]) > 0.01


# Dynamo looks at every tensor's gradient, also of hidden states, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_head_and_compiled_losses_give_the_same_gradients(given, weights):
    model = with_head(language_model())
    training_pass = TrainingPass(model)
    (batch,) = training_pass.batches(given)
    column = batch.flat(weights)[:, 0]

    def gradients_by(value, policy):
        out = training_pass(batch)
        loss = value(out.values, column, mask=batch.mask)
        loss = loss + policy(out.logprobs, out.logprobs.detach() + 0.3 * column, column, mask=batch.mask)
        return gradients_of(model, [loss])[1]

    expected = gradients_by(losses.value, losses.policy)
    head, model.v_head.forward = model.v_head.forward, torch.compile(model.v_head.forward, backend="aot_eager")
    try:
        found = gradients_by(*(torch.compile(loss, backend="aot_eager") for loss in (losses.value, losses.policy)))
    finally:
        model.v_head.forward = head
    assert max(difference(found, expected).values()) < TOLERANCE
