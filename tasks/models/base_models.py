"""The models everything starts from, as folders in the transformers format: safetensors, tokenizer, settings."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
)

from ppo_core.tokens import encode_response
from tasks.data.sources import MODEL_FILES, Fetched, digest
from tasks.data_params import IngestParams
from tasks.errors import ConfigError, DataError
from tasks.workspace import Workspace

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""How peft calls the files of an adapter."""
_MEND = "fetch or save the model again; it is a folder as save_pretrained writes it, with no code of its own"

log = logging.getLogger(__name__)


def write_policy(
    fetched: Fetched, target: Path, params: IngestParams, workspace: Workspace, adapter: Fetched | None = None
) -> Any:
    """Write the policy, `adapter` merged into it, to the folder `target`; returns its tokenizer.

    Raises DataError, ConfigError.
    """
    if fetched.path.suffix == ".gguf":
        shutil.copytree(_converted(fetched.path, workspace.downloads), target)
    else:
        _copy(fetched, target, adapter)
    if adapter is not None:
        _merge(adapter, target)
    config, tokenizer = _checked(AutoModelForCausalLM, target, fetched.label, "a language model")
    _check_context(config, params)
    return _with_ends(tokenizer, target, fetched.label)


def write_judge(fetched: Fetched, target: Path) -> None:
    """Copy the model that becomes the judge to the folder `target`. Raises DataError."""
    _copy(fetched, target)
    # The judge takes the mean of the last layer: a pooler trained for something else may be missing.
    _checked(AutoModel, target, fetched.label, "an encoder", unused="pooler.")


