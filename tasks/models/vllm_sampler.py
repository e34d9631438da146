"""Rollouts from a vLLM server, which is handed the policy's weights before each.

Its arithmetic is its own: its log-probabilities are recorded, but the update starts from those of the scoring pass
(`ppo_core.rollout.score_all`), as it does for the policy's own sampler. How far they lie apart is `train/sampler_gap`.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import requests
import torch

from ppo_core.checkpoint import needs_room, size_of
from ppo_core.config import SamplingConfig
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.types import Samples, Sequences, pad_prompts
from ppo_core.weights import install
from tasks.addresses import public_uri
from tasks.errors import ConfigError, ServiceError

URL, DEFAULT = "PROXIMAL_VLLM_URL", "http://127.0.0.1:8000"
START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve models/base --host 127.0.0.1 "
    "--generation-config vllm --logprobs-mode processed_logprobs"
)
"""The first lets the server take weights, the last has it tell probabilities at the temperature that samples."""
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 600.0
AT_ONCE = 256
"""Requests: the server batches them as it likes."""

Answer = tuple[list[int], list[float]]
"""Tokens and their log-probabilities."""


class VllmServer:
    """The server that PROXIMAL_VLLM_URL names. Every method raises ServiceError where it is away or refuses."""

    def __init__(self, config: SamplingConfig) -> None:
        """Raises ConfigError for what it could not sample, or tells too little of."""
        if config.top_k is not None or config.top_p is not None:
            raise ConfigError(
                "a vLLM server does not tell among which tokens it drew, which every log-probability is relative to",
                "ppo.sampling.top_k and top_p",
                "leave both empty, or ppo.sampler at own",
            )
        self.config = config
        self.url = os.environ.get(URL, DEFAULT).rstrip("/")
        with self._understood("v1/models"):
            self.model: str = self._ask("GET", "v1/models")["data"][0]["id"]

    def load(self, folder: Path) -> None:
        """Answer with the weights in this folder, which the server must see under the same path."""
        weights = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        self._ask("POST", "collective_rpc", weights)
        path = "reset_prefix_cache?reset_running_requests=true"  # what it remembers of prompts is the old weights'
        with self._understood(path):
            if not self._ask("POST", path)["success"]:
                raise self._error("does not forget what its old weights made of prompts", path, _OWN)

    def complete(self, prompt: list[int], seed: int, stop_tokens: Sequence[int]) -> Answer:
        """Sample until one of `stop_tokens`, which stays, or the cut."""
        config = self.config
        request = {
            "model": self.model, "prompt": prompt, "seed": seed, "temperature": config.temperature,
            "max_tokens": config.max_new_tokens, "min_tokens": config.min_new_tokens,
            # Its own idea of what ends a response may be another: here all that do are named.
            "ignore_eos": True, "stop_token_ids": list(stop_tokens),
            "return_token_ids": True, "logprobs": 0,
        }  # fmt: skip
        with self._understood("v1/completions"):
            choice = self._ask("POST", "v1/completions", request)["choices"][0]
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            if choice["finish_reason"] not in ("stop", "length") or not 0 < len(tokens) == len(logprobs):
                raise ValueError(f"{len(tokens)} tokens, ended by {choice['finish_reason']}")
            return tokens, logprobs

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        timeout = (CONNECT_SECONDS, ANSWER_SECONDS)
        try:
            response = requests.request(method, f"{self.url}/{path}", json=body, timeout=timeout)
        except requests.RequestException as error:
            raise self._error(f"does not answer ({type(error).__name__})", path, _OWN) from error
        if not response.ok:
            mend = _OWN if response.status_code == requests.codes.not_found else "see its log"
            raise self._error(f"refused ({response.status_code}): {response.text[:300]}", path, mend)
        return response.json() if response.content else None

    @contextmanager
    def _understood(self, path: str) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, ValueError) as error:
            raise self._error(f"answers as vLLM 0.32 does not ({error!r:.200})", path, _OWN) from error

    def _error(self, what: str, path: str, mend: str) -> ServiceError:
        return ServiceError(f"the vLLM server {what}", f"{public_uri(self.url)}/{path}", mend)


class VllmSampler:
    """Answers prompts as `ppo_core.sampling.sample` does, by the server."""

    def __init__(self, model: ActorCritic, law: SamplingLaw, folder: Path, pad: int) -> None:
        """`folder` is where weights are handed over. Raises what `VllmServer` does."""
        self.model, self.law, self.folder, self.pad = model, law, folder, pad
        # Only to be written, not to compute.
        self.base = copy.deepcopy(model.reference_model).cpu()
        self.server = VllmServer(law.config)

    def __call__(self, prompts: list[list[int]], seeds: Sequence[int]) -> Samples:
        """One response to each prompt, by the policy as it is now."""
        self._hand_over()
        complete = partial(self.server.complete, stop_tokens=self.law.stop_tokens)
        with ThreadPoolExecutor(min(len(prompts), AT_ONCE)) as pool:
            answers = list(pool.map(complete, prompts, seeds))
        return self._samples(prompts, [self._ended(*answer) for answer in answers])

    def _hand_over(self) -> None:
        policy = copy.deepcopy(self.base)
        install(policy, self.model.trained_weights())
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with needs_room(self.folder, size_of(policy.state_dict())), _without_bars():
                policy.save_pretrained(self.folder)
            self.server.load(self.folder)
        finally:
            shutil.rmtree(self.folder)

    def _ended(self, tokens: list[int], logprobs: list[float]) -> Answer:
        """The answer up to its first stop string, which the server was not told of: where one ends, the law says."""
        length = next((n for n in range(1, len(tokens)) if self.law.ends(tokens[:n])), len(tokens))
        return tokens[:length], logprobs[:length]

    def _samples(self, prompts: list[list[int]], answers: list[Answer]) -> Samples:
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


_OWN = f"start one for this run alone: {START}; or name its address in {URL}"
