"""Chats of several turns: which tokens are the model's, by templates of the shapes that there are."""

import json

import numpy as np
import pytest

from tests.rollouts.tokenizers_for_tests import ENDS, Pairs, byte_level, sentence_piece
from vhead import Rollout
from vhead.errors import FieldError
from vhead.rollouts.encoding import Encoder, LengthLimit

USER = {"role": "user", "content": "What is 2 and 2, and the value of it?"}
CALL = {
    "role": "assistant",
    "content": "Let me add.",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}],
}
ANSWER = {"role": "tool", "content": "4 é\n", "name": "add"}
FINAL = {"role": "assistant", "content": "It is 4,  worth a value."}
THANKS = {"role": "user", "content": "Thank you"}
WELCOME = {"role": "assistant", "content": "You are welcome\n"}
TRACE = [USER, CALL, ANSWER, FINAL, THANKS, WELCOME]
TALK = [USER, FINAL, THANKS, WELCOME]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

CALLS = "{% for call in m['tool_calls'] or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}"
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}" + CALLS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCKS = CHATML.replace(
    "{{ m['content'] }}" + CALLS + "<|im_end|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    + CALLS
    + "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '' }}",
)
LLAMA = (
    "<s>{% for m in messages %}<|head|>{{ m['role'] }}<|end_head|>\n\n{{ m['content'] | trim }}" + CALLS + "<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
# The reasoning of turns before the last user's message is cut out, as Qwen3 does.
STRIPPING = (
    "{% set last = namespace(at=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 < last.at %}{{ m['content'].split('</think>')[-1].strip() }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def calls(message):
    shown = (json.dumps(call["function"]) for call in message.get("tool_calls", ()))
    return "".join(f"<call>{call}</call>" for call in shown)


def chatml(messages, tools=None):
    if tools:
        yield f"<|im_start|>system\n{json.dumps(tools)}<|im_end|>\n", False
    for m in messages:
        yield f"<|im_start|>{m['role']}\n", False
        yield f"{m['content']}{calls(m)}<|im_end|>", m["role"] == "assistant"
        yield "\n", False


def llama(messages, tools=None):
    yield "<s>", False
    for m in messages:
        yield f"<|head|>{m['role']}<|end_head|>\n\n", False
        yield f"{m['content'].strip()}{calls(m)}<|eot|>", m["role"] == "assistant"


def mistral(messages, tools=None):
    yield "<s>", False
    for m in messages:
        is_user = m["role"] == "user"
        yield (f"[INST] {m['content']} [/INST]", False) if is_user else (f" {m['content']}</s>", True)


SHAPES = {
    "chatml": (CHATML, chatml, TRACE),
    "generation blocks": (BLOCKS, chatml, TRACE),
    "llama": (LLAMA, llama, TRACE),
    "mistral": (MISTRAL, mistral, TALK),
    "qwen": (STRIPPING, chatml, TALK),
}


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_level(beginning=False)
    made.add_special_tokens({"additional_special_tokens": ["<|head|>", "<|end_head|>", "<|eot|>"]})
    return made


def obvious(tokenizer, pieces):
    """Ids and who wrote each, from the pieces one by one: a token is the model's that holds a character of its."""
    owners = [owner for text, owner in pieces for _ in text]
    text = "".join(text for text, _ in pieces)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], [any(owners[start:stop]) for start, stop in encoding["offset_mapping"]]


def encode(tokenizer, rollout, **options):
    return Encoder(tokenizer, 10**6, LengthLimit(None), **options).encode(0, rollout, "record 0", with_spans=True)


def check(encoded, ids, written):
    first = written.index(True)
    assert encoded.prompt_length == first
    mask = [True] * encoded.completion_length if encoded.mask is None else encoded.mask.tolist()
    assert encoded.tokens.tolist() == ids[: len(encoded)]
    assert mask == written[first : len(encoded)]
    assert not any(written[len(encoded) :])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [2, 3, 4, 6])
