"""Text is tokenised as one text and divided where the completion begins."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from tests.rollouts.tokenizers_for_tests import ENDS, VOCABULARY, Pairs, byte_level, sentence_piece
from tests.scoring.scoring_models import critic
from vhead import Rollout, Scorer
from vhead.errors import FieldError, VheadError
from vhead.rollouts.encoding import Encoder, LengthLimit

MANY = 10**6
BYTE_LEVEL, TRIMMING, SENTENCE_PIECE = byte_level(), byte_level(trim_offsets=True), sentence_piece()
FAST = {"byte level": BYTE_LEVEL, "offsets without spaces": TRIMMING, "sentence piece": SENTENCE_PIECE}


def encoder(tokenizer, **options):
    return Encoder(tokenizer, MANY, LengthLimit(None), **options)


def encode(tokenizer, prompt, completion, **options):
    return encoder(tokenizer, **options).encode(0, Rollout(prompt, completion), "record 0", with_spans=True)


def own_ids(tokenizer, text):
    """What the tokenizer gives for the whole text, without what it puts behind."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id and not text.endswith("</s>") else ids


def pieces(encoded, completion):
    return [completion[first:stop] for first, stop in encoded.spans[encoded.prompt_length :].tolist()]


@pytest.fixture(params=FAST)
def tokenizer(request):
    return FAST[request.param]


PAIRS = [
    ("f(", "x) = y"),
    ("hello wor", "ld"),
    ("hello ", " world"),
    ("hello", "  world"),
    ("The value", "of a state"),
    ("hello\n", "\nworld"),
    ("é", "→ ä “"),
    ("  ", "  hello"),
]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_ids_are_the_tokenizer_s_own_of_the_whole_text(tokenizer, prompt, completion):
    encoded = encode(tokenizer, prompt, completion)
    assert encoded.tokens.tolist() == own_ids(tokenizer, prompt + completion)


def test_tokenising_apart_gives_other_ids():
    """A space that nobody wrote stands before a completion that is tokenised by itself."""
    whole, apart = (encode(SENTENCE_PIECE, "Q", "Q(", separate_tokens=way) for way in (False, True))
    assert SENTENCE_PIECE.convert_ids_to_tokens(whole.tokens[whole.prompt_length :]) == ["<0x51>", "("]
    assert SENTENCE_PIECE.convert_ids_to_tokens(apart.tokens[apart.prompt_length :]) == ["▁", "<0x51>", "("]
    assert len(apart) > len(whole)


def test_a_token_across_the_border_is_the_completion_s():
    encoded = encode(BYTE_LEVEL, "hello wor", "ld is")
    assert BYTE_LEVEL.decode(encoded.tokens[encoded.prompt_length :].tolist()) == " world is"
    assert BYTE_LEVEL.decode(encoded.tokens[1 : encoded.prompt_length].tolist()) == "hello"


def test_a_prompt_that_is_swallowed_whole_is_named():
    bare = byte_level(beginning=False)
    with pytest.raises(FieldError, match="prompt: expected at least one token, got a text in which no token ends"):
        encode(bare, "hel", "lo world")


