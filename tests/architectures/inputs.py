"""What each tiny model is run on: text, and whatever else its forward cannot do without."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.architectures.tiny import FIRST_SPECIAL

FIRST_WORD = 3
ROWS, LENGTH, DECODER_LENGTH = 2, 7, 5

Inputs = dict[str, Tensor]


def words(length: int, seed: int) -> Tensor:
    """Ids `[ROWS, length]` of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, FIRST_SPECIAL - 10, (ROWS, length), generator=generator)


def is_encoder_decoder(body: PreTrainedModel) -> bool:
    return bool(getattr(body.config, "is_encoder_decoder", False))


def text_inputs(body: PreTrainedModel, model_type: str) -> Inputs:
    """Unpadded text `[ROWS, LENGTH]`, the decoder's tokens for an encoder-decoder, and what else is required."""
    inputs = {"input_ids": words(LENGTH, seed=11)}
    if is_encoder_decoder(body):
        inputs["decoder_input_ids"] = words(DECODER_LENGTH, seed=12)
    return REQUIRED[model_type](body, inputs) if model_type in REQUIRED else inputs


def right_padded(inputs: Inputs) -> Inputs:
    """The same batch with the last two tokens of the second row made padding."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1:, -2:] = 0
    return {**inputs, "input_ids": inputs["input_ids"] * mask, "attention_mask": mask}


def left_padded(inputs: Inputs, padding: int = 3) -> Inputs:
    """The same tokens behind columns of padding; what else is given for each token is padded with them."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    moved = {name: _behind(inputs[name], padding) for name in per_token(inputs)}
    return {**inputs, "attention_mask": _behind(mask, padding), **moved}


def per_token(inputs: Inputs) -> list[str]:
    """The inputs that have one entry for each token."""
    return [n for n, value in inputs.items() if value.shape[:2] == (ROWS, LENGTH) and n != "qformer_input_ids"]


def _behind(values: Tensor, padding: int) -> Tensor:
    return torch.cat([values.new_zeros(ROWS, padding, *values.shape[2:]), values], dim=1)


def _pixels(body: PreTrainedModel) -> Tensor:
    config = getattr(body.config, "vision_config", None) or getattr(body.config, "encoder", body.config)
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    generator = torch.Generator().manual_seed(13)
    return torch.randn(ROWS, 3, height, width, generator=generator)


def _image(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    return {**inputs, "pixel_values": _pixels(body)}


def _image_only(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    return {"pixel_values": _pixels(body), "decoder_input_ids": inputs["decoder_input_ids"]}


def _queried_image(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Blip-2's way: the first tokens stand for the image's queries."""
    tokens = inputs["input_ids"].clone()
    tokens[:, : body.config.num_query_tokens] = body.config.image_token_index
    return {**inputs, "input_ids": tokens, "pixel_values": _pixels(body)}


def _instructed_image(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    return {**_queried_image(body, inputs), "qformer_input_ids": words(LENGTH, seed=14)}


def _instructed_video(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    tokens = inputs["input_ids"].clone()
    tokens[:, : body.config.num_query_tokens] = body.config.video_token_index
    questions = words(LENGTH, seed=14)
    return {"input_ids": tokens, "pixel_values": _pixels(body)[:, None], "qformer_input_ids": questions}


def _several_images(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Idefics' way: one image for each row, which every token sees."""
    mask = torch.ones(ROWS, LENGTH, 1, dtype=torch.long)
    return {**inputs, "pixel_values": _pixels(body)[:, None], "image_attention_mask": mask}


def _marked_image(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Kosmos-2's way: a mask says which tokens stand for the image."""
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, : body.config.latent_query_num] = 1
    return {**inputs, "pixel_values": _pixels(body), "image_embeds_position_mask": mask}


def _patches(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Pix2Struct's way: rows of (row, column, pixels)."""
    generator = torch.Generator().manual_seed(13)
    width = body.config.vision_config.patch_embed_hidden_size
    pixels = torch.randn(ROWS, 4, width, generator=generator)
    places = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]]).expand(ROWS, -1, -1)
    return {
        "flattened_patches": torch.cat([places, pixels], dim=-1),
        "decoder_input_ids": inputs["decoder_input_ids"],
    }


def _boxes(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(13)
    corners = torch.rand(ROWS, LENGTH, 2, generator=generator) / 2
    return {**inputs, "bbox": torch.cat([corners, corners + 0.2], dim=-1)}


def _speech(body: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Voxtral Realtime's way: one stretch of sound for each token."""
    generator = torch.Generator().manual_seed(13)
    config = body.config.audio_config
    frames = LENGTH * body.config.audio_length_per_tok
    return {**inputs, "input_features": torch.randn(ROWS, config.num_mel_bins, frames, generator=generator)}


REQUIRED: dict[str, Callable[[PreTrainedModel, Inputs], Inputs]] = {
    "blip": _image,
    "blip-2": _queried_image,
    "idefics": _several_images,
    "instructblip": _instructed_image,
    "instructblipvideo": _instructed_video,
    "kosmos-2": _marked_image,
    "pix2struct": _patches,
    "pp_formulanet": _image_only,
    "udop": _boxes,
    "vision-encoder-decoder": _image_only,
    "voxtral_realtime": _speech,
}
