"""Trains an agent that uses a tool by PPO with one rollout a prompt: with a critic that is warmed up, and a fresh one.

An agent stands before locked doors. In each turn it writes one letter: a key that it tries on the next door, or `?`,
which asks a tool for the right one. Then it reads what came of it, how many doors are locked and what each costs, and
how many turns are left, as in ` shut 3x7 5`. Its reward comes at the end: it pays for every door that is still locked.
Prompts differ in doors and prices, so most of a reward is luck with the prompt, and only a critic can tell.

The update is that of single-rollout asynchronous optimisation (SAO), a batch at a time: one rollout a prompt, K = 2
updates of the critic for one of the policy, frozen attention in the critic, lambda by length, and no step for what the
agent only reads. The critic's head begins with zeros, or is fitted by `vhead.fit` to the games that the policy was
taught by before: no game is played for it. All else is the same for both.

    pip install vhead matplotlib
    python examples/ppo_agent.py --chart ppo-agent.svg
"""

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vhead
from vhead import AutoModelForCausalLMWithValueHead as Model
from vhead import Rollout, Scorer
from vhead.demo import demo_model_path

# The demo model reads bytes; its first three ids are special tokens.
FIRST_BYTE = 3
KEYS, ASK = "abcdef", "?"
LEAST_DOORS, MOST_DOORS, MOST_PRICE = 2, 4, 9

ROLLOUTS, CRITIC_UPDATES = 32, 2
POLICY_RATE, BODY_RATE, HEAD_RATE = 3e-4, 3e-5, 3e-4
SAMPLING = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "pad_token_id": 0}
ALPHA, ENTROPY, CLIP = 0.5, 0.01, (0.2, 0.28)
# The agent has learnt its task when it has this reward, as a mean over so many updates.
GOAL, WINDOW = -0.2, 5


def encoded(text: str) -> list[int]:
    """Makes token ids of text."""
    return [byte + FIRST_BYTE for byte in text.encode()]


@dataclass
class Game:
    """Some locked doors, and what was written before them.

    Attributes:
        keys: The key of each door that is still locked.
        price: What such a door costs in the end.
        turns: How many letters the agent may still write.
        tokens: All token ids so far, with the prompt's.
        written: Which of them the agent wrote.
        logprobs: Log-probabilities of these when they were drawn, 0 for all others.
    """

    keys: str
    price: int
    turns: int
    tokens: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._read("")

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Game":
        """Draws a game, whose turns are enough to ask for every key, or one more."""
        doors = int(rng.integers(LEAST_DOORS, MOST_DOORS + 1))
        keys, price = "".join(rng.choice(list(KEYS), doors)), int(rng.integers(1, MOST_PRICE + 1))
        return cls(keys, price, turns=2 * doors + int(rng.integers(2)))

    @property
    def reward(self) -> float:
        """What the agent gets at the end: from -3.6 to 0."""
        return -self.price * len(self.keys) / 10

    @property
    def is_over(self) -> bool:
        """Whether the agent may write no more."""
        return not self.keys or self.turns == 0

    def write(self, token: int, logprob: float = 0.0) -> None:
        """Takes the agent's next letter, and answers it."""
        self._add([token], [logprob], written=True)
        self.turns -= 1
        if [token] == encoded(ASK):
            self._read(f" is {self.keys[0]}")
        elif [token] == encoded(self.keys[0]):
            self.keys = self.keys[1:]
            self._read(" open")
        else:
            self._read(" shut")

    def _read(self, answer: str) -> None:
        text = f"{answer} {len(self.keys)}x{self.price} {self.turns}\n"
        self._add(encoded(text), [0.0] * len(text), written=False)

    def _add(self, tokens: Sequence[int], logprobs: Sequence[float], *, written: bool) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.written += [written] * len(tokens)

    def rollout(self) -> Rollout:
        """Everything up to the agent's first letter as the prompt, and a mask that is true at its letters."""
        at = self.written.index(True)
        return Rollout(self.tokens[:at], self.tokens[at:], mask=np.array(self.written[at:]))

    def old_logprobs(self) -> list[float]:
        """The completion's log-probabilities when it was drawn."""
        return self.logprobs[self.written.index(True) :]


