"""Models answer prompts, and the answers are measured: by the reward model, the judge and the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ppo_core.diagnostics import PART
from ppo_core.law import SamplingLaw
from ppo_core.masking import counted, masked_mean
from ppo_core.models import ActorCritic
from ppo_core.rollout import RewardFunction, score_all
from ppo_core.sampling import sample
from ppo_core.seeds import derive
from ppo_core.tokens import decode, encode_prompt
from ppo_core.types import Rollout
from tasks.errors import DataError
from tasks.models.preference_models import Judge, judge_text
from tasks.params import Params
from tasks.workspace import Workspace

BATCH = 64
"""Prompts answered at once; a row's sample does not depend on it."""


@dataclass(frozen=True)
class Responses:
    """Answers to N prompts, in their order. Scores are in standard deviations of human-written text."""

    prompts: list[str]
    texts: list[str]
    reward: np.ndarray
    judge: np.ndarray
    kl: np.ndarray
    """Sum over the response of the log-ratio to the reference, nats."""
    entropy: np.ndarray
    """Mean per token, nats."""
    ref_nll: np.ndarray
    """Mean negative log-probability per token under the reference, nats."""
    lengths: np.ndarray
    """Tokens."""
    ended: np.ndarray
    """True where the response ended by EOS."""
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """What the parts of a combined reward say, by name, before they are weighted."""


class Examiner:
    """Puts the prompts of a split to a policy, with the same seeds every time, and has the answers scored."""

    def __init__(self, params: Params, workspace: Workspace, reward: RewardFunction, tokenizer: Any) -> None:
        self.params, self.reward, self.tokenizer = params, reward, tokenizer
        self.law = SamplingLaw.of(params.ppo.sampling, tokenizer)
        self.judge = Judge(workspace)
        self.source = workspace.prompts
        self.prompts = pd.read_parquet(self.source)

    def ask(self, model: ActorCritic, split: str, seeds: int = 1) -> Responses:
        """What the policy of `model` answers to the prompts of `split`."""
        rows = self.prompts[self.prompts.split == split]
        if rows.empty:
            raise DataError(f"has no prompts of the split {split}", str(self.source), "raise ingest.splits." + split)
        return self.answers(model, rows, split, seeds)

    def answers(self, model: ActorCritic, rows: pd.DataFrame, name: str, seeds: int = 1) -> Responses:
        """What the policy answers to the prompts of `rows` (`prompt`, `format`), with seeds that belong to `name`.

        With several `seeds` each prompt is answered so many times: all of them once, then all once more, and so on.
        """
        formats = rows["format"].tolist() * seeds
        prompts = rows["prompt"].tolist() * seeds
        tokens = [encode_prompt(self.tokenizer, p, f) for p, f in zip(prompts, formats, strict=True)]
        # Prompts of like length share a batch, so that little is padded.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        parts = [
            self._answer(model, [tokens[i] for i in batch], [self._seed(name, *divmod(i, len(rows))) for i in batch])
            for batch in tqdm(batches, desc=f"answering {name} prompts", unit="batch", disable=None)
        ]
        back = np.argsort([i for batch in batches for i in batch])
        columns = {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}
        texts = [str(t) for t in columns.pop("texts")]
        whole = [judge_text(p, f, t) for p, f, t in zip(prompts, formats, texts, strict=True)]
        scores = {name.removeprefix(PART): columns.pop(name) for name in [*columns] if name.startswith(PART)}
        return Responses(prompts=prompts, texts=texts, judge=self.judge.score(whole), parts=scores, **columns)

    def _seed(self, name: str, repeat: int, row: int) -> int:
        """The first answer's seed stays what it is when more answers are asked for."""
        return derive(self.params.seed, "examine", name, row, *([repeat] if repeat else []))

    def _answer(self, model: ActorCritic, prompts: list[list[int]], seeds: list[int]) -> dict[str, np.ndarray]:
        samples = sample(model.sampler, model.policy_head, prompts, self.law, seeds, self.tokenizer.pad_token_id)
        rollout = score_all(model, self.reward, samples, self.law, self.params.ppo.update.micro_batch)
        answers = zip(samples.sequences.responses.tolist(), samples.text_lengths.tolist(), strict=True)
        texts = [decode(self.tokenizer, ids[:length]) for ids, length in answers]
        return _figures(rollout) | {"texts": np.array(texts, dtype=object)}


def _figures(rollout: Rollout) -> dict[str, np.ndarray]:
    mask = rollout.mask
    figures = {
        "reward": rollout.scores,
        "kl": counted(rollout.logprobs - rollout.ref_logprobs, mask).sum(dim=1),
        "entropy": masked_mean(rollout.entropy, mask, dim=1),
        "ref_nll": masked_mean(-rollout.ref_logprobs, mask, dim=1),
        "lengths": mask.sum(dim=1),
        "ended": rollout.ended,
        **{PART + name: scores for name, scores in rollout.parts.items()},
    }
    return {name: tensor.cpu().numpy() for name, tensor in figures.items()}
