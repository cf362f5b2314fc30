"""Every way of batching against one rollout at a time, and how the way is chosen."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import modeling_utils

from tests.architectures.tiny import build
from tests.library_versions import need_architecture
from tests.scoring.scoring_models import VOCABULARY, WAYS, by_way, critic, largest_difference, rollouts, trees, worst
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.backbone.hidden_states import plan_for
from vhead.packing import plan, self_check, strategies, tree_packing
from vhead.packing.attention import interface, segments
from vhead.scoring.fields import FIELDS, Asked

TOLERANCE = 1e-4
# Without the attention interface, the dense mask is the fastest way.
INTERFACE = {"TreePacking"} if hasattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS") else set()
PACKED = {"MaskedTreePacking", *INTERFACE}
TAKES = {
    "llama": {*PACKED, "PrefixCache"},
    "gpt2": {*PACKED, "PrefixCache"} if INTERFACE else set(),
    "gemma2": {*PACKED, "PrefixCache"},
    "opt": {*PACKED, "PrefixCache"} if INTERFACE else set(),
    "cohere": {*PACKED, "PrefixCache"},
    "bloom": {"PrefixCache"},
    "falcon_h1": set(),
    "mamba": set(),
}
EACH = [
    (architecture, way) for architecture in TAKES for way in sorted({*TAKES[architecture], "PaddedBatches", "OneByOne"})
]


needs_interface = pytest.mark.skipif(not INTERFACE, reason="transformers before 4.48 has no attention interface")


class Models(dict):
    """Critics by architecture, made when they are first asked for: older transformers lack some."""

    def __missing__(self, name):
        self[name] = critic(name)
        return self[name]


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.mark.parametrize(("architecture", "way"), EACH)
@pytest.mark.parametrize("budget", [60, 2048])
def test_every_way_gives_what_one_rollout_alone_gives(models, architecture, way, budget):
    scorer = by_way(Scorer(models[architecture], token_budget=budget), way)
    records = [*trees(), *rollouts(4)]
    assert worst(models[architecture], records, scorer.score(records, FIELDS)) < TOLERANCE


@pytest.mark.parametrize("architecture", TAKES)
def test_the_fastest_way_that_works_is_chosen(models, architecture):
    scorer = Scorer(models[architecture])
    fastest = [
        w for w in ("TreePacking", "MaskedTreePacking", "PrefixCache", "PaddedBatches") if w in TAKES[architecture]
    ]
    assert scorer.plan.strategy == WAYS[[*fastest, "PaddedBatches"][0]].name
    assert all(name in str(scorer.plan) for name in scorer.plan.rejected)


@pytest.mark.parametrize("way", sorted(PACKED))
def test_shared_tokens_are_computed_once(models, way):
    scorer = by_way(Scorer(models["llama"]), way)
    shapes = []
    embedding = models["llama"].pretrained_model.model.embed_tokens
    handle = embedding.register_forward_hook(lambda _m, args, _o: shapes.append(args[0].shape))
    records = [Rollout([5] * 30, [7 + at] * 3) for at in range(8)]
    try:
        scorer.score(records, FIELDS)
    finally:
        handle.remove()
    assert shapes == [(1, 30 + 8 * 3)]


@needs_interface
def test_rollouts_of_one_prompt_are_found_across_the_chunk(models):
    scorer = Scorer(models["llama"])
    encoded = [scorer._encoder.encode(at, record, "") for at, record in enumerate(trees(prompts=5, completions=6))]
    computed = sum(work.batch.tokens for work in scorer._engine.work(encoded, 2048, Asked(FIELDS)))
    prefixes = {record.tokens[:end].tobytes() for record in encoded for end in range(1, len(record) + 1)}
    assert computed == len(prefixes) < sum(map(len, encoded)) / 2


def mixed_up(states):
    """What a way would give that mixes sequences up."""
    return lambda self, batch: states(self, dataclasses.replace(batch, content=self.spoilt(batch.content)))


@pytest.mark.parametrize(("architecture", "way"), [pair for pair in EACH if pair[1] in PACKED])
def test_the_comparison_sees_rollouts_that_see_each_other(models, architecture, way, monkeypatch):
    scorer = by_way(Scorer(models[architecture]), way)
    monkeypatch.setattr(WAYS[way], "states", mixed_up(WAYS[way].states))
    monkeypatch.setattr(WAYS[way], "states_of", strategies.Strategy.states_of)
    assert worst(models[architecture], trees(), scorer.score(trees(), FIELDS)) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_pack_too(dtype):
    model = critic("llama")
    model.pretrained_model.to(dtype)
    scorer = Scorer(model)
    assert scorer.plan.strategy.startswith("tree packing")
    padded = by_way(Scorer(model), "PaddedBatches")
    exact = critic("llama")
    exact.pretrained_model.load_state_dict(model.pretrained_model.state_dict())
    errors = [worst(exact, trees(), s.score(trees(), ["values", "reward"])) for s in (scorer, padded)]
    assert errors[0] <= 1.5 * errors[1]


class TestSelfCheck:
    def ways(self, model):
        with torch.no_grad():
            return plan.find_ways(strategies.Body(model.pretrained_model, plan_for(model.pretrained_model)))

    @needs_interface
    def test_a_way_that_is_wrong_is_not_used(self, models, monkeypatch):
        monkeypatch.setattr(tree_packing.TreePacking, "states", mixed_up(tree_packing.TreePacking.states))
        ways = self.ways(models["llama"])
        assert isinstance(ways.usual, tree_packing.MaskedTreePacking)
        assert "of the largest state" in ways.plan.rejected["tree packing"]

    def test_wrong_padding_is_noticed(self, models, monkeypatch):
        right = strategies.PaddedBatches.states

        def shifted(self, batch):
            states = right(self, batch)
            return states if len(batch.places) == 1 else states.roll(1, dims=0)

        monkeypatch.setattr(strategies.PaddedBatches, "states", shifted)
        ways = self.ways(models["mamba"])
        assert isinstance(ways.usual, strategies.OneByOne)
        assert "length-sorted batches" in ways.plan.rejected

    @needs_interface
    def test_a_check_that_cannot_fail_is_not_trusted(self, models):
        model = critic("llama")
        with torch.no_grad():
            for layer in model.pretrained_model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        ways = self.ways(model)
        assert isinstance(ways.usual, strategies.PaddedBatches)
        assert (
            ways.plan.rejected["tree packing"] == "cannot be tried, because a wrong result would look like a right one"
        )

    @needs_interface
    def test_what_a_model_raises_is_the_reason(self, models, monkeypatch):
        def fail():
            raise ImportError("no attention interface")

        monkeypatch.setattr(interface, "register", fail)
        ways = self.ways(models["llama"])
        assert isinstance(ways.usual, tree_packing.MaskedTreePacking)
        assert ways.plan.rejected["tree packing"] == "ImportError: no attention interface"

    def test_probes_keep_clear_of_special_tokens(self, models):
        sequences = self_check.probes(models["llama"].pretrained_model, None)
        assert not {0, 1, 2} & {int(token) for sequence in sequences for token in sequence}
        assert max(int(sequence.max()) for sequence in sequences) < VOCABULARY

    def test_a_model_that_reads_padding_goes_one_by_one_and_the_plan_says_why(self):
        need_architecture("cpmant")
        plan = Scorer(AutoModelForCausalLMWithValueHead.from_pretrained(build("cpmant")).eval()).plan
        assert plan.long_strategy == "one sequence at a time"
        assert plan.rejected["length-sorted batches"] == "the model reads padding"

    def test_a_plan_is_plain_data(self, models):
        found = Scorer(models["bloom"]).plan
        assert dataclasses.asdict(found)["strategy"] == "prefix cache"
        assert str(found).startswith("BloomForCausalLM: prefix cache\n  not tree packing: ")


class TestLimits:
    def test_rollouts_beyond_the_window_are_not_packed_under_a_dense_mask(self):
        model = critic("mistral", sliding_window=24)
        scorer = Scorer(model, token_budget=500, attention="mask")
        assert scorer.plan.longest_shared == 24
        records = [*trees(), Rollout([5] * 20, [6, 7]), Rollout([5] * 20, [8, 9])]
        assert worst(model, records, scorer.score(records, FIELDS)) < TOLERANCE
        encoded = [scorer._encoder.encode(at, record, "") for at, record in enumerate(records)]
        for work in scorer._engine.work(encoded, 500, Asked(FIELDS)):
            packed = isinstance(work.strategy, tree_packing.MaskedTreePacking)
            assert all((len(encoded[place]) <= 24) == packed for place in work.batch.places)

    @needs_interface
    @pytest.mark.parametrize("window", [8, 24])
    def test_attention_by_segments_keeps_to_sliding_windows(self, window):
        model = critic("mistral", sliding_window=window)
        scorer = Scorer(model)
        assert (scorer.plan.strategy, scorer.plan.longest_shared) == ("tree packing", None)
        assert model.pretrained_model.config.sliding_window == window
        assert worst(model, trees(), scorer.score(trees(), FIELDS)) < TOLERANCE

    @needs_interface
    def test_the_comparison_sees_a_window_that_is_ignored(self, monkeypatch):
        model = critic("mistral", sliding_window=24)
        scorer = Scorer(model)
        attend = segments.SegmentAttention.__call__
        monkeypatch.setattr(
            segments.SegmentAttention,
            "__call__",
            lambda self, *states, **options: attend(self, *states, **options | {"window": None}),
        )
        assert worst(model, trees(), scorer.score(trees(), FIELDS)) > 100 * TOLERANCE
        assert Scorer(model).plan.longest_shared == 24

    def test_a_window_shorter_than_the_check_rules_sharing_out(self):
        found = Scorer(critic("mistral", sliding_window=8, attention_chunk_size=8)).plan
        assert found.strategy == "length-sorted batches"
        assert found.rejected["tree packing"] == "its layers look back only 8 tokens"

    def test_a_window_that_cannot_be_tried_stays_a_limit(self):
        """The configuration states one, and the model heeds none."""
        found = Scorer(critic("llama", sliding_window=24)).plan
        assert found.strategy.startswith("tree packing")
        assert found.longest_shared == 24

    def test_windows_by_place_in_the_row_are_kept_by_short_rows(self):
        model = critic("gpt_neo")
        scorer = Scorer(model)
        assert scorer.plan.strategy == "tree packing with a dense mask"
        records = trees(prompts=6)
        assert worst(model, records, scorer.score(records, FIELDS)) < TOLERANCE

    def test_rotary_embeddings_that_change_with_the_batch(self):
        settings = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        model = critic("llama", rope_parameters=settings, rope_scaling=settings, max_position_embeddings=32)
        scorer = Scorer(model)
        records = [*trees(), Rollout([5] * 20, [6] * 20, id="long"), Rollout([5] * 20, [7] * 25, id="longer")]
        scores = scorer.score(records, FIELDS)
        assert scorer.plan.longest_shared == 32
        for record, score in zip(records, scores, strict=True):
            model(torch.tensor([[5]]))  # A short sequence resets what the longest one so far left behind.
            assert largest_difference(model, record, score) < TOLERANCE


class TestState:
    def test_the_attention_is_the_model_s_own_afterwards(self, models):
        config = models["gemma2"].pretrained_model.config
        before = config._attn_implementation
        Scorer(models["gemma2"]).score(trees())
        assert config._attn_implementation == before

    @needs_interface
    def test_also_after_an_error(self, models, monkeypatch):
        scorer = Scorer(models["llama"])
        before = models["llama"].config._attn_implementation

        def fail(*_args, **_kwargs):
            raise ValueError("broken")

        monkeypatch.setattr(segments.SegmentAttention, "__call__", fail)
        with pytest.raises(ValueError, match="broken"):
            scorer.score(trees())
        assert models["llama"].config._attn_implementation == before
        assert interface._active.attend is None

    def test_queries_in_several_blocks(self, models, monkeypatch):
        monkeypatch.setattr(segments, "_QUERY_BLOCK", 3)
        for architecture in ("llama", "gemma2"):
            scorer = Scorer(models[architecture])
            assert scorer.plan.strategy.startswith("tree packing")
            assert worst(models[architecture], trees(), scorer.score(trees(), FIELDS)) < TOLERANCE


def test_padding_on_the_left_of_the_input_is_no_matter_of_the_scorer(models):
    """Rollouts come unpadded; a prompt that begins with the padding token is taken as it is."""
    records = [Rollout(np.r_[[0] * 3, record.prompt], record.completion) for record in trees()]
    scores = Scorer(models["llama"]).score(records, FIELDS)
    assert worst(models["llama"], records, scores) < TOLERANCE
