"""Small tokenizers of the kinds that there are, trained on a few lines."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

LINES = [
    "The value of a state is what it is worth.",
    "f(x) = y + 1; return f(x)",
    "hello world, hello words; the world is worth a value",
    "é ä → “quoted”  double  spaces\n\nnew lines\n",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 420
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
UNKNOWN = {"unk_token": "<unk>"}


def byte_level(*, trim_offsets: bool = False, beginning: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    template = processors.TemplateProcessing(
        single="<s> $A </s>" if beginning else "$A", special_tokens=[("<s>", 0), ("</s>", 1)] if beginning else []
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), template])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ENDS)


def sentence_piece() -> PreTrainedTokenizerFast:
    """BPE with a space put in front of every text and bytes for what it does not know, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, **UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **UNKNOWN, **ENDS)
    fast.add_tokens([AddedToken("<|assistant|>", lstrip=True, rstrip=True, special=True)])
    return fast


class Pairs(PreTrainedTokenizer):
    """A slow tokenizer whose tokens are pairs of letters, with a beginning that code puts there, as ChatGLM has it."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012, as transformers declares it

    @property
    def vocab_size(self):
        return 4

    def get_vocab(self):
        return {"[gMASK]": 0, "sop": 1, "</s>": 2}

    def _tokenize(self, text, **_):
        return [text[at : at + 2] for at in range(0, len(text), 2)]

    def _convert_token_to_id(self, token):
        known = self.get_vocab().get(token)
        return 3 + 200 * (ord(token[0]) % 200) + ord(token[-1]) % 200 if known is None else known

    def _convert_id_to_token(self, index):
        return f"{chr((index - 3) // 200)}{chr((index - 3) % 200)}"

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [0, 1, *token_ids_0, *(token_ids_1 or [])]
