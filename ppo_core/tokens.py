"""Text to tokens and back, the same for training and for sampling. Text from data never becomes a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
# Private-use characters: no chat template has a use for them.
_PLACE = "\ue000{}\ue001"
_PLACES = re.compile("\ue000([0-9]+)\ue001")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, format: str) -> list[int]:
    """Token ids of a prompt, at least one.

    `format` "text": the plain text behind the beginning-of-sequence token, if the tokenizer has one.
    "chat": a JSON array of {"role", "content"} in the model's own template, ready for the assistant's reply.
    Raises ValueError for a conversation that the template refuses.
    """
    if format == "chat":
        return _encode_chat(tokenizer, json.loads(prompt), reply=True)
    if format != "text":
        raise ValueError(f"format is {format!r}, must be 'text' or 'chat'")
    start = tokenizer.bos_token_id
    if start is None and not prompt:
        # Something must come first, and what ends a document comes closest to what begins one.
        start = tokenizer.eos_token_id
    return [*([] if start is None else [start]), *encode_response(tokenizer, prompt)]


def encode_conversation(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """Token ids of a chat prompt and the assistant's reply to it, in the model's own template.

    Raises ValueError for a conversation that the template refuses.
    """
    return _encode_chat(tokenizer, [*json.loads(prompt), {"role": "assistant", "content": response}], reply=False)


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text: no special tokens, no end-of-sequence."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids as it stands, control tokens left out."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, reply: bool) -> list[int]:
    """Render the template with places instead of contents, then encode template and contents each in its own way.

    `reply`: whether the assistant's begins behind them.
    """
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"role {message['role']!r} is none of {', '.join(ROLES)}")
    places = [{"role": message["role"], "content": _PLACE.format(i)} for i, message in enumerate(messages)]
    try:
        rendered = tokenizer.apply_chat_template(places, add_generation_prompt=reply, tokenize=False)
    except Exception as error:  # a template is a program that came with the model: it may fail in any way
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"the model's chat template refuses the conversation: {what}") from error
    ids: list[int] = []
    # re.split gives template, index, template, index, ..., template.
    for i, part in enumerate(_PLACES.split(rendered)):
        if i % 2:
            ids += encode_response(tokenizer, messages[int(part)]["content"])
        elif part:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return ids
