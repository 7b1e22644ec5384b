"""The one door of a site: a question comes in as a frame, an answer goes out, whatever happens.

Only two questions are known. An error goes out as one scrubbed line under the site's public name; its whole story
stays in the site's log.
"""

import logging

from panfm.errors import ProtocolError
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.messages import Invitation, Records, RoundTask
from panfm.site.limits import memory_told, time_limit
from panfm.site.scrub import scrub
from panfm.site.site import Site

logger = logging.getLogger(__name__)


def answer(site: Site, asked: Frame) -> Frame:
    """Answer a question.

    Guarantees:
        always: there is an answer, and it says nothing of an error but what `scrub` lets pass.
    """
    site.asked_run = None
    try:
        return Frame(Kind.ANSWER, _handle(site, asked))
    except (Exception, SystemExit) as error:
        logger.exception("%s: answered with an error", asked.kind)
        site.log_error(error)
        return Frame.error(f"site {site.config.name}: {scrub(error)}")


def _handle(site: Site, asked: Frame) -> Records:
    limits = site.config.limits
    with time_limit(limits.seconds_per_round), memory_told(limits):
        if asked.kind is Kind.HANDSHAKE:
            return site.handshake(Invitation.from_records(asked.records)).to_records()
        if asked.kind is Kind.ROUND:
            return site.train_round(RoundTask.from_records(asked.records)).to_records()
    raise ProtocolError(f"{asked.kind}: no question, expected {Kind.HANDSHAKE} or {Kind.ROUND}")
