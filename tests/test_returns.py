"""Advantages and returns: against slow loops in float64, each framework's numbers, and the faults people report."""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vhead import returns
from vhead.returns import native, places

FreshPython = Callable[[str], str]
CONVENTIONS = ("vhead", "verl", "nemo_rl", "slime", "trl")


class Case:
    """Random rewards, values, masks and bootstraps of padded rollouts."""

    def __init__(self, shape=(4, 37), seed=0, share=0.6):
        random = np.random.default_rng(seed)
        self.rewards, self.values = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        self.mask = random.random(shape) < share
        self.mask[:, random.integers(shape[1])] = True
        self.bootstrap = random.standard_normal(shape[0]).astype(np.float32)


def turns(shape, seed=0):
    """A mask with long runs, as rollouts of several turns have it."""
    random = np.random.default_rng(seed)
    rows = [
        np.repeat(random.random(shape[1]) < 0.6, random.integers(1, 400, shape[1]))[: shape[1]] for _ in range(shape[0])
    ]
    return np.stack(rows)


def compressed(rewards, values, mask, gamma=1.0, lam=0.95, value_lam=None, bootstrap=None):
    """The masked tokens taken out, GAE on the rest in float64, the results put back: 0 elsewhere."""
    advantages, found = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for row in range(len(rewards)):
        (places_of_model,) = np.nonzero(mask[row])
        r, v = rewards[row][places_of_model].astype(float), values[row][places_of_model].astype(float)
        following = np.append(v[1:], 0.0 if bootstrap is None else bootstrap[row])
        for lambdas, to, plus in ((lam, advantages, 0.0 * v), (lam if value_lam is None else value_lam, found, v)):
            weight, total = gamma * np.broadcast_to(lambdas, len(rewards))[row], 0.0
            for t in reversed(range(len(r))):
                total = r[t] + gamma * following[t] - v[t] + weight * total
                to[row, places_of_model[t]] = total + plus[t]
    return advantages, found


def carried(rewards, values, mask, gamma=1.0, lam=0.95):
    """One step a column; a masked one keeps the state of the columns behind it, and shows it."""
    state_value, state = np.zeros(len(rewards)), np.zeros(len(rewards))
    advantages = np.zeros(rewards.shape)
    for t in reversed(range(rewards.shape[1])):
        new = rewards[:, t] + gamma * state_value - values[:, t] + gamma * lam * state
        state = np.where(mask[:, t], new, state)
        state_value = np.where(mask[:, t], values[:, t], state_value)
        advantages[:, t] = state
    return advantages, advantages + values


def standardised(x, mask, correction):
    picked = x[mask]
    return (x - picked.mean()) / np.sqrt(picked.var(ddof=correction) + 1e-8)


def verl(rewards, values, mask, gamma, lam):
    advantages, found = carried(rewards, values, mask, gamma, lam)
    return standardised(advantages, mask, 1), found


def nemo_rl(rewards, values, mask, gamma, lam):
    advantages, found = carried(rewards, values, mask, gamma, lam)
    return np.where(mask, standardised(advantages, mask, 0), 0.0), found


def slime(rewards, values, mask, gamma, lam):
    return carried(rewards, values, np.ones_like(mask), gamma, lam)


def trl(rewards, values, mask, gamma, lam):
    """Padding behind the last token; the place after that token still has a value, and nothing behind it."""
    counted = np.arange(mask.shape[1]) <= (np.where(mask, np.arange(mask.shape[1]), -2).max(1) + 1)[:, None]
    advantages, found = carried(
        np.where(counted, rewards, 0), np.where(counted, values, 0), np.ones_like(mask), gamma, lam
    )
    return np.where(mask, standardised(advantages, mask, 1), 0.0), found


FRAMEWORKS = {"verl": verl, "nemo_rl": nemo_rl, "slime": slime, "trl": trl}


def close(actual, expected, tolerance=1e-6):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    return actual.shape == expected.shape and bool(
        (np.abs(actual - expected) <= tolerance * np.maximum(1, np.abs(expected))).all()
    )


def assert_close(actual, expected, tolerance=1e-6):
    for got, wanted in zip(actual, expected, strict=True):
        assert close(got, wanted, tolerance), np.abs(np.asarray(got, np.float64) - wanted).max()


