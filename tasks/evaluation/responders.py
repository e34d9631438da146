"""The models that the evaluate stage compares, as its probes ask them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ppo_core.decoder import load_causal_lm
from ppo_core.models import ActorCritic
from ppo_core.precision import arithmetic
from ppo_core.tokens import encode_prompt, encode_response
from ppo_core.types import Sequences, pad_prompts
from tasks.errors import DataError
from tasks.models.preference_models import load_base, load_tokenizer
from tasks.models.responses import Examiner, Responses
from tasks.models.rewards import load_trained, new_reward
from tasks.params import Params
from tasks.probes.base import CHAMPION, POLICY, REFERENCE, TEST, Continuation, Missing
from tasks.workspace import Workspace

TOKENS = 4096
"""Of a batch whose log-probabilities are asked for, padding included: its logits are the largest tensor there is."""

Weights = Mapping[str, torch.Tensor]


class Responders:
    """Reference, aligned policy and champion on one model: where they share a trunk, it is there once.

    This is `tasks.probes.base.Asked`, which says what each method gives.
    """

    def __init__(
        self, params: Params, workspace: Workspace, cycles: pd.DataFrame, champion: Path | None = None
    ) -> None:
        """`champion` is the folder of a policy of the base model's shape, if there is one; it may be the policy."""
        self.params, self.workspace, self.cycles = params, workspace, cycles
        base, self.tokenizer = load_base(workspace, params.ppo.model.dtype), load_tokenizer(workspace.base_model)
        self.subjects: tuple[str, ...] = (POLICY, REFERENCE, *([CHAMPION] if champion else []))
        # Who is the policy itself is not asked again.
        self._asked = {subject: subject for subject in self.subjects}
        folders = {POLICY: workspace.policy}
        if champion == workspace.policy:
            self._asked[CHAMPION] = POLICY
        elif champion:
            folders[CHAMPION] = champion
        found = {name: _weights(folder, params.ppo.model.dtype) for name, folder in folders.items()}
        self.model = _model(params, base, list(found.values()))
        own = self.model.policy_weights()
        self._weights: dict[str, Weights] = {
            REFERENCE: {name: p.detach().clone() for name, p in own.items()},
            **{subject: {name: weights[name] for name in own} for subject, weights in found.items()},
        }
        trained = load_trained(params, workspace, base)
        reward = new_reward(params, workspace, self.tokenizer, self.model, trained, self._further_prompts())
        self.examiner = Examiner(params, workspace, reward, self.tokenizer)
        self._answers: dict[tuple[str, str], Responses] = {}
        self._logprobs: dict[tuple[Continuation, ...], dict[str, list[np.ndarray]]] = {}

    @property
    def prompt_sets(self) -> tuple[str, ...]:
        return (TEST, *self.params.ingest.probes.prompts)

    def items(self, name: str) -> pd.DataFrame:
        path = self.workspace.probes / f"{name}.parquet"
        if not path.is_file():
            raise Missing(f"ingest.probes names no data {name}")
        return pd.read_parquet(path)

    def responses(self, subject: str, prompts: str) -> Responses:
        subject = self._asked[subject]
        if (subject, prompts) not in self._answers:
            self.model.load_policy(self._weights[subject])
            self._answers[subject, prompts] = self._ask(prompts)
        return self._answers[subject, prompts]

    def _ask(self, prompts: str) -> Responses:
        seeds = self.params.evaluate.seeds
        if prompts == TEST:
            return self.examiner.ask(self.model, TEST, seeds)
        return self.examiner.answers(self.model, self.items(prompts), f"probe {prompts}", seeds)

    def logprobs(self, subject: str, texts: Sequence[Continuation]) -> list[np.ndarray]:
        key = tuple(texts)
        if key not in self._logprobs:
            self._logprobs[key] = self._read(key)
        return self._logprobs[key][self._asked[subject]]

    @torch.no_grad()
    def _read(self, texts: Sequence[Continuation]) -> dict[str, list[np.ndarray]]:
        """Log-probabilities under every subject: a shared trunk reads each text once for all of them."""
        tokens = [self._encode(text) for text in texts]
        found: dict[str, list[np.ndarray]] = {s: [np.empty(0)] * len(texts) for s in self._weights}
        for batch in tqdm(_batches(tokens), desc="reading texts", unit="batch", disable=None):
            sequences = _sequences([tokens[i] for i in batch], self.tokenizer.pad_token_id, self.model.device)
            activations = self.model.activations(sequences)
            for subject in self._weights:
                self.model.load_policy(self._weights[subject])
                rows = self.model.language_model_logprobs(sequences, activations).cpu().numpy()
                for i, row, counts in zip(batch, rows, sequences.mask.cpu().numpy(), strict=True):
                    found[subject][i] = row[counts].astype(np.float64)
        return found

    def _encode(self, text: Continuation) -> tuple[list[int], list[int]]:
        prompt = encode_prompt(self.tokenizer, text.prompt, text.format)
        continuation = encode_response(self.tokenizer, text.text)
        context = getattr(self.model.reference_model.config.get_text_config(), "max_position_embeddings", None)
        if context and len(prompt) + len(continuation) > context:
            raise DataError(
                f"has {len(prompt) + len(continuation)} tokens, the model reads {context}",
                f"probe text {text.text:.60}",
                "shorten it, or leave it out of ingest.probes",
            )
        return prompt, continuation

    def _further_prompts(self) -> list[tuple[str, str]]:
        """Prompts beyond those of the data, and their formats."""
        tables = map(pd.read_parquet, sorted(self.workspace.probes.glob("*.parquet")))
        sets = [table for table in tables if {"prompt", "format"} <= set(table)]
        return [pair for table in sets for pair in zip(table["prompt"], table["format"], strict=True)]


def _weights(folder: Path, dtype: str) -> Weights:
    weights: Weights = load_causal_lm(folder, arithmetic(dtype)).state_dict()
    return weights


def _model(params: Params, base: Any, others: Sequence[Weights]) -> ActorCritic:
    """One trunk for all subjects where none differs from the base model below its top layers, else a whole copy.

    Of a finished policy no adapter is left, and nobody asks for values.
    """
    if params.ppo.model.trainable == "top_layers":
        shared = ActorCritic(base, params.ppo.model.model_copy(update={"critic": "shared"}))
        own = shared.policy_weights()
        frozen = {name: tensor for name, tensor in base.state_dict().items() if name not in own}
        if all(torch.equal(weights[name], tensor) for weights in others for name, tensor in frozen.items()):
            return shared
    return ActorCritic(base, params.ppo.model.model_copy(update={"trainable": "full", "critic": "shared"}))


def _batches(tokens: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Indices of texts of like length together, so that little is padded."""
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i][0]) + len(tokens[i][1]), len(tokens[i][0])))
    batches: list[list[int]] = []
    for i in order:
        rows = [*(batches[-1] if batches else []), i]
        width = sum(max(len(tokens[row][part]) for row in rows) for part in (0, 1))
        if batches and width * len(rows) <= TOKENS:
            batches[-1] = rows
        else:
            batches.append([i])
    return batches


def _sequences(rows: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device) -> Sequences:
    prompts, before = pad_prompts([prompt for prompt, _ in rows], pad, device)
    # Padded on the right: the same, read backwards.
    texts, there = (part.flip(1) for part in pad_prompts([text[::-1] for _, text in rows], pad, device))
    return Sequences(torch.cat([prompts, texts], dim=1), torch.cat([before, there], dim=1), prompts.shape[1])
