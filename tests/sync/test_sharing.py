"""Weights that lie in the pages of files, of which a machine has one copy."""

import re
from pathlib import Path

import pytest
import torch

from tests.sync.conftest import Small, bits, save_critic, train
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.errors import LoadError
from vhead.sync import Follower, Publisher

BODY_BYTES = 20_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A critic of some 20 MB with random weights, saved as bfloat16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("critic")
    save_critic(folder, vocab_size=30_000, hidden_size=320, intermediate_size=640)
    return folder


def scored(scorer):
    tokens = torch.randint(200, (4, 12), generator=torch.Generator().manual_seed(3)).tolist()
    return scorer.score([Rollout(row[:6], row[6:]) for row in tokens], returns=("values", "logprobs"))


def mapped(part):
    """Bytes of the files with `part` in their paths: those in memory, and those that are this process's own."""
    resident = own = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(part) in line
        elif inside and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
        elif inside and line.startswith("Anonymous:"):
            own += 1024 * int(line.split()[1])
    return resident, own


def of(scorer, folder):
    """Bytes of the model's parameters that lie in the pages of files of a folder."""
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(folder) in line
    ]
    places = [(parameter.data_ptr(), parameter.nbytes) for parameter in scorer.model.parameters()]
    return sum(length for at, length in places if any(start <= at < end for start, end in ranges))


def test_a_scorers_weights_lie_in_the_pages_of_the_checkpoint(checkpoint):
    shared = Scorer.from_pretrained(checkpoint, share_weights=True)
    scores = scored(shared)
    assert of(shared, checkpoint) > BODY_BYTES
    resident, own = mapped(checkpoint)
    assert resident > 0.5 * BODY_BYTES
    assert own == 0
    alone = scored(Scorer.from_pretrained(checkpoint))
    assert torch.equal(torch.tensor(scores.values), torch.tensor(alone.values))
    assert torch.equal(torch.tensor(scores.logprobs), torch.tensor(alone.logprobs))


def test_the_check_finds_weights_that_a_process_has_written_to(checkpoint):
    shared = Scorer.from_pretrained(checkpoint, share_weights=True)
    before = (checkpoint / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(shared.model.parameters()).add_(1)
    assert mapped(checkpoint)[1] > 0.5 * BODY_BYTES
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_a_full_publication_is_mapped_and_not_copied(checkpoint, tmp_path):
    trained = AutoModelForCausalLMWithValueHead.from_pretrained(checkpoint)
    scorer = Scorer.from_pretrained(checkpoint, share_weights=True, follow=tmp_path)
    parameters = list(scorer.model.parameters())
    train(trained, 1)
    Publisher(tmp_path).publish(trained, step=5)
    scores = scored(scorer)
    assert set(scores.weights_step.tolist()) == {5}
    assert bits(scorer.model) == bits(trained)
    assert of(scorer, tmp_path / "step-00000005") > BODY_BYTES
    assert mapped("step-00000005")[1] == 0
    assert all(one is other for one, other in zip(parameters, scorer.model.parameters(), strict=True))


@pytest.mark.parametrize("contiguous", [True, False])
def test_full_publications_and_changes_reach_followers_that_share(tmp_path, contiguous):
    model, other = Small(1, contiguous=contiguous), Small(2, contiguous=contiguous)
    publisher, follower = Publisher(tmp_path, delta=True, full_every=3), Follower(tmp_path, share_weights=True)
    for step in range(1, 8):
        train(model, step)
        publisher.publish(model, step=step)
        assert follower.apply(other) == step
        assert bits(other) == bits(model)
    assert other.tied is other.first.weight


def test_what_is_mapped_outlives_its_publication(tmp_path):
    model, other = Small(1), Small(2)
    publisher = Publisher(tmp_path, keep=1)
    publisher.publish(model, step=1)
    Follower(tmp_path, share_weights=True).apply(other)
    before = bits(model)
    train(model, 1)
    publisher.publish(model, step=2)
    assert not (tmp_path / "step-00000001").exists()
    assert bits(other) == before


def test_a_damaged_publication_is_not_mapped(tmp_path):
    model, other = Small(1), Small(2)
    Publisher(tmp_path).publish(model, step=1)
    file = tmp_path / "step-00000001" / "model.safetensors"
    broken = bytearray(file.read_bytes())
    broken[-9] ^= 4
    file.write_bytes(broken)
    before = bits(other)
    with pytest.raises(Exception, match="other bytes"):
        Follower(tmp_path, share_weights=True).apply(other)
    assert bits(other) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_the_body_under_an_adapter_is_shared_and_the_adapter_is_followed(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        checkpoint,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    torch.nn.init.normal_(model.v_head.summary.weight)
    model.save_pretrained(tmp_path / "adapter")
    shared = Scorer.from_pretrained(tmp_path / "adapter", share_weights=True, follow=tmp_path / "weights")
    scores = scored(shared)
    assert of(shared, checkpoint) > BODY_BYTES
    alone = scored(Scorer.from_pretrained(tmp_path / "adapter"))
    assert torch.equal(torch.tensor(scores.values), torch.tensor(alone.values))
    with torch.no_grad():
        model.v_head.summary.weight.neg_()
    Publisher(tmp_path / "weights").publish(model, step=3)
    after = scored(shared)
    assert set(after.weights_step.tolist()) == {3}
    assert not torch.equal(torch.tensor(after.values), torch.tensor(scores.values))
    assert of(shared, checkpoint) > BODY_BYTES


def test_weights_of_another_dtype_cannot_be_shared(checkpoint):
    with pytest.raises(LoadError, match="expected safetensors files of the model's own dtype"):
        Scorer.from_pretrained(checkpoint, share_weights=True, dtype="float64")