def flat(array, mask_of_tokens):
    return array[mask_of_tokens]


# --- GAE against the loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 23), (2, 64), (2, 65), (3, 511), (2, 513), (2, 1500)])
@pytest.mark.parametrize("share", [0.05, 0.6, 1.0, "turns"])
@pytest.mark.parametrize("rules", [{}, {"gamma": 0.99, "lam": 0.9, "value_lam": 1.0}, {"gamma": 0.0}, {"lam": 0.0}])
def test_gae_is_the_float64_loop(shape, share, rules):
    case = Case(shape, share=share if share != "turns" else 1.0)
    if share == "turns":
        case.mask = turns(shape)
    arguments = {"mask": case.mask, "bootstrap": case.bootstrap, **rules}
    actual = returns.gae(case.rewards, case.values, **arguments)
    assert all(array.dtype == np.float32 for array in actual)
    assert_close(actual, compressed(case.rewards, case.values, **arguments))


def test_a_lambda_that_is_a_little_off_is_seen():
    case = Case()
    expected = compressed(case.rewards, case.values, case.mask, lam=0.9500002)
    assert not close(returns.gae(case.rewards, case.values, mask=case.mask, lam=0.951)[0], expected[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_carried_and_compressed_agree_at_the_model_s_tokens_over_random_masks(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 150))
    case = Case((rows, columns), seed=data.draw(st.integers(0, 2**31)))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask = np.array(bits).reshape(rows, columns)
    ours = returns.gae(case.rewards, case.values, mask=mask, lam=0.9)
    loop = carried(case.rewards.astype(float), case.values.astype(float), mask, lam=0.9)
    assert_close(ours, [np.where(mask, array, 0) for array in loop])
    assert_close(ours, compressed(case.rewards, case.values, mask, lam=0.9))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_padded_and_ragged_are_the_same_bits(lengths, seed):
    case = Case((len(lengths), max(lengths) + 1), seed)
    tokens = np.arange(max(lengths) + 1) < np.array(lengths)[:, None]
    mask, offsets = case.mask & tokens, np.cumsum([0, *lengths])
    lam = np.linspace(0.5, 1.0, len(lengths))
    rules = {"lam": lam, "value_lam": 1.0, "bootstrap": case.bootstrap}
    padded = returns.gae(case.rewards, case.values, mask=mask, **rules)
    ragged = returns.gae(case.rewards[tokens], case.values[tokens], mask=mask[tokens], offsets=offsets, **rules)
    for one, other in zip(padded, ragged, strict=True):
        assert (one[mask] == other[mask[tokens]]).all()


def test_lambda_for_each_rollout():
    case, lam = Case(), np.array([0.0, 0.5, 0.9, 1.0])
    arguments = {"mask": case.mask, "lam": lam, "value_lam": lam[::-1]}
    assert_close(
        returns.gae(case.rewards, case.values, **arguments), compressed(case.rewards, case.values, **arguments)
    )


def test_a_million_steps_stay_within_1e_6():
    case = Case((1, 1_000_000), share=1.0)
    expected = compressed(case.rewards, case.values, case.mask, gamma=1.0, lam=1.0)
    assert_close(returns.gae(case.rewards, case.values, lam=1.0), expected)


def test_one_rollout_needs_no_offsets():
    case = Case((1, 30))
    ours = returns.gae(case.rewards[0], case.values[0], mask=case.mask[0])
    assert_close([x[None] for x in ours], compressed(case.rewards, case.values, case.mask))


# --- Frameworks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", FRAMEWORKS)
@pytest.mark.parametrize("rules", [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0)])
def test_each_convention_gives_that_framework_s_numbers_at_every_place(convention, rules):
    case = Case((5, 120))
    case.mask[1, 70:] = False
    expected = FRAMEWORKS[convention](case.rewards.astype(float), case.values.astype(float), case.mask, *rules)
    gamma, lam = rules
    ours = returns.gae(case.rewards, case.values, mask=case.mask, gamma=gamma, lam=lam, convention=convention)
    assert_close(ours, expected)


def test_the_conventions_differ():
    case = Case()
    found = [np.stack(returns.gae(case.rewards, case.values, mask=case.mask, convention=name)) for name in CONVENTIONS]
    assert all(not close(one, other) for place, one in enumerate(found) for other in found[:place])


