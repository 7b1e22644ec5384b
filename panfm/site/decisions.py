"""Decisions of a site's operator, written to its register by `panfm site approve` and `reject`."""

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any

from panfm.errors import DataError
from panfm.site.approvals import Approvals, Decision

_MAX_NAME = 80


class WritableApprovals(Approvals):
    """The register of one site, as its operator writes it."""

    def approve(
        self, experiment: str, *, by: str, until: date | None = None, max_rounds: int | None = None
    ) -> Decision:
        """Let an experiment run here. Raises DataError: `until` has passed, or as `decisions` does."""
        if until and until < date.today():
            raise DataError(f"--until {until}: has passed, expected today or a later day")
        limits = {"until": until and until.isoformat(), "max-rounds": max_rounds}
        return self._add({"kind": "approved", "experiment": experiment, "by": by, **limits})

    def reject(self, experiment: str, *, by: str) -> Decision:
        """Let an experiment not run here, also if it was approved before. Raises DataError as `decisions` does."""
        return self._add({"kind": "rejected", "experiment": experiment, "by": by})

    def _add(self, content: Mapping[str, Any]) -> Decision:
        if not content["by"].strip() or len(content["by"]) > _MAX_NAME or not content["by"].isprintable():
            raise DataError(f"--name {content['by']!r:.100}: expected a name of 1 to {_MAX_NAME} printable characters")
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        with self.chain.writing() as file:
            before, position = self.chain.snapshot(file)
            self.checked(before)
            if not position.size:
                opening = {"kind": "opened", "site": self._site, "time": now}
                _, position = self.chain.append(file, position, opening)
            entry, _ = self.chain.append(file, position, {**content, "time": now})
        return Decision.of(entry)