def test_the_mask_is_that_of_the_pieces_one_by_one(tokenizer, shape, length):
    template, pieces, messages = SHAPES[shape]
    tokenizer.chat_template, chat = template, messages[:length]
    ids, written = obvious(tokenizer, list(pieces(chat)))
    check(encode(tokenizer, Rollout.from_messages(chat)), ids, written)


@pytest.mark.parametrize("shape", ["chatml", "generation blocks"])
def test_tools_are_in_the_prompt(tokenizer, shape):
    template, pieces, messages = SHAPES[shape]
    tokenizer.chat_template = template
    ids, written = obvious(tokenizer, list(pieces(messages, TOOLS)))
    encoded = encode(tokenizer, Rollout.from_messages(messages, tools=TOOLS))
    check(encoded, ids, written)
    assert len(encoded) > len(encode(tokenizer, Rollout.from_messages(messages)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tokenizer_gives_the_same_ids_and_mask_right_away(tokenizer, shape):
    template, _, messages = SHAPES[shape]
    tokenizer.chat_template = template
    later = encode(tokenizer, Rollout.from_messages(messages))
    now = Rollout.from_messages(messages, tokenizer=tokenizer, id="r")
    assert (now.kind, now.id) == ("token ids", "r")
    np.testing.assert_array_equal(np.concatenate([now.prompt, now.completion]), later.tokens)
    np.testing.assert_array_equal(now.mask, later.mask)


def test_a_completion_of_several_messages_is_the_same_chat(tokenizer):
    tokenizer.chat_template = CHATML
    whole = encode(tokenizer, Rollout.from_messages(TRACE, tools=TOOLS))
    parts = encode(tokenizer, Rollout(TRACE[:1], TRACE[1:], tools=TOOLS))
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_array_equal(parts.mask, whole.mask)


@pytest.mark.parametrize("template", [CHATML, BLOCKS], ids=["prefixes", "blocks"])
def test_turns_of_the_prompt_are_not_the_model_s(tokenizer, template):
    tokenizer.chat_template = template
    pieces = list(chatml(TRACE))
    asked = [(text, owner and at > 5) for at, (text, owner) in enumerate(pieces)]
    check(encode(tokenizer, Rollout(TRACE[:3], TRACE[3:])), *obvious(tokenizer, asked))


def test_a_chat_may_end_in_an_observation(tokenizer):
    tokenizer.chat_template = CHATML
    encoded = encode(tokenizer, Rollout.from_messages(TRACE[:3]))
    assert not encoded.mask[-1]
    assert encoded.mask[0]


def test_the_end_of_turn_is_the_model_s_and_the_line_break_behind_is_not(tokenizer):
    tokenizer.chat_template = CHATML
    encoded = encode(tokenizer, Rollout.from_messages(TRACE))
    completion = encoded.tokens[encoded.prompt_length :]
    ends = np.flatnonzero(completion == tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert encoded.mask[ends].tolist() == [True, False, True, False, True]
    assert not encoded.mask[ends[:-1] + 1].any()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["slow", "sentence piece"])
def test_other_tokenizers(kind, separate):
    """Without offsets, each border is where the tokens of the text up to it end."""
    made = Pairs(**ENDS) if kind == "slow" else sentence_piece()
    made.chat_template = "{% for m in messages %}{{ m['role'][0] * 2 }}{{ m['content'] }}{% endfor %}" + (
        "{% if add_generation_prompt %}aa{% endif %}"
    )
    roles, contents = ["user", "assistant"] * 2 + ["user"], ("1234", "5678", "90", "3456", "ef")
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    encoded = encode(made, Rollout.from_messages(chat), separate_tokens=separate)
    completion = encoded.tokens[encoded.prompt_length :]
    assert made.decode(completion[encoded.mask].tolist()).replace(" ", "") == "56783456"


def test_places_in_a_text_are_unknown(tokenizer):
    tokenizer.chat_template = CHATML
    assert (encode(tokenizer, Rollout.from_messages(TRACE)).spans == -1).all()


class TestErrors:
    @pytest.mark.parametrize(
        "render",
        [
            lambda tokenizer, chat: Rollout.from_messages(chat, tokenizer=tokenizer),
            lambda tokenizer, chat: encode(tokenizer, Rollout.from_messages(chat)),
        ],
        ids=["right away", "later"],
    )
    def test_a_template_that_rewrites_history(self, tokenizer, render):
        tokenizer.chat_template = STRIPPING
        chat = [USER, {"role": "assistant", "content": "<think>add</think>4"}, THANKS, WELCOME]
        expected = (
            "messages: expected a chat template that leaves earlier messages as they are when later ones follow, got "
            "one that rewrites history: up to message 1 .* score token ids with a mask, or use a template that marks"
        )
        with pytest.raises(FieldError, match=expected):
            render(tokenizer, chat)

    @pytest.mark.parametrize("blocks", [False, True])
    def test_a_template_that_cuts_reasoning_out_of_every_turn(self, tokenizer, blocks):
        content = "{{ m['content'].split('</think>')[-1] }}"
        if blocks:
            content = f"{{% generation %}}{content}{{% endgeneration %}}"
        tokenizer.chat_template = CHATML.replace("{{ m['content'] }}", content)
        chat = [USER, {"role": "assistant", "content": "<think>add</think>4"}, THANKS, WELCOME]
        with pytest.raises(FieldError, match="shows the assistant's content as it is, got one that changes "):
            encode(tokenizer, Rollout.from_messages(chat))

    @pytest.mark.parametrize("template", [CHATML, BLOCKS], ids=["prefixes", "blocks"])
    def test_a_template_that_leaves_calls_out(self, tokenizer, template):
        tokenizer.chat_template = template.replace(CALLS, "")
        with pytest.raises(FieldError, match="shows the message's `tool_calls`, got one that leaves it out"):
            encode(tokenizer, Rollout.from_messages(TRACE))

    def test_a_template_that_fails_at_a_role(self, tokenizer):
        tokenizer.chat_template = MISTRAL
        with pytest.raises(FieldError, match="record 0: messages: expected a chat that the template takes, got only"):
            encode(tokenizer, Rollout.from_messages(TRACE))

    def test_blocks_with_nothing_in_them(self, tokenizer):
        tokenizer.chat_template = "{% generation %}{% endgeneration %}" + CHATML
        with pytest.raises(FieldError, match="shows what the assistant wrote, got one that shows nothing"):
            encode(tokenizer, Rollout.from_messages(TRACE))

    def test_a_completion_that_does_not_begin_with_the_assistant(self, tokenizer):
        tokenizer.chat_template = CHATML
        with pytest.raises(FieldError, match="begins with a message of the assistant's, got the role 'tool'"):
            encode(tokenizer, Rollout(TRACE[:2], TRACE[2:]))


class TestContents:
    def test_text_parts_are_joined(self, tokenizer):
        tokenizer.chat_template = CHATML
        parts = [{"type": "text", "text": "What is "}, "2 and 2", {"text": ", and the value of it?"}]
        encoded = encode(tokenizer, Rollout.from_messages([{"role": "user", "content": parts}, *TRACE[1:]]))
        np.testing.assert_array_equal(encoded.tokens, encode(tokenizer, Rollout.from_messages(TRACE)).tokens)

    def test_images_are_for_later(self):
        chat = [{"role": "user", "content": [{"type": "image", "text": None}]}, FINAL]
        with pytest.raises(FieldError, match="images and other media cannot be scored yet, got a part of type 'image'"):
            Rollout.from_messages(chat)

    @pytest.mark.parametrize("part", [{"type": "text"}, 3, None, {"text": 4}], ids=str)
    def test_what_is_no_part(self, part):
        with pytest.raises(FieldError, match=r"messages: expected parts like .* at position 0"):
            Rollout.from_messages([{"role": "user", "content": [part]}, FINAL])


# Qwen2.5's way: the template encodes arguments itself. Another shows them as they come, and another looks into them.
ENCODING = CHATML.replace("{{ call['function'] | tojson }}", "{{ call['function']['arguments'] | tojson }}")
AS_THEY_COME = CHATML.replace("{{ call['function'] | tojson }}", "{{ call['function']['arguments'] }}")
LOOKING = CHATML.replace(
    "{{ call['function'] | tojson }}",
    "{% for name, value in call['function']['arguments'].items() %}{{ name }}={{ value }};{% endfor %}",
)


def with_arguments(arguments, *, flat: bool = False):
    function = {"name": "add", "arguments": arguments}
    calls = [function if flat else {"id": "c1", "type": "function", "function": function}]
    return [USER, {"role": "assistant", "content": "I add.", "tool_calls": calls}, ANSWER, FINAL]


def decoded(tokenizer, messages):
    return tokenizer.decode(encode(tokenizer, Rollout.from_messages(messages)).tokens)


@pytest.mark.parametrize("template", [CHATML, ENCODING, LOOKING], ids=["whole calls", "arguments", "their items"])
@pytest.mark.parametrize("arguments", [{"a": 2, "b": "é\n"}, {}], ids=str)
def test_arguments_as_json_text_are_not_quoted_once_more(tokenizer, template, arguments):
    tokenizer.chat_template = template
    found = decoded(tokenizer, with_arguments(json.dumps(arguments)))
    assert found == decoded(tokenizer, with_arguments(arguments))
    assert found != decoded(tokenizer, with_arguments({"a": 3})), "the check can fail"


def test_arguments_of_calls_without_a_function_are_parsed_as_well(tokenizer):
    tokenizer.chat_template = CHATML.replace("call['function'] | tojson", "call['arguments'] | tojson")
    text, given = with_arguments('{"a": 2}', flat=True), with_arguments({"a": 2}, flat=True)
    assert decoded(tokenizer, text) == decoded(tokenizer, given)


def test_a_template_that_shows_text_gets_the_text(tokenizer):
    tokenizer.chat_template = AS_THEY_COME
    assert '<call>{"a":  2}</call>' in decoded(tokenizer, with_arguments('{"a":  2}'))


@pytest.mark.parametrize("arguments", ["{broken", "[1, 2]", "3", '"text"', "[" * 100000], ids=lambda text: text[:8])
def test_arguments_that_are_no_object_stay_as_they_are(tokenizer, arguments):
    tokenizer.chat_template = ENCODING
    assert f"<call>{json.dumps(arguments)[:2000]}" in decoded(tokenizer, with_arguments(arguments))


@pytest.mark.parametrize("length", [2, 6])
def test_a_template_that_ignores_the_tools_is_an_error(tokenizer, length):
    tokenizer.chat_template = LLAMA
    with pytest.raises(FieldError, match=r"tools: expected a chat template that shows the tools, got one that leaves"):
        encode(tokenizer, Rollout.from_messages(TRACE[:length], tools=TOOLS))
    encode(tokenizer, Rollout.from_messages(TRACE[:length], tools=[]))


@pytest.mark.parametrize("role", ["human", "gpt", "Assistant", "ipython", " user"])
@pytest.mark.parametrize("place", [0, 2])
def test_an_unknown_role_is_named_with_its_place(role, place):
    messages = [{**message, "role": role} if at == place else message for at, message in enumerate(TRACE)]
    expected = rf"messages with a role of system, developer, .*, got the role {role!r}.* at position"
    with pytest.raises(FieldError, match=expected):
        Rollout.from_messages(messages)


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function"])
def test_known_roles_are_taken(tokenizer, role):
    tokenizer.chat_template = CHATML
    encode(tokenizer, Rollout.from_messages([{"role": role, "content": "a"}, USER, FINAL]))


@pytest.mark.parametrize("length", [2, 6])
def test_a_chat_that_is_too_long_is_an_error_about_messages(tokenizer, length):
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, 10**6, LengthLimit(7))
    expected = r"record 0: messages: expected at most the model's 7 tokens, got \d+ \+ \d+ = \d+, before and from"
    with pytest.raises(FieldError, match=expected):
        encoder.encode(0, Rollout.from_messages(TRACE[:length]), "record 0")
