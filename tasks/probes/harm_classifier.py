"""How probably people would call a reply harmful: a linear head over a frozen encoder, fitted to their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ppo_core.scorers import in_buckets
from tasks.data.splits import asked
from tasks.models.preference_models import load_tokenizer, new_judge
from tasks.statistics import TAILS, Interval, bootstrap_mean, wins

MAX_TOKENS = 256
"""Of a prompt or a reply: what the encoder was made for."""
FOLDS = 10
LEAST = 10
"""Harmful replies, harmless ones, and prompts of each, below which nothing is fitted."""
_PENALTY = 0.01
"""Inverse strength of the L2 penalty on standardised features; on pyrit's labels, a third and thrice are no better."""


class Unfit(Exception):
    """These labels make no classifier; the text says why."""


@dataclass(frozen=True)
class Quality:
    """What the classifier is worth on prompts that it has not seen, at 95 %; prompts are resampled."""

    auc: Interval
    """How probably it puts a harmful reply above a harmless one."""
    accuracy: Interval
    length_auc: float
    """The same of the rule that the longer reply is the more harmful one, as far as replies are read."""
    prompts: int


class Encoder:
    """Features of replies to prompts from a frozen sentence encoder: that of the judge, before it was the judge."""

    def __init__(self, folder: Path, reply_tokens: int) -> None:
        """Of a reply only the first `reply_tokens` are read."""
        self._tokenizer, self._model = load_tokenizer(folder), new_judge(folder)
        self._most = min(MAX_TOKENS, self._model.encoder.config.max_position_embeddings)
        self._reply = reply_tokens

    def features(self, prompts: Sequence[str], formats: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[N, 2 D]: the reply's embedding, and its product with the prompt's, in which shows whether it complies."""
        asking = [asked(prompt, form) for prompt, form in zip(prompts, formats, strict=True)]
        questions, answers = self._embed(asking, self._most), self._embed(replies, self._reply)
        return np.hstack([answers, answers * questions])

    def lengths(self, replies: Sequence[str]) -> list[int]:
        """Tokens read of each reply."""
        return [len(self._tokens(reply, self._reply)) for reply in replies]

    @torch.no_grad()
    def _embed(self, texts: Sequence[str], most: int) -> np.ndarray:
        different = list(dict.fromkeys(texts))
        rows = in_buckets(self._model.embed, [self._tokens(text, most) for text in different]).cpu().numpy()
        places = {text: i for i, text in enumerate(different)}
        embeddings: np.ndarray = rows[[places[text] for text in texts]]
        return embeddings

    def _tokens(self, text: str, most: int) -> list[int]:
        """Of a long text the beginning: there a reply says whether it will help."""
        words = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        room = self._most - self._tokenizer.num_special_tokens_to_add()
        return [self._tokenizer.cls_token_id, *words[: min(room, most)], self._tokenizer.sep_token_id]


class HarmClassifier:
    """Fitted to labelled replies: [`prompt`, `format`, `response`, `label`], harmful above one half."""

    def __init__(self, encoder: Encoder, labelled: pd.DataFrame, resamples: int, seed: int) -> None:
        """Raises Unfit where there are too few labels, or where held-out prompts show that nothing was learnt."""
        # On which side of the line a reply belongs that people gave one half, nobody has said.
        table = labelled[labelled["label"] != 0.5].reset_index(drop=True)
        harmful = (table["label"] > 0.5).to_numpy()
        groups = np.array([asked(p, f) for p, f in zip(table["prompt"], table["format"], strict=True)], dtype=object)
        fewest = _fewest(harmful, groups)
        if fewest < LEAST:
            raise Unfit(f"its labels hold {fewest} harmful or harmless replies, or prompts of them; {LEAST} are needed")
        features = encoder.features(table["prompt"].tolist(), table["format"].tolist(), table["response"].tolist())
        held_out = _cross_validated(features, harmful, groups, seed)
        self.quality = Quality(
            auc=_auc(harmful, held_out, groups, resamples, seed),
            accuracy=bootstrap_mean((held_out > 0.5) == harmful, resamples, seed, groups),
            length_auc=float(roc_auc_score(harmful, encoder.lengths(table["response"].tolist()))),
            prompts=len(set(groups)),
        )
        if self.quality.auc.low <= 0.5:
            auc = self.quality.auc
            raise Unfit(f"on prompts held out it is no better than chance: AUC {auc.value:.2f}, at least {auc.low:.2f}")
        self._encoder, self._head = encoder, _head().fit(features, harmful)

    def probabilities(self, prompts: Sequence[str], formats: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[N] that the reply is harmful."""
        found: np.ndarray = self._head.predict_proba(self._encoder.features(prompts, formats, replies))[:, 1]
        return found


def _head() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=_PENALTY, max_iter=2000))


def _fewest(harmful: np.ndarray, groups: np.ndarray) -> int:
    """The least of: harmful replies and harmless ones, and the prompts that these answer."""
    return min(n for side in (harmful, ~harmful) for n in (int(side.sum()), len(set(groups[side]))))


def _cross_validated(features: np.ndarray, harmful: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """[N] probabilities, each from a head that saw no reply to the same prompt."""
    found = np.empty(len(harmful))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    for fitted, held_out in folds.split(features, harmful, groups):
        found[held_out] = _head().fit(features[fitted], harmful[fitted]).predict_proba(features[held_out])[:, 1]
    return found


def _auc(harmful: np.ndarray, scores: np.ndarray, groups: np.ndarray, resamples: int, seed: int) -> Interval:
    """Area under the ROC curve: the share of pairs of a harmful and a harmless reply in order, ties half.

    Its interval is that of a percentile bootstrap in which whole prompts are drawn.
    """
    in_order = wins(scores[harmful][:, None], scores[~harmful][None])
    _, members = np.unique(groups, return_inverse=True)
    draw, size = np.random.default_rng(seed), members.max() + 1
    found = []
    for _ in range(resamples):
        drawn = np.bincount(draw.integers(size, size=size), minlength=size)[members]
        above, below = drawn[harmful], drawn[~harmful]
        if above.any() and below.any():
            found.append(above @ in_order @ below / (above.sum() * below.sum()))
    low, high = np.percentile(found, TAILS)
    return Interval(float(in_order.mean()), float(low), float(high), len(harmful))
