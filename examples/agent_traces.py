"""Scores traces of an agent with tools, and shows which of their tokens got which advantage.

The traces lie beside this file in `agent_traces.jsonl`: chats of several turns, in which the model calls tools and
reads what they answer. Only what the model wrote is trained on. The demo model stands in for your critic. Its value
says how natural a text looks so far, so its numbers show how things are done and not how good these agents are.

    pip install vhead
    python examples/agent_traces.py
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vhead import Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.scoring import Scores

TRACES = Path(__file__).with_name("agent_traces.jsonl")

# Your tokenizer has a template of its own; the demo model's has none. The demo model takes 512 bytes, so this one shows
# no more of a tool than its name and arguments. Generation blocks mark what the model wrote. They are read from fast
# tokenizers. With others, such as this one, vhead renders the chat up to each turn and takes the difference.
CHAT_TEMPLATE = """\
{%- for tool in tools or [] -%}
{{ tool.function.name }}({{ tool.function.parameters.properties | join(", ") }}){{ "\\n" }}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role != "assistant" -%}
{{ message.role }}: {{ message.content }}{{ "\\n" }}
{%- else -%}
{{ "assistant: " }}{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ " " if message.content }}{{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor -%}
</s>{% endgeneration %}
{%- endif -%}
{%- endfor -%}
{{ "assistant: " if add_generation_prompt }}"""


def read_traces() -> list[dict[str, Any]]:
    """Reads the bundled traces: `messages`, `tools`, a `reward`, and whether the trace was `cut_off` at a limit."""
    return [json.loads(line) for line in TRACES.read_text().splitlines()]


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Loads the demo model's tokenizer, and gives it a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def as_rollouts(traces: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Rollout]:
    """Turns each trace into token ids, and a mask that is true where the model wrote the token."""
    return [
        Rollout.from_messages(trace["messages"], tools=trace["tools"], tokenizer=tokenizer, id=trace["id"])
        for trace in traces
    ]


def score(rollouts: list[Rollout], rewards: list[float], cut_off: list[bool]) -> tuple[Scores, np.ndarray, np.ndarray]:
    """Gives the scores, and an advantage and a return for each of their tokens."""
    scorer = Scorer.from_pretrained(demo_model_path(), dtype="float32", device="cpu")
    scores = scorer.score(rollouts, returns=("values", "logprobs", "bootstrap"))
    # A trace that was cut off goes on with the value after its last token; one that ended has nothing to come.
    advantages, returns = scores.advantages(rewards, gamma=1.0, lam=0.95, bootstrap=scores.bootstrap * cut_off)
    return scores, advantages, returns


def turns(mask: np.ndarray) -> list[tuple[int, int]]:
    """Divides a completion into runs of tokens that the model wrote, and runs that it read."""
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(mask)]
    return list(pairwise(borders))


def print_table(rollout: Rollout, columns: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints what each turn of a trace says, and what its first and its last token got."""
    print(f"{'':5} {'token':>7} {'':6}", *(f"{name:>9}" for name in columns))
    for start, stop in turns(rollout.mask):
        who = "model" if rollout.mask[start] else "tool"
        print(f"\n{who}: {tokenizer.decode(rollout.completion[start:stop])!r}")
        for place in dict.fromkeys([start, stop - 1]):
            token = tokenizer.decode(rollout.completion[place : place + 1])
            print(f"{'':5} {place:7} {token!r:6}", *(f"{column[place]:9.3f}" for column in columns.values()))


def main() -> None:
    """Scores all traces, and shows one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--show", default="division", help="id of the trace to show")
    shown = parser.parse_args().show
    tokenizer, traces = load_tokenizer(), read_traces()
    rollouts = as_rollouts(traces, tokenizer)
    rewards, cut_off = ([trace[name] for trace in traces] for name in ("reward", "cut_off"))
    scores, advantages, returns = score(rollouts, rewards, cut_off)

    print(f"{'trace':12} {'turns':>5} {'tokens':>6} {'of the model':>12} {'reward':>6} {'advantage':>10}")
    for at, trace in enumerate(traces):
        own = slice(scores.offsets[at], scores.offsets[at + 1])
        mask = scores.mask[own]
        count = sum(message["role"] == "assistant" for message in trace["messages"])
        mean = advantages[own][mask].mean()
        print(f"{trace['id']:12} {count:5} {len(mask):6} {mask.sum():12} {trace['reward']:6.1f} {mean:10.3f}")

    at = scores.ids.index(shown)
    own = slice(scores.offsets[at], scores.offsets[at + 1])
    columns = {"value": scores.values, "logprob": scores.logprobs, "advantage": advantages, "return": returns}
    print(f"\n{shown}:")
    print_table(rollouts[at], {name: column[own] for name, column in columns.items()}, tokenizer)


if __name__ == "__main__":
    main()