def _checked(kind: Any, folder: Path, label: str, called: str, unused: str = "\0") -> tuple[Any, Any]:
    """Configuration and tokenizer of the model in `folder`, of which everything was loaded once and is sound."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = kind.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        control = _control_tokens_in_text(tokenizer)
        last = max(tokenizer.get_vocab().values())
    except MemoryError:
        raise
    except Exception as error:  # the readers of these formats meet damage with whatever error comes first
        if "allocate memory" in str(error):
            raise
        what = f"does not load as {called}: {type(error).__name__}: {error}"
        raise DataError(what[:300], label, _MEND) from error  # some errors list every tensor
    _check_whole(report, label, unused)
    if broken := [name for name, weights in model.named_parameters() if not torch.isfinite(weights).all()]:
        raise DataError(f"holds weights that are not finite: {', '.join(broken[:5])}", label, _MEND)
    if last >= (rows := model.get_input_embeddings().num_embeddings):
        raise DataError(f"has {rows} embeddings, but its tokenizer knows token {last}", label, _MEND)
    if control:
        mend = "choose a model with a tokenizer of the fast kind (tokenizer.json)"
        raise DataError(f"its tokenizer takes the text {control[0]!r} for the control token", label, mend)
    return model.config, tokenizer


def write_reward(fetched: Fetched | None, target: Path) -> None:
    """Copy the ready-made reward model to the folder `target`; without one the folder says just that. Raises DataError.

    (It is there in either case because DVC wants the outputs of a stage to exist.)
    """
    if fetched is None:
        target.mkdir()
    else:
        _copy(fetched, target)
        _check_reward(target, fetched.label)
    source = {"ready_made": fetched.label if fetched else None}
    (target / "source.json").write_text(json.dumps(source), encoding="utf-8")


def _check_reward(folder: Path, label: str) -> None:
    config, _ = _checked(AutoModelForSequenceClassification, folder, label, "a sequence classifier")
    if config.num_labels != 1:
        raise DataError(f"has {config.num_labels} labels", label, "name a reward model: a classifier with one label")


def _copy(fetched: Fetched, target: Path, adapter: Fetched | None = None) -> None:
    if not fetched.path.is_dir():
        raise DataError(
            "is neither a .gguf file nor a folder", fetched.label, "name a folder in the transformers format"
        )
    if (fetched.path / ADAPTER_CONFIG).exists() and adapter is None:
        # transformers would load it unasked, on whatever model its settings name.
        mend = "name it as ingest.adapter, beside the model that it belongs to, or merge it and save the whole model"
        raise DataError("holds a peft adapter", fetched.label, mend)
    files = [file for pattern in MODEL_FILES for file in sorted(fetched.path.glob(pattern))]
    files = [file for file in files if file.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise DataError(
            "holds no weights as .safetensors; pickled ones (.bin, .pt) can run code and are refused",
            fetched.label,
            "write it with model.save_pretrained(folder)",
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise DataError(f"is damaged: {error}", f"{fetched.label}/{file.name}", "fetch it again") from error
    target.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, target / file.name)


def _merge(adapter: Fetched, target: Path) -> None:
    """Merge a LoRA adapter into the model in `target`, in float32. A tokenizer that lies beside it comes along."""
    import peft  # takes a second

    if missing := [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (adapter.path / name).is_file()]:
        raise DataError(f"holds no {' and no '.join(missing)}", adapter.label, "name a folder that peft has saved")
    try:
        config = peft.PeftConfig.from_pretrained(adapter.path)
        if config.peft_type != peft.PeftType.LORA:
            raise DataError(f"is an adapter of the kind {config.peft_type}", adapter.label, "only LoRA can be merged")
        base = AutoModelForCausalLM.from_pretrained(
            target, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        config.base_model_name_or_path = base.name_or_path  # peft would warn of the model's new place
        model = peft.get_peft_model(base, config)
        report = peft.set_peft_model_state_dict(model, load_file(adapter.path / ADAPTER_WEIGHTS))
        merged: Any = model.merge_and_unload()
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, SafetensorError) as error:
        what = f"cannot be merged into the policy: {' '.join(str(error).split())[:300]}"
        raise DataError(what, adapter.label, "name the model that it was trained on as ingest.policy") from error
    # A name that only one of them has would be left out, or stay as it was drawn, without a word.
    strange = [*report.unexpected_keys, *(name for name in report.missing_keys if ".lora_" in name)]
    if strange:
        mend = "name the model that it was trained on as ingest.policy"
        raise DataError(f"does not fit the policy: {', '.join(sorted(strange)[:5])}", adapter.label, mend)
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False  # an adapter can part them
    for file in target.glob("*.safetensors*"):
        file.unlink()
    merged.save_pretrained(target)
    if (adapter.path / "tokenizer_config.json").exists():  # it may have brought the chat template
        AutoTokenizer.from_pretrained(adapter.path, trust_remote_code=False).save_pretrained(target)


def _converted(gguf: Path, downloads: Path) -> Path:
    """The GGUF model as a transformers folder, converted once for each file and version of transformers."""
    folder = downloads / f"{gguf.stem}-{digest(gguf)[:16]}-transformers-{transformers.__version__}"
    stamp = folder.with_suffix(f"{folder.suffix}.json")
    if stamp.exists() and json.loads(stamp.read_text()) == {"sha256": digest(folder)}:
        return folder
    log.info("converting %s to safetensors, once", gguf.name)
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as temporary:
        _convert(gguf, Path(temporary) / "model")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(temporary) / "model").replace(folder)
    stamp.write_text(json.dumps({"sha256": digest(folder)}))
    return folder


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise into bfloat16: 4-bit weights with their scales lose nothing that matters, and take half the space."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    except Exception as error:  # the reader of the format meets damage with whatever error comes first
        mend = "fetch it again; or use an architecture that transformers reads from GGUF, or a folder of its own format"
        raise DataError(f"cannot be converted: {type(error).__name__}: {error}", gguf.name, mend) from error
    _check_whole(report, gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _check_whole(report: dict[str, Any], label: str, unused: str = "\0") -> None:
    """Weights that a file lacks would be drawn at random, with no more than a warning; `unused` begins other names."""
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith(unused)):
        raise DataError(f"lacks weights: {', '.join(missing[:5])}", label, "fetch or save the model again")


def _control_tokens_in_text(tokenizer: Any) -> list[str]:
    """Control tokens that text of the same letters becomes: it could end a turn and begin another."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted(special.union(tokenizer.all_special_tokens) - {tokenizer.unk_token})
    return [t for t in tokens if tokenizer.convert_tokens_to_ids(t) in encode_response(tokenizer, f"a {t} b")]


def _check_context(config: Any, params: IngestParams) -> None:
    context = getattr(config, "max_position_embeddings", None)
    for name in ("max_prompt_tokens", "max_text_tokens"):
        if context is not None and getattr(params, name) > context:
            raise ConfigError(
                f"{getattr(params, name)} is more than the {context} tokens that the policy reads", f"ingest.{name}"
            )


def _with_ends(tokenizer: Any, target: Path, label: str) -> Any:
    """The tokenizer with a padding token; sampling needs to know where a text ends and how to fill a batch."""
    if tokenizer.eos_token_id is None:
        raise DataError("has no end-of-sequence token", label, "set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(target)
    return tokenizer
