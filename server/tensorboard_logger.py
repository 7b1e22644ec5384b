"""TensorBoard: an events file in the run folder, written anew when a run goes on."""

import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import histogram, scalar, text

from panfm.privacy.guarantees import privacy_label
from server.run_folder import RunFolder
from server.tracking import scalars, update_norms


class TensorBoardLogger:
    """Scalars of every round, and histograms of the sites' update norms by group."""

    def __init__(self, folder: RunFolder, run_id: str) -> None:
        """Begin the events anew with the rounds done before, so that a resumed run shows every round once."""
        place = folder.path / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self._events = EventsWriter(str(place / "events"))
        # A TensorBoard that has read the file before forgets what it held.
        restart = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=0, session_log=restart))
        if (label := privacy_label(folder.run)) != "none":
            self._write(0, text("privacy", label))
        for line in folder.rounds():
            self._add(line)
        self._events.flush()

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a round that has ended."""
        self._add(line)
        self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._events.close()

    def _add(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line):
            self._write(line["round"], scalar(name, value))
        for group, norms in update_norms(line).items():
            self._write(line["round"], histogram(f"update-norms/{group}", np.array(norms), "auto"))

    def _write(self, step: int, summary: Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
