"""The files of a checkpoint, on disk or on the hub: read when asked for, written whole."""

# What peft calls an adapter's files.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
