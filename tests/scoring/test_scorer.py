import dataclasses
import itertools

import numpy as np
import pytest
import torch
from transformers import modeling_utils

from tests.scoring.scoring_models import ARCHITECTURES, CONTEXT, VOCABULARY, by_way, critic, reference, rollouts, worst
from vhead import Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.errors import FieldError, HeadError, VheadError
from vhead.ops.token_statistics import twin
from vhead.packing import strategies
from vhead.scoring import engine, logits
from vhead.scoring.fields import FIELDS, Asked
from vhead.scoring.logits import Statistics, statistics_of_logits

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return critic()


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model, token_budget=200)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_field_equals_one_rollout_at_a_time(architecture):
    model = critic(architecture)
    scorer = Scorer(model, token_budget=150)
    assert scorer._engine.selects_rows
    scores = scorer.score(rollouts(), FIELDS, temperature=0.8)
    assert worst(model, rollouts(), scores, temperature=0.8) < TOLERANCE


def test_the_comparison_sees_a_shift_by_one(model, monkeypatch):
    read = engine.Read.of

    def shifted(*args):
        right = read(*args)
        of_head = {name: rows - 1 for name, rows in right.of_head.items()}
        return dataclasses.replace(right, of_head=of_head, written=right.written - 1)

    monkeypatch.setattr(engine.Read, "of", shifted)
    records = rollouts()[1:]
    scores = Scorer(model).score(records, FIELDS)
    assert worst(model, records, scores) > 100 * TOLERANCE


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_the_comparison_sees_padding_that_is_not_masked(architecture, monkeypatch):
    def padded_left(places, sequences):
        right = padded(places, sequences)
        tokens, mask = right.content
        shifts = [tokens.shape[1] - len(sequences[place]) for place in places]
        moved = torch.stack([row.roll(shift) for row, shift in zip(tokens, shifts, strict=True)])
        rows = tuple(own + shift for own, shift in zip(right.rows, shifts, strict=True))
        return dataclasses.replace(right, rows=rows, content=(moved, torch.ones_like(mask)))

    model = critic(architecture)
    scorer = by_way(Scorer(model), "PaddedBatches")
    padded = strategies.padded
    monkeypatch.setattr(strategies, "padded", padded_left)
    assert worst(model, rollouts(), scorer.score(rollouts(), FIELDS)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", FIELDS)
def test_only_what_is_asked_for_is_returned(model, scorer, name):
    scores = scorer.score(rollouts(), [name])
    assert scores.fields == (name,)
    assert worst(model, rollouts(), scores) < TOLERANCE


def test_values_and_rewards_never_touch_the_lm_head(model, scorer):
    calls = []
    handle = model.pretrained_model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        scorer.score(rollouts(), ["values", "reward"])
        assert not calls
        scorer.score(rollouts(), ["logprobs"])
        assert calls
    finally:
        handle.remove()


def test_logits_exist_for_completion_tokens_only_and_a_few_rows_at_a_time(model, scorer, monkeypatch):
    monkeypatch.setattr(twin, "_LOGITS_BYTES", 4 * VOCABULARY * 7)
    seen = []
    handle = model.pretrained_model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))
    try:
        scores = scorer.score(rollouts(), ["logprobs", "entropy"])
    finally:
        handle.remove()
    assert max(seen) == 7
    assert sum(seen) == scores.token_count
    assert worst(model, rollouts(), scores) < TOLERANCE


def test_row_chunks_cover_all_rows_once():
    chunks = list(twin.row_chunks(1000, 151_936))
    assert [row for chunk in chunks for row in range(1000)[chunk]] == list(range(1000))
    assert max(chunk.stop - chunk.start for chunk in chunks) * 151_936 * 4 <= 32 * 2**20
    assert list(twin.row_chunks(2, 2**40)) == [slice(0, 1), slice(1, 2)]


def test_token_statistics_of_impossible_tokens():
    rows = torch.tensor([[1.0, -torch.inf, 2.0], [0.0, 0.0, 0.0]])
    wanted = Statistics(torch.tensor([2, 1]), None, temperature=1.0, entropy=True, top=0)
    statistics = statistics_of_logits(rows, torch.arange(2), wanted)
    logprobs, entropy = statistics.values()
    distribution = torch.log_softmax(rows[0, [0, 2]].double(), 0)
    assert entropy[0].item() == pytest.approx(-(distribution.exp() * distribution).sum().item(), abs=1e-6)
    assert logprobs[0].item() == pytest.approx(distribution[1].item(), abs=1e-6)
    assert entropy[1].item() == pytest.approx(np.log(3), abs=1e-6)