def test_nemo_rl_s_decoupled_lambda_makes_the_returns_only():
    case = Case()
    advantages, found = returns.gae(
        case.rewards, case.values, mask=case.mask, lam=0.9, value_lam=1.0, convention="nemo_rl"
    )
    assert close(advantages, nemo_rl(case.rewards.astype(float), case.values.astype(float), case.mask, 1.0, 0.9)[0])
    assert close(found, carried(case.rewards.astype(float), case.values.astype(float), case.mask, 1.0, 1.0)[1])


@pytest.mark.parametrize("convention", ["verl", "nemo_rl", "trl"])
def test_whitening_a_single_token_is_an_error(convention):
    with pytest.raises(ValueError, match="at least two tokens of the model to whiten, got 1"):
        returns.gae([1.0, 2.0], [0.5, 0.25], mask=[True, False], convention=convention)


# --- Faults that people report ---------------------------------------------------------------------------------------


def test_an_observation_s_value_does_not_leak_into_the_advantage_before_it():
    case = Case()
    changed = np.where(case.mask, case.values, 1e6).astype(np.float32)
    assert_close(
        returns.gae(case.rewards, changed, mask=case.mask), returns.gae(case.rewards, case.values, mask=case.mask), 0
    )


def test_the_reward_lands_on_the_last_model_token_not_on_padding_or_a_tool_token():
    mask = np.array([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], bool)
    rewards = returns.token_rewards(np.float32([2, 3, 5]), mask=mask)
    assert rewards.tolist() == [[0, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 3], [5, 0, 0, 0, 0, 0]]


def test_observations_between_turns_are_no_steps_for_lambda_and_gamma():
    rewards, values = np.float32([[0, 0, 0, 0, 0, 1]]), np.float32([[0.1, 0.2, 9, 9, 9, 0.3]])
    mask = np.array([[1, 1, 0, 0, 0, 1]], bool)
    advantages, _ = returns.gae(rewards, values, mask=mask, gamma=0.5, lam=0.5)
    last = 1 - 0.3
    assert advantages[0, 1] == pytest.approx(0.5 * 0.3 - 0.2 + 0.25 * last)


def test_values_shifted_by_one_against_log_probabilities_give_other_advantages():
    case = Case(share=1.0)
    right = returns.gae(case.rewards, case.values)[0]
    shifted = returns.gae(case.rewards, np.roll(case.values, 1, axis=1))[0]
    assert close(right, compressed(case.rewards, case.values, case.mask)[0])
    assert not close(shifted, right)


def test_the_value_of_a_token_is_subtracted_at_that_token():
    advantages, found = returns.gae([0.0, 0.0, 1.0], [0.25, 0.5, 0.75], lam=0.0)
    assert advantages.tolist() == [0.25, 0.25, 0.25]
    assert found.tolist() == [0.5, 0.75, 1.0]


def test_whitening_does_not_count_masked_places():
    case = Case()
    whitened = returns.whiten(case.values, mask=case.mask)
    assert close(whitened, np.where(case.mask, standardised(case.values.astype(float), case.mask, 1), 0))
    far = np.where(case.mask, case.values, 1e6).astype(np.float32)
    assert (returns.whiten(far, mask=case.mask) == whitened).all()
    kept = returns.whiten(case.values, mask=case.mask, shift_mean=False)[case.mask]
    assert kept.mean() == pytest.approx(case.values[case.mask].mean(), abs=1e-6)


def test_explained_variance_is_global_and_not_the_mean_of_micro_batches():
    case = Case()
    found = case.rewards + np.arange(4, dtype=np.float32)[:, None]
    picked, left = found[case.mask].astype(float), (found - case.values)[case.mask].astype(float)
    ours = returns.explained_variance(case.values, found, mask=case.mask)
    assert ours == pytest.approx(1 - left.var() / picked.var(), abs=1e-6)
    parts = [returns.explained_variance(case.values[i], found[i], mask=case.mask[i]) for i in range(4)]
    assert ours != pytest.approx(np.mean(parts), abs=1e-3)
    assert np.isnan(returns.explained_variance(case.values, np.ones_like(found)))


