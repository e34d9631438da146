"""The policy as an MLflow model. This file is copied into each model's folder and runs there without the repository.

It needs torch, transformers, pandas and mlflow; no network, no pickle, no code from a checkpoint. Artifacts:

    tokens       ppo_core/tokens.py, so that prompts are encoded exactly as in training
    checkpoint   a self-contained transformers folder (the candidate), or else
    weights      the trained weights of one cycle,
    install      ppo_core/weights.py, which puts them into a model, and
    base         JSON that names the model they belong on: {"sha256": {file: digest}, "paths": [folder]}
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, StoppingCriteria

BATCH = 32
"""Prompts in one pass."""


@dataclass(frozen=True)
class Law:
    """What a response is drawn from, and what ends it: `ppo_core.config.SamplingConfig`, as asked for."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    """0: the likeliest token."""
    top_k: int
    """0: all."""
    top_p: float
    stops: list[int]
    """EOS, and the tokens that end a response as it does."""
    stop_strings: list[str]

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            wanted = (
                f"max_new_tokens {self.max_new_tokens} must be at least 1, temperature {self.temperature} at least 0"
            )
            raise _refused(wanted)
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise _refused(f"top_k {self.top_k} must be at least 0 and top_p {self.top_p} above 0, at most 1")
        if "" in self.stop_strings:
            raise _refused("an empty stop string would end every response")

    def probabilities(self, scores: torch.Tensor, t: int) -> torch.Tensor:
        """Of each token [B, V] as response token `t`, from the model's scores [B, V]."""
        scores = scores.float()
        if t < self.min_new_tokens:
            scores = scores.index_fill(-1, torch.tensor(self.stops, device=scores.device), -torch.inf)
        if not self.temperature:
            return torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
        if self.top_k:
            kept = scores.topk(min(self.top_k, scores.shape[-1]))
            scores = torch.full_like(scores, -torch.inf).scatter(-1, kept.indices, kept.values)
        law = (scores / self.temperature).softmax(dim=-1)
        if self.top_p == 1:
            return law
        likeliest, order = law.sort(dim=-1, descending=True, stable=True)
        # The smallest set that reaches top_p: tokens before which there is still something missing.
        kept_mass = likeliest.where(likeliest.cumsum(dim=-1) - likeliest < self.top_p, 0)
        return torch.zeros_like(law).scatter(-1, order, kept_mass)


class PolicyModel(PythonModel):  # type: ignore[misc]
    """Responses to prompts: a plain text is continued, a JSON array of {"role", "content"} is answered."""

    def load_context(self, context: Any) -> None:
        """Called by MLflow once, before the first prediction."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        self.tokens = _module(files["tokens"])
        if "checkpoint" in files:
            folder, self.model = files["checkpoint"], load_policy(files["checkpoint"])
        else:
            folder = find_base(files["base"])
            self.model = load_cycle(folder, files["weights"], _module(files["install"]))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.pad = eos if pad is None else pad
        # In place of the checkpoint's own habits (top-p, penalties), which would bend the law that was trained.
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=self.pad)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """One response for each prompt of the only column. Raises for prompts and params that cannot be served."""
        asked = params or {}
        law, seed = self._law(asked), int(asked["seed"])
        prompts = [self._encode(row, prompt, law.max_new_tokens) for row, prompt in enumerate(model_input.iloc[:, 0])]
        responses: list[str] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            # A generator for each row: a response does not depend on its neighbours, and no global state is touched.
            draws = [torch.Generator().manual_seed(seed + start + row) for row in range(len(batch))]
            responses += self._respond(batch, law, draws)
        return responses

    def _law(self, asked: dict[str, Any]) -> Law:
        known = self.tokenizer.get_vocab()
        if unknown := [text for text in asked["stop_tokens"] if text not in known]:
            raise _refused(f"stop_tokens {unknown} are no tokens of this model")
        return Law(
            max_new_tokens=int(asked["max_new_tokens"]),
            min_new_tokens=int(asked["min_new_tokens"]),
            temperature=float(asked["temperature"]),
            top_k=int(asked["top_k"]),
            top_p=float(asked["top_p"]),
            stops=[self.tokenizer.eos_token_id, *(known[text] for text in asked["stop_tokens"])],
            stop_strings=[str(text) for text in asked["stop_strings"]],
        )

    def _encode(self, row: int, prompt: Any, length: int) -> list[int]:
        if not isinstance(prompt, str):
            raise _refused(f"row {row}: a prompt is text, not {prompt!r}")
        try:
            ids: list[int] = self.tokens.encode_prompt(self.tokenizer, prompt, "chat" if is_chat(prompt) else "text")
        except ValueError as error:
            raise _refused(f"row {row}: {error}") from error
        context = self.model.config.max_position_embeddings
        if len(ids) + length > context:
            raise _refused(
                f"row {row}: {len(ids)} tokens and {length} new ones exceed the model's context of {context}"
            )
        return ids

    @torch.inference_mode()
    def _respond(self, prompts: list[list[int]], law: Law, generators: list[torch.Generator]) -> list[str]:
        width = max(map(len, prompts))
        # Padding on the left, hidden by the mask: every response starts in the same column.
        tokens = torch.tensor([[self.pad] * (width - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        out = self.model.generate(
            tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=law.max_new_tokens,
            eos_token_id=law.stops,
            logits_processor=[Sampling(law, width, generators)],
            stopping_criteria=[Stopping(law, width, self.tokenizer)],
        )
        return [self._text(ids, law.stops) for ids in out[:, width:].tolist()]

    def _text(self, ids: list[int], stops: list[int]) -> str:
        """Up to the first token that ends the response, which is no text."""
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text: str = self.tokens.decode(self.tokenizer, ids[:end])
        return text


class Sampling(LogitsProcessor):  # type: ignore[misc]
    """Makes greedy decoding draw from the law, each row by its own generator."""

    def __init__(self, law: Law, prompt_length: int, generators: list[torch.Generator]) -> None:
        self.law, self.prompt_length, self.generators = law, prompt_length, generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] that leave one token possible in each row."""
        laws = self.law.probabilities(scores, input_ids.shape[1] - self.prompt_length).cpu()
        drawn = [torch.multinomial(law, 1, generator=g) for law, g in zip(laws, self.generators, strict=True)]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn).to(scores.device), 0.0)


