"""Completions as PPO sees them: what each token is worth, by the very functions that train.

Several completions of one prompt are sampled under the law of training, each with a seed of its own. All that are
inspected together are scored, valued and estimated as one rollout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from ppo_core.decoder import load_causal_lm
from ppo_core.experience import estimate, token_rewards
from ppo_core.health import refuse_non_finite
from ppo_core.kl import kl_estimate
from ppo_core.law import SamplingLaw
from ppo_core.masking import counted
from ppo_core.models import ActorCritic
from ppo_core.precision import arithmetic
from ppo_core.rewards import RunningMoments
from ppo_core.rollout import score_all
from ppo_core.sampling import sample
from ppo_core.seeds import derive
from ppo_core.tokens import encode_prompt
from ppo_core.types import Rollout, Samples
from ppo_core.weights import install
from tasks.errors import ConfigError, DataError
from tasks.inspector.token_texts import control_name, pieces
from tasks.models.critic import Critic, critic_of_cycle, load_critic
from tasks.models.preference_models import load_base, load_tokenizer
from tasks.models.rewards import load_trained, new_reward, only
from tasks.params import Params
from tasks.run_folder import CRITIC, RunFolder
from tasks.workspace import Workspace

COMPLETIONS = 6
"""Of each prompt, where nobody asks for another number."""


class Prompt(NamedTuple):
    """A prompt in the canonical form: `format` "text", or "chat" with a JSON array of messages as `text`."""

    text: str
    format: str

    @classmethod
    def of(cls, text: str) -> Prompt:
        """A prompt as a person types it."""
        try:
            turns = json.loads(text)
        except ValueError:
            return cls(text, "text")
        chat = (
            isinstance(turns, list)
            and bool(turns)
            and all(
                isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
                for turn in turns
            )
        )
        return cls(text, "chat" if chat else "text")


@dataclass(frozen=True)
class Token:
    """One token of a response and what is known of it. Logarithms are natural, rewards in the unit of scores."""

    id: int
    text: str
    """What it adds to the response's text: nothing, if it is a part of a character or no text."""
    control: str | None
    """The name of a token that is no text, such as the one that ends the response."""
    logprob: float
    ref_logprob: float
    kl: float
    """logprob - ref_logprob: this token's term of the estimate k1."""
    entropy: float
    """Nats, of the law that it was drawn from."""
    value: float
    """Before it."""
    reward: float
    """The KL penalty; on the last token the score, too."""
    advantage: float
    """By GAE, in the unit of rewards: return - value."""
    update_advantage: float
    """What the policy's update would weigh it with: whitened over all that is inspected, where training whitens."""
    target: float
    """The return, which the value is to learn."""


@dataclass(frozen=True)
class Completion:
    """One response."""

    tokens: tuple[Token, ...]
    score: float
    """In standard deviations of human-written text, before penalties and the clip."""
    kl: float
    """Sum over the response, nats."""
    ended: bool
    """By itself; otherwise it was cut."""


