"""Writes the golden files: checkpoints as other frameworks' own code lays them out, tiny, with known heads.

Run it with the extra `trl` installed: `python tests/formats/make_golden.py`. TRL 1.12 writes the folders `trl_*` but
for the last one; transformers' own classes write `hf_*`. For the others, the modules below have the attributes of the
framework's classes, so that `state_dict` or `save_pretrained` give its names:

- LLaMA-Factory 0.9.5 `save_valuehead_params`: TRL's two tensors in a file of their own.
- OpenRLHF 0.11.2 `get_llm_for_sequence_regression`: the module is called `value_head_prefix`, without a bias.
- verl 0.9.1, Megatron: a last layer of one row, exported as `lm_head.weight`, `reward_head.weight` or `score.weight`.
- trlX `make_head` and `AutoModelForCausalLMWithHydraValueHead.state_dict`: `base_model.`, `v_head.`, `frozen_head.`.
- DeepSpeed-Chat `RewardModel`: `rwtransformer` (once `rwtranrsformer`) and `v_head`.
- NeMo-Aligner 0.7 `GPTRewardModel`: `rm_head`, in a `.nemo` archive a pickle of `model.rm_head`.
- slime and AReaL, Megatron: `output_layer`; AReaL saves that module's own state dict as `value_head.pt`.
- InternLM2 `InternLM2ForRewardModel`: `model`, `v_head`. Qwen `Qwen2ForRewardModel`: `model`, `score`.
- safe-rlhf `LlamaForScore`: `model`, `score_head`, `normalizer`.
- Qwen2.5-Math-PRM `Qwen2ForProcessRewardModel`: `model`, `score`, whose two outputs are labels.
- Skywork-o1-Open-PRM `Qwen2ForPrmModel`: TRL's two tensors. TRL `PRMTrainer`: a token classifier of two labels.
- xtuner #2099: `value_head.weight` in the place of the language-model head. UniRL #256: `value_head.proj`, beside it.
- RLinf #580, Megatron: a last layer without a bias. ArmoRM: `regression_layer`, `reward_transform_matrix`, `gating`.

`expected.json` has each head's projections, and, of a checkpoint with a language model, the values that the framework's
rule gives for `TOKENS`: the head applied to each last hidden state.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    OPTConfig,
    OPTModel,
    Qwen2Config,
    Qwen2Model,
)
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel
from trl.experimental.ppo import AutoModelForCausalLMWithValueHead

GOLDEN = Path(__file__).parent / "golden"
TOKENS = [[1, 5, 2, 9, 4, 7]]
SIZES = {"vocab_size": 11, "hidden_size": 8, "max_position_embeddings": 16, "num_hidden_layers": 1}
LLAMA = {**SIZES, "num_attention_heads": 2, "intermediate_size": 8}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}

expected = {}


def llama(**options):
    return LlamaConfig(**LLAMA, **NO_TOKENS, **options)


def linear(inputs, outputs, *, bias=True):
    layer = nn.Linear(inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def mlp(hidden, intermediate, outputs=1):
    return nn.Sequential(linear(hidden, intermediate), nn.ReLU(), linear(intermediate, outputs))


def randomize(model):
    """Random biases and norms as well, which fresh models have as zeros and ones."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def folder(name):
    path = GOLDEN / name
    path.mkdir(parents=True)
    return path


def numbers(tensor):
    return None if tensor is None else tensor.detach().float().tolist()


def note(name, form, head, hidden_states=None, **more):
    """Writes down what must be read from a folder, and the values where there is a language model."""
    layers = [layer for layer in (head if isinstance(head, nn.Sequential) else [head]) if isinstance(layer, nn.Linear)]
    expected[name] = {
        "format": form,
        "layers": [{"weight": numbers(layer.weight), "bias": numbers(layer.bias)} for layer in layers],
        "values": None if hidden_states is None else numbers(head.float()(hidden_states)),
        "body_prefix": "",
        **more,
    }


@torch.no_grad()
def states(body):
    return body(torch.tensor(TOKENS)).last_hidden_state.float()


def save_raw(path, state, config, file="model.safetensors"):
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    if file.endswith("safetensors"):
        save_file(state, path / file, metadata={"format": "pt"})
    else:
        torch.save(state, path / file)
    if config is not None:
        config.save_pretrained(path)


