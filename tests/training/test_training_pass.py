"""Batches and their orders, what stays the same over many updates, and what is refused and how."""

import copy
import pickle

import numpy as np
import pytest
import torch

from tests.trainers.toy_task import language_model
from tests.training.padded_loop import rollouts
from tests.training.test_gradients import with_head
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, Support, TrainingPass, VheadError, freeze, losses
from vhead.errors import AdapterError, FieldError, GradientError, HeadError
from vhead.packing.attention import segments
from vhead.training import trained_model
from vhead.training.kept_states import states_key

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def given():
    return rollouts()


class TestBatches:
    @pytest.mark.parametrize("token_budget", [45, 1000])
    def test_what_comes_out_is_what_the_scorer_gives(self, given, token_budget):
        model = with_head(language_model())
        scores = Scorer(model).score(given, ("values", "logprobs", "entropy"), temperature=0.7)
        training_pass = TrainingPass(model, token_budget=token_budget, temperature=0.7)
        seen = []
        for batch in training_pass.batches(given):
            out = training_pass(batch)
            assert len(batch) == len(batch.places) == len(batch.offsets) - 1
            assert torch.equal(batch.mask, batch.flat([score.mask for score in scores]))
            for name in ("values", "logprobs", "entropy"):
                torch.testing.assert_close(
                    getattr(out, name).detach(), batch.flat(getattr(scores, name)), rtol=1e-4, atol=1e-5
                )
            seen += batch.places.tolist()
        assert sorted(seen) == list(range(len(given)))

    def test_arrays_go_into_a_batch_s_order_and_back(self, given):
        training_pass = TrainingPass(with_head(language_model()), token_budget=60)
        arrays = [np.random.default_rng(at).normal(size=(len(each.completion), 2)) for at, each in enumerate(given)]
        flat = np.concatenate(arrays)
        for batch in training_pass.batches(given):
            for asked in (arrays, flat, torch.from_numpy(flat), [array.tolist() for array in arrays]):
                for place, own in zip(batch.places, batch.split(batch.flat(asked)), strict=True):
                    np.testing.assert_allclose(own, arrays[place], rtol=1e-6)

    def test_totals_are_over_all_batches(self, given):
        batches = TrainingPass(with_head(language_model()), token_budget=60).batches(given)
        assert len(batches) > 1
        assert {batch.totals for batch in batches} == {batches[0].totals}
        assert batches[0].totals.tokens == sum(int(each.mask.sum()) for each in given)
        assert batches[0].totals.rollouts == len(given)

    def test_only_the_model_s_tokens_cost_rows_of_the_language_model_head(self, given, monkeypatch):
        from vhead import ops

        own, rows = ops.token_logprobs, []
        monkeypatch.setattr(ops, "token_logprobs", lambda h, *a, **k: rows.append(len(h)) or own(h, *a, **k))
        training_pass = TrainingPass(with_head(language_model()))
        out = [training_pass(batch) for batch in training_pass.batches(given)]
        assert sum(rows) == sum(int(each.mask.sum()) for each in given)
        assert sum(len(each.logprobs) for each in out) == sum(len(each.completion) for each in given)

    def test_no_rollouts_are_no_batches(self):
        assert TrainingPass(with_head(language_model())).batches([]) == []

    def test_a_distributional_head_gives_its_logits(self, given):
        support = Support(-2.0, 2.0, 11)
        model = with_head(language_model(), support=support)
        training_pass = TrainingPass(model)
        (batch,) = training_pass.batches(given)
        out = training_pass(batch)
        centers = (out.value_logits.softmax(-1) * support.centers()).sum(-1)
        torch.testing.assert_close(out.values, centers)
        losses.distributional(out.value_logits, torch.ones_like(out.values), support, mask=batch.mask).backward()
        assert model.v_head.summary.weight.grad.any()

    def test_several_outputs_are_columns(self, given):
        training_pass = TrainingPass(with_head(language_model(), num_outputs=3))
        (batch,) = training_pass.batches(given)
        assert training_pass(batch, ["values"]).values.shape == (len(batch.mask), 3)


