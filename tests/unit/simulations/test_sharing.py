import io

from rich.console import Console

from panfm.config import load_run
from simulations.harness import QUICKSTART, StudyResult
from simulations.studies.sharing import ARMS, show


def test_the_table_fits_80_columns():
    result = StudyResult("sharing", {})
    for arm in ARMS:
        for metric in (*load_run(QUICKSTART).cohort.sites, "mean", "all-organs"):
            result.values[f"{metric}/auc", arm] = [0.561, 0.585]
    console = Console(width=80, soft_wrap=True, file=io.StringIO())
    show(result, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "university-hospital" in " ".join(lines)
    for line in lines[4:-1]:
        assert line.count(".573 ± .017") == len(ARMS)
