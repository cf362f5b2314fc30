"""What has to hold for a language model of any architecture, each aspect as one function.

The truth is transformers' own: the last of its `output_hidden_states`, which is what TRL's class read, and the input of
its language-model head. An aspect returns "yes", or in a few words how it fails; it raises what the model raises.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.architectures.inputs import (
    REQUIRED,
    Inputs,
    is_encoder_decoder,
    left_padded,
    per_token,
    right_padded,
    text_inputs,
    words,
)
from tests.architectures.tiny import build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from vhead.backbone import hidden_states
from vhead.backbone.hidden_states import Retention
from vhead.backbone.padding import Padding
from vhead.packing.limits import context_length

HOLDS = "yes"
# Models whose tiny form keeps a longer context are not run to its end.
LONGEST = 4096


@dataclass
class Subject:
    """A tiny model, its wrapper, and what it is run on.

    Attributes:
        states: The true last hidden state `[B, T, H]` of the unpadded inputs.
        read: What the language-model head is called with.
        logits: The model's own logits.
        trl: What TRL's class would take for the last hidden state, where that is something else.
    """

    model_type: str
    auto_class: str
    model: Any
    inputs: Inputs
    states: Tensor
    read: Tensor | None
    logits: Tensor
    trl: str | None

    @property
    def body(self) -> PreTrainedModel:
        return self.model.pretrained_model


# What a model's head reads, where the head is not what `get_output_embeddings` returns.
_TRUNKS = {"blip": "text_decoder.bert"}


def subject(model_type: str, auto_class: str) -> Subject:
    """Builds the model and establishes the truth about it, without the package."""
    body = build(model_type, auto_class)
    inputs = text_inputs(body, model_type)
    output, read = _own_output(body, inputs, _TRUNKS.get(model_type))
    listed = getattr(output, "decoder_hidden_states" if is_encoder_decoder(body) else "hidden_states", None)
    tokens = inputs["decoder_input_ids" if is_encoder_decoder(body) else "input_ids"].shape
    if listed is None:
        states, trl = read, "an error: no hidden states are returned"
    elif listed[-1].shape[:-1] != tokens:
        states, trl = read, f"a tensor of shape {list(listed[-1].shape)} for tokens of shape {list(tokens)}"
    else:
        states, trl = listed[-1], None
    return Subject(model_type, auto_class, wrapped(body, auto_class), inputs, states, read, output.logits, trl)


def _own_output(body: PreTrainedModel, inputs: Inputs, trunk: str | None) -> tuple[Any, Tensor | None]:
    head, seen = body.get_output_embeddings(), []
    if trunk is not None:
        handle = body.get_submodule(trunk).register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    elif head is not None:
        handle = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    torch.manual_seed(0)
    output = body(**inputs, output_hidden_states=True, return_dict=True)
    if head is not None or trunk is not None:
        handle.remove()
    return output, seen[-1] if seen else None


def wrapper_class(auto_class: str) -> type:
    """The class of the package for models of one auto class."""
    is_seq2seq = auto_class == "AutoModelForSeq2SeqLM"
    return AutoModelForSeq2SeqLMWithValueHead if is_seq2seq else AutoModelForCausalLMWithValueHead


def wrapped(body: PreTrainedModel, auto_class: str) -> Any:
    """The model with a head of random weights and a bias that is not zero."""
    model = wrapper_class(auto_class)(body).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.v_head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def seeded(run: Callable[[], Any]) -> Any:
    """Runs from the same random state every time: Reformer hashes with random rotations."""
    torch.manual_seed(0)
    return run()


def same(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}"
    return HOLDS if torch.equal(found, expected) else f"differs by {(found - expected).abs().max():.1e}"


def close(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}"
    is_close = torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    return HOLDS if is_close else f"differs by {(found - expected).abs().max():.1e}"


def logits_path(subject: Subject) -> str:
    """The logits come from the true state: its head reads it, or depends on it position by position."""
    states, read = subject.states, subject.read
    if read is not None and read.dim() == 4:
        read = read[:, 0]  # ProphetNet predicts several tokens, the next one first.
    if read is not None and read.shape == states.shape:
        if torch.equal(read, states):
            return HOLDS
        ratio = read / states
        if ratio.std() < 1e-4 * ratio.mean().abs():
            return HOLDS
    position = subject.logits.shape[1] // 2
    (gradient,) = torch.autograd.grad(subject.logits[0, position].sum(), states, allow_unused=True, retain_graph=True)
    if gradient is None:
        return "the logits do not come from this state"
    elsewhere = gradient.abs().sum() - gradient[0, position].abs().sum()
    return (
        HOLDS if gradient[0, position].abs().sum() > 0 and elsewhere == 0 else "the logits mix positions of this state"
    )


def forward_value(subject: Subject) -> str:
    """`forward` gives the head's output for the true state, bit for bit, also as it is kept under compilation."""
    expected = subject.model.v_head(subject.states).squeeze(-1)
    found = same(seeded(lambda: subject.model(**subject.inputs)).value, expected)
    plan = subject.model.plan
    compiled = replace(plan, retention=plan.compiled_retention)
    if found != HOLDS or compiled.retention is Retention.CAPTURE:
        return found
    _, states = seeded(lambda: hidden_states.run(subject.body, compiled, dict(subject.inputs)))
    return same(states, subject.states) if subject.trl is None else HOLDS


