"""Each way of attending in a packed row, against each sequence's attention by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.packing.attention_cases import SIZE, install_flash, one_at_a_time, random_pack, random_states
from vhead.packing.attention import flash as attention_flash
from vhead.packing.attention import flex as attention_flex
from vhead.packing.attention import segments as attention_segments
from vhead.packing.attention.flash import FlashAttention, after_stretch
from vhead.packing.attention.flex import BLOCK, FlexAttention, block_mask, seen_blocks, whole_blocks
from vhead.packing.attention.segments import Piece, SegmentAttention, branches, groups, pieces
from vhead.packing.attention.visibility import Visibility, dense_mask
from vhead.packing.trees import Pack, Segment, pack_trees

TOLERANCE = 1e-5
SEEDS = st.integers(0, 2**32 - 1)
# Scale, soft cap and window, each with and without.
OPTIONS = [(0.3, None, None), (0.3, 2.0, None), (0.5, None, 5), (0.5, 2.0, 5)]

needs_flex = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "flex_attention") and torch.__version__ < "2.5",
    reason="FlexAttention came with torch 2.5",
)


def tensors_may_claim_a_device() -> bool:
    """Whether tensors without data can say that they are on CUDA; old releases ask the driver about that."""
    try:
        with FakeTensorMode():
            return torch.arange(2).to("cuda").is_cuda
    except RuntimeError:
        return False


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    install_flash(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    yield
    torch.compiler.reset()


def difference(way, pack: Pack, seed: int, options, **settings) -> float:
    """The largest, of a way over all rows of a pack."""
    scale, softcap, window = options
    segments = whole_blocks(pack.segments) if way is FlexAttention else pack.segments
    states = random_states(segments[-1].stop, seed, **settings)
    expected = one_at_a_time(pack, states, scale=scale, softcap=softcap, window=window)[:, : len(pack.tokens)]
    assert expected.isfinite().all()
    attended = way(segments)(*states, scale=scale, softcap=softcap, window=window)
    assert attended.is_contiguous()
    return float((attended[:, : len(pack.tokens)] - expected).abs().max())


class TestEveryWay:
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("work", [0.0, attention_segments._CALL_WORK["cpu"], 1e15])
    @settings(max_examples=8, deadline=None)
    @given(seed=SEEDS)
    def test_segments(self, work, options, seed):
        """From every piece alone to all pieces padded into one call."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(attention_segments._CALL_WORK, "cpu", work)
            assert difference(SegmentAttention, random_pack(seed), seed, options) < TOLERANCE

    @pytest.mark.parametrize("options", OPTIONS)
    @settings(max_examples=8, deadline=None)
    @given(seed=SEEDS)
    def test_flash(self, options, seed):
        assert difference(FlashAttention, random_pack(seed), seed, options) < TOLERANCE

    @needs_flex
    @pytest.mark.parametrize("capped", [False, True])
    @settings(max_examples=6, deadline=None)
    @given(seed=SEEDS)
    def test_flex(self, capped, seed):
        for options in OPTIONS:
            if (options[1] is not None) == capped:
                assert difference(FlexAttention, random_pack(seed, longest=150), seed, options) < TOLERANCE

    @pytest.mark.parametrize("key_heads", [1, 4])
    @pytest.mark.parametrize("way", [SegmentAttention, FlashAttention])
    def test_heads_that_are_grouped_otherwise(self, way, key_heads):
        for seed in range(3):
            assert difference(way, random_pack(seed), seed, OPTIONS[0], key_heads=key_heads) < TOLERANCE

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("way", [SegmentAttention, FlashAttention])
    def test_long_segments_are_divided(self, way, options, monkeypatch):
        monkeypatch.setattr(attention_segments, "_QUERY_BLOCK", 3)
        for seed in range(3):
            assert difference(way, random_pack(seed), seed, options) < TOLERANCE

    @pytest.mark.parametrize("window", [1, 2, 1000])
    @pytest.mark.parametrize("way", [SegmentAttention, FlashAttention])
    def test_windows_of_any_size(self, way, window):
        for seed in range(3):
            assert difference(way, random_pack(seed), seed, (0.3, None, window)) < TOLERANCE

    def test_the_comparison_sees_rows_of_another_path(self):
        pack = random_pack(7)
        states = random_states(len(pack.tokens), 7)
        expected = one_at_a_time(pack, states, scale=0.3, softcap=None, window=None)
        attended = SegmentAttention([Segment(0, len(pack.tokens), ())])(*states, scale=0.3)
        assert len(pack.segments) > 2
        assert (attended - expected).abs().max() > 0.1

    def test_the_comparison_sees_a_window_that_is_one_too_long(self):
        pack = random_pack(7)
        states = random_states(len(pack.tokens), 7)
        expected = one_at_a_time(pack, states, scale=0.3, softcap=None, window=5)
        for way in (SegmentAttention, FlashAttention):
            assert (way(pack.segments)(*states, scale=0.3, window=6) - expected).abs().max() > 0.1

    def test_the_default_scale_is_that_of_the_head_size(self):
        pack = random_pack(3)
        for way in (SegmentAttention, FlashAttention):
            states = random_states(len(pack.tokens), 3)
            torch.testing.assert_close(way(pack.segments)(*states), way(pack.segments)(*states, scale=SIZE**-0.5))


