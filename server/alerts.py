"""Tells people of a run's events, by a webhook and by mail: one alert for each event, also over resumes.

The queue is the history itself (events.jsonl). What went out is written down in `alerts.jsonl`, one line per alert:
time, number of the event's line, channel, and `sent`, or `given-up` with the reason. Each channel has a thread, which
sends what is not in the record, in order, and tries again with longer and longer pauses; one that is refused does not
hold up those behind it, and one that a process has tried for a day is given up. The run never waits for it, but for a
moment at its end. What is not out by then is sent by `server keep`, which waits for it, or when the run is resumed.
Processes send in turn, by a lock for each channel, so none sends what another has sent; one that is killed between an
alert and its line in the record sends that alert again.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from panfm.config import load_run
from panfm.errors import PanfmError, reason
from panfm.files import is_locked, locked
from panfm.outputs import read_json_lines
from panfm.report.run_events import Event
from server.alert_senders import FAILURES, TIMEOUT_S, post, why_failed, write_mail
from server.alerts_config import FILE, AlertsConfig, read_alerts
from server.events import EventLog, append_lines
from server.run_folder import LOCK

RECORD = "alerts.jsonl"
logger = logging.getLogger(__name__)
Send = Callable[[str, int, Event], None]
"""Sends an alert: name of the run, number of the event, and the event."""
_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 600.0
_GIVEN_UP_S = 86_400.0
_MOST_FAILURES = 3
"""In a row, after which a channel takes its server for down, and pauses."""
_POLL_S = 0.5
_LAST_WAIT_S = 20.0
"""For alerts that are not out when the run ends."""


@contextmanager
def alerted(folder: Path, name: str, events: EventLog) -> Iterator[None]:
    """Send alerts of a run until the block ends; nothing without `alerts.toml` in the run folder.

    Args:
        name: Of the run.
    Raises:
        ConfigError: the file does not hold.
    """
    path = folder / FILE
    channels = start_channels(folder, name, read_alerts(path), events) if path.exists() else []
    for channel in channels:
        events.on_event.append(channel.wake.set)
    try:
        yield
    finally:
        deadline = time.monotonic() + _LAST_WAIT_S
        for channel in channels:
            events.on_event.remove(channel.wake.set)
            channel.close(deadline)


@contextmanager
def delivered(folder: Path) -> Iterator[None]:
    """Send what the server of a run could not, after a block that follows the run, also if it says that it failed."""
    try:
        yield
    except PanfmError as error:
        deliver_pending(folder, f"{error}; ")
        raise
    deliver_pending(folder)


def deliver_pending(folder: Path, words: str = "") -> None:
    """Send the alerts of a run that has ended, until all are out or given up, or a server is at work on it again.

    Without alerts, or where their secrets cannot be read, it returns at once.

    Args:
        words: Told before the wait, if there is one.
    """
    path = folder / FILE
    if not path.exists() or is_locked(folder / LOCK):
        return
    try:
        config = read_alerts(path)
        config.check_secrets()
        channels = start_channels(folder, load_run(folder / "run.toml").name, config, EventLog(folder))
    except PanfmError as error:
        logger.warning("alerts: none is sent from here: %s", error)
        return
    if left := sum(channel.num_left() for channel in channels):
        logger.warning("%swaiting until %d alerts are sent, for a day at most; Ctrl-C ends it", words, left)
    try:
        while any(channel.num_left() for channel in channels) and not is_locked(folder / LOCK):
            time.sleep(_POLL_S)
    finally:
        for channel in channels:
            channel.close(time.monotonic())


def watched_certificates(folder: Path) -> list[Path]:
    """Certificates whose end a run's server tells of. Raises ConfigError as `alerted`."""
    path = folder / FILE
    return [Path(name) for name in read_alerts(path).certificates] if path.exists() else []


def start_channels(folder: Path, name: str, config: AlertsConfig, events: EventLog) -> list["Channel"]:
    """Start a thread for each way in which people are told."""
    sends: dict[str, Send] = {}
    if webhook := config.webhook:
        sends["webhook"] = lambda name, number, event: post(webhook, name, number, event)
    if mail := config.mail:
        sends["mail"] = lambda name, number, event: write_mail(mail, name, number, event)
    return [Channel(channel, folder, name, config, events, send) for channel, send in sends.items()]