def played(policy: Model, games: list[Game]) -> list[Game]:
    """Has the policy play games to their ends, a letter of each at a time."""
    while running := [game for game in games if not game.is_over]:
        # What the agent reads is equally long in every game, so there is nothing to pad.
        tokens = torch.tensor([game.tokens for game in running])
        output = policy.generate(tokens, return_dict_in_generate=True, output_logprobs=True, **SAMPLING)
        letters, logprobs = output.sequences[:, -1].tolist(), output.logprobs[:, 0].tolist()
        for game, letter, logprob in zip(running, letters, logprobs, strict=True):
            game.write(letter, logprob)
    return games


def demonstrated(rng: np.random.Generator) -> Game:
    """Plays a game as somebody careless would, who often tries without asking, and often forgets the answer."""
    game, told = Game.drawn(rng), False
    while not game.is_over:
        letter = ASK if rng.random() < 0.4 else str(rng.choice(list(KEYS)))
        if told and rng.random() < 0.5:
            letter = game.keys[0]
        locked = len(game.keys)
        game.write(*encoded(letter))
        told = len(game.keys) == locked and (told or letter == ASK)
    return game


def imitating(games: Sequence[Game]) -> Model:
    """Teaches the demo model to play as in these games, so that there is a policy to begin with."""
    policy = Model.from_pretrained(demo_model_path()).float().eval()
    training_pass = vhead.TrainingPass(policy, returns=("logprobs",))
    optimizer = torch.optim.AdamW(policy.pretrained_model.parameters(), lr=1e-3)
    for start in range(0, len(games), ROLLOUTS):
        optimizer.zero_grad()
        for batch in training_pass.batches([game.rollout() for game in games[start : start + ROLLOUTS]]):
            (-training_pass(batch).logprobs[batch.mask].sum() / batch.totals.tokens).backward()
        optimizer.step()
    return policy


def critics(policy: Model, games: Sequence[Game]) -> dict[str, Model]:
    """Makes two critics on copies of the policy's body: one with a head of zeros, one fitted to these games."""
    fresh = Model.from_pretrained(copy.deepcopy(policy.pretrained_model), v_head_init_strategy="zeros").eval()
    fitted = copy.deepcopy(fresh)
    rollouts, rewards = [game.rollout() for game in games], [game.reward for game in games]
    fitted.v_head.load(vhead.fit(fitted, rollouts, rewards, target="returns").head)
    return {"fresh": fresh, "fitted": fitted}


