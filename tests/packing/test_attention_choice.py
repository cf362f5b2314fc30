"""Which way of attending a scorer takes, how it says so, and that each way gives the same scores."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM, modeling_utils

from tests.packing.attention_cases import flash_attn_varlen_func, install_flash
from tests.scoring.scoring_models import by_way, critic, rollouts, trees, worst
from vhead import Scorer, VheadError
from vhead.backbone.hidden_states import plan_for
from vhead.backbone.placement import to_device
from vhead.packing import plan, strategies, tree_packing
from vhead.packing.attention import flash as flash_attention
from vhead.packing.attention import interface, visibility
from vhead.packing.attention import segments as segment_attention
from vhead.packing.tree_packing import MaskedTreePacking, TreePacking
from vhead.scoring import engine
from vhead.scoring.chunks import Outputs
from vhead.scoring.fields import FIELDS, Asked
from vhead.scoring.logits import LogitsRule, token_statistics

TOLERANCE = 1e-5
# Grouped heads, a sliding window of 12, soft-capped scores with a window in every other layer.
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "gemma2": {"sliding_window": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
}

pytestmark = [
    pytest.mark.skipif(not hasattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS"), reason="no attention interface"),
    pytest.mark.skipif(torch.__version__ < "2.5", reason="FlexAttention came with torch 2.5"),
]


@pytest.fixture(scope="module")
def models():
    return {name: critic(name, **settings) for name, settings in MODELS.items()}


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    install_flash(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("attention", ["segments", "flex", "flash"])
def test_every_way_gives_what_one_rollout_alone_gives(models, architecture, attention):
    model = models[architecture]
    scorer = Scorer(model, attention=attention)
    assert (scorer.plan.attention, scorer.plan.attention_reason) == (attention, "as asked for")
    assert scorer.plan.longest_shared is None
    for seed in range(3):
        records = [*trees(seed=seed), *rollouts(4, seed=seed)]
        assert worst(model, records, scorer.score(records, FIELDS)) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_dense_mask_gives_the_same(architecture):
    model = critic(architecture)
    scorer = Scorer(model, attention="mask")
    assert scorer.plan.strategy == "tree packing with a dense mask"
    assert worst(model, trees(), scorer.score(trees(), FIELDS)) < TOLERANCE


@pytest.mark.parametrize("attention", ["segments", "flex", "flash", "mask"])
def test_in_half_precision_no_way_is_worse_than_padding(attention):
    model, exact = critic("llama"), critic("llama")
    model.pretrained_model.to(torch.bfloat16)
    exact.pretrained_model.load_state_dict(model.pretrained_model.state_dict())
    padded = by_way(Scorer(model), "PaddedBatches")
    records = trees(prompts=8)
    errors = [
        worst(exact, records, scorer.score(records, ["values", "reward"]))
        for scorer in (Scorer(model, attention=attention), padded)
    ]
    assert errors[0] <= 1.5 * errors[1]


def test_terms_that_are_not_known_are_refused():
    with pytest.raises(NotImplementedError, match="the model adds terms of its own to attention scores: s_aux"):
        interface._forward(None, None, None, None, s_aux=torch.zeros(4))


class TestLeaks:
    """One token that sees one token too many is noticed when the scorer is made."""

    def refused(self, model, attention):
        with pytest.raises(VheadError, match=r"differs from one sequence alone by .* of the largest state") as raised:
            Scorer(model, attention=attention)
        return str(raised.value)

    @pytest.mark.parametrize("attention", ["flex", "mask"])
    def test_a_row_that_is_seen_by_one_more(self, models, attention, monkeypatch):
        of = visibility.Visibility.of

        def leaky(segments):
            visibility = of(segments)
            visibility.ends[segments[0].stop - 1] += 1
            return visibility

        monkeypatch.setattr(visibility.Visibility, "of", leaky)
        self.refused(models["llama"], attention)

    def test_a_key_too_many_in_a_segment(self, models, monkeypatch):
        pieces = segment_attention.pieces

        def leaky(segments, window):
            for piece in pieces(segments, window):
                own = piece.keys[-1]
                more = (max(own[0] - 1, 0), own[1])
                yield segment_attention.Piece(
                    piece.start,
                    piece.stop,
                    (*piece.keys[:-1], more),
                    piece.queries,
                    piece.key_count + more[1] - own[1] + own[0] - more[0],
                )

        monkeypatch.setattr(segment_attention, "pieces", leaky)
        self.refused(models["llama"], "segments")

    def test_a_stretch_that_is_one_too_long(self, models, monkeypatch):
        after = flash_attention.after_stretch
        monkeypatch.setattr(
            flash_attention,
            "after_stretch",
            lambda segments, depth: [(queries, (start, stop + 1)) for queries, (start, stop) in after(segments, depth)],
        )
        self.refused(models["llama"], "flash")

    def test_a_window_that_is_one_too_long_keeps_long_rollouts_out(self, models, monkeypatch):
        attend = segment_attention.SegmentAttention.__call__
        monkeypatch.setattr(
            segment_attention.SegmentAttention,
            "__call__",
            lambda self, *states, window, **options: attend(self, *states, window=window + 1, **options),
        )
        found = Scorer(models["mistral"]).plan
        assert found.longest_shared is None or found.longest_shared <= 12
        assert found.strategy != "tree packing"


class TestChoice:
    @pytest.fixture
    def as_on_cuda(self, monkeypatch):
        """The order of CUDA, with kernels that run here."""
        monkeypatch.setitem(plan._ORDER, "cpu", plan._ORDER["cuda"])

    def test_segments_are_the_first_choice_on_a_cpu(self, models):
        found = Scorer(models["llama"]).plan
        assert str(found) == (
            "LlamaForCausalLM: tree packing\n"
            "  attention: segments, the fastest measured on a CPU\n"
            "  logits: the language-model head's output\n  batches: 2048 tokens, as VHEAD_TOKEN_BUDGET says\n"
            "  own kernels: 2 of 2 gated layers, 5 of 5 norms, 2 of 2 decoder layers\n"
            "  last layer: where few rows are read, of those alone"
        )

    def test_flex_is_the_first_choice_on_cuda(self, models, as_on_cuda):
        found = Scorer(models["llama"]).plan
        assert str(found) == (
            "LlamaForCausalLM: tree packing with FlexAttention\n"
            "  attention: flex, expected to be the fastest on CUDA\n"
            "  logits: the language-model head's output\n  batches: 2048 tokens, as VHEAD_TOKEN_BUDGET says\n"
            "  own kernels: 2 of 2 gated layers, 5 of 5 norms, 2 of 2 decoder layers\n"
            "  last layer: where few rows are read, of those alone"
        )

    def test_flash_is_the_next_and_what_failed_is_said(self, models, as_on_cuda, monkeypatch):
        def fail(*_args, **_options):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(tree_packing.FlexAttention, "__call__", fail)
        found = Scorer(models["llama"]).plan
        assert (found.attention, found.attention_reason) == ("flash", "the next one that passed its trial")
        assert found.rejected == {"tree packing with FlexAttention": "RuntimeError: no compiler"}

    def test_without_the_package_segments_follow(self, models, as_on_cuda, monkeypatch):
        monkeypatch.setitem(tree_packing.FlexAttention.__init__.__globals__, "_kernel", None)
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        found = Scorer(models["llama"]).plan
        assert found.attention == "segments"
        assert found.rejected["tree packing with FlashAttention"].startswith(
            "ModuleNotFoundError: import of flash_attn"
        )

    def test_a_kernel_that_refuses_the_dtype_is_the_reason(self, models):
        def half_only(q, *args, **options):
            if q.dtype not in (torch.float16, torch.bfloat16):
                raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
            return flash_attn_varlen_func(q, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            install_flash(patch, half_only)
            with pytest.raises(VheadError, match="got 'flash': RuntimeError: FlashAttention only support fp16"):
                Scorer(models["llama"], attention="flash")

    def test_what_a_model_cannot_take_is_an_error_with_the_reason(self):
        with pytest.raises(
            VheadError, match=r"attention: expected one that the MambaForCausalLM can take, got 'flex': "
        ):
            Scorer(critic("mamba"), attention="flex")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"attention": "sdpa"}, "attention: expected one of segments, flex, flash, mask, got 'sdpa'"),
            (
                {"attention": "flex", "batch_invariant": True},
                "attention: expected None with batch_invariant, got 'flex'",
            ),
        ],
    )
    def test_what_cannot_be_asked_for(self, models, options, message):
        with pytest.raises(ValueError, match=message):
            Scorer(models["llama"], **options)

    def test_without_trees_the_plan_has_no_attention(self):
        found = Scorer(critic("mamba")).plan
        assert found.attention is None
        assert "attention" not in str(found).replace("attention interface", "")


class TestOnCuda:
    """A whole model whose tensors say they are on CUDA and hold nothing: whatever waits for the device raises."""

    @pytest.mark.parametrize("way", ["TreePacking", "MaskedTreePacking"])
    def test_a_batch_goes_through_without_waiting(self, models, way, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        interface.register()
        scorer = Scorer(models["llama"])
        encoded = [scorer._encoder.encode(at, record, "") for at, record in enumerate(trees())]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            with torch.device("cuda"):
                model = AutoModelForCausalLM.from_config(models["llama"].pretrained_model.config).eval()
                head = torch.nn.Linear(32, 1)
            body = strategies.Body(model, plan_for(model))
            strategy = TreePacking(body) if way == "TreePacking" else MaskedTreePacking(body, None)
            own = object.__new__(engine.Engine)
            own._head, own.outputs = head, Outputs(1)
            (batch,) = strategy.batches([rollout.tokens for rollout in encoded], [], 2048)
            asked = Asked(FIELDS)
            read = engine.Read.of([encoded[place] for place in batch.places], batch, scorer._conventions, None, asked)
            states = strategy.states_of(batch, read.rows)
            computed = own._head_outputs(states, read, asked)
            rows = states[to_device(read.written, states.device)]
            computed |= token_statistics(rows, LogitsRule(model.lm_head), read.statistics(asked))
            assert {(tensor.device.type, tensor.shape) for tensor in computed.values()} == {
                ("cuda", (sum(read.counts),)),
                ("cuda", (len(encoded),)),
                ("cuda", (len(encoded), 1)),
            }
            with pytest.raises(DataDependentOutputException):
                computed["values"].sum().item()
