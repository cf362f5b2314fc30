"""What does not hold, by name and with the reason: tests fail where the list is too short, and where it is too long."""

_AS_TRANSFORMERS = "plain transformers fails in the same way"
_TIES = "its layers select among tokens that score alike, and which of them depends on the number of columns"
# Why plain `generate` of left-padded prompts is not what `forward` gives: the values are those of what it ran.
_BY_COLUMN = "plain `generate` counts positions by column, padding included"
_FROM_ZERO = "plain `generate` counts positions from zero, `forward` from behind the padding's"
_RECURRENT = "plain `generate` hides padding from attention alone, and a recurrent layer reads it"
_BLOCKS = "plain `generate` groups padding in blocks with tokens"
_CACHE = "plain `generate` gives other numbers with its cache than without"
_OWN_INPUTS = "plain `generate` runs it on other inputs than the sequence"

# Model types of the auto classes that cannot be built or are no language models: nothing is said about them.
LEFT_OUT = {
    "diffusion_gemma": "denoises a canvas of 256 tokens: its states are not those of the tokens that it is given",
    "dory": "plain transformers' forward fails with the cache that it makes",
    "evolla": "transformers' auto class refuses the configuration that it lists",
    "gemma3n": "its vision tower needs the package timm (its text model, `gemma3n_text`, is below)",
    "gemma4_assistant": "drafts tokens from another model's states and cache",
    "gemma4_unified_assistant": "drafts tokens from another model's states and cache",
    "musicgen": "transformers' auto class makes its class from a configuration that the class does not take",
    "musicgen_melody": "transformers' auto class makes its class from a configuration that the class does not take",
    "pi0": "a robot's policy: it predicts movements, not tokens",
}

# The same of models of one auto class alone.
LEFT_OUT_OF_CLASS = {
    ("llama4", "AutoModelForImageTextToText"): "plain transformers' forward reads an output that it does not have",
}

LIMITS: dict[str, dict[str, str]] = {
    "logits path": {
        "prophetnet": "its logits come from a second stream; the values are those of the first, as with TRL",
    },
    "right padding": {
        "glm_moe_dsa": _TIES,
        "voxtral_realtime": "each token comes with a stretch of sound, and padding has none: an error",
    },
    "left padding": {
        "hy_v4_vl": _TIES,
        "voxtral_realtime": "each token comes with a stretch of sound, and padding has none: an error",
    },
    "generated values": {
        **dict.fromkeys(
            [
                *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
                *("plbart", "prophetnet", "trocr", "whisper"),
            ],
            _BY_COLUMN,
        ),
        **dict.fromkeys(
            [
                *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
                "xmod",
            ],
            _FROM_ZERO,
        ),
        **dict.fromkeys(["recurrent_gemma", "rwkv", "xlstm"], _RECURRENT),
        **dict.fromkeys(["blt", "deepseek_v4"], _BLOCKS),
        **dict.fromkeys(["git", "kosmos-2.5", "moshi"], _CACHE),
        **dict.fromkeys(["xlm", "xlnet"], _OWN_INPUTS),
        **dict.fromkeys(["cpmant", "paligemma"], "padding is left out of `values`, and plain `generate` sees it"),
        "janus": "refused: its own `generate` drops the logits processor that reads the values off",
        "reformer": _AS_TRANSFORMERS,
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


def left_out(model_type: str, auto_class: str) -> str | None:
    """Why nothing is said about a model type, or None."""
    return LEFT_OUT.get(model_type) or LEFT_OUT_OF_CLASS.get((model_type, auto_class))
