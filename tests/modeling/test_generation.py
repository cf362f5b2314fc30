"""What is read off while a model generates equals what a second forward over its output gives."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tests.library_versions import HAS_FSMT, TRANSFORMERS
from tests.modeling.tiny_models import batch, build
from vhead import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    ValueHead,
)
from vhead.errors import GenerationError
from vhead.modeling.generation import ScoredGeneration

EVERYTHING = {"output_values": True, "output_logprobs": True, "output_entropy": True}
NEW_TOKENS = 6


def critic(architecture: str) -> PreTrainedModelWrapper:
    body = build(architecture)
    is_encoder_decoder = body.config.is_encoder_decoder
    wrapper = AutoModelForSeq2SeqLMWithValueHead if is_encoder_decoder else AutoModelForCausalLMWithValueHead
    torch.manual_seed(3)
    return wrapper(body, v_head_init_strategy="normal").eval()


def padded_prompts(model: PreTrainedModelWrapper) -> dict[str, Tensor]:
    """Three prompts, two of them padded: on the left, unless an encoder reads them, whose positions it shifts."""
    inputs = batch(model.pretrained_model, rows=3)
    if inputs.pop("decoder_input_ids", None) is not None:
        return inputs
    return {name: value.flip(-1) for name, value in inputs.items()}


@torch.no_grad()
def score_again(
    model: PreTrainedModelWrapper, prompts: dict[str, Tensor], output: ScoredGeneration
) -> dict[str, Tensor]:
    """Runs each row of the output on its own, without padding, and reads the same statistics off the logits."""
    rows = [score_row(model, prompts, output, row) for row in range(output.sequences.shape[0])]
    return {name: torch.stack([row[name] for row in rows]) for name in ("values", "logprobs", "entropy")}


def score_row(
    model: PreTrainedModelWrapper, prompts: dict[str, Tensor], output: ScoredGeneration, row: int
) -> dict[str, Tensor]:
    mask = output.completion_mask[row]
    count, columns = int(mask.sum()), mask.shape[0]
    tokens = output.sequences[row, -columns:][:count]
    prompt_row = row * prompts["input_ids"].shape[0] // output.sequences.shape[0]
    prompt = prompts["input_ids"][prompt_row][prompts["attention_mask"][prompt_row].bool()]
    start = output.sequences[row, :-columns]
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": prompt[None], "decoder_input_ids": torch.cat([start, tokens])[None]}
    else:
        inputs = {"input_ids": torch.cat([prompt, tokens])[None]}
    # With a cache, FSMT leaves out the mask that keeps its decoder from looking ahead.
    logits, _, values = model(**inputs, use_cache=False)
    log_probabilities = logits[0, -count - 1 : -1].log_softmax(dim=-1)
    statistics = {
        "values": values[0, -count - 1 : -1],
        "logprobs": log_probabilities.gather(-1, tokens[:, None]).squeeze(-1),
        "entropy": -(log_probabilities.exp() * log_probabilities).sum(dim=-1),
    }
    return {name: torch.cat([value, value.new_zeros(columns - count)]) for name, value in statistics.items()}


def assert_equal_to_scoring(
    model: PreTrainedModelWrapper, prompts: dict[str, Tensor], output: ScoredGeneration
) -> None:
    expected = score_again(model, prompts, output)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(output, name), value, rtol=1e-4, atol=2e-5)


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "several for a prompt": {"do_sample": True, "num_return_sequences": 2},
    "penalty": {"do_sample": False, "repetition_penalty": 1.8},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_statistics_equal_those_of_scoring_the_output(way: str) -> None:
    model = critic("llama")
    prompts = padded_prompts(model)
    torch.manual_seed(1)
    output = model.generate(**prompts, max_new_tokens=NEW_TOKENS, **EVERYTHING, **WAYS[way])
    assert output.values.shape == output.completion_mask.shape
    assert output.values.dtype == output.logprobs.dtype == output.entropy.dtype == torch.float32
    assert_equal_to_scoring(model, prompts, output)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "opt", "qwen2", "t5", "bart", "fsmt"])
def test_every_route_to_the_last_hidden_state(architecture: str) -> None:
    if architecture == "fsmt" and not HAS_FSMT:
        pytest.skip(f"transformers {TRANSFORMERS}'s own FSMT is broken")
    model = critic(architecture)
    prompts = padded_prompts(model)
    # FSMT's configuration asks for beams, and its decoder overlooks padding tokens, chosen ones included.
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1, "suppress_tokens": [0]}
    output = model.generate(**prompts, **arguments, **EVERYTHING)
    assert_equal_to_scoring(model, prompts, output)


def test_a_cached_prefix() -> None:
    model = critic("llama")
    prompts = batch(model.pretrained_model, rows=1)
    prefix = {name: value[:, :4] for name, value in prompts.items()}
    cache = model(**prefix, use_cache=True, return_past_key_values=True)[-1]
    output = model.generate(**prompts, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False, **EVERYTHING)
    assert_equal_to_scoring(model, prompts, output)


def test_embeddings_as_prompts() -> None:
    model = critic("llama")
    prompts = batch(model.pretrained_model, rows=1)
    embeddings = model.get_input_embeddings()(prompts["input_ids"])
    arguments = {"attention_mask": prompts["attention_mask"], "max_new_tokens": NEW_TOKENS, "do_sample": False}
    output = model.generate(inputs_embeds=embeddings, **arguments, **EVERYTHING)
    assert output.values.shape == output.sequences.shape
    output.sequences = torch.cat([prompts["input_ids"], output.sequences], dim=-1)
    assert_equal_to_scoring(model, prompts, output)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it by its old name
def test_a_model_with_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    body = build("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = AutoModelForCausalLMWithValueHead(peft.get_peft_model(body, config), v_head_init_strategy="normal").eval()
    prompts = padded_prompts(model)
    output = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **EVERYTHING)
    assert_equal_to_scoring(model, prompts, output)


def test_the_tokens_are_those_of_plain_generation() -> None:
    model = critic("llama")
    prompts = padded_prompts(model)
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(5)
    plain = model.generate(**prompts, **arguments)
    torch.manual_seed(5)
    output = model.generate(**prompts, **arguments, **EVERYTHING)
    assert torch.equal(output.sequences, plain)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_a_prompt_goes_on_in_a_batch_as_it_does_alone(architecture: str) -> None:
    model = critic(architecture)
    prompts = padded_prompts(model)
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "suppress_tokens": [0, 2]}
    together = model.generate(**prompts, **arguments)
    for row, mask in enumerate(prompts["attention_mask"].bool()):
        prompt = prompts["input_ids"][row][mask][None]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
        assert torch.equal(together[row, -NEW_TOKENS:], alone[0, -NEW_TOKENS:])


def test_a_copy_with_another_language_model_head_goes_on_otherwise() -> None:
    model = critic("gpt2")
    reference = copy.deepcopy(model)
    head = reference.pretrained_model.lm_head.weight
    head.data = -head.data
    prompts = padded_prompts(model)
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    before = model.generate(**prompts, **arguments)
    assert not torch.equal(reference.generate(**prompts, **arguments), before)
    assert torch.equal(model.generate(**prompts, **arguments), before)


@pytest.fixture
def ends_early() -> tuple[PreTrainedModelWrapper, dict[str, Tensor], GenerationConfig]:
    """A model, prompts, and a configuration by which one row ends after two tokens and the others later."""
    model = critic("llama")
    prompts = padded_prompts(model)
    free = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    end = int(free[1, prompts["input_ids"].shape[1] + 1])
    return (
        model,
        prompts,
        GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=0),
    )


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_rows_end_at_different_lengths(
    ends_early: tuple[PreTrainedModelWrapper, dict[str, Tensor], GenerationConfig], pad_is_end: bool
) -> None:
    model, prompts, config = ends_early
    if pad_is_end:
        config.pad_token_id = config.eos_token_id
    output = model.generate(**prompts, generation_config=config, **EVERYTHING)
    lengths = output.completion_mask.sum(dim=-1)
    assert lengths.unique().numel() > 1
    assert int(lengths[1]) <= 2
    assert (output.values[~output.completion_mask] == 0).all()
    assert_equal_to_scoring(model, prompts, output)


class StopsRow(StoppingCriteria):
    """Ends a row at a length."""

    def __init__(self, row: int, length: int) -> None:
        self.row = row
        self.length = length

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        ends = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        ends[self.row] = input_ids.shape[1] >= self.length
        return ends


def test_rows_that_another_criterion_ends_are_masked() -> None:
    model = critic("llama")
    prompts = padded_prompts(model)
    criteria = [StopsRow(1, prompts["input_ids"].shape[1] + 3)]
    output = model.generate(
        **prompts, max_new_tokens=NEW_TOKENS, do_sample=False, stopping_criteria=criteria, **EVERYTHING
    )
    assert output.completion_mask.sum(dim=-1).tolist()[1] == 3
    assert_equal_to_scoring(model, prompts, output)


@pytest.mark.parametrize("pad_token", [0, 2])
def test_a_row_that_a_criterion_ended_is_told_from_one_that_wrote_an_end_though_padding_and_end_are_one(
    ends_early: tuple[PreTrainedModelWrapper, dict[str, Tensor], GenerationConfig], pad_token: int
) -> None:
    model, prompts, config = ends_early
    ended_by_token = model.generate(**prompts, generation_config=config, **EVERYTHING).completion_mask.sum(dim=-1)
    config.pad_token_id = config.eos_token_id if pad_token else pad_token
    criteria = [StopsRow(0, prompts["input_ids"].shape[1] + 3)]
    output = model.generate(**prompts, generation_config=config, stopping_criteria=criteria, **EVERYTHING)
    lengths = output.completion_mask.sum(dim=-1).tolist()
    assert lengths == [min(3, int(ended_by_token[0])), *ended_by_token.tolist()[1:]]
    assert_equal_to_scoring(model, prompts, output)


def test_ends_and_padding_that_only_the_model_s_configuration_names_are_masked(
    ends_early: tuple[PreTrainedModelWrapper, dict[str, Tensor], GenerationConfig],
) -> None:
    model, prompts, config = ends_early
    expected = model.generate(**prompts, generation_config=config, **EVERYTHING)
    assert not expected.completion_mask.all()
    own = model.pretrained_model.generation_config
    own.eos_token_id, own.pad_token_id = config.eos_token_id, config.pad_token_id
    bare = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)
    assert (bare.eos_token_id, bare.pad_token_id) == (None, None)
    for arguments in ({"generation_config": bare}, {"max_new_tokens": NEW_TOKENS, "do_sample": False}):
        output = model.generate(**prompts, **arguments, **EVERYTHING)
        assert torch.equal(output.completion_mask, expected.completion_mask)
        assert torch.equal(output.values, expected.values)


def test_a_mask_with_a_hole_gives_the_same_values_by_every_way() -> None:
    """Tokens are counted, columns are not: as `generate` and TRL count positions."""
    for architecture in ("llama", "gpt2"):
        model = critic(architecture)
        tokens = padded_prompts(model)["input_ids"]
        mask = torch.ones_like(tokens)
        mask[0, :2], mask[0, 4], mask[1, 3:5] = 0, 0, 0
        prompts = {"input_ids": tokens, "attention_mask": mask}
        output = model.generate(**prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **EVERYTHING)
        whole = torch.cat([mask, torch.ones_like(output.completion_mask, dtype=torch.long)], dim=-1)
        positions = (whole.cumsum(dim=-1) - 1).clamp(min=0)
        with torch.no_grad():
            values = model.values(output.sequences, attention_mask=whole)
            forward = model(output.sequences, attention_mask=whole, position_ids=positions).value
        real = whole.bool()
        torch.testing.assert_close(values[real], forward[real], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(values[:, -NEW_TOKENS - 1 : -1], output.values, rtol=1e-4, atol=2e-5)
        assert_equal_to_scoring(model, prompts, output)
        by_column = torch.arange(whole.shape[1]).expand_as(whole)
        shifted = model(output.sequences, attention_mask=whole, position_ids=by_column).value
        assert (shifted - values)[real].abs().max() > 1e-2


class Intruder(StoppingCriteria, BaseStreamer):
    """Runs the model in the middle of a decoding step, on rows of its own."""

    def __init__(self, run: Callable[[Tensor], object]) -> None:
        self._run = run
        self.runs = 0

    def intrude(self) -> None:
        self.runs += 1
        torch.manual_seed(self.runs)
        self._run(torch.randint(3, 97, (5, 4)))

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        self.intrude()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.intrude()
        return scores

    def put(self, value: Tensor) -> None:
        self.intrude()

    def end(self) -> None:
        self.intrude()

    def allow(self, row: int, tokens: Tensor) -> list[int]:
        self.intrude()
        return list(range(97))


INTRUSIONS = {
    "logits processor": lambda intruder: {"logits_processor": [intruder.process]},
    "stopping criterion": lambda intruder: {"stopping_criteria": [intruder]},
    "streamer": lambda intruder: {"streamer": intruder},
    "allowed tokens": lambda intruder: {"prefix_allowed_tokens_fn": intruder.allow},
}
RUNS = {
    "forward": lambda model: model,
    "values": lambda model: model.values,
    "the language model": lambda model: model.pretrained_model,
    "generate": lambda model: lambda tokens: model.generate(tokens, max_new_tokens=2, **EVERYTHING),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("intrusion", INTRUSIONS)
def test_a_second_run_of_the_model_within_a_step_does_not_change_what_is_read_off(intrusion: str, run: str) -> None:
    model = critic("llama")
    prompts = padded_prompts(model)
    rows = slice(1, 2) if intrusion == "streamer" else slice(None)
    prompts = {name: value[rows] for name, value in prompts.items()}
    arguments = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**prompts, **arguments, **EVERYTHING)
    intruder = Intruder(RUNS[run](model))
    output = model.generate(**prompts, **arguments, **INTRUSIONS[intrusion](intruder), **EVERYTHING)
    assert intruder.runs >= 3
    assert torch.equal(output.sequences, expected.sequences)
    for name in ("values", "logprobs", "entropy"):
        assert torch.equal(getattr(output, name), getattr(expected, name))


def test_arguments_by_position_are_those_by_name() -> None:
    model = critic("llama")
    prompts = padded_prompts(model)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)
    criteria = [StopsRow(1, prompts["input_ids"].shape[1] + 3)]
    tokens, mask = prompts["input_ids"], prompts["attention_mask"]
    output = model.generate(tokens, config, None, criteria, attention_mask=mask, **EVERYTHING)
    assert output.completion_mask.sum(dim=-1).tolist()[1] == 3
    assert_equal_to_scoring(model, prompts, output)
    with pytest.raises(TypeError, match="inputs"):
        model.generate(tokens, inputs=tokens, **EVERYTHING)


@pytest.mark.parametrize("name", ["values", "logprobs", "entropy"])
def test_only_what_is_asked_for_is_returned(name: str) -> None:
    model = critic("gpt2")
    output = model.generate(**padded_prompts(model), max_new_tokens=2, do_sample=False, **{f"output_{name}": True})
    others = {"values", "logprobs", "entropy"} - {name}
    assert getattr(output, name).shape == (3, 2)
    assert [getattr(output, other) for other in others] == [None, None]


def test_nothing_asked_for_returns_what_transformers_returns() -> None:
    model = critic("gpt2")
    output = model.generate(**padded_prompts(model), max_new_tokens=2, do_sample=False)
    assert isinstance(output, Tensor)


def test_transformers_own_outputs_stay_reachable() -> None:
    model = critic("gpt2")
    output = model.generate(
        **padded_prompts(model), max_new_tokens=3, do_sample=False, output_scores=True, **EVERYTHING
    )
    assert len(output.scores) == 3
    copied = pickle.loads(
        pickle.dumps(ScoredGeneration(output.sequences, output.completion_mask, None, None, None, None))
    )
    assert torch.equal(copied.sequences, output.sequences)
    with pytest.raises(AttributeError):
        output.no_such_output


def test_nothing_stays_in_the_model() -> None:
    model = critic("llama")
    model.generate(**padded_prompts(model), max_new_tokens=2, do_sample=False, **EVERYTHING)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


REFUSED = {
    "beam search": {"num_beams": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "do_sample": False},
    "no dictionary": {"return_dict_in_generate": False},
    "guidance": {"guidance_scale": 1.5, "do_sample": False},
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_read_off_is_refused(way: str) -> None:
    model = critic("llama")
    with pytest.raises(GenerationError):
        model.generate(**padded_prompts(model), max_new_tokens=2, output_values=True, **REFUSED[way])


def test_the_comparison_can_fail() -> None:
    model = critic("llama")
    prompts = padded_prompts(model)
    output = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **EVERYTHING)
    output.values = output.values.roll(1, dims=1)
    with pytest.raises(AssertionError):
        assert_equal_to_scoring(model, prompts, output)


@torch.no_grad()
def test_a_head_of_several_outputs_gives_each_token_all_of_them() -> None:
    model = critic("llama")
    model.v_head = ValueHead(model.config, num_outputs=3, v_head_init_strategy="normal").eval()
    prompts = padded_prompts(model)
    output = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, output_values=True)
    mask = output.completion_mask
    assert output.values.shape == (*mask.shape, 3)
    assert not output.values[~mask].any()
    for row in range(mask.shape[0]):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        tokens = output.sequences[row, -mask.shape[1] :][: int(mask[row].sum())]
        expected = model.values(torch.cat([prompt, tokens])[None])[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(output.values[row, : len(tokens)], expected, rtol=1e-4, atol=1e-5)
