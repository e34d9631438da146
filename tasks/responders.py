"""The two models that the evaluate stage compares."""

from __future__ import annotations

from ppo_core.decoder import load_causal_lm
from ppo_core.models import ActorCritic
from ppo_core.precision import arithmetic
from tasks.params import Params
from tasks.preference_models import load_base, load_tokenizer
from tasks.responses import Examiner, Responses
from tasks.rewards import load_trained, new_reward
from tasks.workspace import Workspace


class Responders:
    """Reference and aligned policy, as the evaluate stage asks them."""

    def __init__(self, params: Params, workspace: Workspace) -> None:
        base, tokenizer = load_base(workspace, params.ppo.model.dtype), load_tokenizer(workspace.base_model)
        self.workspace = workspace
        # Of a policy in models/policy no adapter is left, and nobody asks for values.
        shared = params.ppo.model.trainable == "top_layers"
        form = {"trainable": "top_layers" if shared else "full", "critic": "shared"}
        self.model = ActorCritic(base, params.ppo.model.model_copy(update=form))
        self.start = {name: p.clone() for name, p in self.model.policy_weights().items()}
        self.dtype = params.ppo.model.dtype
        trained = load_trained(params, workspace, base)
        reward = new_reward(params, workspace, tokenizer, self.model, trained)
        self.examiner = Examiner(params, workspace, reward, tokenizer)

    def reference(self, split: str) -> Responses:
        """The model before training: the policy as it starts."""
        self.model.load_policy(self.start)
        return self.examiner.ask(self.model, split)

    def policy(self, split: str) -> Responses:
        """The aligned policy in models/policy."""
        self.model.load_policy(load_causal_lm(self.workspace.policy, arithmetic(self.dtype)).state_dict())
        return self.examiner.ask(self.model, split)