def make_trl():
    body = randomize(LlamaForCausalLM(llama(tie_word_embeddings=True)))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body, v_head_init_strategy="normal")
    torch.nn.init.normal_(model.v_head.summary.bias)
    head = {f"v_head.{name}": value for name, value in model.v_head.state_dict().items()}
    linear_, hidden = model.v_head.summary, states(body.model)

    model.save_pretrained(str(folder("trl_single")))
    model.save_pretrained(str(folder("trl_sharded")), max_shard_size=600)
    note("trl_single", "trl", linear_, hidden)
    note("trl_sharded", "trl", linear_, hidden)
    torch.save(head, folder("trl_adapter") / "pytorch_model.bin")
    note("trl_adapter", "trl", linear_)
    for file, save in (("value_head.safetensors", save_file), ("value_head.bin", torch.save)):
        name = f"llama_factory_{file.rpartition('.')[2]}"
        save(head, folder(name) / file)
        note(name, "llama-factory", linear_)
    raw = {f"module.{name}": value for name, value in nn.Module.state_dict(model).items()}
    save_raw(folder("trl_raw_module"), raw, body.config, "pytorch_model.bin")
    note("trl_raw_module", "trl", linear_, hidden, body_prefix="module.pretrained_model.")
    save_file({name: value for name, value in body.state_dict().items() if "norm" in name}, plain_file())


def plain_file():
    return folder("plain") / "model.safetensors"


def make_vhead():
    for name, head in (("vhead_outputs", linear(8, 3)), ("vhead_two_layers", mlp(8, 5))):
        body = randomize(LlamaForCausalLM(llama(tie_word_embeddings=True)))
        state = {**body.state_dict(), **{f"v_head.summary.{key}": value for key, value in head.state_dict().items()}}
        del state["lm_head.weight"]
        save_raw(folder(name), state, body.config)
        note(name, "vhead", head, states(body.model))


def make_transformers():
    model = randomize(LlamaForTokenClassification(llama(num_labels=1)))
    model.save_pretrained(folder("hf_token"))
    note("hf_token", "hf-token-classification", model.score, states(model.model))
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16, num_labels=2, **NO_TOKENS)
    model = randomize(GPT2ForTokenClassification(config))
    model.save_pretrained(folder("hf_token_classifier"))
    hidden = states(model.transformer)
    note("hf_token_classifier", "hf-token-classification", model.classifier, hidden, activation="softmax")
    model = randomize(LlamaForSequenceClassification(llama(num_labels=3))).bfloat16()
    model.save_pretrained(folder("hf_sequence"))
    note("hf_sequence", "hf-sequence-classification", model.score, states(model.model.float()))


def class_with(base, **modules):
    """A model with these modules beside its trunk, as a framework's class has them."""

    def __init__(self, config):  # noqa: N807, becomes the class's
        base.__init__(self, config)
        trunk = LlamaModel if base is LlamaPreTrainedModel else Qwen2Model
        self.model = trunk(config)
        for name, module in modules.items():
            setattr(self, name, module)
        self.post_init()

    return __init__


def make_openrlhf():
    for name, prefix, configured in (("openrlhf", "score", True), ("openrlhf_older", "value_head", False)):
        head = linear(8, 1, bias=False).to(torch.bfloat16 if configured else torch.float32)
        init = class_with(LlamaPreTrainedModel, **{prefix: head})
        reward_model = type("RewardModel", (LlamaPreTrainedModel,), {"__init__": init})
        statistics = {"mean": 0.25, "std": 1.5}
        model = randomize(reward_model(llama(**({"value_head_prefix": prefix, **statistics} if configured else {}))))
        model.save_pretrained(folder(name))
        note(name, "openrlhf", getattr(model, prefix), states(model.model), **(statistics if configured else {}))


def make_verl():
    for name, key in (("verl_megatron", "lm_head"), ("verl_megatron_reward", "reward_head")):
        body = randomize(LlamaModel(llama(architectures=["LlamaForCausalLM"])))
        head = linear(8, 1, bias=False)
        state = {f"model.{key_}": value for key_, value in body.state_dict().items()}
        save_raw(folder(name), {**state, f"{key}.weight": head.weight}, body.config)
        note(name, "verl-megatron", head, states(body))


def make_trlx():
    body = randomize(LlamaForCausalLM(llama(tie_word_embeddings=False, architectures=["LlamaForCausalLM"])))
    head = mlp(8, 16)
    state = {
        **{f"base_model.{name}": value for name, value in body.state_dict().items()},
        **{f"v_head.{name}": value for name, value in head.state_dict().items()},
    }
    save_raw(folder("trlx"), state, body.config, "pytorch_model.bin")
    note("trlx", "trlx", head, states(body.model), body_prefix="base_model.")
    upper = body.model.layers[0].state_dict()
    frozen = {f"frozen_head.decoder_blocks.0.{name}": value for name, value in upper.items()}
    save_raw(folder("trlx_hydra"), {**state, **frozen}, body.config, "pytorch_model.bin")
    note("trlx_hydra", "trlx", head, states(body.model), body_prefix="base_model.")
    branch = {f"v_head.decoder_blocks.0.{name}": value for name, value in upper.items()}
    branch |= {f"v_head.lm_head.{name}": value for name, value in head.state_dict().items()}
    body_alone = {name: value for name, value in state.items() if not name.startswith("v_head")}
    save_raw(folder("refused_trlx_branch"), {**body_alone, **branch}, None, "pytorch_model.bin")


