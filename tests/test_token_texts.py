"""What single tokens say: parts of characters, signs that nobody sees, text that is too long."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_core.tokens import encode_response
from tasks.inspector.token_texts import cells, control_name, elide, pieces, runs_right_to_left, visible
from tasks.models.preference_models import load_tokenizer


@pytest.mark.parametrize("text", ["the film", " quite 🙂 odd", "é", "👩‍👩‍👧 ok", "فيلم", "a\n\tb\x00c", "�", "", "🙂"])
def test_pieces_make_up_the_text(policy_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(policy_folder)
    ids = encode_response(tokenizer, text)
    assert "".join(pieces(tokenizer, ids)) == text
    assert len(pieces(tokenizer, ids)) == len(ids)


def test_the_token_that_completes_a_character_brings_it(policy_folder: Path) -> None:
    tokenizer = load_tokenizer(policy_folder)
    ids = encode_response(tokenizer, "🙂")
    assert len(ids) == 4, "the tiny vocabulary has single bytes for it"
    assert pieces(tokenizer, ids) == ["", "", "", "🙂"]
    cut = pieces(tokenizer, [*encode_response(tokenizer, "ab"), *ids[:2]])
    assert "".join(cut) == "ab�"
    (stray,) = encode_response(tokenizer, "é")[:1]
    film = encode_response(tokenizer, " film")
    assert pieces(tokenizer, [stray, *film]) == ["�", " film"]


def test_control_tokens_have_a_name_and_no_text(policy_folder: Path) -> None:
    tokenizer = load_tokenizer(policy_folder)
    ids = [*encode_response(tokenizer, "film"), tokenizer.eos_token_id]
    assert pieces(tokenizer, ids)[-1] == ""
    assert control_name(tokenizer, ids[-1]) == "<|im_end|>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"), ("a\n", "a⏎"), ("\t\r", "⇥␍"), ("\x00\x1b", "␀␛"), ("\u202eabc", "⟨202E⟩abc"),
        ("\u2028", "⟨2028⟩"), ("👩\u200d👧", "👩\u200d👧"), ("می\u200cخواهم", "می\u200cخواهم"), ("\ufeff", "⟨FEFF⟩"),
    ],
)  # fmt: skip
def test_what_cannot_be_seen_has_a_sign(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "right"),
    [("هذا film", True), ("שלום", True), ("a هذا", False), ("12 هذا", True), ("123", False), ("", False)],
)
def test_the_first_letter_says_which_way_a_text_runs(text: str, right: bool) -> None:
    assert runs_right_to_left(text) is right


def test_long_text_loses_its_middle() -> None:
    assert elide("abcdefghij", 10) == "abcdefghij"
    assert elide("abcdefghijk", 10) == "abcdef…ijk"
    assert cells("电影e\u0301") == 5
    assert elide("电影电影电影电影", 9) == "电影电…影"
    assert all(cells(elide("电影ab" * 9, limit)) <= limit for limit in range(4, 40))
