"""Strict descriptions of a run and of a site: TOML in, one-line complaints out.

`load_run` is imported when it is asked for: a site's worker reads no file that describes a run.
"""

from typing import TYPE_CHECKING

from panfm.config.load import (
    as_told,
    description_hash,
    dump_toml,
    experiment_hash,
    load_site,
    parse_run,
    parse_site,
    parse_table,
    read_site_text,
    without_summed_constants,
)
from panfm.config.run_description import RunConfig
from panfm.config.site_description import Releasable, SiteConfig, site_folders, site_path
from panfm.config.streams import StreamConfig

if TYPE_CHECKING:
    from panfm.config.run_file import load_run

__all__ = [
    "Releasable",
    "RunConfig",
    "SiteConfig",
    "StreamConfig",
    "as_told",
    "description_hash",
    "dump_toml",
    "experiment_hash",
    "load_run",
    "load_site",
    "parse_run",
    "parse_site",
    "parse_table",
    "read_site_text",
    "site_folders",
    "site_path",
    "without_summed_constants",
]


def __getattr__(name: str) -> object:
    if name != "load_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from panfm.config.run_file import load_run

    return load_run
