"""tasks.base_models: a GGUF file becomes the model that it was written from, once."""

from __future__ import annotations

import json

import gguf
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import base_models
from tasks.base_models import write_policy
from tasks.errors import DataError
from tasks.params import check_params
from tasks.sources import Fetched
from tasks.workspace import Workspace


def write_gguf(folder, target):
    """The model in `folder` as a GGUF file, weights in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied to the embedding
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            # GGUF holds the two halves of a rotary pair side by side.
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tokenizer(writer, folder):
    saved = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in saved["model"]["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny.CHATML)


@pytest.fixture
def fetched(policy_folder, tmp_path):
    return Fetched(write_gguf(policy_folder, tmp_path / "tiny.gguf"), "tiny.gguf", "1", "")


@pytest.fixture
def write(tmp_path, fetched):
    """Writes the policy to a folder of the name given, and returns the folder."""
    params = check_params(tiny.tiny_params()).ingest

    def write(name):
        write_policy(fetched, tmp_path / name, params, Workspace(tmp_path))
        return tmp_path / name

    return write


def test_a_gguf_file_becomes_the_model_it_was_written_from(write, policy_folder):
    folder = write("base")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, policy_folder))
    text = "the film is brilliant, naïve and 日本"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (folder, policy_folder)]
    weights = [model.state_dict() for model in models]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_it_is_converted_once_and_again_only_if_the_result_was_damaged(write, monkeypatch, tmp_path):
    calls = []
    convert = base_models._convert
    monkeypatch.setattr(base_models, "_convert", lambda *paths: calls.append(paths) or convert(*paths))
    write("first")
    write("second")
    assert len(calls) == 1
    (kept,) = (tmp_path / "work" / "downloads").glob("*/model.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    assert (write("third") / "model.safetensors").read_bytes() == (
        tmp_path / "first" / "model.safetensors"
    ).read_bytes()
    assert len(calls) == 2


def test_weights_that_the_file_lacks_are_named_and_not_made_up(write, fetched):
    fetched.path.write_bytes(fetched.path.read_bytes().replace(b"blk.2.attn_v.weight", b"blk.2.attn_?.weight"))
    with pytest.raises(DataError, match=r"lacks weights: model\.layers\.2\.self_attn\.v_proj\.weight"):
        write("base")


@pytest.mark.parametrize("keep", [0, 3, 19, 1000, 200_000])
def test_a_file_that_is_cut_is_refused(write, fetched, keep):
    fetched.path.write_bytes(fetched.path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"tiny\.gguf — cannot be converted"):
        write("base")
