"""What the rules of `tiny.py` cannot know about single model types: fields that depend on one another."""

from typing import Any

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
_NEMOTRON_H = {"n_groups": 2, "mamba_num_heads": 4}
# One layer in the middle differs in its sizes from the others.
_DOTS3_NOTE = {
    "head_dim": 16,
    "per_layer_config": {
        2: {"kv_lora_rank": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "qk_nope_head_dim": 8},
    },
}
# The upper layers read the keys and values of the lower ones.
_GEMMA3N = {
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_QWEN4_EXP = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# Image tokenizers normalise in groups of 32 channels.
_IMAGE_TOKENIZER = {"base_channels": 32, "channel_multiplier": [1, 1]}
_IMAGE_VOCABULARY = {"<image>": 100, "<|extra_200|>": 101}
_SPEECH_ENCODER = {"num_filters": 2, "depths": [1] * 7}
_SAM = {"vision_config": {"sam_config": {"downsample_channels": [16, 32]}}}

OVERRIDES: dict[str, dict[str, Any]] = {
    # Layers of several kinds: at least one of each.
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"num_hidden_layers": 2, "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "hash_seed": 0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "gemma3n_text": _GEMMA3N,
    "dots3_note": {"text_config": _DOTS3_NOTE},
    "dots3_note_text": _DOTS3_NOTE,
    # Sizes that have to agree with other sizes.
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "xlnet": {"d_head": 8},
    "nemotron_h": _NEMOTRON_H,
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 4, "index_kpool": 2}},
    "bailing_hybrid": {"num_experts": 8, "num_expert_group": 2},
    "kimi_linear": {"num_experts": 8},
    "kolibri1": {"num_experts": 8},
    "qwen3_moe": {"num_experts": 8},
    "qwen3_vl_moe": {"text_config": {"num_experts": 8}},
    "mellum": {"num_experts": 8},
    "xlstm": {"hidden_size": 128},
    # Fields that the default leaves open, or that only the checkpoints set.
    "blt": {"num_hidden_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _PLAIN_ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _PLAIN_ROPE}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "qwen4_exp_text": _QWEN4_EXP,
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "xmod": {"default_language": "en_XX"},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE}, "vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [32, 16],
            "rope_parameters": _PLAIN_ROPE | {"mrope_section": [1, 1, 2]},
        },
    },
    # Towers for images and sound, which text does not pass through; still they have to be small.
    "chameleon": {"vq_config": _IMAGE_TOKENIZER, "vocabulary_map": _IMAGE_VOCABULARY},
    "emu3": {"vq_config": _IMAGE_TOKENIZER | {"attn_resolutions": []}, "vocabulary_map": _IMAGE_VOCABULARY},
    "janus": {"vq_config": _IMAGE_TOKENIZER},
    "deepseek_ocr2": {
        **_SAM,
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1},
    },
    "unlimited_ocr": _SAM,
    "omniasr": {"audio_config": {"conv_dim": [32] * 7}},
    # Ranges of its vocabulary follow one another.
    "apertus1p5": {
        "vision_config": _IMAGE_TOKENIZER | {"codebook_size": 8, "attn_resolutions": []},
        "audio_config": {"codebook_size": 8, "num_filters": 4},
        "image_token_offset": 104,
        "audio_token_offset": 112,
    },
    # Its own vision tower is one of the library timm.
    "fast_vlm": {"vision_config": _SIGLIP},
    "perception_lm": {"vision_config": _SIGLIP | {"model_args": {"embed_dim": 32}}},
    "florence2": {
        "vision_config": {"embed_dim": [8] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4},
    },
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "inkling_mm_model": {"vision_config": {"patch_size": 4, "num_hidden_layers": 4}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {"audio_config": {"patch_sizes": [4, 4], "hidden_sizes": [16, 32], "depths": [1, 1]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "text_config": _NEMOTRON_H},
    "nemo_speechlm": {
        "text_config": _NEMOTRON_H,
        "audio_config": {
            "diarization_config": {
                "chunk_length": 16,
                "chunk_left_context": 2,
                "chunk_right_context": 2,
                "speaker_cache_update_period": 8,
                "fifo_length": 8,
            },
        },
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 3200,
        "acoustic_tokenizer_encoder_config": _SPEECH_ENCODER,
        "semantic_tokenizer_encoder_config": _SPEECH_ENCODER,
    },
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "idefics": {"freeze_text_layers": False, "freeze_vision_layers": False},
    "kosmos-2": {"latent_query_num": 2},
    # Encoder-decoders put together from two models.
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder": {"is_decoder": True, "add_cross_attention": True}},
}