class Channel:
    """One way in which people are told, and its thread."""

    def __init__(
        self, channel: str, folder: Path, name: str, config: AlertsConfig, events: EventLog, send: Send
    ) -> None:
        """Begin to send what has not been sent."""
        self.wake = threading.Event()
        self._channel = channel
        self._folder = folder
        self._name = name
        self._kinds = set(config.kinds)
        self._events = events
        self._send = send
        self._unrecorded: dict[int, dict[str, Any]] = {}
        """Event -> its line of the record, until the disk has taken both."""
        self._failures: Counter[int] = Counter()
        self._first_try: dict[int, float] = {}
        """Event that failed -> when it was tried first, by the monotonic clock."""
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name=f"alerts-{channel}", daemon=True)
        self._thread.start()

    def close(self, deadline: float) -> None:
        """Try once more to send what is left, and end; wait for it until a time of the monotonic clock."""
        self._is_closing = True
        self.wake.set()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if left := self.num_left():
            logger.warning(
                "alerts: %d not sent by %s; `server keep` sends them, or the run's resume", left, self._channel
            )

    def num_left(self) -> int:
        """How many alerts are neither sent nor given up."""
        return len(self._pending())

    def _work(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            is_last = self._is_closing
            self.wake.clear()
            sent, left = self._send_pending()
            if is_last:
                return
            if sent or not left:
                pause = _FIRST_PAUSE_S
            if left:
                self._rest(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            elif not self._is_closing:
                self.wake.wait()

    def _rest(self, pause: float) -> None:
        """Wait before another try; the end of the run ends it, a new event shortens it to the first pause."""
        begin = time.monotonic()
        while not self._is_closing and (rested := time.monotonic() - begin) < pause:
            if rested >= _FIRST_PAUSE_S and self.wake.is_set():
                return
            time.sleep(_POLL_S)

    def _send_pending(self) -> tuple[int, int]:
        """Send what is left, in order, what has failed more often last; stop after a few failures in a row.

        Returns:
            How many were sent, and how many are left.
        """
        self._write_record()
        sent = in_a_row = 0
        pending = self._pending()
        for number in sorted(pending, key=lambda number: (self._failures[number], number)):
            if in_a_row >= _MOST_FAILURES:
                break
            with self._turn() as is_ours:
                is_out = is_ours and (number not in self._pending() or self._try(number, pending[number]))
            if is_out:
                sent, in_a_row = sent + 1, 0
            else:
                in_a_row += 1
        return sent, len(self._pending())

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Whether no other process sends on this channel until the block ends."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self._folder / f".alerts-{self._channel}.lock", wait_s=TIMEOUT_S))
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                logger.warning("alerts: no lock (%s)", reason(error))
            yield True

    def _try(self, number: int, event: Event) -> bool:
        """Whether an alert went out; one that has failed for a day is given up."""
        first = self._first_try.setdefault(number, time.monotonic())
        try:
            self._send(self._name, number, event)
        except FAILURES as error:
            text = why_failed(error)
            logger.warning("alerts: %s failed: %s", self._channel, text)
            self._failures[number] += 1
            if time.monotonic() - first > _GIVEN_UP_S:
                self._record(number, "given-up", text)
            return False
        self._record(number, "sent")
        return True

    def _pending(self) -> dict[int, Event]:
        """Number -> event of those that are neither sent nor given up."""
        try:
            lines = read_json_lines(self._folder / RECORD)
            done = {line["event"] for line in lines if line["channel"] == self._channel} | self._unrecorded.keys()
            events = enumerate(self._events.all(), start=1)
        except PanfmError as error:
            logger.warning("alerts: %s", error)
            return {}
        return {number: event for number, event in events if event.kind in self._kinds and number not in done}

    def _record(self, number: int, state: str, why: str = "") -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": now, "event": number, "channel": self._channel, "state": state, "why": why}
        self._unrecorded[number] = line
        self._write_record()

    def _write_record(self) -> None:
        """Write down what became of alerts, but of events that the history lacks still: another may get the number."""
        if not self._unrecorded:
            return
        try:
            num_events = self._events.num_written()
            lines = [line for number, line in self._unrecorded.items() if number <= num_events]
            append_lines(self._folder / RECORD, lines)
        except (OSError, PanfmError) as error:
            logger.warning("%s: cannot be written (%s)", RECORD, reason(error))
            return
        for line in lines:
            del self._unrecorded[line["event"]]
