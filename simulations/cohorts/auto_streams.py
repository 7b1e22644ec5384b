"""Streams whose settings follow from the images: `brain-mr = { size = "auto" }`.

A simulation knows where its sites are, so it asks their images as `panfm plan` does; the run folder holds the
resolved description. A hospital never sees "auto": it is sent the resolved description.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panfm.config import dump_toml, parse_table, site_folders
from panfm.errors import ConfigError
from panfm.texts import parse_toml
from simulations.cohorts.cohort_source import FolderCohort


def with_streams(table: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A description whose streams of `size = "auto"` have spacing, shape and patch; keys that stand beside it win.

    Raises:
        ConfigError: the sites are not folders that exist, or have no image of such a stream.
        DataError: as `survey_sites`.
    """
    streams: Any = table.get("streams")
    auto = [name for name, stream in streams.items() if _is_auto(stream)] if isinstance(streams, dict) else []
    if not auto:
        return table
    proposed = _proposed(table, where)
    if missing := [name for name in auto if name not in proposed]:
        known = ", ".join(proposed)
        raise ConfigError(f'{where}: streams.{missing[0]}.size: "auto", but no site has images of it, found {known}')
    given = {name: {key: value for key, value in streams[name].items() if key != "size"} for name in auto}
    return {**table, "streams": {**streams, **{name: proposed[name] | given[name] for name in auto}}}


def _is_auto(stream: Any) -> bool:
    return isinstance(stream, dict) and stream.get("size") == "auto"


def _proposed(table: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Stream -> its proposed settings as TOML has them."""
    cohort = table.get("cohort")
    if not isinstance(cohort, dict) or cohort.get("kind") != "folder":
        raise ConfigError(f'{where}: streams: size = "auto" needs sites to ask, expected [cohort] kind = "folder"')
    described = parse_table(FolderCohort, cohort, where, key="cohort")
    described.check({})
    from panfm.planning.image_sizes import survey_sites  # brings nibabel
    from panfm.planning.stream_proposal import propose_streams

    sites = [Path(site) for site in described.sites or ()] or site_folders(Path(described.path or "") / "sites")
    streams = propose_streams(survey_sites(sites).streams)
    return {name: parse_toml(dump_toml(stream), name) for name, stream in streams.items()}