class TestSegments:
    @settings(max_examples=30, deadline=None)
    @given(seed=SEEDS, window=st.none() | st.integers(1, 30), work=st.sampled_from([0.0, 1e4, 1e5, 1e12]))
    def test_every_query_is_in_one_call(self, seed, window, work):
        pack = random_pack(seed)
        together = groups(branches(pieces(pack.segments, window), window), 128, work)
        rows = sorted(row for group in together for piece in group for row in range(piece.start, piece.stop))
        assert rows == list(range(len(pack.tokens)))

    def test_small_pieces_are_put_together_and_large_ones_are_not(self):
        small = [Piece(at, at + 4, ((at, at + 4),), 4, 4) for at in range(0, 40, 4)]
        large = [Piece(at, at + 400, ((at, at + 400),), 400, 400) for at in range(40, 2040, 400)]
        together = groups([*small, *large], 4 * 14 * 64, attention_segments._CALL_WORK["cpu"])
        assert [len(group) for group in together] == [10, 1, 1, 1, 1, 1]

    @pytest.mark.parametrize("options", OPTIONS)
    def test_short_completions_of_a_long_prompt_are_one_call(self, options):
        rng = np.random.default_rng(2)
        prompt = rng.integers(3, 90, 300)
        tails = [rng.integers(3, 90, int(rng.integers(1, 5))) for _ in range(40)]
        (pack,) = pack_trees([np.concatenate([prompt, tail]) for tail in tails], 10**6)
        assert difference(SegmentAttention, pack, 2, options) < TOLERANCE
        found = branches(pieces(pack.segments, None), None)
        assert sum(piece.forks for piece in found) <= 2
        assert len(found) <= 3

    def test_long_completions_of_a_short_prompt_are_calls_of_their_own(self):
        segments = [Segment(0, 300, ()), *(Segment(at, at + 100, ((0, 200),)) for at in range(300, 1100, 100))]
        assert branches(pieces(segments, None), None) == list(pieces(segments, None))

    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS, window=st.none() | st.integers(1, 60))
    def test_branches_that_fork_in_any_way(self, seed, window):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_segments, "_JOINED_AS_PAIRS", 10**6)
            assert difference(SegmentAttention, random_pack(seed), seed, (0.3, None, window)) < TOLERANCE

    def test_a_batched_call_has_no_more_pairs_than_its_mask_may(self, monkeypatch):
        monkeypatch.setattr(attention_segments, "_MOST_PAIRS", 50)
        small = [Piece(at, at + 4, ((at, at + 4),), 4, 4) for at in range(0, 40, 4)]
        assert max(len(group) for group in groups(small, 1, 1e12)) == 3

    def test_layers_of_one_kind_share_what_was_planned(self):
        pack = random_pack(5)
        attend, states = SegmentAttention(pack.segments), random_states(len(pack.tokens), 5)
        attend(*states)
        (planned,) = attend._calls.values()
        attend(*states)
        assert next(iter(attend._calls.values())) is planned
        attend(*states, window=5)
        assert len(attend._calls) == 2


