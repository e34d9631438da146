"""The sampler: what ends a response, what counts in it, and what does not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from families import VOCABULARY, plain_model, sampler_of, tiny_model
from runs import PROMPTS
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ppo_core.config import SamplingConfig
from ppo_core.decoder import clone, split
from ppo_core.law import SamplingLaw
from ppo_core.rollout import text_attention
from ppo_core.sampling import Sampler, sample
from ppo_core.tokens import encode_response
from ppo_core.types import Samples

EOS, STOP = 2, 9
BYTES = {3: "é".encode()[:1], 4: "é".encode()[1:], 5: "€".encode()[:2], 6: "€".encode()[2:]}


def read(ids: Sequence[int]) -> str:
    """Each token is the character of that code, but those of `BYTES` are parts of one."""
    return b"".join(BYTES.get(i, bytes([i])) for i in ids).decode(errors="replace")


class Script:
    """A head that makes the sampler say what is written: token t of row b is `rows[b][t]`."""

    def __init__(self, rows: list[list[int]], vocabulary: int = VOCABULARY) -> None:
        self.rows, self.vocabulary, self.calls = rows, vocabulary, 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), self.vocabulary)
        for row, script in enumerate(self.rows):
            logits[row, script[min(self.calls, len(script) - 1)]] = 100.0
        self.calls += 1
        return logits


def say(rows: list[list[int]], *, stop_tokens=(EOS, STOP), pad: int = EOS, decode=read, **sampling) -> Samples:
    """What the sampler makes of a model that wants to say `rows`."""
    law = SamplingLaw(SamplingConfig.model_validate({"max_new_tokens": 6} | sampling), stop_tokens, decode)
    prompts = [PROMPTS[row % 4] for row in range(len(rows))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppo_core.sampling.LEAVING", 0)  # every row stays where the script has it
        return sample(sampler_of(plain_model("Llama")), Script(rows), prompts, law, range(len(rows)), pad)


def responses(samples: Samples) -> list[list[int]]:
    rows = zip(samples.sequences.responses, samples.sequences.mask, strict=True)
    return [tokens[mask].tolist() for tokens, mask in rows]


def texts(samples: Samples) -> list[list[int]]:
    rows = zip(samples.sequences.responses, samples.text_lengths, strict=True)
    return [tokens[:n].tolist() for tokens, n in rows]


@pytest.mark.parametrize("pad", [EOS, 0])
def test_eos_and_stop_tokens_end_a_response_as_actions_that_are_no_text(pad: int):
    samples = say([[EOS], [5, 6, STOP, 7], [5, 6, 7, 8, 10, 11, 12], [5, 6, 7, 8, 10, EOS]], pad=pad)
    assert responses(samples) == [[EOS], [5, 6, STOP], [5, 6, 7, 8, 10, 11], [5, 6, 7, 8, 10, EOS]]
    assert texts(samples) == [[], [5, 6], [5, 6, 7, 8, 10, 11], [5, 6, 7, 8, 10]]
    assert samples.ended.tolist() == [True, True, False, True]
    sequences = samples.sequences
    assert (sequences.responses[~sequences.mask] == pad).all()
    assert (samples.logprobs[~sequences.mask] == 0).all()
    prompts = sequences.attention[:, : sequences.prompt_length]
    assert [row[there].tolist() for row, there in zip(sequences.tokens[:, :6], prompts, strict=True)] == PROMPTS
    text = text_attention(samples)[:, sequences.prompt_length :]
    assert text.sum(dim=1).tolist() == [0, 2, 6, 5]


@pytest.mark.parametrize("minimum", [0, 1, 3, 6])
def test_a_minimum_length_forbids_ends_exactly_so_long(minimum: int):
    # Each row wants nothing but to end; where it may not, it says something else.
    samples = say([[EOS], [STOP], [EOS], [STOP]], min_new_tokens=minimum)
    for row, end in enumerate([EOS, STOP, EOS, STOP]):
        response = responses(samples)[row]
        assert len(response) == min(minimum + 1, 6)
        assert not {EOS, STOP} & set(response[:minimum])
        assert response[minimum:] == [end][: 6 - minimum]
    assert samples.ended.tolist() == [minimum < 6] * 4


CASES = {
    "one token": ("a", "xyab", "xya"),
    "several tokens": ("abc", "xabcd", "xabc"),
    "a start that leads nowhere": ("aab", "aaabc", "aaab"),
    "the last chance": ("f", "abcdef", "abcdef"),
    "a character of two tokens": ("é", "aébc", "aé"),
    "characters of two tokens in a row": ("é€", "éé€x", "éé€"),
    "the first of two": ("cd|b", "abcd", "ab"),
    "none": ("zz", "azbzcz", "azbzcz"),
}


def write(text: str) -> list[int]:
    return [i for character in text for i in {"é": [3, 4], "€": [5, 6]}.get(character, [ord(character)])]


@pytest.mark.parametrize(("stop", "wanted", "said"), CASES.values(), ids=CASES.keys())
def test_a_stop_string_ends_a_response_and_stays_in_it(stop: str, wanted: str, said: str):
    samples = say([write(wanted)] * 2, stop_strings=stop.split("|"))
    assert responses(samples) == texts(samples) == [write(said)] * 2
    assert samples.ended.tolist() == [stop != "zz"] * 2


def test_a_stop_string_before_the_minimum_length_ends_nothing_now_or_later():
    samples = say([write("abxabx"), write("abxxxx"), write("xxabxx")], stop_strings=["ab"], min_new_tokens=4)
    assert [read(row) for row in responses(samples)] == ["abxab", "abxxxx", "xxab"]
    assert samples.ended.tolist() == [True, False, True]


def test_a_tokenizer_sees_a_stop_string_across_its_tokens(policy_folder):
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    law = SamplingLaw.of(SamplingConfig(stop_strings=("naïve – 日本",)), tokenizer)
    ids = encode_response(tokenizer, "is it naïve – 日本")
    assert [law.ends(ids[:n]) for n in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [True]
    assert not law.ends([*ids, *encode_response(tokenizer, "?")])


def test_a_stop_string_may_begin_with_the_space_that_a_decoder_drops_at_the_start():
    vocabulary = {"\u2581a": 0, "\u2581b": 1, "?": 2, "\u2581?": 3}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokens.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, clean_up_tokenization_spaces=True)
    assert tokenizer.decode([0, 1]) == "a b"
    law = SamplingLaw.of(SamplingConfig(stop_strings=(" ",)), tokenizer)
    assert [law.ends([0]), law.ends([0, 1]), law.ends([0, 2])] == [False, True, False]
    # Nothing is cleaned up: that would take the space away again.
    assert SamplingLaw.of(SamplingConfig(stop_strings=(" ?",)), tokenizer).ends([0, 3])


OPTIONS = {
    "plain": {},
    "top_k": {"top_k": 5, "temperature": 0.7},
    "top_p": {"top_p": 0.7, "temperature": 1.5},
    "min": {"min_new_tokens": 3, "top_k": 9},
    "strings": {"stop_strings": ["a", "b", "c", "d", "\x10", "\x11", "\x12"]},
}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", ["Mistral", "Bloom"])
def test_a_row_does_not_depend_on_its_neighbours(option: dict, family: str):
    model = plain_model(family)
    law = SamplingLaw(SamplingConfig.model_validate({"max_new_tokens": 8} | option), range(20, 100, 7), read)

    def draw(prompts: list[list[int]], seeds: Sequence[int]) -> Samples:
        return sample(sampler_of(model), model.lm_head, prompts, law, seeds, 0)

    together = draw(PROMPTS * 2, range(8))
    assert len({len(row) for row in responses(together)}) > 2
    for row, prompt in enumerate(PROMPTS * 2):
        single, kept = draw([prompt], [row]), together.rows(torch.tensor([row]))
        n = len(responses(kept)[0])
        assert responses(single) == responses(kept)
        assert (single.ended, single.text_lengths) == (kept.ended, kept.text_lengths)
        torch.testing.assert_close(single.logprobs[:, :n], kept.logprobs, atol=1e-5, rtol=0)
        if law.truncates:
            sets = [{*part.sequences.kept[0, t].tolist()} - {-1} for part in (single, kept) for t in range(n)]
            assert sets[:n] == sets[n:]


def test_a_row_draws_with_its_own_seed():
    model = plain_model("Llama")
    law = SamplingLaw(SamplingConfig(max_new_tokens=8), ())
    rows = responses(sample(sampler_of(model), model.lm_head, [PROMPTS[0]] * 3, law, [4, 5, 4], 0))
    assert rows[0] == rows[2] != rows[1]


def test_what_the_trunk_said_while_sampling_is_what_it_says_of_the_sampler_of():
    # Rows end at different lengths, so that they leave; by a stop token, by a string, and by the cut.
    model = tiny_model("Llama")
    trunk, top = split(model, 2)
    settings = SamplingConfig(max_new_tokens=8, stop_strings=("a", "b", "c", "d"))
    law = SamplingLaw(settings, range(20, 100, 7), read)
    samples = sample(Sampler(trunk, clone(top)), model.lm_head, PROMPTS * 3, law, range(12), 0)
    lengths = samples.sequences.mask.sum(dim=1)
    by_string = samples.ended & (samples.text_lengths == lengths)
    assert lengths.unique().numel() > 2
    assert by_string.any()
    assert (~samples.ended).any()
    assert (samples.ended & ~by_string).any()
    with torch.no_grad():
        expected = trunk(samples.sequences.tokens, samples.sequences.attention)
    text = text_attention(samples)  # all that the policy, the critic and the reward model read
    assert samples.activations is not None
    torch.testing.assert_close(samples.activations[text], expected[text], atol=1e-5, rtol=0)
