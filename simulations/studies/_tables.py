"""Printed results of studies: tables of means over pairs, paired differences, targets."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from panfm.report.console_tables import number_text
from simulations.study_result import StudyResult


def mean_sd(values: Sequence[float], separator: str = " ± ") -> str:
    """Mean and standard deviation as a table cell; `-` without values."""
    if not values:
        return "-"
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{number_text(float(np.mean(values)))}{separator}{number_text(float(spread))}"


def print_arms(result: StudyResult, title: str, console: Console | None = None) -> None:
    """Print mean and standard deviation of every metric and arm of a study, its ratios, and its targets."""
    arms = list(dict.fromkeys(arm for _, arm in result.values))
    table = Table("", *arms, title=f"{title}: mean ± sd over seeds")
    for metric in dict.fromkeys(metric for metric, _ in result.values):
        table.add_row(metric, *(mean_sd(result.values.get((metric, arm), ())) for arm in arms))
    print_study(result, table, console=console)


def print_study(result: StudyResult, *tables: Table, console: Console | None = None, with_ratios: bool = True) -> None:
    """Print the tables of a study, its ratios, and its targets."""
    console = console or Console(soft_wrap=True, highlight=False)
    for table in tables:
        console.print(table)
    for name, value in result.ratios.items() if with_ratios else ():
        console.print(f"{name}: {value:+.4f}")
    for target in result.targets:
        console.print(str(target))