def batch_sizes(scorer, fields, records=None):
    encoded = [scorer._encoder.encode(index, record, "") for index, record in enumerate(records or rollouts())]
    return [work.batch.tokens for work in scorer._engine.work(encoded, scorer.token_budget, Asked(fields))]


class TestLogitsRule:
    @pytest.mark.parametrize(("architecture", "change"), [("gemma2", {"softcap": None}), ("cohere", {"scale": 1.0})])
    def test_a_wrong_rule_is_noticed(self, architecture, change, monkeypatch):
        rule_of = logits._rule_of
        monkeypatch.setattr(logits, "_rule_of", lambda *args: dataclasses.replace(rule_of(*args), **change))
        assert not Scorer(critic(architecture))._engine.selects_rows

    @pytest.mark.parametrize("cap", [30.0, 50.0])
    def test_a_missing_soft_cap_is_noticed_though_the_logits_are_small(self, cap, monkeypatch):
        model = critic("gemma2", final_logit_softcapping=cap)
        with torch.no_grad():
            model.pretrained_model.lm_head.weight.mul_(1e-3)
        assert Scorer(model)._engine._rule.softcap == cap
        rule_of = logits._rule_of
        monkeypatch.setattr(logits, "_rule_of", lambda *args: dataclasses.replace(rule_of(*args), softcap=None))
        assert not Scorer(model)._engine.selects_rows

    def test_without_a_rule_the_model_s_own_logits_are_used(self, model, monkeypatch):
        monkeypatch.setattr(engine, "find_logits_rule", lambda *_: None)
        monkeypatch.setattr(engine, "_FULL_LOGITS_BYTES", 4 * VOCABULARY * 80)
        scorer = Scorer(model, token_budget=500)
        assert max(batch_sizes(scorer, ["logprobs"])) <= 80
        assert max(batch_sizes(by_way(Scorer(model, token_budget=500), "PaddedBatches"), ["values"])) > 80
        assert worst(model, rollouts(), scorer.score(rollouts(), FIELDS, temperature=1.3), 1.3) < TOLERANCE


class TestState:
    def test_dropout_is_off_and_the_mode_is_kept(self):
        model = critic("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
        expected = Scorer(model).score(rollouts(), FIELDS)
        model.train()
        model.v_head.eval()
        modes = [module.training for module in model.modules()]
        scores = Scorer(model).score(rollouts(), FIELDS)
        assert [module.training for module in model.modules()] == modes
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(scores, name), getattr(expected, name))

    def test_threads_are_as_before(self, model, monkeypatch):
        used = []
        set_num_threads = torch.set_num_threads
        monkeypatch.setattr(torch, "set_num_threads", lambda count: (used.append(count), set_num_threads(count)))
        before = torch.get_num_threads()
        Scorer(model, num_threads=before + 1).score(rollouts(2))
        assert torch.get_num_threads() == before
        assert set(used) == {before, before + 1}

    def test_new_weights_count_at_once(self):
        model = critic()
        scorer = Scorer(model)
        with torch.no_grad():
            model.v_head.summary.weight.mul_(-2.0)
            model.pretrained_model.lm_head.weight.mul_(0.5)
        assert worst(model, rollouts(), scorer.score(rollouts(), FIELDS)) < TOLERANCE

    def test_a_model_that_caches_tensors_can_be_trained_afterwards(self):
        cache = []

        def scaled(_module, _args, output):
            if not cache:
                cache.append(torch.full_like(output[..., :1], 1.5)[:1, :1])
            return output * cache[0]

        model = critic()
        model.pretrained_model.model.embed_tokens.register_forward_hook(scaled)
        scores = Scorer(model).score(rollouts(2))
        assert scores.values.size
        assert all(parameter.grad is None for parameter in model.parameters())
        model(torch.tensor([[5, 6]])).value.sum().backward()
        assert model.pretrained_model.model.embed_tokens.weight.grad is not None


