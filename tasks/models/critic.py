"""The critic that was trained beside a policy, and the trainer's counters: what the inspector needs of a training.

`models/critic` holds those of the result as DVC keeps them, and names the policy that they belong to. Those of every
cycle lie in the run's folder.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppo_core.checkpoint import load_plain, load_tensors, needs_room
from ppo_core.digests import sha256
from ppo_core.rewards import RunningMoments
from tasks.errors import DataError, IntegrityError
from tasks.run_folder import COUNTERS, CRITIC, RunFolder
from tasks.seals import SEAL, seal
from tasks.workspace import Workspace, replacing

SOURCE = "source.json"


@dataclass(frozen=True)
class Critic:
    """What of a training, beside the policy, decides what a token is worth."""

    cycle: int
    state: dict[str, Tensor]
    """For `ActorCritic.load_critic`."""
    kl_coef: float
    """As the next iteration would have used it."""
    moments: RunningMoments
    """Of the scores seen so far."""


def write_critic(workspace: Workspace, folder: RunFolder, cycle: int) -> None:
    """Put the critic of `cycle` in its place, beside the policy of the same cycle that is in its own already."""
    weights, counters = folder.critic(cycle)
    with replacing(workspace.critic) as beside:
        with needs_room(beside, weights.stat().st_size):
            shutil.copyfile(weights, beside / CRITIC)
        shutil.copyfile(counters, beside / COUNTERS)
        source = {"cycle": cycle, "policy": sha256(workspace.policy / SEAL)}
        (beside / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        seal(beside)


def load_critic(workspace: Workspace) -> Critic:
    """The critic of the policy in models/policy.

    Raises DataError where there is none, IntegrityError where it belongs to another policy.
    """
    place = str(workspace.critic.relative_to(workspace.root))
    mend = "run the ppo stage again: it leaves the critic beside the policy, and repeats no cycle that is finished"
    if not (workspace.critic / SOURCE).is_file():
        raise DataError("is missing: this policy was trained without keeping its critic", place, mend)
    source = load_plain(workspace.critic / SOURCE)
    if sha256(workspace.policy / SEAL) != source["policy"]:
        raise IntegrityError("belongs to another policy than the one in models/policy", place, mend)
    tensors = load_tensors(workspace.critic / CRITIC)
    return _critic(source["cycle"], tensors, load_plain(workspace.critic / COUNTERS))


def critic_of_cycle(folder: RunFolder, cycle: int) -> Critic:
    """The critic after a finished cycle."""
    weights, counters = folder.critic(cycle)
    return _critic(cycle, load_tensors(weights), load_plain(counters))


def _critic(cycle: int, tensors: dict[str, Tensor], counters: dict[str, Any]) -> Critic:
    moments = RunningMoments()
    moments.load_state_dict(counters["moments"])
    return Critic(cycle, tensors, counters["kl"]["coef"], moments)
