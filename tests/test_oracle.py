"""One whole PPO iteration, written plainly in float64 from the papers, against `Trainer.step`.

Nothing of ppo_core does any of the oracle's mathematics: each row goes alone through a plain transformers model, every
sum is a Python loop over the tokens that were sampled, gradients come from autograd, clipping and AdamW are spelt out.
From ppo_core it takes the tokens that were sampled and the order of the minibatches, which are draws, not mathematics.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import EOS, PAD, STOP, VOCABULARY, id_sum, toy_config, toy_trainer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ppo_core.config import PPOConfig
from ppo_core.seeds import generator
from ppo_core.trainer import Trainer

TOLERANCE = 1e-3
"""Of the largest change of a weight. float32 carries 1e-7 of each gradient; Adam divides small gradients by at least
1e-5, and whitening, ratios and four steps pass errors on: up to 1.1e-4 was seen. Every term of the update that is left
out or altered changes the weights by more than 30 times the tolerance (`test_every_knob_shows`)."""

EVERYTHING: dict[str, Any] = {
    "sampling": {"max_new_tokens": 6, "temperature": 0.7},
    "reward": {"kl_coef": 0.3, "score_clip": 1.5, "normalise": True, "missing_eos_penalty": 0.5},
    "advantages": {"gamma": 0.9, "lam": 0.8},
    "loss": {"value_coef": 0.5, "entropy_coef": 0.1},
    "update": {"max_grad_norm": 0.5, "micro_batch": 3, "critic_learning_rate": 4e-3},
}
"""Every term large enough to matter, every clip narrow enough to bind, micro-batches that do not divide evenly."""

VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "separate": {"model": {"critic": "separate"}},
    "KL in the loss": {"reward": {"kl_in": "loss", "kl_estimator": "k3"}},
    "k3 in the reward": {"reward": {"kl_estimator": "k3", "whiten": True}, "model": {"critic": "separate"}},
    "by sequences": {"loss": {"aggregation": "sequences"}, "reward": {"kl_in": "loss"}},
    "dual clip": {"loss": {"dual_clip": 1.3}, "advantages": {"whiten": False}},
}


def merged(*changes: dict[str, Any]) -> PPOConfig:
    sections: dict[str, Any] = {}
    for change in (EVERYTHING, *changes):
        for name, section in change.items():
            sections[name] = sections.get(name, {}) | section
    return toy_config(**sections)


def plain_model() -> GPTNeoXForCausalLM:
    """A model whose every operation is float64 once its weights are: Llama's norm would go through float32."""
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, hidden_dropout=0.0, attention_dropout=0.0,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return GPTNeoXForCausalLM(config).requires_grad_(False).eval()


def trainer(config: PPOConfig) -> Trainer:
    t = toy_trainer(config, model=plain_model())
    # The policy is some way from its reference, as it is in every iteration but the first.
    noise = torch.Generator().manual_seed(7)
    for p in t.model.policy_weights().values():
        p.data += 0.1 * torch.randn(p.shape, generator=noise)
    t.moments.update(torch.tensor([0.5, 1.0, 4.0]))  # scores of an earlier iteration
    return t


@dataclass
class Row:
    prompt: list[int]
    response: list[int]
    score: float = 0.0

    def see(self, policy: Any, critic: Any, head: Any, temperature: float) -> tuple[list[Tensor], ...]:
        """Log-probability, entropy and value of each token of the response."""
        ids = torch.tensor([self.prompt + self.response])
        law = (policy(ids).logits[0] / temperature).log_softmax(dim=-1)
        hidden = (critic or policy.gpt_neox)(ids).last_hidden_state[0]
        logprobs, entropy, values = [], [], []
        for t, token in enumerate(self.response):
            before = len(self.prompt) + t - 1
            logprobs.append(law[before, token])
            entropy.append(-(law[before].exp() * law[before]).sum())
            values.append((head.weight[0] * hidden[before]).sum() + head.bias[0])
        return logprobs, entropy, values


def estimate(d: float, kind: str) -> float:
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