class TestBatching:
    @pytest.mark.parametrize("budget", [1, 60, 10_000])
    def test_the_budget_changes_no_numbers(self, model, budget):
        scores = Scorer(model, token_budget=budget).score(rollouts(30), FIELDS)
        assert worst(model, rollouts(30), scores) < TOLERANCE

    def test_batches_keep_to_the_budget(self, model):
        shapes = []
        scorer = Scorer(model, token_budget=120)
        handle = model.pretrained_model.model.embed_tokens.register_forward_hook(
            lambda _m, args, _o: shapes.append(args[0].shape)
        )
        try:
            scorer.score(rollouts(40), ["values"])
        finally:
            handle.remove()
        assert max(shape.numel() for shape in shapes) <= 120
        assert len(shapes) < 30, "rollouts are batched"

    @pytest.mark.parametrize(("dtype", "few"), [(torch.bfloat16, True), (torch.float32, False)])
    def test_half_precision_has_few_batch_sizes_on_a_cpu(self, dtype, few):
        scorer = by_way(Scorer(critic().to(dtype), token_budget=192), "TreePacking")
        sizes = {size for seed in range(6) for size in batch_sizes(scorer, ["values"], rollouts(20, seed))}
        assert (sizes <= {64, 128, 192}) is few

    def test_the_bundled_model_shares_prompts_in_bfloat16(self):
        assert Scorer.from_pretrained(demo_model_path(), device="cpu").plan.strategy.startswith("tree packing")

    def test_order_is_the_input_s(self, model, scorer):
        records = rollouts(25)
        scores = scorer.score(records, ["values"])
        assert list(scores.ids) == [record.id for record in records]
        assert scores.indices.tolist() == list(range(25))
        assert scores.prompt_lengths.tolist() == [len(record.prompt) for record in records]

    def test_no_rollouts(self, scorer):
        scores = scorer.score([])
        assert len(scores) == 0
        assert scores.fields == ("values", "logprobs", "reward")


class TestStream:
    def test_the_same_as_score(self, scorer):
        scores = scorer.score(rollouts(40), FIELDS)
        streamed = list(scorer.stream(iter(rollouts(40)), FIELDS))
        assert [score.index for score in streamed] == list(range(40))
        for got, want in zip(streamed, scores, strict=True):
            assert got.id == want.id
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=TOLERANCE)

    def test_reads_no_further_than_a_chunk(self, scorer):
        read = []

        def endless():
            for index in itertools.count():
                read.append(index)
                yield Rollout([5] * 10, [6, 7], id=index)

        stream = scorer.stream(endless(), ["reward"])
        assert [next(stream).id for _ in range(5)] == list(range(5))
        chunk = 8 * scorer.token_budget // 12 + 1
        # One that is computed, one that is ready, one in the making.
        assert len(read) <= 3 * chunk
        for _ in range(3 * chunk):
            next(stream)
        assert len(read) <= 7 * chunk

    def test_good_records_before_a_bad_one_are_given_first(self, scorer):
        records = rollouts(10)
        records[6] = Rollout([VOCABULARY], [1], id="bad")
        given = []
        with pytest.raises(FieldError, match=r"^record 6 \(id 'bad'\): prompt: expected token ids below"):
            given.extend(scorer.stream(records))
        assert [score.index for score in given] == list(range(6))

    def test_an_error_of_the_input_comes_after_what_was_read(self, scorer):
        def broken():
            yield from rollouts(4)
            raise OSError("the disk is gone")

        given = []
        with pytest.raises(OSError, match="the disk is gone"):
            given.extend(scorer.stream(broken()))
        assert len(given) == 4

    def test_bad_records_can_be_left_out(self, model, scorer):
        records = rollouts(10)
        records[0] = Rollout([VOCABULARY], [1], id="bad")
        records[6] = Rollout("some", "text", id="text")
        errors = []
        given = list(scorer.stream(records, FIELDS, on_error=errors.append))
        assert [score.index for score in given] == [1, 2, 3, 4, 5, 7, 8, 9]
        assert [error.record for error in errors] == ["record 0 (id 'bad')", "record 6 (id 'text')"]
        expected = reference(model, records[7])
        np.testing.assert_allclose(given[5].values, expected["values"], atol=TOLERANCE)