def make_deepspeed_chat():
    config = OPTConfig(
        **SIZES, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=4, architectures=["OPTForCausalLM"], **NO_TOKENS
    )
    for name, attribute in (("deepspeed_chat", "rwtransformer"), ("deepspeed_chat_older", "rwtranrsformer")):
        body, head = randomize(OPTModel(config)), linear(4, 1, bias=False)
        state = {f"{attribute}.{key}": value for key, value in body.state_dict().items()}
        save_raw(folder(name), {**state, "v_head.weight": head.weight}, config, "pytorch_model.bin")
        note(name, "deepspeed-chat", head, states(body), body_prefix=f"{attribute}.")


def make_megatron():
    head = linear(8, 4)
    state = {f"model.rm_head.{name}": value.detach() for name, value in head.state_dict().items()}
    state["model.decoder.final_layernorm.weight"] = torch.randn(8)
    save_raw(folder("nemo"), state, None)
    note("nemo", "nemo", head)
    content = io.BytesIO()
    torch.save(state, content)
    with tarfile.open(folder("nemo_archive") / "model.nemo", "w") as archive:
        for name, data in (("./model_config.yaml", b"{}\n"), ("./model_weights.ckpt", content.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    note("nemo_archive", "nemo", head, file="model.nemo")

    head = linear(8, 1)
    state = {f"module.module.output_layer.{name}": value.detach() for name, value in head.state_dict().items()}
    state["module.module.decoder.final_layernorm.weight"] = torch.randn(8)
    torch.save({"model": state, "iteration": 7}, folder("slime") / "model_optim_rng.pt")
    note("slime", "megatron", head, body_prefix="module.module.", file="model_optim_rng.pt")

    body = randomize(LlamaModel(llama(tie_word_embeddings=True, architectures=["LlamaForCausalLM"])))
    path = folder("areal")
    save_raw(path, {f"model.{name}": value for name, value in body.state_dict().items()}, body.config)
    torch.save({**head.state_dict(), "_extra_state": torch.empty(0, dtype=torch.uint8)}, path / "value_head.pt")
    note("areal", "megatron", head, states(body))


def make_reward_models():
    head = linear(8, 1, bias=False)
    path = folder("internlm2")
    save_raw(path, {"model.tok_embeddings.weight": torch.randn(11, 8), "v_head.weight": head.weight}, None)
    (path / "config.json").write_text('{"architectures": ["InternLM2ForRewardModel"], "model_type": "internlm2"}\n')
    note("internlm2", "internlm2", head)

    for name, outputs in (("qwen", 1), ("qwen_process", 2)):
        config = Qwen2Config(**LLAMA, num_key_value_heads=2, num_labels=outputs, tie_word_embeddings=False, **NO_TOKENS)
        init = class_with(Qwen2PreTrainedModel, score=mlp(8, 8, outputs))
        class_name = "Qwen2ForRewardModel" if name == "qwen" else "Qwen2ForProcessRewardModel"
        model = randomize(type(class_name, (Qwen2PreTrainedModel,), {"__init__": init})(config))
        model.save_pretrained(folder(name))
        note(name, "qwen", model.score, states(model.model), **({} if outputs == 1 else {"activation": "softmax"}))


def make_beaver():
    for name, outputs, bias in (("beaver", 1, True), ("beaver_cost", 1, False), ("beaver_scores", 3, True)):
        normalizer = nn.Module()
        normalizer.register_buffer("mean", torch.full((outputs,), 0.5))
        normalizer.register_buffer("var", torch.full((outputs,), 4.0))
        normalizer.register_buffer("count", torch.tensor([64]))
        init = class_with(LlamaPreTrainedModel, score_head=linear(8, outputs, bias=bias), normalizer=normalizer)
        kind = "cost" if name == "beaver_cost" else "reward"
        config = llama(
            score_dim=outputs,
            score_bias=bias,
            score_type=kind,
            do_normalize=True,
            mean=[0.5] * outputs,
            var=[4.0] * outputs,
        )
        model = randomize(type("LlamaForScore", (LlamaPreTrainedModel,), {"__init__": init})(config))
        model.save_pretrained(folder(name))
        statistics = {"beaver": {"mean": 0.5, "std": 2.0}, "beaver_cost": {"std": 2.0}}.get(name, {})
        note(name, "beaver", model.score_head, states(model.model), **statistics)


def make_adapter():
    model = randomize(LlamaForSequenceClassification(llama(num_labels=1)))
    adapted = get_peft_model(model, LoraConfig(r=1, task_type="SEQ_CLS", target_modules=["q_proj"]))
    adapted.save_pretrained(folder("hf_adapter"))
    head = adapted.base_model.model.score.modules_to_save["default"]
    note("hf_adapter", "hf-token-classification", head, body_prefix="base_model.")


def make_process_reward_models():
    config = Qwen2Config(**LLAMA, num_key_value_heads=2, tie_word_embeddings=False, **NO_TOKENS)
    config.architectures = ["Qwen2ForPrmModel"]
    body, head = randomize(Qwen2Model(config)), linear(8, 1)
    state = {f"model.{name}": value for name, value in body.state_dict().items()}
    state |= {"lm_head.weight": torch.randn(11, 8)}
    state |= {f"v_head.summary.{name}": value for name, value in head.state_dict().items()}
    save_raw(folder("skywork_process"), state, config)
    note("skywork_process", "trl", head, states(body))
    model = randomize(LlamaForTokenClassification(llama(num_labels=2)))
    model.save_pretrained(folder("trl_process"))
    note("trl_process", "hf-token-classification", model.score, states(model.model), activation="softmax")
    adapted = get_peft_model(model, LoraConfig(r=1, task_type="TOKEN_CLS", target_modules=["q_proj"]))
    adapted.save_pretrained(folder("trl_process_adapter"))
    head = adapted.base_model.model.score.modules_to_save["default"]
    prefix = {"body_prefix": "base_model.", "activation": "softmax"}
    note("trl_process_adapter", "hf-token-classification", head, **prefix)


def make_critics():
    body = randomize(LlamaForCausalLM(llama(tie_word_embeddings=False)))
    for name, form, module, head in (
        ("xtuner", "xtuner", "value_head", linear(8, 1, bias=False)),
        ("unirl", "unirl", "value_head.proj", linear(8, 1)),
    ):
        state = {key: value for key, value in body.state_dict().items() if name == "unirl" or "lm_head" not in key}
        state |= {f"{module}.{key}": value for key, value in head.state_dict().items()}
        body.config.architectures = ["LlamaForCausalLM"]
        save_raw(folder(name), state, body.config)
        note(name, form, head, states(body.model))
    head = linear(8, 1, bias=False)
    state = {"output_layer.weight": head.weight.detach(), "decoder.final_layernorm.weight": torch.randn(8)}
    torch.save({"model": state, "iteration": 7}, folder("rlinf") / "model_optim_rng.pt")
    note("rlinf", "megatron", head, file="model_optim_rng.pt")


def make_armorm():
    config = llama(num_labels=19, architectures=["LlamaForRewardModelWithGating"])
    body, head = randomize(LlamaModel(config)), linear(8, 19, bias=False)
    state = {f"model.{name}": value for name, value in body.state_dict().items()}
    state |= {"regression_layer.weight": head.weight, "reward_transform_matrix": torch.randn(19, 19)}
    state |= {f"gating.layers.{place}.weight": torch.randn(8, 8) for place in range(2)}
    save_raw(folder("armorm"), state, config)
    note("armorm", "armorm", head, states(body))


def make_distributional():
    body, head = randomize(LlamaForCausalLM(llama(tie_word_embeddings=True))), linear(8, 5)
    support = {"low": -1.0, "high": 2.0, "bins": 5, "kind": "two_hot", "sigma": None}
    body.config.v_head_support = support
    state = {**body.state_dict(), **{f"v_head.summary.{key}": value for key, value in head.state_dict().items()}}
    del state["lm_head.weight"]
    save_raw(folder("vhead_distributional"), state, body.config)
    note("vhead_distributional", "vhead", head, states(body.model), support=support)
    probabilities = head(states(body.model)).softmax(-1)
    values = (probabilities * torch.linspace(-1.0, 2.0, 5)).sum(-1, keepdim=True)
    expected["vhead_distributional"]["values"] = numbers(values)


def main():
    torch.manual_seed(0)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    make_trl()
    make_vhead()
    make_transformers()
    make_openrlhf()
    make_verl()
    make_trlx()
    make_deepspeed_chat()
    make_megatron()
    make_reward_models()
    make_beaver()
    make_adapter()
    make_process_reward_models()
    make_critics()
    make_armorm()
    make_distributional()
    for extra in (*GOLDEN.rglob("generation_config.json"), *GOLDEN.rglob("README.md")):
        extra.unlink()
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