def values_without_logits(subject: Subject) -> str:
    """`values` gives what `forward` gives, bit for bit without padding, and closely on the tokens of padded rows."""
    model, padded = subject.model, right_padded(subject.inputs) if "input_ids" in subject.inputs else subject.inputs
    expected = seeded(lambda: model(**subject.inputs)).value
    found = same(seeded(lambda: model.values(**subject.inputs)), expected)
    if found != HOLDS:
        return found
    if model.plan.padding is Padding.LEFT_OUT:
        return HOLDS  # `forward` passes padding on, and such a model reads it.
    values, expected = seeded(lambda: model.values(**padded)), seeded(lambda: model(**padded)).value
    if not is_encoder_decoder(subject.body):
        real = padded["attention_mask"].bool()
        values, expected = values[real], expected[real]
    return close(values, expected)


def left_padding(subject: Subject) -> str:
    """`values` of a left-padded batch are those of the unpadded one."""
    padded = left_padded(subject.inputs)
    values = seeded(lambda: subject.model.values(**padded))
    if not is_encoder_decoder(subject.body):
        values = values[:, -subject.inputs["input_ids"].shape[1] :]
    return close(values, seeded(lambda: subject.model.values(**subject.inputs)))


def right_padding(subject: Subject) -> str:
    """`values` of a right-padded row are those of its tokens alone."""
    padded, length = right_padded(subject.inputs), int(right_padded(subject.inputs)["attention_mask"][1].sum())
    last = {name: value[1:] for name, value in padded.items() if name != "attention_mask"}
    alone = {n: v[:, :length] if n in per_token(subject.inputs) else v for n, v in last.items()}
    values = seeded(lambda: subject.model.values(**padded))[1:]
    if not is_encoder_decoder(subject.body):
        values = values[:, :length]
    return close(values, seeded(lambda: subject.model.values(**alone)))


def generated_values(subject: Subject) -> str:
    """The values that are read off while a left-padded batch is continued are those of the finished sequences."""
    padded, settings = left_padded(subject.inputs), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    output = seeded(lambda: subject.model.generate(**padded, **settings, output_values=True))
    new = output.values.shape[1]
    tokens = output.sequences
    if tokens.shape[1] == new:
        tokens = torch.cat([padded["input_ids"], tokens], dim=-1)
    mask = torch.cat([padded["attention_mask"], padded["attention_mask"].new_ones(len(tokens), new)], dim=-1)
    values = seeded(lambda: subject.model.values(tokens, attention_mask=mask))
    return close(output.values, values[:, -new - 1 : -1])