class TestBadInput:
    @pytest.mark.parametrize(
        ("record", "message"),
        [
            (
                Rollout([VOCABULARY], [1]),
                f"record 1: prompt: .* below the vocabulary's {VOCABULARY}, got {VOCABULARY} at position 0",
            ),
            (Rollout([1], [5, 10**15]), "record 1: completion: .*got 1000000000000000 at position 1"),
            (
                Rollout([1] * 40, [1] * 25, id=3),
                rf"record 1 \(id 3\): completion: expected at most the model's {CONTEXT} tokens .*got 40 \+ 25 = 65",
            ),
            (Rollout("a", "b"), "record 1: prompt: expected token ids, because there is no tokenizer, got text"),
            ("text", "record 1: rollout: expected a Rollout, got str"),
        ],
        ids=["prompt range", "completion range", "context", "no tokenizer", "type"],
    )
    def test_the_record_and_the_field_are_named(self, scorer, record, message):
        with pytest.raises(FieldError, match=message):
            scorer.score([rollouts(1)[0], record])

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
    def test_the_context_can_be_full(self, architecture):
        model = critic(architecture)
        record = Rollout([5] * 40, [6] * (CONTEXT - 40))
        assert worst(model, [record], Scorer(model).score([record], FIELDS)) < TOLERANCE

    @pytest.mark.parametrize("fields", [["values"], ["logprobs"], ["entropy"], ["reward"], FIELDS])
    @pytest.mark.parametrize("way", ["TreePacking", "MaskedTreePacking", "PaddedBatches"])
    def test_nan_names_the_record_and_harms_no_other(self, fields, way):
        if way == "TreePacking" and not hasattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS"):
            pytest.skip("transformers before 4.48 has no attention interface")
        model = critic()
        scorer = Scorer(model, token_budget=500)
        with torch.no_grad():
            model.pretrained_model.model.embed_tokens.weight[50] = torch.nan
        by_way(scorer, way)
        records = [Rollout([5, 6], [7, 8, 9], id=f"r{index}") for index in range(4)]
        records[2] = Rollout([5, 50], [7, 8], id="nan")
        with pytest.raises(FieldError, match=rf"record 2 \(id 'nan'\): {fields[0]}: expected finite numbers .*got nan"):
            scorer.score(records, fields)
        errors = []
        given = list(scorer.stream(records, fields, on_error=errors.append))
        assert [score.id for score in given] == ["r0", "r1", "r3"]
        assert len(errors) == 1
        assert worst(model, [records[0], records[1], records[3]], given) < TOLERANCE

    def test_ids_may_come_twice(self, scorer):
        records = [Rollout([5], [6], id=name) for name in (1, 2, 3, 1)]
        assert scorer.score(records, ["reward"]).ids == (1, 2, 3, 1)

    def test_a_rollout_that_cannot_be_scored_is_told_before_its_chunk_is_full(self, scorer):
        told = []

        def records():
            yield Rollout([5], [VOCABULARY])
            assert len(told) == 1
            yield Rollout([5], [6])

        assert len(list(scorer.chunks(records(), ["reward"], on_error=told.append))) == 1

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
    def test_temperature(self, scorer, temperature):
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            scorer.score(rollouts(1), temperature=temperature)

    @pytest.mark.parametrize("returns", [[], ["value"], ["values", "kl"], "kl"])
    def test_returns(self, scorer, returns):
        with pytest.raises(ValueError, match=r"returns: expected some of values, .*, tokens, got"):
            scorer.score(rollouts(1), returns)

    def test_one_field_may_come_as_text(self, scorer):
        assert scorer.score(rollouts(2), "values").fields == ("values",)

    def test_a_model_without_a_head(self, model):
        with pytest.raises(HeadError, match="expected a language model with a value head, got a LlamaForCausalLM"):
            Scorer(model.pretrained_model)

    @pytest.mark.parametrize("number", [0, -1, 2**20, 2**62, 2**70])
    def test_threads_that_no_machine_runs(self, model, number):
        with pytest.raises(ValueError, match=f"num_threads: expected 1 to 1024, got {number}"):
            Scorer(model, num_threads=number)

    def test_an_unknown_option_names_the_known_ones(self, model):
        with pytest.raises(TypeError, match=r"expected options among token_budget, .*, got tokens_budget"):
            Scorer(model, tokens_budget=7)

    def test_the_old_names_of_chunks_work_and_say_the_new_ones(self, model):
        with pytest.warns(FutureWarning, match="window_tokens is now called chunk_tokens") as warned:
            scorer = Scorer(model, window_tokens=20)
        assert warned[0].filename == __file__
        given = rollouts()[:4]
        with pytest.warns(FutureWarning, match=r"Scorer\.windows is now called Scorer\.chunks"):
            old = list(scorer.windows(given, ["values"]))
        assert [chunk.ids for chunk in old] == [chunk.ids for chunk in scorer.chunks(given, ["values"])]
        assert len(old) > 1

    @pytest.mark.parametrize("argument", ["token_budget", "chunk_tokens"])
    def test_arguments_below_one(self, model, argument):
        with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got 0"):
            Scorer(model, **{argument: 0})

    def test_out_of_memory_names_the_way_out(self, model, scorer, monkeypatch):
        def fail(*_args, **_kwargs):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

        monkeypatch.setattr(strategies, "last_hidden_state", fail)
        with pytest.raises(VheadError, match=r"out of memory with a batch of 2 tokens; .*smaller token_budget"):
            scorer.score(rollouts(1))