class Oracle:
    """The iteration of a trainer that has not made it yet."""

    def __init__(self, t: Trainer) -> None:
        self.c, self.seed = t.config, t.seed
        self.reference = copy.deepcopy(t.model.reference_model).double()
        self.policy = copy.deepcopy(self.reference)
        self.policy.load_state_dict({k: v.detach().double() for k, v in t.model.policy_weights().items()}, strict=False)
        self.critic = None if t.model.critic is None else copy.deepcopy(t.model.critic.decoder).double()
        self.head = copy.deepcopy(t.model.value_head.linear).double()
        samples = t.sample()
        sequences = samples.sequences
        self.rows = []
        for tokens, attention in zip(sequences.tokens.tolist(), sequences.attention.tolist(), strict=True):
            kept = [i for i, there in enumerate(attention) if there]
            prompt = [tokens[i] for i in kept if i < sequences.prompt_length]
            self.rows.append(Row(prompt, [tokens[i] for i in kept if i >= sequences.prompt_length]))
        earlier = [0.5, 1.0, 4.0]
        scores = [sum(row.response) / 10 for row in self.rows]
        if self.c.reward.normalise:
            seen = earlier + scores
            mean = sum(seen) / len(seen)
            std = math.sqrt(sum((s - mean) ** 2 for s in seen) / len(seen))
            scores = [(s - mean) / std for s in scores]
        for row, score in zip(self.rows, scores, strict=True):
            if row.response[-1] not in (EOS, STOP):
                score -= self.c.reward.missing_eos_penalty
            bound = self.c.reward.score_clip or math.inf
            row.score = max(-bound, min(bound, score))

    def learn(self) -> dict[str, Tensor]:
        """The weights after the iteration."""
        c = self.c
        policy, critic = dict(self.policy.named_parameters()), [*self.head.parameters()]
        if self.critic is not None:
            critic = [*self.critic.parameters(), *critic]
        for p in (*policy.values(), *critic):
            p.requires_grad_(True)
        targets = self.targets()
        groups = [(p, c.update.learning_rate) for p in policy.values()]
        groups += [(p, c.update.critic_learning_rate) for p in critic]
        first = [torch.zeros_like(p) for p, _ in groups]
        second = [torch.zeros_like(p) for p, _ in groups]
        step = 0
        for epoch in range(c.update.epochs):
            order = torch.randperm(len(self.rows), generator=generator(self.seed, "minibatches", 0, epoch)).tolist()
            size = len(self.rows) // c.update.minibatches
            for k in range(c.update.minibatches):
                step += 1
                loss = self.loss([(self.rows[i], targets[i]) for i in order[k * size : (k + 1) * size]])
                gradients = torch.autograd.grad(loss, [p for p, _ in groups])
                norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
                scale = min(1.0, c.update.max_grad_norm / (norm + 1e-6))
                with torch.no_grad():
                    for (p, rate), g, m, v in zip(groups, gradients, first, second, strict=True):
                        m.mul_(0.9).add_(0.1 * scale * g)
                        v.mul_(0.95).add_(0.05 * (scale * g) ** 2)
                        p -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-5)
        return {k: p.detach() for k, p in (policy | {f"critic.{i}": p for i, p in enumerate(critic)}).items()}

    @torch.no_grad()
    def targets(self) -> list[list[dict[str, float]]]:
        """For each token of each row what the whole update holds fast: old and reference log-probability and value,
        advantage and return.
        """
        reward, c = self.c.reward, self.c.advantages
        rows = []
        for row in self.rows:
            old, _, values = row.see(self.policy, self.critic, self.head, self.c.sampling.temperature)
            ref, _, _ = row.see(self.reference, None, self.head, self.c.sampling.temperature)
            tokens = [
                {"old": float(o), "ref": float(f), "value": float(v)} for o, f, v in zip(old, ref, values, strict=True)
            ]
            for token in tokens:
                kl = estimate(token["old"] - token["ref"], reward.kl_estimator)
                token["reward"] = -reward.kl_coef * kl if reward.kl_in == "reward" else 0.0
            tokens[-1]["reward"] += row.score
            rows.append(tokens)
        every = [token for tokens in rows for token in tokens]
        if reward.whiten:
            mean, std = moments([token["reward"] for token in every])
            for token in every:
                token["reward"] = (token["reward"] - mean) / std + mean
        for tokens in rows:
            values = [token["value"] for token in tokens] + [0.0]
            deltas = [token["reward"] + c.gamma * values[t + 1] - values[t] for t, token in enumerate(tokens)]
            for t, token in enumerate(tokens):
                token["advantage"] = sum((c.gamma * c.lam) ** k * delta for k, delta in enumerate(deltas[t:]))
                token["return"] = token["advantage"] + token["value"]
        if c.whiten:
            mean, std = moments([token["advantage"] for token in every])
            for token in every:
                token["advantage"] = (token["advantage"] - mean) / std
        return rows

    def loss(self, minibatch: list[tuple[Row, list[dict[str, float]]]]) -> Tensor:
        c, total = self.c.loss, torch.zeros((), dtype=torch.float64)
        count = sum(len(row.response) for row, _ in minibatch)
        for row, tokens in minibatch:
            share = 1 / count if c.aggregation == "tokens" else 1 / (len(minibatch) * len(row.response))
            seen = row.see(self.policy, self.critic, self.head, self.c.sampling.temperature)
            for token, logprob, entropy, value in zip(tokens, *seen, strict=True):
                a, ratio = token["advantage"], (logprob - token["old"]).exp()
                near = ratio.clamp(1 - c.clip_range, 1 + c.clip_range)
                gain = torch.minimum(ratio * a, near * a)
                if c.dual_clip is not None and a < 0:
                    gain = torch.maximum(gain, torch.tensor(c.dual_clip * a, dtype=torch.float64))
                close = value.clamp(token["value"] - c.value_clip_range, token["value"] + c.value_clip_range)
                error = torch.maximum((value - token["return"]) ** 2, (close - token["return"]) ** 2) / 2
                term = -gain + c.value_coef * error - c.entropy_coef * entropy
                if self.c.reward.kl_in == "loss":
                    # The KL's gradient is the expectation of d times that of the log-probability.
                    d = (logprob - token["ref"]).detach()
                    term = term + self.c.reward.kl_coef * d * logprob
                total = total + share * term
        return total