class TestManyUpdates:
    def test_a_frozen_body_runs_once_however_many_updates_there_are(self, given, tmp_path):
        ways = {"memory": {}, "disk": {"keep_states": 0, "states_folder": tmp_path}, "not at all": {"keep_states": 0}}
        for name, options in ways.items():
            model = with_head(language_model())
            freeze(model, "body")
            training_pass = TrainingPass(model, token_budget=60, returns=["values"], **options)
            ran = []
            model.pretrained_model.model.norm.register_forward_hook(lambda *_, ran=ran: ran.append(1))
            batches = training_pass.batches(given)
            optimizer = torch.optim.SGD(model.v_head.parameters(), lr=0.1)
            outputs = [update(training_pass, batches, optimizer) for _ in range(3)]
            assert len(ran) == (3 if name == "not at all" else 1) * len(batches)
            assert outputs == pytest.approx(expected_updates(given), rel=1e-5), name
            assert bool(list(tmp_path.iterdir())) == (name == "disk")
            del batches
            assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("change", ["in place", "new data", "new parameter", "fused", "data", "numpy", "dtype"])
    def test_a_body_that_has_changed_runs_again(self, given, change):
        """Also where torch does not count what was written."""
        model = with_head(language_model())
        freeze(model, "body")
        training_pass = TrainingPass(model, returns=["values"])
        (batch,) = training_pass.batches(given)
        before = training_pass(batch).values
        CHANGES[change](model.pretrained_model)
        after = training_pass(batch).values
        assert (before - after).abs().max() > 1e-4
        assert torch.equal(after, TrainingPass(model, returns=["values"], keep_states=0)(batch).values)

    def test_a_weight_s_bytes_are_compared_wherever_they_lie(self):
        memory = torch.zeros(40, dtype=torch.bfloat16)
        for start in range(1, 4):
            parameter = torch.nn.Parameter(memory[start : start + 31], requires_grad=False)
            keys = {states_key(torch.nn.Module(), [parameter], parameter.device)}
            for place in (0, 15, 30):
                parameter.data[place] += 1.0
                keys.add(states_key(torch.nn.Module(), [parameter], parameter.device))
            assert len(keys) == 4

    def test_a_file_that_somebody_deleted_is_made_again(self, given, tmp_path):
        model = with_head(language_model())
        freeze(model, "body")
        training_pass = TrainingPass(model, returns=["values"], keep_states=0, states_folder=tmp_path)
        (batch,) = training_pass.batches(given)
        before = training_pass(batch).values
        (file,) = tmp_path.iterdir()
        file.unlink()
        assert torch.equal(training_pass(batch).values, before)
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_full_disk_leaves_no_file(self, given, tmp_path, monkeypatch):
        def fail(states, file):
            file.write(b"some")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", fail)
        model = with_head(language_model())
        freeze(model, "body")
        training_pass = TrainingPass(model, returns=["values"], keep_states=0, states_folder=tmp_path)
        (batch,) = training_pass.batches(given)
        with pytest.raises(OSError, match="No space left"):
            training_pass(batch)
        assert not list(tmp_path.iterdir())

    def test_autocast_has_states_of_its_own(self, given):
        model = with_head(language_model())
        freeze(model, "body")
        training_pass = TrainingPass(model, returns=["values"])
        (batch,) = training_pass.batches(given)
        before = training_pass(batch).values
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(training_pass(batch).values, before)
        assert torch.equal(training_pass(batch).values, before)

    def test_inference_mode_leaves_nothing_behind_that_cannot_be_trained_with(self, given):
        model = with_head(language_model())
        freeze(model, "body")
        training_pass = TrainingPass(model, returns=["values"])
        (batch,) = training_pass.batches(given)
        with torch.inference_mode():
            training_pass(batch)
        training_pass(batch).values.sum().backward()
        assert model.v_head.summary.weight.grad.any()

    def test_states_are_not_kept_while_the_body_drops_activations(self, given):
        body = language_model()
        body.config.attention_dropout = 0.3
        for module in body.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        model = with_head(body)
        freeze(model, "body")
        training_pass = TrainingPass(model, returns=["values"]).train()
        batch = training_pass.batches(given)[0]
        assert not torch.equal(training_pass(batch).values, training_pass(batch).values)
        training_pass.eval()
        assert torch.equal(training_pass(batch).values, training_pass(batch).values)


