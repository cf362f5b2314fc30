"""The update in its plainest form: padded rows, the logits of every token, and autograd."""

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from vhead import Rollout


def rollouts(seed=0, prompts=3, completions=3, longest=14, vocabulary=90, masked=True):
    """Prompts with several completions each, which share more than their prompt in places, in random order."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(prompts):
        prompt = rng.integers(3, vocabulary, int(rng.integers(9, 20)))
        first = rng.integers(3, vocabulary, longest)
        for at in range(completions):
            own = rng.integers(3, vocabulary, int(rng.integers(1, longest)))
            completion = np.concatenate([first[:9], own]) if at == 1 else own
            mask = rng.random(len(completion)) < 0.7
            mask[rng.integers(len(mask))] = True
            found.append(Rollout(prompt, completion, mask=mask if masked else None))
    return [found[at] for at in rng.permutation(len(found))]


def weights_of(given, seed=0):
    """What each token's value, log-probability and entropy count in the loss: `[C, 3]` for each rollout."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(rollout.completion), 3, generator=generator) for rollout in given]


def loop_loss(model, given, weights):
    """The loss of one padded batch: values and log-probabilities of completion tokens by transformers' own forward."""
    rows = [torch.from_numpy(np.concatenate([each.prompt, each.completion])) for each in given]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits, _, values = model(pad_sequence(rows, batch_first=True), attention_mask=mask)
    if values.dim() == 3:
        values = values.squeeze(-1)
    loss = logits.new_zeros((), dtype=torch.float64)
    for at, (each, weight) in enumerate(zip(given, weights, strict=True)):
        predicting = slice(len(each.prompt) - 1, len(each.prompt) + len(each.completion) - 1)
        distribution = functional.log_softmax(logits[at, predicting].to(promoted(logits)), -1)
        logprobs = distribution.gather(-1, torch.from_numpy(each.completion.copy())[:, None]).squeeze(-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        written = torch.ones(len(each.completion)) if each.mask is None else torch.from_numpy(each.mask.copy())
        value, logprob, own_entropy = weight.to(logprobs.dtype).T
        own = values[at, predicting] * value + written * (logprobs * logprob + entropy * own_entropy)
        loss = loss + own.double().sum()
    return loss


def promoted(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def packed_loss(training_pass, batch, weights):
    """The same loss of a training pass' batch."""
    out = training_pass(batch)
    weight = batch.flat(weights).to(out.values.dtype)
    own = out.values * weight[:, 0] + out.logprobs * weight[:, 1] + out.entropy * weight[:, 2]
    return own.double().sum()


def gradients_of(model, losses):
    """The gradients of every trained parameter after backward of each loss in turn, float64, by name."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    found = {
        name: torch.zeros_like(p).double() if p.grad is None else p.grad.double().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return total, found


def of_pass(training_pass, given, weights):
    batches = training_pass.batches(given)
    return gradients_of(training_pass.model, (packed_loss(training_pass, batch, weights) for batch in batches))


def of_loop(model, given, weights, size=1):
    chunks = [slice(at, at + size) for at in range(0, len(given), size)]
    return gradients_of(model, (loop_loss(model, given[chunk], weights[chunk]) for chunk in chunks))


def difference(found, expected):
    """The largest difference of each gradient, as a part of its largest number, or of all if that is tiny."""
    assert found.keys() == expected.keys()
    everything = max(float(gradient.abs().max()) for gradient in expected.values())
    return {
        name: float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-3 * everything)
        for name, gradient in expected.items()
    }