class Stopping(StoppingCriteria):  # type: ignore[misc]
    """Ends a row whose last token completes a stop string."""

    def __init__(self, law: Law, prompt_length: int, tokenizer: Any) -> None:
        self.strings, self.prompt_length, self.tokenizer = law.stop_strings, prompt_length, tokenizer
        # A token has at least one byte, so a string of n bytes that ends in the last token lies in the last n tokens.
        self.tail = max((len(text.encode()) for text in law.stop_strings), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether each row has ended, [B]."""
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.strings:
            for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
                text = self.tokenizer.decode(ids[-self.tail :])
                ended[row] = any(string in text for string in self.strings)
        return ended


def is_chat(prompt: str) -> bool:
    """Whether the prompt is a JSON array of messages rather than text to continue."""
    try:
        messages = json.loads(prompt)
    except ValueError:
        return False
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )


def load_cycle(folder: Path, weights: Path, install: ModuleType) -> Any:
    """The base model in `folder` with the trained `weights` of a cycle, put there by ppo_core/weights.py."""
    trained = load_file(weights)
    # They come in the precision that sampled; all of the model follows them.
    model = load_policy(folder, next(tensor.dtype for name, tensor in trained.items() if name != install.SCALING))
    try:
        install.install(model, trained)
    except (KeyError, RuntimeError) as error:
        raise _refused(f"{weights.name} does not fit the model in {folder}: {error}") from error
    return model


def load_policy(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The causal language model in `folder`, ready to sample as in training."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        # transformers would go on, with random numbers where tensors are missing.
        raise _refused(f"{folder} does not fit: missing {sorted(info['missing_keys'])}")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def find_base(record: Path) -> Path:
    """The folder of the base model: where it was, else PROXIMAL_BASE_MODEL; its safetensors must be the very same."""
    base = json.loads(record.read_text(encoding="utf-8"))
    named = os.environ.get("PROXIMAL_BASE_MODEL")
    folders = [Path(path) for path in (*base["paths"], *([named] if named else []))]
    for folder in folders:
        if all(_sha256(folder / name) == digest for name, digest in base["sha256"].items()):
            return folder
    raise _refused(
        f"the base model of this cycle ({base['sha256']}) is at none of {', '.join(map(str, folders))}. Check out "
        "the commit in the run's tag mlflow.source.git.commit, run `dvc pull models/base`, and set PROXIMAL_BASE_MODEL "
        "to that folder"
    )


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _module(path: Path) -> ModuleType:
    """The Python file as a module that only this model sees: no import path changes, nothing is shadowed."""
    spec = importlib.util.spec_from_file_location(f"policy_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refused(why: str) -> MlflowException:
    """MLflow's model server answers with status 400 and the reason."""
    return MlflowException.invalid_parameter_value(why)


set_model(PolicyModel())
