"""What tokens can be coloured by, and the style sheet of the inspector: in place of a script it reads radio buttons."""

from __future__ import annotations

LENSES = {
    "value": "Value: the score that the critic expects in the end, from the text before the token alone.",
    "reward": "Reward: what the token brought in. {reward}",
    "advantage": "Advantage: how much better than the critic had expected things went from this token on (GAE), in the "
    "unit of rewards. PPO makes tokens with a positive one likelier, those with a negative one less likely. (For the "
    "update it is whitened over a whole rollout; here over what is inspected, and in the numbers only.)",
    "kl": "KL: log-probability under the policy less that under the reference. Above 0, training made it likelier.",
}
"""Name and meaning; each is a field of `tasks.inspector.inspection.Token`."""
PENALISED = "Each pays {kl_coef:g} times its KL; the last one gets the response's score, too."
NOT_PENALISED = "Only the last one gets any, the response's score: the KL penalty is no part of the rewards here."

_CHOSEN = "\n".join(
    f"body:has(#lens-{lens}:checked) .token > span {{ background: var(--{lens}); }}\n"
    f"body:has(#lens-{lens}:checked) .scale-{lens} {{ display: block; }}"
    for lens in LENSES
)

STYLE = (
    """
.lens { margin: var(--gap) 0; padding: 1rem 1.25rem; border: 1px solid var(--line); border-radius: .5rem; }
.lens fieldset { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; margin: 0; padding: 0; border: 0; }
.lens legend { float: left; margin-right: 1.25rem; padding: 0; color: var(--soft); font-weight: 600; }
.lens label { display: inline-flex; gap: .4rem; align-items: center; cursor: pointer; }
.lens input { margin: 0; accent-color: var(--accent); }
.lens p { margin: .75rem 0; max-width: 52rem; color: var(--soft); font-size: .9375rem; line-height: 1.5; }
.lens > p:last-child { margin-bottom: 0; }
.scale { display: none; clear: both; }
@supports not selector(body:has(a)) { .scale-value { display: block; } }
.swatches { display: flex; max-width: 40rem; font-size: .75rem; text-align: center; }
.swatches span { flex: 1; padding: .3rem 0; min-width: 0; }
.inspection { margin: 2.5rem 0; }
.prompt { padding: .1rem 1.25rem; border-left: .25rem solid var(--accent); font-size: 1.125rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.prompt p { margin: .5rem 0; }
.prompt b { color: var(--soft); font-size: .8125rem; }
.about { color: var(--soft); }
.paths { margin: 1rem 0 2rem; }
.tree { display: block; max-width: none; height: auto; font: 12.5px/1 ui-monospace, "SFMono-Regular", Menlo, Consolas,
  "DejaVu Sans Mono", "Noto Sans Mono", monospace; }
.tree .branch { fill: none; stroke: #b6c2cf; stroke-linecap: round; }
.tree text { fill: var(--ink); white-space: pre; unicode-bidi: isolate; }
.tree .value { fill: var(--soft); font-size: 10.5px; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
.tree .score { font-size: 13.5px; font-weight: 700; }
.tree circle { stroke: var(--ink); stroke-width: 1.25; }
.completion { margin: 1.75rem 0; break-inside: avoid; }
.completion h3 { margin: 0 0 .35rem; color: var(--soft); font-size: .875rem; font-weight: 500; }
.completion .score { display: inline-block; margin-right: .35rem; padding: .1rem .6rem; border-radius: 1rem;
  color: var(--ink); font-weight: 700; }
.tokens { display: flex; flex-wrap: wrap; row-gap: 1rem; font-size: 1rem; line-height: 1.5; }
.word { display: flex; flex-wrap: wrap; max-width: 100%; }
.break { flex-basis: 100%; }
.token { display: flex; flex-direction: column; min-width: .85rem; max-width: 100%; }
.token svg { display: block; width: 0; min-width: 100%; height: 3.25rem; margin-bottom: .2rem;
  overflow: visible; }
.token path { fill: none; vector-effect: non-scaling-stroke; }
.token .area { fill: #dde3ea; }
.token .zero { stroke: var(--line); stroke-width: 1; }
.token .value, .token .error { stroke: var(--ink); stroke-width: 1.75; stroke-linecap: round; }
.token .error { stroke-width: 1.25; stroke-dasharray: 2 3.5; }
.token .dot { stroke: var(--ink); stroke-width: 7; stroke-linecap: round; }
.tokens[dir=rtl] svg { transform: scaleX(-1); }
.token > span { padding: .05rem .1rem; border-inline-end: 1px solid #fff; background: var(--value); color: var(--ink);
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.token.mute > span { font-size: .75rem; line-height: 2; }
.token:hover > span { outline: 2px solid var(--ink); outline-offset: -1px; }
"""
    + _CHOSEN
    + """
.completion details { margin-top: .5rem; font-size: .875rem; }
.completion summary { color: var(--soft); cursor: pointer; }
.completion td:first-child { white-space: pre; font-family: ui-monospace, Menlo, Consolas, monospace; }
@media print {
  .lens fieldset, .completion details { display: none; }
  .tree { width: 100%; }
  .token > span, .swatches span, .completion .score, .tree circle { print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  .paths, .prompt { break-inside: avoid; }
}
"""
)
