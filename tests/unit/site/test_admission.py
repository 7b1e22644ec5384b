"""Which runs a site's limits let in."""

import pytest

from panfm.config import experiment_hash, parse_run, parse_site
from panfm.errors import LimitError
from panfm.site.admission import check_sizes

RUN = 'name = "small"\n[streams]\nbrain-mr = { shape = [8, 8, 8], patch = [4, 4, 8], spacing-mm = [8.0, 8.0, 8.0] }\n'


def test_experiments_are_known_by_what_sites_are_told_of_them():
    run, other = parse_run(RUN), parse_run(RUN + "[train]\nrounds = 9\n")
    simulated = parse_run(RUN + '[cohort]\nkind = "folder"\npath = "/tmp"\n')
    assert experiment_hash(simulated) == experiment_hash(run) != experiment_hash(other)


def test_sizes_at_the_limit_and_beyond():
    limits = parse_site(
        'name = "alpha"\n[limits]\nvoxels-per-image = 512\ntokens-per-patient = 4\nrounds = 10\n'
    ).limits
    run = parse_run(RUN)
    check_sizes(run, limits)
    for name, found in (("voxels-per-image", 512), ("tokens-per-patient", 4), ("rounds", 10), ("local-steps", 20)):
        less = limits.model_copy(update={name.replace("-", "_"): found - 1})
        with pytest.raises(LimitError, match=rf"asks for {found}, this site's limits\.{name} is {found - 1}$"):
            check_sizes(run, less)
