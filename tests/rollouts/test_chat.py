"""Chats: what the model wrote of them, by templates of the kinds that there are."""

import numpy as np
import pytest

from tests.rollouts.tokenizers_for_tests import byte_level
from vhead import Rollout
from vhead.errors import FieldError
from vhead.rollouts.chat import chat_passage
from vhead.rollouts.encoding import Encoder, LengthLimit
from vhead.rollouts.template import Template

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
PLAIN, CUT = "m['content']", "m['content'].split('</think>')[-1]"

TEMPLATES = {
    "chatml": TURNS.replace("CONTENT", PLAIN) + ASSISTANT,
    "stripping": TURNS.replace("CONTENT", "m['content'] | trim") + ASSISTANT,
    "cutting": TURNS.replace("CONTENT", CUT) + ASSISTANT,
    "thinking": TURNS.replace("CONTENT", PLAIN) + THINKING,
    "cutting and thinking": TURNS.replace("CONTENT", CUT) + THINKING,
    # The last turn always has a block of reasoning, with line breaks of the template's own.
    "tidying": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}{% set parts = m['content'].split('</think>') %}<think>\n"
        "{{ m['reasoning_content'] or parts[0].replace('<think>', '').strip() if parts | length > 1 "
        "or m['reasoning_content'] else '' }}\n"
        "</think>\n\n{{ parts[-1].strip() }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
        "<|im_end|>\n{% endfor %}" + ASSISTANT
    ),
    "without a marker": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "calls": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for call in m['tool_calls'] or [] %}<call>{{ call['name'] }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        + ASSISTANT
    ),
}
QUESTION = {"role": "user", "content": "2 and 2?"}
HEAD = "<|im_start|>user\n2 and 2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tokenizer():
    return byte_level(beginning=False)


def parts(tokenizer, template, *messages, **answer):
    """The text that the model read and the text that it wrote."""
    tokenizer.chat_template = TEMPLATES[template]
    rollout = Rollout([*(messages or [QUESTION])], [{"role": "assistant", **answer}])
    passage = chat_passage(Template(tokenizer, "record 0"), rollout.prompt, rollout.completion)
    return passage.text[: passage.border], passage.text[passage.border :]


class TestWhereTheTurnEnds:
    def test_at_its_marker_and_not_at_the_line_break_behind(self, tokenizer):
        assert parts(tokenizer, "chatml", content="four") == (HEAD, "four<|im_end|>")

    def test_the_last_token_is_the_marker_s(self, tokenizer):
        tokenizer.chat_template = TEMPLATES["chatml"]
        rollout = Rollout.from_messages([QUESTION, {"role": "assistant", "content": "four"}])
        encoded = Encoder(tokenizer, 10**6, LengthLimit(None)).encode(0, rollout, "record 0")
        assert encoded.tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.decode(encoded.tokens.tolist()) == f"{HEAD}four<|im_end|>"

    def test_without_a_marker_where_the_template_ends_it(self, tokenizer):
        assert parts(tokenizer, "without a marker", content="four") == (
            "user: 2 and 2?\nassistant: ",
            "four\n",
        )

    def test_white_space_of_the_content_is_the_model_s(self, tokenizer):
        assert parts(tokenizer, "chatml", content="four \n")[1] == "four \n<|im_end|>"

    def test_append_eos_is_for_plain_text(self, tokenizer):
        tokenizer.chat_template = TEMPLATES["chatml"]
        rollout = Rollout.from_messages([QUESTION, {"role": "assistant", "content": "four"}])
        plain, ended = (
            Encoder(tokenizer, 10**6, LengthLimit(None), append_eos=way).encode(0, rollout, "") for way in (False, True)
        )
        np.testing.assert_array_equal(plain.tokens, ended.tokens)