def moments(x: list[float]) -> tuple[float, float]:
    mean = sum(x) / len(x)
    return mean, math.sqrt(sum((y - mean) ** 2 for y in x) / len(x) + 1e-8)


def weights(t: Trainer) -> dict[str, Tensor]:
    critic = {f"critic.{i}": p for i, p in enumerate(t.model.critic_weights())}
    return {name: p.detach().double().clone() for name, p in (t.model.policy_weights() | critic).items()}


def distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in some)


def iterate(config: PPOConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Weights before and after one iteration, and its figures."""
    t = trainer(config)
    before = weights(t)
    stats = t.step()
    return before, weights(t), stats


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_new_weights_are_those_of_the_oracle(variant: str):
    config = merged(VARIANTS[variant])
    before, after, stats = iterate(config)
    expected = Oracle(trainer(config)).learn()
    change = distance(before, expected)
    assert distance(after, expected) < TOLERANCE * change
    # What is compared was at work: tokens were clipped, responses differ in length, some were cut.
    assert min(stats["clip_fraction"], stats["value_clip_fraction"], stats["length_std"], stats["kl"]) > 0.01
    assert 0 < stats["ended_rate"] < 1
    assert stats["grad_norm"] > config.update.max_grad_norm


KNOBS: list[dict[str, Any]] = [
    {"sampling": {"temperature": 0.75}},
    {"reward": {"kl_coef": 0.2}},
    {"reward": {"kl_in": "none"}},
    {"reward": {"kl_in": "loss"}},
    {"reward": {"kl_estimator": "k2"}},
    {"reward": {"score_clip": 1.2}},
    {"reward": {"normalise": False}},
    {"reward": {"whiten": True}},
    {"reward": {"missing_eos_penalty": 0.0}},
    {"advantages": {"gamma": 0.95}},
    {"advantages": {"lam": 0.9}},
    {"advantages": {"whiten": False}},
    {"loss": {"clip_range": 0.25}},
    {"loss": {"value_clip_range": 2.0}},
    {"loss": {"value_coef": 0.4}},
    {"loss": {"entropy_coef": 0.05}},
    {"loss": {"dual_clip": 1.3}},
    {"loss": {"aggregation": "sequences"}},
    {"update": {"max_grad_norm": 1.0}},
    {"update": {"epochs": 1}},
    {"update": {"minibatches": 1}},
    {"update": {"learning_rate": 9e-3}},
    {"update": {"critic_learning_rate": 5e-3}},
]


def test_every_knob_shows():
    # If the oracle's agreement were for want of sensitivity, a trainer with another knob would agree as well.
    before, _, _ = iterate(merged())
    expected = Oracle(trainer(merged())).learn()
    change = distance(before, expected)
    shown = {str(knob): distance(iterate(merged(knob))[1], expected) / change for knob in KNOBS}
    assert {knob: d for knob, d in shown.items() if d < 30 * TOLERANCE} == {}


def test_the_score_of_the_oracle_is_that_of_the_reward():
    t = trainer(merged({"reward": {"normalise": False, "score_clip": None, "missing_eos_penalty": 0.0}}))
    scores = torch.tensor([row.score for row in Oracle(t).rows])
    torch.testing.assert_close(id_sum(t.sample(), torch.zeros(())), scores)
