"""The picture in which PPO is explained: inspected completions as blocks of a page (`tasks.pages`).

The page needs no script: what colours the tokens is chosen by radio buttons that the style sheet reads. `STYLE` is to
be handed to `pages.page` along with the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tasks import pages
from tasks.inspector.diverging import Diverging, signed
from tasks.inspector.drawn_tree import drawn, from_the_best, token_label
from tasks.inspector.inspection import Completion, Inspection, Token
from tasks.inspector.style import LENSES, NOT_PENALISED, PENALISED, STYLE
from tasks.inspector.token_texts import runs_right_to_left

__all__ = ["STYLE", "blocks", "page"]

LEAD = (
    "What PPO sees of a response: what each token cost, what the critic expected before it, and how much better than "
    "expected it turned out."
)
_TABLE = (
    "token", "log-prob.", "reference", "KL", "reward", "value", "advantage", "in the update", "return", "entropy",
)  # fmt: skip


@dataclass(frozen=True)
class _Scales:
    """Common to the whole page, so that everything on it can be compared."""

    colours: dict[str, Diverging]
    """By lens, and `score`."""
    low: float
    high: float
    """Of the curves."""

    @classmethod
    def over(cls, completions: Sequence[Completion]) -> _Scales:
        tokens = [token for completion in completions for token in completion.tokens]
        colours = {lens: Diverging.over([getattr(token, lens) for token in tokens]) for lens in LENSES}
        # What is expected and what came of it are compared, so they share a scale.
        outcomes = [*(token.value for token in tokens), *(completion.score for completion in completions)]
        colours["value"] = colours["score"] = Diverging.over(outcomes)
        heights = [0.0, *(token.value for token in tokens), *(c.tokens[-1].reward for c in completions if c.tokens)]
        return cls(colours, min(heights), max(heights))

    def height(self, number: float) -> str:
        """Its place in a curve's band, from 4 (top) to 96."""
        span = self.high - self.low
        return f"{50 if not span else 96 - 92 * (number - self.low) / span:.1f}"


def page(inspections: Sequence[Inspection]) -> str:
    """The whole document, which needs nothing else."""
    return pages.page("Inspector", LEAD, blocks(inspections), STYLE)


def blocks(inspections: Sequence[Inspection]) -> list[Markup]:
    """The key, then each prompt with the tree of its completions and their tokens. Nothing for no inspections."""
    if not inspections:
        return []
    scales = _Scales.over([completion for inspection in inspections for completion in inspection.completions])
    return [_key(scales, inspections[0].kl_coef), *(_inspection(inspection, scales) for inspection in inspections)]


def _key(scales: _Scales, kl_coef: float) -> Markup:
    """What colours the tokens, and how to read the rest."""
    choice = Markup('<label><input type="radio" name="lens" id="lens-{}"{}>{}</label>')
    choices = Markup("").join(
        choice.format(lens, Markup(" checked") if lens == "value" else "", meaning.partition(":")[0])
        for lens, meaning in LENSES.items()
    )
    reward = PENALISED.format(kl_coef=kl_coef) if kl_coef else NOT_PENALISED
    legend = Markup('<div class="scale scale-{}"><p>{}</p>{}</div>')
    legends = Markup("").join(
        legend.format(lens, meaning.format(reward=reward), scales.colours[lens].legend())
        for lens, meaning in LENSES.items()
    )
    curve = (
        f"The curve above the text is the value, from token to token: its band reaches from {signed(scales.low)} "
        f"to {signed(scales.high)}, the thin line is 0. At the end it meets what came: the dot is the last token's "
        "reward, the dashed line how far off the critic was. Point at a token for its numbers."
    )
    paths = (
        "In the tree, the paths of a prompt's completions part where their tokens differ. A line is as wide as many "
        "completions take it, a fork has the colour of the critic's value there, an end that of its score. Of long "
        "runs the middle is left out."
    )
    return Markup(
        '<div class="lens"><fieldset><legend>Tokens are coloured by</legend>{}</fieldset>{}<p>{}</p><p>{}</p></div>'
    ).format(choices, legends, curve, paths)


def _inspection(inspection: Inspection, scales: _Scales) -> Markup:
    completions = inspection.completions
    scores = [completion.score for completion in completions]
    about = (
        f"{len(completions)} completions by {_who(inspection.cycle)}: scores from {signed(min(scores))} to "
        f"{signed(max(scores))}, mean {signed(sum(scores) / len(scores))} standard deviations of human text; "
        f"mean KL {sum(c.kl for c in completions) / len(completions):.2f} nats."
    )
    return Markup(
        '<article class="inspection"><div class="prompt">{}</div><p class="about">{}</p>'
        '<div class="wide paths" tabindex="0">{}</div>{}</article>'
    ).format(
        _prompt(inspection),
        about,
        drawn(completions, scales.colours["value"], scales.colours["score"]),
        Markup("\n").join(_completion(*said, scales) for said in from_the_best(completions)),
    )