class Trainer:
    """Updates a policy and its critic, which has a body of its own."""

    def __init__(self, policy: Model, critic: Model) -> None:
        vhead.freeze(policy, "embeddings")
        vhead.freeze(critic, "attention")
        self._policy_pass = vhead.TrainingPass(policy, returns=("logprobs",))
        self._critic_pass = vhead.TrainingPass(critic, returns=("values",))
        self._scorer = Scorer(critic)
        self._of_policy = torch.optim.AdamW(_trained(policy.pretrained_model), lr=POLICY_RATE, weight_decay=0.0)
        body = {"params": _trained(critic.pretrained_model), "lr": BODY_RATE}
        head = {"params": _trained(critic.v_head), "lr": HEAD_RATE}
        self._of_critic = torch.optim.AdamW([body, head], weight_decay=0.0)

    def update(self, games: Sequence[Game]) -> float:
        """One update of the policy and two of the critic, on one rollout of each prompt.

        Returns:
            How much of the returns' variance the critic explained before.
        """
        rollouts, rewards = [game.rollout() for game in games], [game.reward for game in games]
        scores = self._scorer.score(rollouts, ("values",))
        lam = vhead.returns.length_adaptive_lam([rollout.mask.sum() for rollout in rollouts], alpha=ALPHA)
        advantages, returns = scores.advantages(rewards, lam=lam, value_lam=1.0)
        old_logprobs = np.concatenate([game.old_logprobs() for game in games])
        self._update_policy(rollouts, old_logprobs, vhead.returns.whiten(advantages, mask=scores.mask))
        self._update_critic(rollouts, returns)
        return float(vhead.returns.explained_variance(scores.values, returns, mask=scores.mask))

    def _update_policy(self, rollouts: Sequence[Rollout], old_logprobs: np.ndarray, advantages: np.ndarray) -> None:
        self._of_policy.zero_grad()
        for batch in self._policy_pass.batches(rollouts):
            out, common = self._policy_pass(batch), {"mask": batch.mask, "totals": batch.totals}
            old, gain = batch.flat(old_logprobs), batch.flat(advantages)
            loss = vhead.losses.policy(out.logprobs, old, gain, clip=CLIP, **common)
            (loss - ENTROPY * vhead.losses.entropy(out.entropy, **common)).backward()
        _step(self._of_policy)

    def _update_critic(self, rollouts: Sequence[Rollout], returns: np.ndarray) -> None:
        batches = self._critic_pass.batches(rollouts)
        for _ in range(CRITIC_UPDATES):
            self._of_critic.zero_grad()
            for batch in batches:
                values = self._critic_pass(batch).values
                vhead.losses.value(values, batch.flat(returns), mask=batch.mask, totals=batch.totals).backward()
            _step(self._of_critic)


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _step(optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def train(start: Model, critic: Model, seed: int, updates: int) -> dict[str, list[float]]:
    """Trains copies of both; gives the mean reward, and the variance that the critic explained, before each update."""
    policy = copy.deepcopy(start)
    trainer = Trainer(policy, copy.deepcopy(critic))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    curves: dict[str, list[float]] = {"rewards": [], "explained_variance": []}
    for _ in range(updates):
        games = played(policy, [Game.drawn(rng) for _ in range(ROLLOUTS)])
        curves["rewards"].append(float(np.mean([game.reward for game in games])))
        curves["explained_variance"].append(trainer.update(games))
    return curves


def needed(rewards: Sequence[float]) -> float:
    """How many updates it took to reach the goal, as a mean over a window; infinity: more than there were."""
    windows = range(WINDOW, len(rewards) + 1)
    return next((float(end) for end in windows if np.mean(rewards[end - WINDOW : end]) >= GOAL), float("inf"))


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws every run, and the median of those with each kind of head."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    for kind, colour in {"fresh": "#8c8c8c", "fitted": "#c2410c"}.items():
        rewards = np.array([run["rewards"] for run in runs if run["head"] == kind])
        count = np.arange(1, rewards.shape[1] + 1)
        axes.plot(count, rewards.T, color=colour, alpha=0.25, linewidth=0.8)
        label = f"{kind} head, median of {len(rewards)} seeds"
        axes.plot(count, np.median(rewards, axis=0), color=colour, linewidth=2, label=label)
    axes.axhline(GOAL, color="#555555", linestyle=":", linewidth=1)
    axes.annotate("goal", (1, GOAL), (0, 3), textcoords="offset points", fontsize=8, color="#555555")
    axes.set(xlabel=f"updates of the policy, {ROLLOUTS} rollouts each", ylabel="mean reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, facecolor="white")


def main() -> None:
    """Trains with both kinds of heads, and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--demonstrations", type=int, default=1600, help="games that the first policy is taught by")
    parser.add_argument("--curves", type=Path, default=Path("ppo-agent.json"), help="a file for the curves")
    parser.add_argument("--chart", type=Path, help="a picture of them, which needs matplotlib")
    options = parser.parse_args()

    torch.manual_seed(0)
    rng = np.random.default_rng(99)
    games = [demonstrated(rng) for _ in range(options.demonstrations)]
    start, runs = imitating(games), []
    for kind, critic in critics(start, games).items():
        for seed in options.seeds:
            runs.append({"head": kind, "seed": seed, **train(start, critic, seed, options.updates)})
            first, last = runs[-1]["rewards"][0], np.mean(runs[-1]["rewards"][-WINDOW:])
            print(f"{kind:>6} head, seed {seed}: mean reward {first:.2f} at first, {last:.2f} at last", flush=True)
        median = np.median([needed(run["rewards"]) for run in runs if run["head"] == kind])
        print(f"{kind:>6} head: {median:.0f} updates to a mean reward of {GOAL} in the median")
    options.curves.write_text(json.dumps(runs))
    if options.chart:
        draw(runs, options.chart)


if __name__ == "__main__":
    main()
