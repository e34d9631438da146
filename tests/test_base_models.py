"""tasks.models.base_models: a GGUF file becomes the model that it was written from, once."""

from __future__ import annotations

import json
import shutil

import gguf
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.data.sources import Fetched
from tasks.errors import DataError
from tasks.models import base_models
from tasks.models.base_models import write_policy, write_reward
from tasks.params import check_params
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


@pytest.fixture
def adapter(tmp_path, policy_folder):
    """A LoRA adapter that peft has saved, of all linear layers, none of it zero; its tokenizer has another template."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(policy_folder),
        peft.LoraConfig(r=3, lora_alpha=9, target_modules="all-linear", use_rslora=True),
    )
    draw = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=draw)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def merge(tmp_path, policy, adapter=None):
    named = {name: Fetched(path, name, "", "") for name, path in (("base", policy), ("sft", adapter)) if path}
    params = check_params(tiny.tiny_params()).ingest
    write_policy(named["base"], tmp_path / "merged", params, Workspace(tmp_path), named.get("sft"))
    return tmp_path / "merged"


def test_an_adapter_becomes_part_of_the_policy(policy_folder, adapter, tmp_path):
    folder = merge(tmp_path, policy_folder, adapter)
    base = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert ours.dtype == torch.float32
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    before = AutoModelForCausalLM.from_pretrained(policy_folder).state_dict()
    moved = {name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(moved) == 4 * 7
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages[0]['content'] }}"
    assert not list(folder.glob("adapter*"))


def test_an_adapter_in_the_policys_own_folder_is_not_passed_over(policy_folder, adapter, tmp_path):
    both = shutil.copytree(policy_folder, tmp_path / "both")
    for file in adapter.glob("adapter*"):
        shutil.copy(file, both)
    with pytest.raises(DataError, match=r"base — holds a peft adapter — name it as ingest\.adapter"):
        merge(tmp_path, both)
    folder = merge(tmp_path, both, both)
    assert not torch.equal(*(weight(path) for path in (folder, policy_folder)))


def weight(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.layers.0.mlp.up_proj.weight"]


def test_an_adapter_that_does_not_fit_is_refused(policy_folder, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.3.", "layers.7."): t for name, t in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(DataError, match=r"sft — does not fit the policy: .*layers\.3\..*"):
        merge(tmp_path, policy_folder, adapter)
    save_file({name: t[:1] for name, t in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"sft — cannot be merged into the policy: .* size mismatch"):
        merge(tmp_path / "other", policy_folder, adapter)


def test_pickled_weights_of_an_adapter_are_not_read(policy_folder, adapter, tmp_path):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(DataError, match=r"sft — holds no adapter_model\.safetensors"):
        merge(tmp_path, policy_folder, adapter)


def test_a_reward_model_has_one_label_and_is_whole(tmp_path, policy_folder):
    two = Fetched(tiny.tiny_reward(tmp_path / "two", labels=2), "two", "", "")
    with pytest.raises(DataError, match="two — has 2 labels"):
        write_reward(two, tmp_path / "target")
    headless = Fetched(shutil.copytree(policy_folder, tmp_path / "headless"), "headless", "", "")
    config = json.loads((headless.path / "config.json").read_text())
    (headless.path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "good"}}))
    with pytest.raises(DataError, match=r"headless — lacks weights: score\.weight"):
        write_reward(headless, tmp_path / "other")