class TestReasoning:
    @pytest.mark.parametrize("template", ["cutting", "tidying"])
    def test_what_a_template_would_cut_or_change_is_scored_as_the_model_wrote_it(self, tokenizer, template):
        """DeepSeek-R1's template shows `four` of this, Qwen3's other line breaks."""
        expected = (HEAD, "<think>add them</think>four<|im_end|>")
        assert parts(tokenizer, template, content="<think>add them</think>four") == expected

    @pytest.mark.parametrize("template", ["thinking", "cutting and thinking"])
    @pytest.mark.parametrize(
        "content", ["<think>\nadd them</think>four", "<think>add them</think>four", "add them</think>four"]
    )
    def test_a_generation_prompt_that_opens_it(self, tokenizer, template, content):
        assert parts(tokenizer, template, content=content) == (f"{HEAD}<think>\n", "add them</think>four<|im_end|>")

    @pytest.mark.parametrize("template", ["thinking", "cutting and thinking"])
    def test_an_answer_without_the_reasoning_that_was_opened_is_an_error(self, tokenizer, template):
        with pytest.raises(FieldError, match=r"messages: expected content with the reasoning that .* opens by <think>"):
            parts(tokenizer, template, content="four")

    def test_earlier_turns_are_what_the_template_shows_of_them(self, tokenizer):
        earlier = [QUESTION, {"role": "assistant", "content": "<think>x</think>four"}, QUESTION]
        read, wrote = parts(tokenizer, "cutting", *earlier, content="<think>y</think>4")
        assert read == HEAD.removesuffix("<|im_start|>assistant\n") + "<|im_start|>assistant\nfour<|im_end|>\n" + HEAD
        assert wrote == "<think>y</think>4<|im_end|>"

    def test_reasoning_beside_the_content(self, tokenizer):
        wrote = parts(tokenizer, "tidying", content="four", reasoning_content="add them")[1]
        assert wrote == "<think>\nadd them\n</think>\n\nfour<|im_end|>"

    def test_reasoning_beside_the_content_that_the_template_leaves_out(self, tokenizer):
        expected = (
            "messages: expected a chat template that shows the message's `reasoning_content`, got one that leaves"
        )
        with pytest.raises(FieldError, match=expected):
            parts(tokenizer, "chatml", content="four", reasoning_content="add them")


class TestToolCalls:
    CALLS = [{"name": "add"}]  # noqa: RUF012, a constant

    @pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
    def test_without_words(self, tokenizer, content):
        assert parts(tokenizer, "calls", tool_calls=self.CALLS, **content) == (HEAD, "<call>add</call><|im_end|>")

    def test_with_words(self, tokenizer):
        wrote = parts(tokenizer, "calls", content="Let me see.", tool_calls=self.CALLS)[1]
        assert wrote == "Let me see.<call>add</call><|im_end|>"

    def test_a_template_that_leaves_them_out(self, tokenizer):
        with pytest.raises(FieldError, match="shows the message's `tool_calls`, got one that leaves it out"):
            parts(tokenizer, "chatml", content="four", tool_calls=self.CALLS)

    def test_null_as_parquet_gives_it(self, tokenizer):
        null = {"content": "2 and 2?", "role": "user", "tool_calls": None}
        assert parts(tokenizer, "calls", null, content="four", tool_calls=None) == (HEAD, "four<|im_end|>")

    def test_no_words_and_no_calls_are_an_error(self):
        with pytest.raises(FieldError, match="messages with a text `role` and a text `content`, or with `tool_calls`"):
            Rollout.from_messages([QUESTION, {"role": "assistant", "content": None}])


def test_a_template_that_changes_the_prompt(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}: {{ messages[-1]['content'] }}"
    with pytest.raises(FieldError, match="messages: expected a chat template that leaves the prompt as it is when the"):
        chat_passage(Template(tokenizer, "record 0"), [QUESTION], [{"role": "assistant", "content": "four"}])


@pytest.mark.parametrize(
    ("template", "content", "pieces"),
    [
        ("chatml", "e hello", ["e", " hello", ""]),
        ("chatml", "im_end", ["i", "m", "_", "e", "n", "d", ""]),
        ("stripping", "  é hello ", ["é", " hello", ""]),
        ("cutting and thinking", "<think>\ne</think> hello", ["e", "<", "/", "th", "in", "k", ">", " hello", ""]),
    ],
)
def test_offsets_count_the_characters_of_the_content(tokenizer, template, content, pieces):
    """The template's own tokens stand for none of them."""
    tokenizer.chat_template = TEMPLATES[template]
    rollout = Rollout.from_messages([QUESTION, {"role": "assistant", "content": content}])
    encoded = Encoder(tokenizer, 10**6, LengthLimit(None)).encode(0, rollout, "record 0", with_spans=True)
    spans = encoded.spans[encoded.prompt_length :].tolist()
    assert [content[first:stop] for first, stop in spans] == pieces
