"""A plain accelerate loop: prepare, backward, clip, save and load the state, unwrap."""

import pytest
import torch

import vhead
from tests.trainers.toy_task import language_model
from vhead import AutoModelForCausalLMWithValueHead

accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class RawNames(AutoModelForCausalLMWithValueHead):
    """The same model with the module's own names in its state dict, as docs/trainers.md shows it."""

    state_dict = torch.nn.Module.state_dict


class Run:
    """A training run whose whole state accelerate holds."""

    def __init__(self, body, wrapper=AutoModelForCausalLMWithValueHead):
        self.accelerator = accelerate.Accelerator(cpu=True)
        model = wrapper(body, summary_dropout_prob=0.2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        tokens = torch.randint(3, 259, (4, 6), generator=torch.Generator().manual_seed(1))
        loader = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": row.sign()} for row in tokens], 2)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader, schedule
        )

    def epoch(self):
        self.model.train()
        losses = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                _, loss, values = self.model(**batch, labels=batch["input_ids"])
                loss = loss + (values - 1).square().mean()
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def with_adapter():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(language_model(), lora)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("wrapper", [AutoModelForCausalLMWithValueHead, RawNames])
def test_a_run_resumes_where_its_state_was_saved(tmp_path, wrapper, tied, safe):
    run = Run(language_model(tied=tied), wrapper)
    before = run.weights()
    run.epoch()
    assert not any(torch.equal(before[name], weight) for name, weight in run.weights().items())
    saved = run.weights()
    run.accelerator.save_state(tmp_path, safe_serialization=safe)
    losses = run.epoch()
    assert not same(saved, run.weights())

    torch.manual_seed(99)
    other = Run(language_model(tied=tied), wrapper)
    other.accelerator.load_state(tmp_path)
    assert same(saved, other.weights())
    assert other.epoch() == losses  # Dropout and its generator, optimizer and schedule included.


def test_another_state_resumes_otherwise(tmp_path):
    run = Run(language_model())
    run.accelerator.save_state(tmp_path)
    losses = run.epoch()
    torch.manual_seed(99)
    assert Run(language_model()).epoch() != losses


def test_a_missing_weight_that_is_not_tied_is_an_error(tmp_path):
    from safetensors.torch import load_file, load_model, save_file

    model = RawNames(language_model())
    for state in (model.state_dict(), AutoModelForCausalLMWithValueHead(language_model()).state_dict()):
        kept = {name: value.clone() for name, value in state.items() if "norm" not in name}
        save_file(kept, tmp_path / "model.safetensors")
        assert load_file(tmp_path / "model.safetensors").keys() == kept.keys()
        for wrapper in (RawNames, AutoModelForCausalLMWithValueHead):
            with pytest.raises(RuntimeError, match="norm"):
                load_model(wrapper(language_model()), tmp_path / "model.safetensors")


def test_adapters_are_in_the_state_under_raw_names(tmp_path):
    """The class's own state dict of a model with adapters is its head alone, as TRL's is."""
    run = Run(with_adapter(), RawNames)
    run.epoch()
    saved = run.weights()
    run.accelerator.save_state(tmp_path)
    other = Run(with_adapter(), RawNames)
    assert not same(saved, other.weights())
    other.accelerator.load_state(tmp_path)
    assert same(saved, other.weights())


def test_the_unwrapped_model_saves_a_checkpoint(tmp_path):
    run = Run(language_model())
    run.epoch()
    model = run.accelerator.unwrap_model(run.model)
    assert type(model) is AutoModelForCausalLMWithValueHead
    model.save_pretrained(tmp_path, state_dict=run.accelerator.get_state_dict(run.model))
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert same(dict(loaded.named_parameters()), run.weights())


def test_save_model_writes_what_load_checkpoint_in_model_reads(tmp_path):
    run = Run(language_model(tied=False))
    run.epoch()
    run.accelerator.save_model(run.model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    other = AutoModelForCausalLMWithValueHead(language_model(tied=False).apply(_shift))
    # Not `strict=True`: older releases then ask each shard for every weight.
    accelerate.load_checkpoint_in_model(other, tmp_path)
    assert same(dict(other.named_parameters()), run.weights())


@pytest.mark.parametrize("wrap", ["pretrained_model.", "module.pretrained_model.", "module."])
def test_deepspeed_and_ddp_prefixes(tmp_path, wrap):
    """What DeepSpeed's `zero_to_fp32.py` writes is the raw module's names; DDP puts `module.` before either."""
    model = AutoModelForCausalLMWithValueHead(language_model(tied=False))
    raw = wrap.endswith("pretrained_model.")
    names = torch.nn.Module.state_dict(model) if raw else model.state_dict()
    outer = "module." if wrap.startswith("module.") else ""
    state = {outer + name: value for name, value in names.items()}
    assert any(name.startswith(wrap) for name in state)

    other = AutoModelForCausalLMWithValueHead(language_model(tied=False).apply(_shift))
    other.load_state_dict(state, strict=True)
    assert same(dict(model.named_parameters()), dict(other.named_parameters()))

    model.save_pretrained(tmp_path, state_dict=state)
    loaded = vhead.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert same(dict(model.named_parameters()), dict(loaded.named_parameters()))


@torch.no_grad()
def _shift(module):
    for parameter in module.parameters(recurse=False):
        parameter.add_(1.0)