def longest_sequence(subject: Subject) -> str:
    """A sequence of as many tokens as the scorer lets through goes through."""
    length = context_length(subject.body)
    return HOLDS if seeded(lambda: subject.model.values(_words(length))).isfinite().all() else "not finite"


def _words(length: int) -> Tensor:
    return words(length, seed=15)[:1]


def gradients(subject: Subject) -> str:
    """A loss on the values reaches the head, and the body down to its embeddings."""
    subject.model.zero_grad(set_to_none=True)
    inputs = subject.inputs
    try:
        if subject.model_type == "reformer":
            # It computes no gradients in evaluation mode, and trains on whole chunks alone.
            subject.model.train()
            inputs = {"input_ids": inputs["input_ids"][:, :4]}
        seeded(lambda: subject.model.values(**inputs)).pow(2).sum().backward()
    finally:
        subject.model.eval()
    places = {"head": subject.model.v_head.summary.weight, "embeddings": _embeddings(subject.body)}
    missing = [name for name, weight in places.items() if weight.grad is None or not weight.grad.any()]
    subject.model.zero_grad(set_to_none=True)
    return f"no gradient for {' and '.join(missing)}" if missing else HOLDS


def _embeddings(body: PreTrainedModel) -> Tensor:
    module = body.get_decoder() if is_encoder_decoder(body) else body
    # Some decoders have embeddings, but not the method that returns them.
    return module.embed_tokens.weight if hasattr(module, "embed_tokens") else module.get_input_embeddings().weight


def generation(subject: Subject) -> str:
    """`generate` continues the text."""
    inputs = {name: value for name, value in subject.inputs.items() if name != "decoder_input_ids"}
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    if is_encoder_decoder(subject.body):
        settings["decoder_start_token_id"] = 1
    tokens = seeded(lambda: subject.model.generate(**inputs, **settings))
    before = 1 if is_encoder_decoder(subject.body) else subject.inputs["input_ids"].shape[1]
    before -= subject.model_type == "blip"  # It takes the prompt's last token for an end, and drops it.
    return HOLDS if tokens.shape[1] in (3, before + 3) else f"{tokens.shape[1]} tokens after {before}"


def save_and_load(subject: Subject) -> str:
    """A saved model comes back with the same bits in body and head, and gives the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        again = wrapper_class(subject.auto_class).from_pretrained(folder)
    before, after = subject.model.state_dict(), again.state_dict()
    different = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if different or after.keys() != before.keys():
        return f"{len(different)} tensors differ, {different[0] if different else 'more of them'} among them"
    return same(seeded(lambda: again.values(**subject.inputs)), seeded(lambda: subject.model.values(**subject.inputs)))


def labels(subject: Subject) -> str:
    """An encoder-decoder takes labels instead of the decoder's tokens, in `values` as in `forward`."""
    inputs = {name: value for name, value in subject.inputs.items() if name != "decoder_input_ids"}
    inputs["labels"] = subject.inputs["decoder_input_ids"]
    values = seeded(lambda: subject.model.values(**inputs))
    return same(values, seeded(lambda: subject.model(**inputs)).value)


ASPECTS: dict[str, Callable[[Subject], str]] = {
    "logits path": logits_path,
    "forward": forward_value,
    "values": values_without_logits,
    "gradients": gradients,
    "right padding": right_padding,
    "left padding": left_padding,
    "labels": labels,
    "generate": generation,
    "generated values": generated_values,
    "longest": longest_sequence,
    "save, load": save_and_load,
}


def applies(aspect: str, subject: Subject) -> bool:
    if aspect == "labels":
        return is_encoder_decoder(subject.body)
    if aspect in ("left padding", "right padding"):
        return "input_ids" in subject.inputs
    if aspect in ("generated values", "longest"):
        takes_text_alone = not is_encoder_decoder(subject.body) and subject.model_type not in REQUIRED
        return takes_text_alone and (aspect != "longest" or 0 < (context_length(subject.body) or 0) <= LONGEST)
    return True
