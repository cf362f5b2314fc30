"""Writes the golden files: checkpoints as other frameworks' own code lays them out, tiny, with known heads.

Run it with the extra `trl` installed: `python tests/formats/make_golden.py`. TRL 1.12 writes the folders `trl_*`; the
LLaMA-Factory files hold what its `save_valuehead_params` splits out: TRL's two tensors in a file of their own.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from trl.experimental.ppo import AutoModelForCausalLMWithValueHead

GOLDEN = Path(__file__).parent / "golden"
TINY = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)


def main() -> None:
    torch.manual_seed(0)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    body = LlamaForCausalLM(TINY).to(torch.bfloat16)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body, v_head_init_strategy="normal")
    torch.nn.init.normal_(model.v_head.summary.bias)
    head = {f"v_head.{name}": value for name, value in model.v_head.state_dict().items()}

    model.save_pretrained(str(GOLDEN / "trl_single"))
    model.save_pretrained(str(GOLDEN / "trl_sharded"), max_shard_size=600)
    (GOLDEN / "trl_adapter").mkdir()
    torch.save(head, GOLDEN / "trl_adapter" / "pytorch_model.bin")
    for name, save in (("value_head.safetensors", save_file), ("value_head.bin", torch.save)):
        folder = GOLDEN / f"llama_factory_{name.rpartition('.')[2]}"
        folder.mkdir()
        save(head, folder / name)
    (GOLDEN / "plain").mkdir()
    save_file(
        {name: value for name, value in body.state_dict().items() if "norm" in name},
        GOLDEN / "plain" / "model.safetensors",
    )
    expected = {name: [float(x) for x in value.flatten()] for name, value in head.items()}
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