class TestVisibility:
    @settings(max_examples=30, deadline=None)
    @given(seed=SEEDS)
    def test_a_row_sees_its_path_and_nothing_else(self, seed):
        pack = random_pack(seed)
        expected = np.zeros((len(pack.tokens), len(pack.tokens)), bool)
        for at in range(len(pack.places)):
            rows = pack.rows(at)
            expected[np.ix_(rows, rows)] |= np.tril(np.ones((len(rows), len(rows)), bool))
        found = Visibility.of(pack.segments)
        assert np.array_equal(found.positions, pack.positions)
        assert np.array_equal(pairs(found, None), expected)
        mask = dense_mask(pack.segments, torch.float32)
        assert mask.shape == (1, 1, *expected.shape)
        assert np.array_equal(mask[0, 0].numpy() == 0.0, expected)
        assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}

    @settings(max_examples=30, deadline=None)
    @given(seed=SEEDS, window=st.none() | st.integers(1, 400))
    def test_blocks_hold_what_is_seen(self, seed, window):
        visibility = Visibility.of(whole_blocks(random_pack(seed, longest=400).segments))
        full, partial = seen_blocks(visibility, window)
        count = len(full)
        blocks = pairs(visibility, window).reshape(count, BLOCK, count, BLOCK)
        assert np.array_equal(full & partial, np.zeros_like(full))
        assert blocks.all(axis=(1, 3))[full].all()
        assert not blocks.any(axis=(1, 3))[~(full | partial)].any()

    def test_blocks_are_passed_over_and_seen_as_a_whole(self):
        segments = [Segment(0, 384, ()), Segment(384, 512, ((0, 256),)), Segment(512, 768, ())]
        full, partial = seen_blocks(Visibility.of(segments), None)
        assert full.astype(int).tolist() == [
            [0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0],
        ]
        assert np.array_equal(partial, np.eye(6, dtype=bool))

    @pytest.mark.parametrize(("rows", "filled"), [(1, 256), (256, 256), (257, 384), (1000, 1024)])
    def test_rows_are_filled_up_to_whole_blocks(self, rows, filled):
        segments = whole_blocks([Segment(0, rows, ())])
        assert segments[-1].stop == filled
        assert Visibility.of(segments).ends[:rows].max() == rows

    @needs_flex
    def test_the_block_mask_is_the_tree_s(self):
        visibility = Visibility.of(whole_blocks(random_pack(11, longest=300).segments))
        for window in (None, 50):
            made = block_mask(visibility, window, torch.device("cpu"))
            rows = torch.arange(len(visibility.ends))
            zero = torch.tensor(0)
            visible = made.mask_mod(zero, zero, rows[:, None], rows)
            assert np.array_equal(visible.numpy(), pairs(visibility, window))
            full, partial = seen_blocks(visibility, window)
            assert np.array_equal(listed(made.kv_num_blocks, made.kv_indices), partial)
            assert np.array_equal(listed(made.full_kv_num_blocks, made.full_kv_indices), full)


def listed(counts: torch.Tensor, chosen: torch.Tensor) -> np.ndarray:
    """Lists of blocks `[1, 1, Q, K]` as a table, by what FlexAttention says they are."""
    table = np.zeros(chosen.shape[2:], bool)
    for row, (count, blocks) in enumerate(zip(counts[0, 0].tolist(), chosen[0, 0].tolist(), strict=True)):
        table[row, blocks[:count]] = True
    return table


def pairs(visibility: Visibility, window: int | None) -> np.ndarray:
    """Which row sees which, by the rule of `Visibility`."""
    rows = np.arange(len(visibility.ends))
    seen = (rows <= rows[:, None]) & (rows[:, None] < visibility.ends)
    near = visibility.positions[:, None] - visibility.positions < (len(rows) if window is None else window)
    return seen & near


class TestFlash:
    def test_neighbours_that_share_a_stretch_are_one_sequence(self):
        segments = [
            Segment(0, 30, ()),
            Segment(30, 35, ((0, 20),)),
            Segment(35, 40, ((0, 20),)),
            Segment(40, 45, ((0, 20), (35, 38))),
            Segment(45, 60, ()),
        ]
        assert after_stretch(segments, 0) == [((30, 45), (0, 20))]
        assert after_stretch(segments, 1) == [((40, 45), (35, 38))]
        assert after_stretch(segments, 2) == []

    @pytest.mark.parametrize("shorter", [0, 1, 2])
    def test_windows_about_as_long_as_the_longest_path(self, shorter):
        pack = random_pack(7)
        window = int(pack.positions.max()) + 1 - shorter
        assert difference(FlashAttention, pack, 7, (0.3, None, window)) < TOLERANCE

    def test_without_sharing_it_is_one_call(self, monkeypatch):
        calls = []
        install_flash(monkeypatch, lambda q, *args, **options: (calls.append(options), q)[1])
        FlashAttention([Segment(0, 5, ()), Segment(5, 9, ())])(*random_states(9, 0))
        assert calls == [{"softmax_scale": None, "causal": True}]

    def test_logarithms_in_another_layout_are_refused(self, monkeypatch):
        install_flash(monkeypatch, lambda q, *args, **options: (q, torch.zeros(2, q.shape[1], 5), None))
        with pytest.raises(
            RuntimeError, match=r"expected logarithms of sums by token, of shape \(4, 9\), got \(2, 4, 5\)"
        ):
            FlashAttention([Segment(0, 5, ()), Segment(5, 9, ((0, 3),))])(*random_states(9, 0))

    def test_the_merge_is_one_softmax(self, monkeypatch):
        """Breaking the merge on purpose is seen."""
        merge = attention_flash._merge
        monkeypatch.setattr(
            attention_flash, "_merge", lambda o, s, rows, more, sums: merge(o, s, rows, more, sums + 0.5)
        )
        assert difference(FlashAttention, random_pack(7), 7, OPTIONS[0]) > 100 * TOLERANCE


