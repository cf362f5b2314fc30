"""What does not hold, by name and with the reason: tests fail where the list is too short, and where it is too long."""

_BY_COLUMN = "positions are counted by column, and the model takes no `position_ids` to correct them"
_RECURRENT = "a recurrent layer reads the padding, since transformers hides it from attention alone"
_BLOCKS = "layers group tokens in blocks that start at the first column"
_AS_TRANSFORMERS = "plain transformers fails in the same way"

# Model types of the auto classes that cannot be built or are no language models: nothing is said about them.
LEFT_OUT = {
    "diffusion_gemma": "denoises a canvas of 256 tokens: its states are not those of the tokens that it is given",
    "evolla": "transformers' auto class refuses the configuration that it lists",
    "gemma3n": "its vision tower needs the package timm (its text model, `gemma3n_text`, is below)",
    "gemma4_assistant": "drafts tokens from another model's states and cache",
    "gemma4_unified_assistant": "drafts tokens from another model's states and cache",
    "musicgen": "transformers' auto class makes its class from a configuration that the class does not take",
    "musicgen_melody": "transformers' auto class makes its class from a configuration that the class does not take",
    "pi0": "a robot's policy: it predicts movements, not tokens",
}

LIMITS: dict[str, dict[str, str]] = {
    "logits path": {
        "prophetnet": "its logits come from a second stream; the values are those of the first, as with TRL",
    },
    "left padding": {
        **dict.fromkeys(
            [
                *(
                    "bart",
                    "bigbird_pegasus",
                    "blenderbot",
                    "blenderbot-small",
                    "encoder-decoder",
                    "florence2",
                    "led",
                    "marian",
                    "mbart",
                ),
                *("mvp", "pegasus", "pegasus_x", "plbart", "prophetnet", "trocr", "whisper"),
            ],
            _BY_COLUMN,
        ),
        **dict.fromkeys(["recurrent_gemma", "rwkv", "xlstm"], _RECURRENT),
        **dict.fromkeys(["blt", "deepseek_v4", "reformer"], _BLOCKS),
        "blip": _BY_COLUMN,
        "hunyuan_vl": "transformers counts positions by column: pass `position_ids`",
        "paligemma": "padding is not hidden from the prefix, which sees itself in both directions",
        "voxtral_realtime": "each token comes with a stretch of sound, and padding has none",
    },
    "labels": {
        "fsmt": _AS_TRANSFORMERS,
        "pp_formulanet": _AS_TRANSFORMERS,
    },
    "generate": {
        "reformer": _AS_TRANSFORMERS,
        "voxtral_realtime": "it writes one token for each stretch of sound, no more",
    },
    "save, load": {
        "shieldgemma2": f"{_AS_TRANSFORMERS}: it does not find the weights that it has written",
        "youtu": f"{_AS_TRANSFORMERS}: it does not find the weights that it has written",
    },
}
