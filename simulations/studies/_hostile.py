"""Hostile sites for the poisoning study: they alter real handshakes and replies on the way to the server.

They are as strong as can be: they know the run, the guards, each other, and every honest reply of the round before they
answer. An update is never longer than the guards let pass, and its direction is as wrong as passes.

    scaling           the honest update, as long as passes
    sign-flip         the others' mean, turned round
    inflated          the same, from a site that says it has a million subjects
    little-is-enough  the others' mean less 1.5 standard deviations of theirs, number by number
    gate-mass         as sign-flip, and every layer's gate mass laid on the expert that the others used least

Source:
    Baruch et al. 2019 (arXiv 1902.06156): little is enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from client.app import app as client_app
from client.records import pack
from panfm.config import RunConfig
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.weights import GroupWeights, Weights
from server.app import app as server_app
from server.rounds import initial_state
from simulations.engines.job import Job
from simulations.engines.local import LocalGrid
from simulations.engines.logs import logged_to
from simulations.studies._federations import Federated, federated, outcome
from strategies import Memory
from strategies.reply_guards import LIMIT, OTHERS, NormBounds
from strategies.round_messages import unpack
from strategies.server_step import add_norms

ATTACKS = ("scaling", "sign-flip", "inflated", "little-is-enough", "gate-mass")
GUARDS_OFF = (
    "federation.max-share=1.0",
    "federation.max-weight=1e6",
    "sharing.guards.norm-limit=1e6",
    "sharing.guards.norm-ratio=1e6",
    "sharing.guards.direction=2.0",
)
"""What a run changes to be without the guards that can be turned off."""
_SUBJECTS = 1_000_000
"""What an inflated site says it has."""
_UNGUARDED = 10.0
"""How much longer than its honest update a hostile one is where no guard limits it."""
_DEVIATIONS = 1.5
_OF_LIMIT = 0.95
"""Share of a limit that hostile sites use."""


@dataclass
class _Seen:
    """Knowledge of hostile sites about the round."""

    number: int = 0
    honest: dict[str, RoundReply] = field(default_factory=dict)
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    """Site -> group -> norm of what it sent."""


class HostileGrid(LocalGrid):
    """Sites in this process, of which the last, by name and in every round, are hostile."""

    def __init__(self, sites: ClientApp, job: Job, run: RunConfig, attack: str, num_hostile: int) -> None:
        super().__init__(sites, job.num_sites, job.run_config())
        self._run = run
        self._attack = attack
        self._manifest: GroupManifest = initial_state(run)[1]
        self._group_weights = GroupWeights(run.sharing, run.train, run.site_dp, self._manifest)
        self._hostile = frozenset(self.get_node_ids()[-num_hostile:])
        self._is_guarded = run.federation.max_share < 1.0
        self._names: dict[int, str] = {}
        self._streams: dict[int, tuple[str, ...]] = {}
        self._seen = _Seen()
        self._memory = Memory()

    def _reply(self, message: Message) -> Message:
        reply, node_id = super()._reply(message), message.metadata.dst_node_id
        if reply.has_error():
            return reply
        if message.metadata.message_type == MessageType.QUERY:
            return self._shake(reply, node_id)
        answer = RoundReply.from_records(unpack(reply.content))
        if answer.round_number != self._seen.number:
            self._next_round(answer.round_number)
        if node_id in self._hostile:
            answer = self._poisoned(node_id, answer)
        else:
            self._seen.honest[self._names[node_id]] = answer
        self._seen.norms[self._names[node_id]] = {
            group: float(np.linalg.norm(flat)) for group, flat in answer.updates.items()
        }
        reply.content = pack(answer.to_records())
        return reply

    def _shake(self, reply: Message, node_id: int) -> Message:
        handshake = Handshake.from_records(unpack(reply.content))
        self._names[node_id], self._streams[node_id] = handshake.site, tuple(handshake.streams)
        if node_id in self._hostile and self._attack == "inflated":
            streams = dict.fromkeys(handshake.streams, _SUBJECTS)
            handshake = replace(handshake, subjects=_SUBJECTS, streams=streams)
        reply.content = pack(handshake.to_records())
        return reply

    def _next_round(self, number: int) -> None:
        """Remember of the last round what the server does."""
        memory, honest = self._memory, self._seen.honest
        memory.norms = add_norms(memory.norms, self._seen.number, self._seen.norms)
        for group in self._manifest.groups:
            updates = {site: reply.updates[group] for site, reply in honest.items() if group in reply.updates}
            if not updates:
                continue
            if (votes := memory.votes.get(group)) is not None:
                memory.cosines[group] = {site: _cosine(update, votes) for site, update in updates.items()}
            memory.votes[group] = np.sum([np.sign(update) for update in updates.values()], axis=0)
            memory.voters[group] = tuple(updates)
        self._seen = _Seen(number)

    def _poisoned(self, node_id: int, answer: RoundReply) -> RoundReply:
        bounds = NormBounds(self._run.sharing, self._run.train, answer.round_number, self._memory.norms)
        updates, weights = {}, dict(answer.weights)
        for group, own in answer.updates.items():
            others = [reply.updates[group] for reply in self._seen.honest.values() if group in reply.updates]
            longest = _UNGUARDED * float(np.linalg.norm(own))
            if self._is_guarded:
                site = self._names[node_id]
                longest = min(_OF_LIMIT * bounds.limit(site, group, len(own))[0], bounds.clip(site, group))
            updates[group] = self._update(group, own, others, longest)
            weights[group] = self._weights(group, answer.weights[group], self._streams[node_id])
        return replace(answer, updates=updates, weights=weights)

    def _update(self, group: str, own: Flat, others: Sequence[Flat], longest: float) -> Flat:
        if self._attack == "scaling" or not others:
            return _of_length(own, longest)
        mean = np.mean(others, axis=0)
        if self._attack == "little-is-enough":
            update = (mean - _DEVIATIONS * np.std(others, axis=0)).astype(np.float32)
            return _of_length(update, min(longest, float(np.linalg.norm(update))))
        return _of_length(self._turned(group, -mean), longest)

    def _turned(self, group: str, wanted: Flat) -> Flat:
        """A direction that passes for the guard, as near to the wanted one as can be."""
        votes, cosines = self._memory.votes.get(group), self._memory.cosines.get(group, {})
        if not self._is_guarded or votes is None or len(self._memory.voters[group]) < OTHERS:
            return wanted
        usual = median(cosines.values() or [0.0])
        lowest = usual - _OF_LIMIT * LIMIT
        lowest = min(lowest, 0.0) if usual >= 0.0 else lowest
        if _cosine(wanted, votes) >= lowest:
            return wanted
        agreed = _of_length(votes, 1.0)
        rest = wanted - float(np.dot(wanted, agreed)) * agreed
        return lowest * agreed + float(np.sqrt(1.0 - lowest**2)) * _of_length(rest, 1.0)

    def _weights(self, group: str, own: Weights, streams: Sequence[str]) -> Weights:
        if self._attack == "inflated":
            counts = dict.fromkeys(streams, _SUBJECTS)
            return self._group_weights.limits(group, subjects=_SUBJECTS, subjects_per_stream=counts)
        if self._attack == "gate-mass" and self._group_weights.is_pooled(group):
            return self._on_the_least_used(group, own)
        return own

    def _on_the_least_used(self, group: str, own: Weights) -> Weights:
        used = np.sum([reply.weights[group] for reply in self._seen.honest.values()], axis=0)
        layers: dict[str, list[int]] = {}
        for index, (layer, _) in enumerate(self._manifest.experts(group)):
            layers.setdefault(layer, []).append(index)
        weights = [0.0] * len(own)
        for indices in layers.values():
            weights[min(indices, key=lambda index: float(used[index]))] = sum(own[index] for index in indices)
        return tuple(weights)


def federate_with(run: RunConfig, cohort: Path, attack: str, num_hostile: int) -> Federated:
    """Run a federation over a cohort's sites, the last of which are hostile."""

    def start(job: Job) -> None:
        with logged_to(job.log):
            grid = HostileGrid(client_app, job, run, attack, num_hostile)
            server_app(grid, Context(1, 1, {}, RecordDict(), dict(job.run_config())))

    with federated(run, cohort, start) as folder:
        return outcome(folder)


def _of_length(flat: Flat, length: float) -> Flat:
    norm = float(np.linalg.norm(flat))
    return (flat * (length / norm) if norm else flat).astype(np.float32)


def _cosine(one: Flat, other: Flat) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.dot(one, other)) / norms if norms else 0.0
