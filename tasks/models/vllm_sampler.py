"""Rollouts from a vLLM server, which is handed the policy's weights before each.

Its arithmetic is its own: its log-probabilities are recorded, but the update starts from those of the scoring pass
(`ppo_core.rollout.score_all`), as it does for the policy's own sampler. How far they lie apart is `train/sampler_gap`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch

from ppo_core.checkpoint import needs_room, size_of
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.types import Samples, Sequences, pad_prompts
from ppo_core.weights import install
from tasks.addresses import public_uri
from tasks.errors import ConfigError, ServiceError

URL = "PROXIMAL_VLLM_URL"
DEFAULT = "http://127.0.0.1:8000"
START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve models/base --host 127.0.0.1 --generation-config vllm "
    "--logprobs-mode processed_logprobs"
)
"""How the server is started: the first lets it take weights, the last has it tell probabilities at the temperature."""
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 600.0

_Tokens = tuple[list[int], list[float]]
"""Tokens and their log-probabilities."""


class VllmSampler:
    """Answers prompts as `ppo_core.sampling.sample` does, on the server that PROXIMAL_VLLM_URL names.

    The server must see `folder`, through which the weights go.
    """

    def __init__(self, model: ActorCritic, law: SamplingLaw, folder: Path, pad: int) -> None:
        """Raises ServiceError where no server answers, and ConfigError for a law that it does not tell enough of."""
        if law.truncates:
            raise ConfigError(
                "a vLLM server does not tell among which tokens it drew, which every log-probability is relative to",
                "ppo.sampling.top_k and top_p",
                "leave both empty, or ppo.sampler at own",
            )
        self.model, self.law, self.folder, self.pad = model, law, folder, pad
        self.url = os.environ.get(URL, DEFAULT).rstrip("/")
        self.served: str = self._ask("GET", "v1/models").json()["data"][0]["id"]

    def __call__(self, prompts: list[list[int]], seeds: Sequence[int]) -> Samples:
        """One response to each prompt, by the policy as it is now. Raises ServiceError where the server has gone."""
        self._hand_over()
        with ThreadPoolExecutor(len(prompts)) as pool:
            return self._samples(prompts, list(pool.map(self._answer, prompts, seeds)))

    def _hand_over(self) -> None:
        policy = copy.deepcopy(self.model.reference_model)
        install(policy, self.model.trained_weights())
        self.folder.mkdir(parents=True, exist_ok=True)
        with needs_room(self.folder, size_of(policy.state_dict())), _without_bars():
            policy.save_pretrained(self.folder)
        weights = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder.resolve())}}
        self._ask("POST", "collective_rpc", weights)
        self._ask("POST", "reset_prefix_cache")  # what it remembers of prompts is the old weights'

    def _answer(self, prompt: list[int], seed: int) -> _Tokens:
        config = self.law.config
        request = {
            "model": self.served, "prompt": prompt, "seed": seed, "temperature": config.temperature,
            "max_tokens": config.max_new_tokens, "min_tokens": config.min_new_tokens,
            # Its own idea of what ends a response may be another: here all that do are named.
            "ignore_eos": True, "stop_token_ids": list(self.law.stop_tokens),
            "return_token_ids": True, "logprobs": 0,
        }  # fmt: skip
        choice = self._ask("POST", "v1/completions", request).json()["choices"][0]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        length = next((n for n in range(1, len(tokens)) if self.law.ends(tokens[:n])), len(tokens))
        return tokens[:length], logprobs[:length]

    def _samples(self, prompts: list[list[int]], answers: list[_Tokens]) -> Samples:
        steps, device = self.law.config.max_new_tokens, self.model.device
        tokens, attention = pad_prompts(prompts, self.pad, device)
        responses = torch.full((len(answers), steps), self.pad)
        logprobs = torch.zeros(len(answers), steps)
        for row, (ids, found) in enumerate(answers):
            responses[row, : len(ids)], logprobs[row, : len(ids)] = torch.tensor(ids), torch.tensor(found)
        lengths = torch.tensor([len(ids) for ids, _ in answers])
        stopped = torch.tensor([ids[-1] in self.law.stop_tokens for ids, _ in answers])
        ended = stopped | torch.tensor([self.law.ends(ids) for ids, _ in answers])
        mask = torch.arange(steps) < lengths.unsqueeze(1)
        sequences = Sequences(
            torch.cat([tokens, responses.to(device)], 1), torch.cat([attention, mask.to(device)], 1), tokens.shape[1]
        )
        return Samples(sequences, logprobs.to(device), ended.to(device), (lengths - stopped.long()).to(device))

    def _ask(self, method: str, path: str, body: Any = None) -> requests.Response:
        where, mend = f"{public_uri(self.url)}/{path}", f"start it with {START}, or name its address in {URL}"
        try:
            response = requests.request(
                method, f"{self.url}/{path}", json=body, timeout=(CONNECT_SECONDS, ANSWER_SECONDS)
            )
        except requests.RequestException as error:
            raise ServiceError(f"the vLLM server does not answer ({type(error).__name__})", where, mend) from error
        if not response.ok:
            raise ServiceError(f"the vLLM server refused ({response.status_code}): {response.text[:300]}", where, mend)
        return response


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers would draw one for every hand-over."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
