"""Finds settings of a run description that would break its site-level privacy (`[site-dp]`)."""

from collections.abc import Iterator

from panfm.config import RunConfig
from panfm.texts import toml_key


def site_dp_faults(run: RunConfig) -> Iterator[str]:
    """List what would show a site by more than its clipped and noised update, one line each."""
    assert run.site_dp is not None
    private, sharing = run.site_dp, run.sharing
    largest = 0.1 / private.num_sites
    if private.delta > largest:
        yield f"site-dp.delta: {private.delta:g} is above 1 / (10 num-sites), set at most {largest:.3g}"
    if private.num_sites != run.federation.min_sites:
        yield f"federation.min-sites: no round is released without all sites, set {private.num_sites}, as num-sites"
    means = {"sharing.mean": sharing.mean}
    means |= {f"sharing.groups.{name}.mean": group.mean for name, group in sharing.groups.items() if group.mean}
    for key, mean in means.items():
        if mean != "weighted":
            yield f'{key}: "{mean}" has no sensitivity of clip-norm / num-sites, set "weighted"'
    if sharing.experts == "pooled":
        yield 'sharing.experts: "pooled" weighs sites by their patients\' gates, set "private" or "naive"'
    if sharing.guards.direction is not None:
        yield "sharing.guards.direction: refuses sites by what their updates say, leave it out"
    if run.features.whitening:
        yield "features.whitening: is fitted from the sites' images without noise, set false"
    if run.probe.tasks:
        yield "probe.tasks: labels are summed at the sites without noise, leave it out"
    for name, stream in run.streams.items():
        yield from (f"{toml_key('streams', name)}.{line}" for line in stream.couplings())
    if run.gate:
        yield "gate.measure: is summed at the sites without noise, leave the table out"
    if run.federation.participation < 1.0:
        yield "federation.participation: the mean is over all sites in every round, set 1.0"
    if run.masking.steered_by == "federation":
        yield 'masking.scope: "federation" tells the mean of the sites\' saliency, set "site" or "subject"'
