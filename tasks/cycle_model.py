"""The policy as an MLflow model. This file is copied into each model's folder and runs there without the repository.

It needs torch, transformers, pandas and mlflow; no network, no pickle, no code from a checkpoint. Artifacts:

    tokens       ppo_core/tokens.py, so that prompts are encoded exactly as in training
    checkpoint   a self-contained transformers folder (the candidate), or else
    weights      the trained weights of one cycle, under their Hugging Face names, and
    base         JSON that names the model they belong on: {"sha256": {file: digest}, "paths": [folder]}
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

BATCH = 32
"""Prompts in one pass."""


class PolicyModel(PythonModel):  # type: ignore[misc]
    """Responses to prompts: a plain text is continued, a JSON array of {"role", "content"} is answered."""

    def load_context(self, context: Any) -> None:
        """Called by MLflow once, before the first prediction."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        self.tokens = _module(files["tokens"])
        folder = files["checkpoint"] if "checkpoint" in files else find_base(files["base"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.model = load_policy(folder, files.get("weights"))
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.pad = eos if pad is None else pad
        # In place of the checkpoint's own habits (top-p, penalties), which would bend the law that was trained.
        self.model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=self.pad)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """One response for each prompt of the only column. Raises for prompts and params that cannot be served."""
        asked = params or {}
        length, temperature, seed = int(asked["max_new_tokens"]), float(asked["temperature"]), int(asked["seed"])
        if length < 1 or not 0 <= temperature < float("inf"):
            raise _refused(f"max_new_tokens {length} must be at least 1 and temperature {temperature} at least 0")
        prompts = [self._encode(row, prompt, length) for row, prompt in enumerate(model_input.iloc[:, 0])]
        responses: list[str] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            # A generator for each row: a response does not depend on its neighbours, and no global state is touched.
            draws = [torch.Generator().manual_seed(seed + start + row) for row in range(len(batch))]
            responses += self._respond(batch, length, Sampling(temperature, draws) if temperature else None)
        return responses

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
    def _respond(self, prompts: list[list[int]], length: int, sampling: LogitsProcessor | None) -> list[str]:
        width = max(map(len, prompts))
        # Padding on the left, hidden by the mask: every response starts in the same column.
        tokens = torch.tensor([[self.pad] * (width - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        out = self.model.generate(
            tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=length,
            logits_processor=[sampling] if sampling else [],
        )
        return [self.tokens.decode(self.tokenizer, ids) for ids in out[:, width:].tolist()]


class Sampling(LogitsProcessor):  # type: ignore[misc]
    """Makes greedy decoding draw from softmax(logits / temperature), each row by its own generator."""

    def __init__(self, temperature: float, generators: list[torch.Generator]) -> None:
        self.temperature = temperature
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] that leave one token possible in each row."""
        laws = (scores.float() / self.temperature).softmax(dim=-1).cpu()
        drawn = [torch.multinomial(law, 1, generator=g) for law, g in zip(laws, self.generators, strict=True)]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn).to(scores.device), 0.0)


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


def load_policy(folder: Path, weights: Path | None = None) -> Any:
    """The causal language model in `folder`, with `weights` put over its own, ready to sample as in training."""
    trained = load_file(weights) if weights else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        # Trained weights come in the precision that sampled; all of the model follows them.
        dtype=next(iter(trained.values())).dtype if trained else "auto",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    strangers = model.load_state_dict(trained, strict=False).unexpected_keys
    if info["missing_keys"] or strangers:
        # transformers would go on, with random numbers where tensors are missing.
        raise _refused(f"{folder} does not fit: missing {sorted(info['missing_keys'])}, unknown {strangers}")
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
    spec = importlib.util.spec_from_file_location("policy_tokens", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refused(why: str) -> MlflowException:
    """MLflow's model server answers with status 400 and the reason."""
    return MlflowException.invalid_parameter_value(why)


set_model(PolicyModel())
