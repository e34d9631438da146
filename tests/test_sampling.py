"""The sampler: its law, what ends a response, and what does not depend on the batch."""

from __future__ import annotations

from pathlib import Path

import torch
from runs import EOS, PAD, PROMPTS, config, draw, law, trainer

from ppo_core.config import SamplingConfig
from ppo_core.sampling import inverse_cdf, sample


def test_a_sample_does_not_depend_on_its_neighbours(policy_folder: Path):
    model = trainer(policy_folder, config()).model
    together = draw(model, PROMPTS).sequences
    for row, prompt in enumerate(PROMPTS):
        settings = SamplingConfig(max_new_tokens=8)
        alone = sample(model.sampler, model.policy_head, [prompt], law(settings), [row], PAD).sequences
        kept = together.responses[row][together.mask[row]]
        assert alone.responses[0][alone.mask[0]].tolist() == kept.tolist()


def test_the_sampler_follows_the_law():
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(1))
    drawn = inverse_cdf(law.log().expand(n, 4), uniforms).bincount(minlength=4)
    chi_squared = ((drawn - n * law) ** 2 / (n * law)).sum().item()
    assert chi_squared < 16.27  # 99.9 % quantile at 3 degrees of freedom
    assert inverse_cdf(law.log().expand(2, 4), torch.tensor([0.0, 1 - 1e-7])).tolist() == [0, 3]


def test_responses_stop_after_eos_and_keep_it(policy_folder: Path):
    model = trainer(policy_folder, config()).model

    class AlwaysEos(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*hidden.shape[:-1], 512)
            logits[..., EOS] = 100.0
            return logits

    samples = sample(model.sampler, AlwaysEos(), PROMPTS, law(SamplingConfig()), range(4), PAD)
    assert samples.ended.all()
    assert samples.sequences.mask.sum(dim=1).tolist() == [1, 1, 1, 1]
    assert samples.sequences.responses[:, 0].tolist() == [EOS] * 4