def test_a_rollout_that_was_cut_off_bootstraps_from_the_value_behind_it():
    advantages, found = returns.gae([0.0, 0.0], [0.5, 0.25], bootstrap=[2.0], lam=1.0, gamma=0.5)
    assert found.tolist() == [0.5, 1.0]
    assert advantages.tolist() == [0.0, 0.75]


# --- The other functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "abs"])
def test_token_rewards_put_the_penalty_at_the_model_s_tokens(kl):
    case = Case()
    d = case.rewards.astype(float) - case.values
    estimates = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "abs": np.abs(d)}
    expected = np.where(case.mask, -0.1 * estimates[kl], 0)
    for row in range(4):
        expected[row, np.nonzero(case.mask[row])[0][-1]] += case.bootstrap[row]
    arguments = {"logprobs": case.rewards, "ref_logprobs": case.values, "kl_coef": 0.1, "kl": kl}
    assert close(returns.token_rewards(case.bootstrap, mask=case.mask, **arguments), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns_are_the_float64_loop(gamma):
    case, expected = Case((3, 700)), np.zeros((3, 700))
    for row in range(3):
        total = float(case.bootstrap[row])
        for t in reversed(np.nonzero(case.mask[row])[0]):
            total = expected[row, t] = float(case.rewards[row, t]) + gamma * total
    ours = returns.discounted(case.rewards, gamma=gamma, mask=case.mask, bootstrap=case.bootstrap)
    assert close(ours, expected)


def test_length_adaptive_lambda():
    assert returns.length_adaptive_lam(np.array([0, 10, 20, 40, 400])).tolist() == [0, 0, 0, 0.5, 0.95]
    assert returns.length_adaptive_lam(torch.tensor([400])).dtype == torch.float64


# --- Kinds of arrays ------------------------------------------------------------------------------------------------


def every_function(give, offsets=None):
    """What all functions make of a case whose arrays `give` has made."""
    case = Case((3, 90))
    rewards, values, mask, bootstrap = map(give, (case.rewards, case.values, case.mask, case.bootstrap))
    for convention in CONVENTIONS:
        yield from returns.gae(rewards, values, mask=mask, bootstrap=bootstrap, value_lam=1.0, convention=convention)
    yield returns.discounted(rewards, gamma=0.9, mask=mask, bootstrap=bootstrap)
    yield returns.token_rewards(bootstrap, mask=mask, logprobs=rewards, ref_logprobs=values, kl_coef=0.1, kl="k3")
    yield returns.whiten(values, mask=mask)
    yield returns.whiten(values, shift_mean=False)
    yield returns.explained_variance(values, rewards, mask=mask)


def test_torch_in_torch_out_with_the_bits_of_numpy():
    for ours, numpys in zip(every_function(torch.from_numpy), every_function(np.asarray), strict=True):
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == torch.float32
            assert not ours.requires_grad
            assert (ours.numpy() == numpys).all()
        else:
            assert ours == numpys


def test_the_scan_in_torch_agrees_with_the_kernels(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vhead.ops.devices.SETTINGS", type("Plain", (), {"plain_torch": True}))
        scans = list(every_function(torch.from_numpy))
    for scan, kernel in zip(scans, every_function(np.asarray), strict=True):
        assert close(np.asarray(scan), np.asarray(kernel, np.float64))


def test_the_scan_keeps_ragged_rollouts_apart(monkeypatch):
    monkeypatch.setattr("vhead.ops.devices.SETTINGS", type("Plain", (), {"plain_torch": True}))
    case, offsets = Case((1, 60)), np.array([0, 0, 7, 40, 40, 60, 60])
    r, v, m = case.rewards[0], case.values[0], case.mask[0]
    for convention in CONVENTIONS:
        rules = {"offsets": offsets, "lam": np.linspace(0.5, 1, 6), "convention": convention}
        scan = returns.gae(torch.from_numpy(r), torch.from_numpy(v), mask=torch.from_numpy(m), **rules)
        assert_close([x.numpy() for x in scan], [x.astype(float) for x in returns.gae(r, v, mask=m, **rules)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_any_real_dtype_is_read_as_float32(dtype):
    values = torch.tensor([0.0, 1.0, 2.0, -3.0]).to(dtype)
    advantages, found = returns.gae(values.requires_grad_() if dtype.is_floating_point else values, values)
    assert advantages.dtype == found.dtype == torch.float32
    assert not advantages.requires_grad
    assert close(advantages, returns.gae(values.detach().float().numpy(), values.detach().float().numpy())[0])


def test_masks_of_zeros_and_ones_are_masks():
    case = Case()
    for dtype in (np.int64, np.uint8, np.int32):
        ours = returns.gae(case.rewards, case.values, mask=case.mask.astype(dtype))
        assert_close(ours, returns.gae(case.rewards, case.values, mask=case.mask), 0)


def test_arrays_that_are_not_contiguous_are_read_as_they_are():
    case = Case((37, 37))
    ours = returns.gae(case.rewards.T, case.values.T, mask=case.mask.T)
    assert_close(ours, returns.gae(case.rewards.T.copy(), case.values.T.copy(), mask=case.mask.T.copy()), 0)


def test_numpy_needs_no_torch(fresh_python: FreshPython):
    code = "import sys, numpy, vhead; a = vhead.returns.gae(numpy.ones((40, 5000)), numpy.ones((40, 5000)))"
    assert fresh_python(f"{code}; vhead.returns.whiten(a[0]); print('torch' in sys.modules)") == "False"


def test_the_number_of_threads_changes_no_bit():
    code = (
        "import sys, numpy, hashlib, vhead; r = numpy.random.default_rng(0); x = r.standard_normal((50, 3000), 'f4')\n"
        "m = r.random((50, 3000)) < 0.7; a = vhead.returns.gae(x, x[::-1], mask=m, convention='verl')\n"
        "print(hashlib.sha256(a[0].tobytes() + a[1].tobytes()).hexdigest())\n"
        "print(vhead.returns.explained_variance(x, x[::-1]))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"VHEAD_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "2", "5")
    }
    assert len(printed) == 1


def test_empty_batches_give_empty_arrays():
    for shape in ((0,), (0, 5), (3, 0)):
        for array in returns.gae(np.zeros(shape, np.float32), np.zeros(shape, np.float32)):
            assert array.shape == shape
    flat_ones = returns.gae(np.zeros(0, np.float32), np.zeros(0, np.float32), offsets=[0])
    assert [array.shape for array in flat_ones] == [(0,), (0,)]


# --- Bad input --------------------------------------------------------------------------------------------------------

ROWS = np.float32([[1, 2, 3], [4, 5, 6]])
BAD = [
    ({"mask": [[True, False]]}, ValueError, r"mask: expected \[2, 3\] as rewards, got \[1, 2\]"),
    ({"mask": np.full((2, 3), 2)}, ValueError, "mask: expected bool, or the integers 0 and 1, got 2"),
    ({"mask": np.full((2, 3), np.nan)}, TypeError, "mask: expected bool, or the integers 0 and 1, got float64"),
    ({"gamma": 1.5}, ValueError, r"gamma: expected a number in \[0, 1\], got 1.5"),
    ({"gamma": float("nan")}, ValueError, r"gamma: expected a number in \[0, 1\], got nan"),
    ({"gamma": "1"}, TypeError, r"gamma: expected a number in \[0, 1\], got str"),
    ({"lam": -0.1}, ValueError, r"lam: expected a number in \[0, 1\], got -0.1"),
    ({"lam": [0.5, 1.1]}, ValueError, r"lam: expected numbers in \[0, 1\], got 1.1 for rollout 1"),
    ({"value_lam": [0.5, 0.5, 0.5]}, ValueError, r"value_lam: expected \[2\] as one for each rollout"),
    ({"bootstrap": [1.0]}, ValueError, r"bootstrap: expected \[2\] as one for each rollout, got \[1\]"),
    ({"bootstrap": [1.0, np.inf]}, ValueError, "bootstrap: expected finite numbers, got inf at rollout 1"),
    ({"values": ROWS[0]}, ValueError, r"values: expected \[2, 3\] as rewards, got \[3\]"),
    ({"values": np.float32([[1, 2, 3], [4, np.nan, 6]])}, ValueError, "values: .* got NaN at token 1 of rollout 1"),
    ({"rewards": np.float32([[1, 2, np.inf], [4, 5, 6]])}, ValueError, "rewards: .* got inf at token 2 of rollout 0"),
    ({"rewards": np.array([["a"] * 3] * 2)}, TypeError, "rewards: expected floats, got <U1"),
    (
        {"rewards": ROWS[None]},
        ValueError,
        r"rewards: expected \[T\] or \[B, T\], or flat with offsets, got \[1, 2, 3\]",
    ),
    ({"offsets": [0, 3]}, ValueError, r"rewards: expected a flat array \[T\] beside offsets, got \[2, 3\]"),
    ({"convention": "ppo"}, ValueError, "convention: expected one of vhead, verl, nemo_rl, slime, trl, got 'ppo'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        returns.gae(**{"rewards": ROWS, "values": ROWS, **arguments})


@pytest.mark.parametrize("offsets", [[0, 2], [1, 6], [0, 4, 2, 6], [0, 7], [], [[0, 6]]])
def test_offsets_that_do_not_fit_are_named(offsets):
    with pytest.raises(ValueError, match="offsets: expected"):
        returns.gae(ROWS.ravel(), ROWS.ravel(), offsets=np.array(offsets, np.int64))
    with pytest.raises(TypeError, match="offsets: expected int64, got float64"):
        returns.gae(ROWS.ravel(), ROWS.ravel(), offsets=[0.0, 6.0])


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "scan"])
def test_a_number_that_is_not_finite_is_named_with_its_rollout_and_token(kind, plain, monkeypatch):
    monkeypatch.setattr("vhead.ops.devices.SETTINGS", type("Plain", (), {"plain_torch": plain}))
    case = Case((3, 300))
    case.rewards[2, 217], case.mask[2, 217] = np.nan, True
    with pytest.raises(ValueError, match=r"(?i)rewards: .* nan at token 217 of rollout 2"):
        returns.gae(kind(case.rewards), kind(case.values), mask=kind(case.mask), lam=0.0)


def test_what_stands_at_masked_places_is_not_read():
    case = Case()
    dirty = np.where(case.mask, case.values, np.nan).astype(np.float32)
    ours = returns.gae(np.where(case.mask, case.rewards, np.inf), dirty, mask=case.mask)
    assert_close(ours, returns.gae(case.rewards, case.values, mask=case.mask), 0)
    with pytest.raises(ValueError, match="values: expected finite numbers, got NaN"):
        returns.gae(case.rewards, dirty, mask=case.mask, convention="verl")


def test_a_rollout_without_model_tokens_has_zeros_and_no_place_for_a_reward():
    case = Case()
    case.mask[2] = False
    advantages, found = returns.gae(case.rewards, case.values, mask=case.mask)
    assert not advantages[2].any()
    assert not found[2].any()
    with pytest.raises(ValueError, match="got none in rollout 2; leave it out"):
        returns.token_rewards(case.bootstrap, mask=case.mask)


def test_token_rewards_say_what_is_missing():
    with pytest.raises(ValueError, match="ref_logprobs: expected log-probabilities beside logprobs"):
        returns.token_rewards([1.0], logprobs=[-1.0])
    with pytest.raises(ValueError, match=r"logprobs: expected log-probabilities for kl_coef=0.1, got None"):
        returns.token_rewards([1.0], mask=[True], kl_coef=0.1)
    with pytest.raises(ValueError, match="kl: expected one of k1, k2, k3, abs, got 'k4'"):
        returns.token_rewards([1.0], mask=[True], kl="k4")
    with pytest.raises(ValueError, match="which say how many tokens there are"):
        returns.token_rewards([1.0])
    with pytest.raises(ValueError, match="reward: expected finite numbers, got NaN at rollout 0"):
        returns.token_rewards([np.nan], mask=[True])


def test_whitening_names_the_number_that_is_not_finite():
    with pytest.raises(ValueError, match="x: expected finite numbers, got NaN at place 1"):
        returns.whiten([1.0, np.nan, 2.0])


def test_lengths_and_alpha_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"alpha: expected a number above 0, got 0\.0"):
        returns.length_adaptive_lam([1], alpha=0)
    with pytest.raises(ValueError, match="lengths: expected numbers of tokens, got -1"):
        returns.length_adaptive_lam([1, -1])


def test_small_tensors_elsewhere_go_to_the_cpu():
    assert places.SMALL >= 1 << 16
    assert places.place_of(rewards=torch.zeros(3)).kernels is native