@given(st.text("ab w\n é→", min_size=1, max_size=12), st.text("ab w\n é→", min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_characters_of_the_completion_are_those_of_its_tokens(prompt, completion):
    for tokenizer in FAST.values():
        encoded = encode(tokenizer, prompt, completion)
        assert encoded.tokens.tolist() == own_ids(tokenizer, prompt + completion)
        spans = encoded.spans[encoded.prompt_length :]
        assert spans[0, 0] == 0
        assert spans[-1, 1] == len(completion)
        assert (spans[1:, 0] <= spans[:-1, 1]).all()
        ends = encoder(tokenizer)._text._tokenised(prompt + completion)[1][:, 1]
        assert encoded.completion_length == (ends > len(prompt)).sum()


@pytest.mark.parametrize("wrong", ["ends left at the starts", "falling"])
def test_offsets_that_cannot_be_right_are_not_believed(monkeypatch, wrong):
    """Releases of tokenizers have stated such for Llama 3."""
    right = encode(BYTE_LEVEL, "hello ", "world is")

    class Mistaken:
        is_fast = True

        def __call__(self, text, **options):
            encoding = dict(BYTE_LEVEL(text, **options))
            if "offset_mapping" in encoding:
                spans = encoding["offset_mapping"]
                encoding["offset_mapping"] = [(a, a) for a, _ in spans] if wrong[0] == "e" else spans[::-1]
            return encoding

        def decode(self, ids, **options):
            return BYTE_LEVEL.decode(ids, **options)

    encoded = encode(Mistaken(), "hello ", "world is")
    assert encoded.tokens.tolist() == right.tokens.tolist()
    assert encoded.prompt_length == right.prompt_length
    assert pieces(encoded, "world is") == pieces(right, "world is") == ["world", " is"]


class TestBeginning:
    @pytest.mark.parametrize("tokenizer", FAST, indirect=True)
    def test_a_prompt_that_begins_with_it_does_not_get_it_twice(self, tokenizer):
        with_text, without = encode(tokenizer, "<s>hello", " world"), encode(tokenizer, "hello", " world")
        assert with_text.tokens[0] == without.tokens[0] == tokenizer.bos_token_id
        assert (with_text.tokens == tokenizer.bos_token_id).sum() == 1

    @pytest.mark.parametrize("apart", [False, True])
    def test_what_code_puts_in_front_is_there(self, apart):
        slow = Pairs(**ENDS)
        encoded = encode(slow, "abcd", "ef", separate_tokens=apart)
        assert encoded.tokens.tolist() == slow("abcdef")["input_ids"]
        assert encoded.tokens[:2].tolist() == [0, 1]
        assert encoded.prompt_length == 4

    def test_a_tokenizer_that_mixes_its_own_tokens_into_the_text_is_refused_by_name(self):
        class Mixing(Pairs):
            def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
                return [0, *(token + 1 for token in token_ids_0)]

        with pytest.raises(VheadError, match=r"^Mixing: expected a tokenizer that puts its special tokens before and"):
            encode(Mixing(**ENDS), "ab", "cd")


class TestSlow:
    def test_the_completion_begins_where_prompt_and_whole_differ(self):
        encoded = encode(Pairs(**ENDS), "abc", "def")
        assert encoded.prompt_length == 3
        assert pieces(encoded, "def") == ["d", "ef"]

    def test_characters_of_several_tokens(self):
        """The bundled model's tokenizer has a token for each byte."""
        encoded = encode(ByT5Tokenizer(extra_ids=0), "Wh→", "é a→b")
        assert pieces(encoded, "é a→b") == ["é", "é", " ", "a", "→", "→", "→", "b"]

    def test_a_text_that_decoding_does_not_give_back_has_no_places(self):
        class Capital(Pairs):
            def _tokenize(self, text, **options):
                return super()._tokenize(text.upper(), **options)

        assert (encode(Capital(**ENDS), "ab", "cd").spans == -1).all()


class TestEnd:
    def test_nothing_is_put_behind_a_text(self, tokenizer):
        assert encode(tokenizer, "hello", " world").tokens[-1] != tokenizer.eos_token_id

    def test_append_eos(self, tokenizer):
        plain, ended = (encode(tokenizer, "hello", " world", append_eos=way) for way in (False, True))
        assert ended.tokens.tolist() == [*plain.tokens.tolist(), tokenizer.eos_token_id]
        assert ended.spans[-1].tolist() == [6, 6]

    def test_a_completion_that_ends_in_it_gets_no_second_one(self, tokenizer):
        ended = encode(tokenizer, "hello", " world</s>", append_eos=True)
        assert ended.tokens.tolist() == encode(tokenizer, "hello", " world</s>").tokens.tolist()
        assert (ended.tokens == tokenizer.eos_token_id).sum() == 1

    def test_the_reward_is_read_there(self):
        model = critic(vocab_size=VOCABULARY + 4)
        scorer = Scorer(model, BYTE_LEVEL, append_eos=True)
        tokens = BYTE_LEVEL("hello world")["input_ids"]
        expected = Scorer(model).score([Rollout(tokens[:-2], tokens[-2:])])
        np.testing.assert_allclose(scorer.score([Rollout("hello", " world")]).reward, expected.reward, atol=1e-6)
        without = Scorer(model, BYTE_LEVEL).score([Rollout("hello", " world")])
        assert abs(without.reward - expected.reward) > 1e-3

    def test_a_tokenizer_without_one(self):
        bare = byte_level()
        bare.eos_token = None
        with pytest.raises(VheadError, match="append_eos: expected a tokenizer with an end-of-sequence token"):
            encoder(bare, append_eos=True)


class TestMarkerThatTakesSpace:
    @pytest.mark.parametrize("completion", ["hello", "  hello", "\nhello"])
    def test_it_is_the_prompt_s(self, completion):
        """`<|assistant|>` takes the white space behind it, which may be the completion's."""
        encoded = encode(SENTENCE_PIECE, "f(x) <|assistant|>\n", completion)
        marker = SENTENCE_PIECE.convert_tokens_to_ids("<|assistant|>")
        assert encoded.tokens[encoded.prompt_length - 1] == marker


@pytest.fixture(scope="module")
def scorer():
    return Scorer(critic(vocab_size=VOCABULARY + 4), BYTE_LEVEL)


class TestTokensAmongTheReturns:
    def test_values_line_up_with_text(self, scorer):
        texts = [("hello ", "world, hello"), ("f(x", ") = y")]
        scores = scorer.score([Rollout(*text) for text in texts], ("values", "tokens"))
        for (prompt, completion), score in zip(texts, scores, strict=True):
            encoded = encode(BYTE_LEVEL, prompt, completion)
            assert score.token_ids.tolist() == encoded.tokens[encoded.prompt_length :].tolist()
            assert score.offsets.shape == (len(score.values), 2)
            assert "".join(completion[a:b] for a, b in score.offsets.tolist()) == completion

    def test_token_ids_have_no_places_in_a_text(self, scorer):
        (score,) = scorer.score([Rollout([5, 6], [7, 8, 9])], ["tokens"])
        assert score.token_ids.tolist() == [7, 8, 9]
        assert score.offsets.tolist() == [[-1, -1]] * 3

    def test_truncated_completions(self):
        scorer = Scorer(critic(vocab_size=VOCABULARY + 4), BYTE_LEVEL, truncation="completion", max_length=4)
        (score,) = scorer.score([Rollout("hello", " world, hello")], ["values", "tokens"])
        assert score.truncated
        assert len(score.values) == len(score.token_ids) == len(score.offsets) == 2
        assert score.offsets.tolist() == [[0, 6], [6, 7]]

    def test_a_stream_and_a_chunk_of_none(self, scorer):
        rollouts = [Rollout("hello ", "world")] * 3
        (one, *_) = scorer.stream(iter(rollouts), ["tokens", "reward"])
        assert one.token_ids.tolist() == scorer.score(rollouts, ["tokens"])[0].token_ids.tolist()
        assert scorer.score([], ["tokens"]).token_offsets.shape == (0, 2)

    def test_columns(self, scorer):
        scores = scorer.score([Rollout("hello ", "world")] * 2, ["values", "tokens"])
        assert scores.columns == ("values", "token_ids", "token_offsets")
        table = scores.to_arrow()
        assert table.column("token_offsets").to_pylist() == [score.offsets.tolist() for score in scores]
        assert json.loads(json.dumps(table.column("token_ids").to_pylist())) == [s.token_ids.tolist() for s in scores]
