"""transformers' own `Trainer` trains, saves and resumes the wrapper, which is no model of its own kind."""

import pytest
import torch
from safetensors.torch import load_file

from tests.library_versions import READS_PICKLES
from tests.trainers.toy_task import language_model
from vhead import AutoModelForCausalLMWithValueHead

pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        tokens = torch.arange(6) + 3 + index
        return {"input_ids": tokens, "labels": tokens}


class ValueTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_arguments):
        output = model(**inputs)
        loss = output.loss + output.value.square().mean()
        return (loss, output) if return_outputs else loss


def trainer(model, folder):
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return ValueTrainer(model, arguments, train_dataset=Tokens())


# Older releases resume by `torch.load` without saying what they trust.
@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")
@pytest.mark.skipif(not READS_PICKLES, reason="this transformers resumes with torch >= 2.6 only")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_trainer_saves_and_resumes(tmp_path, tied):
    model = AutoModelForCausalLMWithValueHead(language_model(tied=tied))
    trainer(model, tmp_path / "run").train()
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    other = AutoModelForCausalLMWithValueHead(language_model(tied=tied))
    trainer(other, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, saved[name], msg=name)
