"""Tiny seeded models, ratings that can be learnt, and a whole workspace on top of them: no network, seconds of work."""

from __future__ import annotations

import json
import random
import shutil
import string
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tasks.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parents[1]
VOCABULARY = 512
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VALENCE = {
    "wonderful": 3, "brilliant": 3, "moving": 2, "charming": 2, "decent": 1,
    "plain": 0, "odd": 0, "slow": -1, "clumsy": -2, "boring": -2, "dreadful": -3, "unwatchable": -3,
}  # fmt: skip
_SUBJECTS = (
    "film",
    "story",
    "cast",
    "script",
    "ending",
    "score",
    "camera",
    "hero",
    "villain",
    "dialogue",
    "pace",
    "set",
)
_OPENINGS = ("the", "this", "its", "her", "his", "that", "their", "a", "one", "every", "no", "my")
_LINKS = ("is", "was", "feels", "looks", "seems", "remains", "stays", "turned", "became", "proves", "sounds", "ends")
_DEGREES = ("quite", "very", "rather", "truly", "almost", "never", "often", "simply", "oddly", "mostly", "so", "too")


def sentences(n: int, seed: int = 0) -> list[tuple[str, float]]:
    """`n` different film snippets, each with the valence (about -6 to 6) that its words add up to."""
    draw = random.Random(seed)
    found: dict[str, float] = {}
    while len(found) < n:
        first, second = draw.choice(list(_VALENCE)), draw.choice(list(_VALENCE))
        start = [draw.choice(words) for words in (_OPENINGS, _SUBJECTS, _LINKS, _DEGREES)]
        text = " ".join([*start, first, "and", draw.choice(_DEGREES), second, draw.choice(".!?")])
        found[text] = _VALENCE[first] + _VALENCE[second]
    return list(found.items())


def ratings_file(path: Path, n: int, seed: int = 0) -> Path:
    """JSONL of {"text", "ratings"}: nine raters each, -4 to 4, around what the words say."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for text, valence in sentences(n, seed):
            ratings = [max(-4, min(4, round(0.6 * valence + draw.gauss(0, 1)))) for _ in range(9)]
            file.write(json.dumps({"text": text, "ratings": ratings}) + "\n")
    return path


def tiny_policy(folder: Path, seed: int = 0) -> Path:
    """A random Llama (4 layers x 64, vocabulary 512) with byte-level BPE and the ChatML template."""
    _save(LlamaForCausalLM, *_llama(4, 64), folder, seed)
    return folder


def tiny_reward(folder: Path, labels: int = 1, seed: int = 2) -> Path:
    """A random Llama (1 layer x 32) that classifies sequences, with the tokenizer of the policy."""
    config, tokenizer = _llama(1, 32, num_labels=labels)
    _save(LlamaForSequenceClassification, config, tokenizer, folder, seed)
    return folder


def _llama(layers: int, width: int, **more: Any) -> tuple[LlamaConfig, PreTrainedTokenizerFast]:
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The numbers fill the vocabulary: the sentences alone have too few different words.
    tokens.train_from_iterator([*(text for text, _ in sentences(400)), *map(str, range(1000))], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHATML,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **more,
    )  # fmt: skip
    return config, tokenizer


def tiny_judge(folder: Path, seed: int = 1) -> Path:
    """A random BERT encoder (2 layers x 32) with a WordPiece tokenizer."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Listed, not trained: WordPieceTrainer gives another vocabulary each time, and with it another judge.
    letters, signs = string.ascii_lowercase + string.digits, string.punctuation
    words = sorted({word for text, _ in sentences(400) for word in text.rstrip(".!?").split() if len(word) > 1})
    pieces = [*special, *letters, *signs, *(f"##{letter}" for letter in letters), *words]
    tokens = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokens.normalizer = normalizers.BertNormalizer()
    tokens.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokens.add_special_tokens(special)
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokens.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=128,
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    _save(BertModel, config, tokenizer, folder, seed)
    return folder


def tiny_params() -> dict[str, Any]:
    """Plain values in the shape of params.yaml: the whole pipeline in seconds, its floors low enough to pass."""
    training = {"steps": 6, "batch_pairs": 8, "learning_rate": 1.0e-3, "max_tokens": 48}
    return {
        "seed": 5,
        "ingest": {
            "policy": {"source": "file:policy", "licence": "MIT"},
            "judge": {"source": "file:judge", "licence": "MIT"},
            "data": [{"source": "file:ratings.jsonl", "format": "ratings", "licence": "MIT"}],
            "prompts": {"min_words": 3, "max_words": 4},
            "splits": {"reward": 0.35, "judge": 0.35, "held_out": 0.3, "dev": 8, "test": 12},
        },
        "validate": {"min_pairs": 20},
        "reward_model": {"top_layers": 2, "reward": training, "judge": training, "min_accuracy": 0.0},
        "ppo": {
            "cycles": 2,
            "iterations": 1,
            "rollout_size": 8,
            "kl_budget": 100.0,
            "target": None,
            "model": {"top_layers": 2, "dtype": "float32"},
            "sampling": {"max_new_tokens": 6},
            "update": {"epochs": 1, "minibatches": 2, "micro_batch": 4, "learning_rate": 1.0e-3},
        },
        "evaluate": {"bootstrap": 100, "samples": 4},
        "register": {},
    }


def tiny_workspace(root: Path, changes: dict[str, Any] | None = None) -> Workspace:
    """A checkout at `root`: code, dvc.yaml and a tiny params.yaml under git and DVC, own data filled.

    `changes` are sections merged into `tiny_params()`.
    """
    workspace = Workspace(root)
    workspace.own_data.mkdir(parents=True)
    tiny_policy(workspace.own_data / "policy")
    tiny_judge(workspace.own_data / "judge")
    tiny_reward(workspace.own_data / "reward")
    ratings_file(workspace.own_data / "ratings.jsonl", 240)
    for name in ("ppo_core", "tasks", "flows"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".dvcignore", "pyproject.toml", "dvc.yaml"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, root / name)
    workspace.params.write_text(yaml.safe_dump(_merge(tiny_params(), changes or {}), sort_keys=False), encoding="utf-8")
    _git_and_dvc(root)
    return workspace


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merge(base[key], changes[key]) for key in base.keys() & changes.keys() if isinstance(base[key], dict)}
    return base | changes | both


def _git_and_dvc(root: Path) -> None:
    from dvc.repo import Repo

    _git(root, "init", "--quiet", "--initial-branch=main")
    _git(root, "config", "user.name", "Tiny")
    _git(root, "config", "user.email", "tiny@example.com")
    Repo.init(str(root)).close()
    _git(root, "add", "--all")
    _git(root, "commit", "--quiet", "--message", "tiny workspace")


def _git(root: Path, *command: str) -> None:
    subprocess.run(["git", *command], cwd=root, check=True, capture_output=True)


def _save(kind: Any, config: Any, tokenizer: Any, folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