def _who(cycle: int) -> str:
    return f"the policy after cycle {cycle}" if cycle else "the reference"


def _prompt(inspection: Inspection) -> Markup:
    text, form = inspection.prompt
    if form == "chat":
        turn = Markup('<p dir="auto"><b>{}</b> {}</p>')
        return Markup("").join(turn.format(each["role"], each["content"]) for each in json.loads(text))
    return Markup('<p dir="auto">{}</p>').format(text or "(no prompt: the model begins)")


def _completion(completion: Completion, times: int, scales: _Scales) -> Markup:
    tokens = completion.tokens
    text = "".join(token.text for token in tokens)
    facts = f"KL {completion.kl:.2f} nats · {len(tokens)} tokens, {'ended by itself' if completion.ended else 'cut'}"
    facts += f" · said {times} times" if times > 1 else ""
    words = Markup("").join(_word(completion, word, scales) for word in _words(tokens))
    rows = [
        [token_label(token), token.logprob, token.ref_logprob, token.kl, token.reward, token.value, token.advantage,
         token.update_advantage, token.target, token.entropy]
        for token in tokens
    ]  # fmt: skip
    return Markup(
        '<section class="completion"><h3><span class="score" style="background:{}">{}</span> {}</h3>'
        '<div class="tokens" dir="{}">{}</div><details><summary>All numbers</summary>{}</details></section>'
    ).format(
        scales.colours["score"].colour(completion.score),
        signed(completion.score),
        facts,
        "rtl" if runs_right_to_left(text) else "ltr",
        words,
        pages.table(_TABLE, rows),
    )


def _words(tokens: Sequence[Token]) -> Iterator[list[int]]:
    """Places of tokens that stay on one line together: a word begins with white space, and a control token alone."""
    word: list[int] = []
    for t, token in enumerate(tokens):
        if word and (token.text[:1].isspace() or token.control or _breaks(tokens[t - 1])):
            yield word
            word = []
        word.append(t)
    if word:
        yield word


def _breaks(token: Token) -> bool:
    return "\n" in token.text


def _word(completion: Completion, word: Sequence[int], scales: _Scales) -> Markup:
    end = Markup('<span class="break"></span>') if _breaks(completion.tokens[word[-1]]) else ""
    return Markup('<span class="word">{}</span>{}').format(
        Markup("").join(_token(completion, t, scales) for t in word), end
    )


def _token(completion: Completion, t: int, scales: _Scales) -> Markup:
    token = completion.tokens[t]
    colours = ";".join(f"--{lens}:{scales.colours[lens].colour(getattr(token, lens))}" for lens in LENSES)
    return Markup('<span class="token{}" style="{}" title="{}">{}<span dir="auto">{}</span></span>').format(
        "" if token.text else " mute",
        colours,
        _numbers(completion, t),
        _curve(completion, t, scales),
        token_label(token),
    )


def _curve(completion: Completion, t: int, scales: _Scales) -> Markup:
    """The value from before the token to before the next one; behind the last token, the reward that came."""
    tokens, zero = completion.tokens, scales.height(0.0)
    start, last = scales.height(tokens[t].value), t == len(tokens) - 1
    end = scales.height(tokens[t].reward if last else tokens[t + 1].value)
    if last:
        line = Markup('<path class="error" d="M0 {}L97 {end}"/><path class="dot" d="M97 {end}h0"/>').format(
            start, end=end
        )
    else:
        line = Markup('<path class="area" d="M0 {zero}V{start}L100 {end}V{zero}"/>')
        line += Markup('<path class="value" d="M0 {start}L100 {end}"/>')
    opening = Markup('<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">')
    line += Markup('<path class="zero" d="M0 {zero}H100"/></svg>')
    return opening + line.format(zero=zero, start=start, end=end)


def _numbers(completion: Completion, t: int) -> str:
    """What is said of a token where one points at it."""
    token = completion.tokens[t]
    return "\n".join(
        (
            f"{token_label(token)}   token {t + 1} of {len(completion.tokens)}",
            f"value before it {signed(token.value)}, return {signed(token.target)}",
            f"reward {signed(token.reward)}",
            f"advantage {signed(token.advantage)}, in the update {signed(token.update_advantage)}",
            f"KL {signed(token.kl)}: log-probability {token.logprob:.2f}, reference {token.ref_logprob:.2f}",
            f"entropy {token.entropy:.2f} nats",
        )
    )