def step_fused(body):
    parameters = list(body.parameters())
    for parameter in parameters:
        parameter.requires_grad, parameter.grad = True, torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.01, fused=True).step()
    for parameter in parameters:
        parameter.requires_grad, parameter.grad = False, None


def multiply_in_place(body):
    with torch.no_grad():
        first_up(body).weight.mul_(1.5)


def replace_data(body):
    first_up(body).weight.data = first_up(body).weight.data * 1.5


def replace_parameter(body):
    first_up(body).weight = torch.nn.Parameter(first_up(body).weight.detach() * 1.5, requires_grad=False)


def first_up(body):
    return body.model.layers[0].mlp.up_proj


CHANGES = {
    "in place": multiply_in_place,
    "new data": replace_data,
    "new parameter": replace_parameter,
    "fused": step_fused,
    "data": lambda body: first_up(body).weight.data.mul_(1.5),
    "numpy": lambda body: first_up(body).weight.numpy().fill(0.1),
    "dtype": lambda body: body.bfloat16(),
}


def update(training_pass, batches, optimizer):
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        out = training_pass(batch)
        loss = losses.value(out.values, torch.ones_like(out.values), mask=batch.mask, totals=batch.totals)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def expected_updates(given):
    model = with_head(language_model())
    training_pass = TrainingPass(model, returns=["values"])
    optimizer = torch.optim.SGD(model.v_head.parameters(), lr=0.1)
    return [update(training_pass, training_pass.batches(given), optimizer) for _ in range(3)]


class TestAnotherDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_a_model_that_gets_it_after_the_pass_was_made(self, given, dtype):
        model = with_head(language_model())
        training_pass = TrainingPass(model)
        (batch,) = training_pass.batches(given)
        expected = training_pass(batch).logprobs
        model.to(dtype)
        found = training_pass(batch).logprobs
        found.sum().backward()
        tolerance = 1e-4 if dtype == torch.float64 else 0.5
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)
        assert all(parameter.grad.isfinite().all() for parameter in model.pretrained_model.parameters())


class TestDropout:
    def test_a_model_that_drops_attention_weights_is_packed_under_a_mask(self):
        body = language_model()
        for module in body.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        plan = TrainingPass(with_head(body)).plan
        assert plan.packing.attention == "mask"
        assert "drops attention weights while it trains" in plan.packing.rejected["tree packing"]

    def test_the_head_s_dropout_is_at_work_in_training_mode_alone(self, given):
        torch.manual_seed(3)
        model = AutoModelForCausalLMWithValueHead(language_model(), summary_dropout_prob=0.5).eval()
        training_pass = TrainingPass(model)
        (batch,) = training_pass.batches(given)
        values = [training_pass(batch).values for _ in range(2)]
        assert torch.equal(*values)
        training_pass.train()
        dropped = [training_pass(batch).values for _ in range(2)]
        assert not torch.equal(*dropped)

    def test_making_a_pass_changes_neither_the_mode_nor_torch_s_generator(self):
        model = with_head(language_model()).train()
        before = torch.get_rng_state()
        training_pass = TrainingPass(model)
        assert torch.equal(torch.get_rng_state(), before)
        assert training_pass.training
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