@pytest.mark.skipif(not tensors_may_claim_a_device(), reason="this torch asks the driver about fake CUDA tensors")
class TestOnCuda:
    """Tensors that say they are on CUDA and hold nothing: whatever reads one, or mixes devices, raises."""

    @pytest.fixture(autouse=True)
    def no_page_locking(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_nothing_waits_for_the_device(self, options):
        scale, softcap, window = options
        pack = random_pack(7)
        with FakeTensorMode():
            states = [torch.empty(1, heads, len(pack.tokens), SIZE, device="cuda") for heads in (4, 2, 2)]
            attended = SegmentAttention(pack.segments)(*states, scale=scale, softcap=softcap, window=window)
            assert attended.device.type == "cuda"
            assert attended.shape == (1, len(pack.tokens), 4, SIZE)

    @pytest.mark.parametrize("window", [None, 5])
    def test_flash(self, window, monkeypatch):
        def varlen(q, k, v, *bounds, **options):
            assert {bound.device.type for bound in bounds[:2]} == {q.device.type} == {"cuda"}
            return (q, q.new_empty(4, q.shape[0]), None) if options.get("return_attn_probs") else q

        install_flash(monkeypatch, varlen)
        pack = random_pack(7)
        with FakeTensorMode():
            states = [torch.empty(1, heads, len(pack.tokens), SIZE, device="cuda") for heads in (4, 2, 2)]
            assert FlashAttention(pack.segments)(*states, window=window).device.type == "cuda"

    @needs_flex
    def test_masks_are_made_there(self):
        segments = whole_blocks(random_pack(7).segments)
        device = torch.device("cuda")
        with FakeTensorMode():
            assert dense_mask(segments, torch.float32, device).device.type == "cuda"
            made = block_mask(Visibility.of(segments), None, device)
            tensors = (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
            assert {tensor.device.type for tensor in tensors} == {"cuda"}

    @pytest.mark.parametrize("window", [None, 5])
    @pytest.mark.parametrize("way", [SegmentAttention, FlashAttention])
    def test_layers_may_be_on_several_devices(self, way, window, monkeypatch):
        def varlen(q, k, v, *bounds, **options):
            assert {bound.device for bound in bounds[:2]} == {q.device}
            return (q, q.new_empty(4, q.shape[0]), None) if options.get("return_attn_probs") else q

        install_flash(monkeypatch, varlen)
        pack = random_pack(7)
        with FakeTensorMode():
            attend = way(pack.segments)
            for device in ("cuda:0", "cuda:1"):
                states = [torch.empty(1, heads, len(pack.tokens), SIZE, device=device) for heads in (4, 2, 2)]
                assert str(attend(*states, window=window).device) == device

    def test_the_check_can_fail(self):
        with FakeTensorMode():
            there, here = torch.empty(3, device="cuda"), torch.empty(3)
            with pytest.raises(RuntimeError):
                there + here
            with pytest.raises(DataDependentOutputException):
                there.sum().item()

    def test_a_device_call_is_worth_more_than_a_call_on_the_cpu(self):
        pack = random_pack(7)
        states = random_states(len(pack.tokens), 7)
        calls = {}
        with FakeTensorMode():
            for device in ("cpu", "cuda"):
                attend = SegmentAttention(pack.segments)
                attend(*(torch.empty(state.shape, device=device) for state in states))
                calls[device] = len(next(iter(attend._calls.values())))
        assert calls["cuda"] < calls["cpu"]
        assert attention_flex.BLOCK % 64 == 0
