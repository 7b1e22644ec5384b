"""Constants of the tokenizers' inputs from sums over all sites, for streams with `input-constants = "summed"`.

    1. ask the sites that are there, before round 1, for sums of what the tokenizers read    exchange.py
    2. add them up by stream, in the order of the sites' names, and compute `input-centre` and `input-scale`
    3. write these into the run's description, which all later messages carry                run_folder.py

A site that gives nothing, or answers badly, is left out and named; it takes part in the rounds all the same. A stream
that no site holds keeps its inputs as they are without constants.
"""

import logging
from collections.abc import Mapping
from functools import reduce
from operator import add

from flwr.serverapp import Grid

from panfm.config import RunConfig
from panfm.errors import ProtocolError, RunError, one_line
from panfm.evaluate.input_sums import Constants, InputSums, neutral_constants
from panfm.sharing.messages import Handshake
from panfm.sharing.sums_messages import SumsReply
from server.exchange import Answers, Watch, ask_input_sums, unwatched
from server.quorum import require_answers
from server.run_folder import RunFolder

logger = logging.getLogger(__name__)


def fill_in_constants(
    grid: Grid,
    folder: RunFolder,
    run_id: str,
    roster: Mapping[int, Handshake],
    *,
    at_least: int = 0,
    watch: Watch = unwatched,
) -> None:
    """Compute the constants that the streams of a run lack, and write them into the run folder; nothing if none lack.

    Args:
        roster: Node id -> handshake of the sites to ask.
        at_least: So many of them that hold such streams must answer, unless the others have refused for good.
    Raises:
        RunError: no site gives sums of a stream that some site holds.
        NoQuorumError: too few answer.
    """
    run = folder.shared_run
    if not run.summed_streams:
        return
    holders = {node: known for node, known in roster.items() if {*known.streams} & {*run.summed_streams}}
    answers = ask_input_sums(grid, run, run_id, holders, watch=watch)
    require_answers(answers, min(at_least, len(holders)), "input-constants")
    sums, failed = _site_sums(run, answers, {handshake.site: handshake.streams for handshake in holders.values()})
    for site, reason in failed.items():
        logger.warning("input-constants: %s left out: %s", site, reason)
    streams = {stream for handshake in roster.values() for stream in handshake.streams}
    constants: dict[str, Constants] = {}
    given: dict[str, list[str]] = {}
    for name in run.summed_streams:
        of_stream = {site: parts[name] for site, parts in sums.items() if name in parts}
        if name in streams and not of_stream:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in failed.items()) or "too few subjects"
            raise RunError(
                f"input-constants: no site gave sums of {name}, write input-centre and input-scale: {reasons}"
            )
        constants[name] = reduce(add, of_stream.values()).constants() if of_stream else neutral_constants(run, name)
        given[name] = list(of_stream)
    folder.fill_in_constants(constants, given, failed)


def _site_sums(
    run: RunConfig, answers: Answers, subjects: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, dict[str, InputSums]], dict[str, str]]:
    """Site -> stream -> its sums, sorted by site, and why sites have none.

    Args:
        subjects: Site -> stream that it holds -> its subjects.
    """
    sums: dict[str, dict[str, InputSums]] = {}
    refused: dict[str, str] = {}
    for site, reply in answers.replies.items():
        try:
            sums[site] = _checked(run, reply, subjects[site])
        except ProtocolError as error:
            refused[site] = one_line(str(error))
    return sums, {**answers.failed, **refused}


def _checked(run: RunConfig, reply: SumsReply, subjects: Mapping[str, int]) -> dict[str, InputSums]:
    """Read a site's answer. Raises ProtocolError: it is not of streams that the site holds, or does not hold."""
    if unknown := sorted(set(reply.inputs) - (set(run.summed_streams) & set(subjects))):
        raise ProtocolError(
            f"input sums of {unknown[0]!r:.80}, which the site does not hold or the run does not ask for"
        )
    return {
        name: InputSums.from_arrays(parts, run.streams[name], run.model.tokenizer, subjects=subjects[name])
        for name, parts in reply.inputs.items()
    }