class TestTwoAdapters:
    def model(self, *, tied=True, targets=("q_proj",), **options):
        peft = pytest.importorskip("peft")
        torch.manual_seed(5)
        lora = peft.LoraConfig(
            r=2, task_type="CAUSAL_LM", target_modules=list(targets), init_lora_weights=False, **options
        )
        body = peft.get_peft_model(language_model(tied=tied), lora)
        body.add_adapter("critic", lora)
        return with_head(body)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_each_gets_the_gradients_of_its_own_loss(self, given, checkpointing):
        from tests.training.test_gradients import checkpoint_activations

        model = self.model()
        training_pass = TrainingPass(model, policy_adapter="default", value_adapter="critic").train()
        if checkpointing:
            checkpoint_activations(model.pretrained_model.get_base_model(), use_reentrant=False)
        (batch,) = training_pass.batches(given)
        both = training_pass(batch)
        (both.values.sum() + both.logprobs.sum()).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert {name.split(".")[-2] for name in found if "lora" in name} == {"default", "critic"}
        for adapter, name in (("default", "logprobs"), ("critic", "values")):
            model.zero_grad(set_to_none=True)
            model.pretrained_model.set_adapter(adapter)
            alone = TrainingPass(model).train()
            getattr(alone(alone.batches(given)[0]), name).sum().backward()
            for parameter, own in model.named_parameters():
                if "lora" in parameter and own.grad is not None:
                    torch.testing.assert_close(own.grad, found[parameter], rtol=1e-4, atol=1e-6)

    def test_states_of_a_frozen_body_are_those_of_the_adapter_that_is_on(self, given):
        model = self.model()
        freeze(model, "body")
        training_pass = TrainingPass(model, returns=["values"])
        (batch,) = training_pass.batches(given)
        before = training_pass(batch).values
        with model.pretrained_model.disable_adapter():
            without = training_pass(batch).values
            assert torch.equal(without, TrainingPass(model, returns=["values"], keep_states=0)(batch).values)
        freeze(model, "body")  # What peft had switched off, it lets be trained when it switches it on.
        assert (without - before).abs().max() > 1e-3
        assert torch.equal(training_pass(batch).values, before)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 5.0)
        assert (training_pass(batch).values - before).abs().max() > 1e-3

    @pytest.mark.parametrize("options", [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
    def test_the_policy_has_its_own_language_model_head_whichever_adapter_is_active(self, given, options):
        found = []
        for active in ("default", "critic"):
            model = self.model(tied=False, **options)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lm_head" in name and "critic" in name:
                        parameter.mul_(-0.5)
            model.pretrained_model.set_adapter(active)
            training_pass = TrainingPass(model, policy_adapter="default", value_adapter="critic")
            (batch,) = training_pass.batches(given)
            out = training_pass(batch)
            out.logprobs.sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "lora" in name}
            assert not any("critic" in name for name in gradients)
            found.append((out.logprobs, gradients))
        (expected, of_expected), (logprobs, gradients) = found
        torch.testing.assert_close(logprobs, expected)
        torch.testing.assert_close(gradients, of_expected)

    def test_a_model_that_makes_its_own_logits(self, given, monkeypatch):
        monkeypatch.setattr(trained_model, "find_logits_rule", lambda *_: None)
        training_pass = TrainingPass(self.model(), policy_adapter="default", value_adapter="critic")
        for batch in training_pass.batches(given):
            both, values = training_pass(batch), training_pass(batch, ["values"]).values
            torch.testing.assert_close(both.values, values)
            assert (values - TrainingPass(training_pass.model)(batch, ["values"]).values).abs().max() > 1e-3

    def test_an_adapter_that_is_not_there(self):
        with pytest.raises(AdapterError, match="value_adapter: expected one of the model's adapters, got 'other'"):
            TrainingPass(self.model(), value_adapter="other")
        with pytest.raises(AdapterError, match="the model has no adapters"):
            TrainingPass(with_head(language_model()), policy_adapter="default")


class TestSelfCheck:
    def test_wrong_gradients_are_noticed_although_the_states_are_right(self, monkeypatch, caplog):
        own = segments._States.differentiate

        def wrong(self, *arguments):
            query, key, value = own(self, *arguments)
            return query, key, value * 1.01

        monkeypatch.setattr(segments._States, "differentiate", wrong)
        plan = TrainingPass(with_head(language_model())).plan
        assert plan.packing.attention == "mask"
        assert "its gradients differ from one sequence alone by" in plan.packing.rejected["tree packing"]
        assert "its gradients differ" in str(plan)

    def test_a_model_that_cannot_be_packed_says_what_is_left_and_what_it_costs(self):
        from tests.architectures.tiny import build

        training_pass = TrainingPass(AutoModelForCausalLMWithValueHead(build("mamba")).eval())
        text = str(training_pass.plan)
        assert training_pass.plan.packing.strategy == "length-sorted batches", text
        assert "not tree packing" in text
        assert "a prompt is computed once for each of its completions" in text

    def test_logits_of_a_model_s_own_have_to_be_asked_for_when_the_pass_is_made(self, given, monkeypatch):
        monkeypatch.setattr(trained_model, "find_logits_rule", lambda *_: None)
        training_pass = TrainingPass(with_head(language_model()), returns=["values"])
        (batch,) = training_pass.batches(given)
        with pytest.raises(VheadError, match="name them when the pass is made"):
            training_pass(batch, ["logprobs"])

    def test_an_attention_that_was_asked_for_and_is_refused(self):
        from tests.architectures.tiny import build

        with pytest.raises(VheadError, match="attention: expected one that the MambaForCausalLM can take"):
            TrainingPass(build("mamba"), attention="segments")


class TestBadInput:
    def test_a_rollout_that_is_longer_than_the_budget(self):
        long = Rollout(range(3, 40), range(3, 60), id="long")
        with pytest.raises(
            FieldError, match=r"record 0 \(id 'long'\): completion: expected at most the token_budget's 64"
        ):
            TrainingPass(with_head(language_model()), token_budget=64).batches([long])
        (batch,) = TrainingPass(with_head(language_model())).batches([long])
        assert len(batch.mask) == 57

    def test_of_several_rollouts_that_are_too_long_the_first_is_named_and_without_a_budget_each_goes_alone(self, given):
        long = [Rollout(range(3, 40), range(3, 60 + count), id=f"long {count}") for count in range(3)]
        model = with_head(language_model())
        with pytest.raises(FieldError, match=r"record 9 \(id 'long 0'\): completion: expected at most"):
            TrainingPass(model, token_budget=64).batches([*given, *long])
        training_pass = TrainingPass(model)
        training_pass.token_budget = 50
        batches = training_pass.batches([*long, *given])
        alone = [batch.places.tolist() for batch in batches if set(batch.places) & {0, 1, 2}]
        assert sorted(alone) == [[0], [1], [2]]
        assert sorted(place for batch in batches for place in batch.places) == list(range(12))

    def test_numbers_of_another_length_are_named_by_rollout(self, given):
        (batch,) = TrainingPass(with_head(language_model())).batches(given)
        arrays = [np.zeros(len(each.completion)) for each in given]
        arrays[2] = arrays[2][1:]
        with pytest.raises(FieldError, match=r"record 2: per_rollout: expected \d+ numbers"):
            batch.flat(arrays)
        with pytest.raises(ValueError, match="expected one array for each of the 9 rollouts"):
            batch.flat(arrays[1:])
        with pytest.raises(ValueError, match=r"per_rollout: expected \d+ numbers, one for each completion token"):
            batch.flat(np.zeros(3))

    def test_gradients_that_are_no_numbers_are_named_by_rollout(self, given):
        training_pass = TrainingPass(with_head(language_model()))
        (batch,) = training_pass.batches(given)
        advantages = [np.ones(len(each.completion), np.float32) for each in given]
        written = int(np.flatnonzero(given[4].mask)[-1])
        advantages[4][written] = np.nan
        out = training_pass(batch)
        loss = losses.policy(out.logprobs, out.logprobs.detach(), batch.flat(advantages), mask=batch.mask)
        with pytest.raises(
            GradientError, match=rf"record 4: expected finite gradients .* completion token {written}"
        ) as e:
            loss.backward()
        assert e.value.rollouts == (4,)
        assert pickle.loads(pickle.dumps(e.value)).rollouts == (4,)

    def test_gradients_are_not_looked_at_where_that_is_turned_off(self, given):
        training_pass = TrainingPass(with_head(language_model()), check_finite=False)
        (batch,) = training_pass.batches(given)
        (training_pass(batch).values * torch.nan).sum().backward()

    def test_what_a_model_cannot_give(self):
        with pytest.raises(HeadError, match="without a value head"):
            TrainingPass(language_model(), returns=["values"])
        with pytest.raises(ValueError, match="returns: expected some of values, logprobs"):
            TrainingPass(language_model(), returns=["entropy"])

    @pytest.mark.parametrize("option", [{"token_budget": 0}, {"temperature": 0.0}, {"keep_states": -1}])
    def test_numbers_out_of_range(self, option):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected"):
            TrainingPass(language_model(), **option)

    def test_something_that_is_no_batch(self, given):
        with pytest.raises(TypeError, match="batch: expected one that batches"):
            TrainingPass(with_head(language_model()))(given)

    def test_something_that_is_no_model_and_a_rollout_alone(self, given):
        with pytest.raises(TypeError, match="model: expected a loaded language model, got a str"):
            TrainingPass("policy")
        with pytest.raises(TypeError, match="rollouts: expected a list of them, got one Rollout alone"):
            TrainingPass(with_head(language_model())).batches(given[0])

    def test_text_without_a_tokenizer(self):
        expected = "record 0: prompt: expected token ids, because there is no tokenizer, got text"
        with pytest.raises(FieldError, match=expected):
            TrainingPass(language_model()).batches([Rollout("a", "b")])

    def test_candidates_of_some_rollouts_alone(self):
        with_some = Rollout([3, 4], [5, 6], candidates=[[1, 2], [3, 4]])
        with pytest.raises(FieldError, match="record 1: candidates: expected 2 for each token"):
            TrainingPass(language_model()).batches([with_some, Rollout([3, 4], [5, 6])])

    def test_parts_that_cannot_be_frozen(self):
        with pytest.raises(ValueError, match="part: expected one of body, attention, embeddings, got 'head'"):
            freeze(language_model(), "head")
        with pytest.raises(VheadError, match="part: expected a model with attention, found none"):
            freeze(torch.nn.Linear(2, 2), "attention")


def test_a_copy_of_a_pass_trains_its_own_model(given):
    training_pass = TrainingPass(with_head(language_model()))
    for again in (copy.deepcopy(training_pass), pickle.loads(pickle.dumps(training_pass))):
        (batch,) = again.batches(given)
        again(batch).values.sum().backward()
        assert again.model.v_head.summary.weight.grad is not None
        assert training_pass.model.v_head.summary.weight.grad is None


def test_flex_has_no_gradients_on_a_cpu():
    message = (
        "attention: expected one that the .* can take, got 'flex': no gradients flow through it on cpu; "
        "leave it at None to have the fastest one that the model can take"
    )
    with pytest.raises(VheadError, match=message):
        TrainingPass(language_model(tied=True), attention="flex")
    # A release of torch that has them is noticed here.
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    query = torch.randn(1, 2, 128, 16, requires_grad=True)
    with pytest.raises((NotImplementedError, ValueError), match=r"CPU|CUDA"):
        flex_attention(query, query, query)