@dataclass(frozen=True)
class Inspection:
    """Several completions of one prompt, by one state of the training."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    cycle: int
    """0 is the reference."""
    kl_coef: float
    """Weight of the KL in the rewards; 0 where the penalty acts elsewhere."""


def inspect(
    params: Params, workspace: Workspace, prompts: Sequence[Prompt], completions: int, cycle: int | None = None
) -> list[Inspection]:
    """`completions` of each prompt by the policy of models/policy, or as it was after `cycle` (0: the reference).

    Raises ConfigError for prompts that the model cannot take and a cycle that is not there, DataError and
    IntegrityError where the critic is missing or belongs to another policy.
    """
    if not prompts:
        return []
    if cycle is not None and cycle < 0:
        raise ConfigError(f"no cycle {cycle}", "--cycle", "0 is the reference")
    inspector = Inspector(params, workspace, prompts)
    inspector.become(cycle)
    return inspector.look(completions)


def drawn_prompts(params: Params, workspace: Workspace, split: str, count: int) -> list[Prompt]:
    """`count` different prompts of a split, or all that there are, drawn by the seed."""
    there = split_prompts(workspace, split)
    draw = np.random.default_rng(derive(params.seed, "inspect", split))
    rows = draw.choice(len(there), min(count, len(there)), replace=False)
    return [there[row] for row in sorted(rows.tolist())]


def split_prompts(workspace: Workspace, split: str) -> list[Prompt]:
    """All prompts of a split, in their order."""
    rows = pd.read_parquet(workspace.prompts)
    rows = rows[rows.split == split]
    if rows.empty:
        raise DataError(f"has no prompts of the split {split}", str(workspace.prompts), f"raise ingest.splits.{split}")
    return [Prompt(*row) for row in zip(rows["prompt"], rows["format"], strict=True)]


class Inspector:
    """Policy, critic and reference in the form in which everything about them can be asked for."""

    def __init__(self, params: Params, workspace: Workspace, prompts: Sequence[Prompt]) -> None:
        self.params, self.workspace, self.prompts = params, workspace, prompts
        base, self.tokenizer = load_base(workspace, params.ppo.model.dtype), load_tokenizer(workspace.base_model)
        self.law = SamplingLaw.of(params.ppo.sampling, self.tokenizer)
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self.encoded = [self._encode(prompt, context) for prompt in prompts]
        # What an adapter learnt is merged into the model.
        form = "top_layers" if params.ppo.model.trainable == "top_layers" else "full"
        trained = load_trained(params, workspace, base)
        config = params.ppo.model.model_copy(update={"trainable": form})
        self.model = ActorCritic(base, config, only(trained), seed=params.seed)
        self.reward = new_reward(params, workspace, self.tokenizer, self.model, trained, prompts)
        self.critic = Critic(0, self.model.critic_state(), params.ppo.reward.kl_coef, RunningMoments())

    def become(self, cycle: int | None) -> None:
        """The result in models/, or what training had after `cycle`."""
        dtype = self.params.ppo.model.dtype
        if cycle is None:
            self.critic = load_critic(self.workspace)
            policy = load_causal_lm(self.workspace.policy, arithmetic(dtype))
        elif cycle:
            folder = self._folder(cycle)
            self.critic = critic_of_cycle(folder, cycle)
            policy = load_base(self.workspace, dtype)
            install(policy, load_file(folder.weights(cycle)))
        else:
            return  # as it was made, it is the reference
        self.model.load_policy(policy.state_dict())
        self.model.load_critic(self.critic.state)

    def look(self, completions: int) -> list[Inspection]:
        """Sample `completions` of each prompt, and everything about them."""
        asked = [tokens for tokens in self.encoded for _ in range(completions)]
        # A draw does not depend on what else is inspected.
        names = [(prompt.text, k) for prompt in self.prompts for k in range(completions)]
        seeds = [derive(self.params.seed, "inspect", *name) for name in names]
        model, pad = self.model, self.tokenizer.pad_token_id
        samples = sample(model.sampler, model.policy_head, asked, self.law, seeds, pad)
        rollout = score_all(model, self.reward, samples, self.law, self.params.ppo.update.micro_batch)
        refuse_non_finite(rollout, "inspection")
        found = self._completions(samples, rollout)
        penalised = self.params.ppo.reward.kl_in == "reward"
        return [
            Inspection(
                prompt,
                tuple(found[i * completions : (i + 1) * completions]),
                self.critic.cycle,
                self.critic.kl_coef if penalised else 0.0,
            )
            for i, prompt in enumerate(self.prompts)
        ]

    def _completions(self, samples: Samples, rollout: Rollout) -> list[Completion]:
        ppo, mask = self.params.ppo, rollout.mask
        rewards = token_rewards(rollout, ppo, self.critic.kl_coef, self.critic.moments)
        experience = estimate(rollout, rewards, ppo.advantages)
        kl = counted(kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1"), mask)
        columns = {
            "logprob": rollout.logprobs,
            "ref_logprob": rollout.ref_logprobs,
            "kl": kl,
            "entropy": rollout.entropy,
            "value": rollout.values,
            "reward": rewards,
            "advantage": experience.returns - rollout.values,
            "update_advantage": experience.advantages,
            "target": experience.returns,
        }
        return [
            Completion(
                self._tokens(samples, row, columns),
                float(rollout.scores[row]),
                float(kl[row].sum()),
                bool(rollout.ended[row]),
            )
            for row in range(len(rollout))
        ]

    def _tokens(self, samples: Samples, row: int, columns: dict[str, Tensor]) -> tuple[Token, ...]:
        sequences, special = samples.sequences, set(self.tokenizer.all_special_ids)
        ids = sequences.responses[row][sequences.mask[row]].tolist()
        length = int(samples.text_lengths[row])
        texts = [*pieces(self.tokenizer, ids[:length]), *[""] * (len(ids) - length)]
        numbers = {name: column[row].tolist() for name, column in columns.items()}
        return tuple(
            Token(
                id=token,
                text=texts[t],
                control=control_name(self.tokenizer, token) if t >= length or token in special else None,
                **{name: values[t] for name, values in numbers.items()},
            )
            for t, token in enumerate(ids)
        )

    def _encode(self, prompt: Prompt, context: int | None) -> list[int]:
        where = f"prompt {prompt.text:.60}"
        try:
            ids = encode_prompt(self.tokenizer, *prompt)
        except ValueError as error:
            raise ConfigError(
                str(error), where, "give a text, or a conversation that the model's template takes"
            ) from error
        length = self.params.ppo.sampling.max_new_tokens
        if context and len(ids) + length > context:
            what = f"its {len(ids)} tokens and {length} new ones exceed the model's context of {context}"
            raise ConfigError(what, where, "shorten it, or lower ppo.sampling.max_new_tokens")
        return ids

    def _folder(self, cycle: int) -> RunFolder:
        """The folder of the run that made models/policy. Raises ConfigError where it has no such cycle."""
        metrics = self.workspace.metrics("ppo")
        if not metrics.is_file():
            raise DataError("is missing", str(metrics.relative_to(self.workspace.root)), "run the ppo stage first")
        run = self.workspace.runs / json.loads(metrics.read_text(encoding="utf-8"))["fingerprint"]
        folder = RunFolder(run)
        if not folder.critic(cycle)[0].is_file():
            there = [int(path.parent.name[-3:]) for path in sorted(run.glob(f"cycle_*/{CRITIC}"))]
            last = (
                f"there are 0 (the reference) and {there[0]} to {there[-1]}"
                if there
                else f"{run} holds none with its critic: run the ppo stage again"
            )
            raise ConfigError(f"no cycle {cycle}", "--cycle", last)
        folder.verify(cycle)
        return folder
