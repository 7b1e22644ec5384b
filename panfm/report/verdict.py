"""Writes the report's first screen: whether the federated model beats each site alone, as sentences and a chart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from panfm.evaluate.result import ProbeResult, Score
from panfm.report.blocks import Html
from panfm.report.charts import Bar, interval_bars
from panfm.report.console_tables import number_text, score_text, summary
from panfm.report.run_files import Run
from panfm.report.status import headline

OURS = "federated"
_RIVALS = ("start", "untrained", "statistics")
_REFERENCES = (*_RIVALS, "tokenizer")
_WORDS = {
    OURS: "the federated model",
    "start": "the start model",
    "untrained": "an untrained model",
    "statistics": "plain image statistics",
    "tokenizer": "the tokenizer alone, no network",
    "federated-probe": "the federated model, probed by summed statistics of the sites",
    "federated-lda": "the federated model, probed by a linear discriminant analysis of the same sums",
    "local-probe": "the federated model, each site's own labels",
    "own": "the site's own",
    "ensemble": "the mean of both",
    "training-mean": "the mean of the training subjects",
}
AUC_WORDS = (
    "AUC is the chance that a model ranks a patient with the finding above one without: .5 is guessing, 1 is perfect. "
    "Every model turns images into numbers and is then left as it is; a linear probe learns each label from training "
    "patients and is scored on held-out ones. The interval in brackets, the thin line, holds 95 % of the scores that "
    "come out when the held-out patients are drawn anew, with replacement."
)
R2_WORDS = (
    "R2 is the share of a label's variance that a linear probe of a model's frozen features explains in held-out "
    "patients: 0 is the mean of all, 1 is perfect. The interval in brackets, the thin line, holds 95 % of the scores "
    "that come out when the held-out patients are drawn anew, with replacement."
)


@dataclass(frozen=True)
class Verdict:
    """Headline, further sentences, a chart, and an explanation of the chart's axis."""

    headline: str
    sentences: Sequence[str]
    chart: Html | None = None
    explanation: str = ""


def arm_words(arm: str) -> str:
    """Name a model that was probed for readers: `federated` becomes "the federated model"."""
    site = arm.removeprefix("site:")
    return f"{site} alone" if site != arm else _WORDS.get(arm, arm)


def verdict(run: Run) -> Verdict:
    """Write the verdict on a run; without scores of held-out patients it says that they are missing."""
    scored = main_scores(run.probe) if run.probe else []
    if not run.probe or not scored:
        return _unscored(run)
    metric = scored[0].metric
    sentences = (
        summary(run.probe) if metric == "auc" else [f"The chart shows R2 of {scored[0].group}, one of the numbers."]
    )
    bars = [_bar(score, best_site(scored)) for score in _in_order(scored)]
    text = {bar.label: score_text(score) for bar, score in zip(bars, _in_order(scored), strict=True)}
    patients = run.probe.subjects.get("test", 0)
    axis = f"AUC, mean over {scored[0].num_labels} labels" if metric == "auc" else f"R2 of {scored[0].group}"
    chart = interval_bars(
        bars, start=0.5 if metric == "auc" else 0.0, axis=f"{axis}, {patients} held-out patients", text=text
    )
    words = AUC_WORDS if metric == "auc" else R2_WORDS
    return Verdict(_headline(scored), [*_references(scored), *_tokenizer(scored), *sentences], chart, words)


def main_scores(probe: ProbeResult) -> list[Score]:
    """Each model's mean AUC over all labels; without AUCs, its R2 of the first label that is a number."""
    aucs = [score for score in probe.scores if (score.group, score.metric) == ("all", "auc")]
    numbers = [score for score in probe.scores if score.metric == "r2"]
    return aucs or [score for score in numbers if score.group == numbers[0].group]


def best_site(scored: Sequence[Score]) -> Score | None:
    """Best score among the models that one site trained alone; None if no such score is known."""
    sites = [score for score in scored if score.arm.startswith("site:") and not math.isnan(score.value)]
    return max(sites, key=lambda score: score.value, default=None)


def _in_order(scored: Sequence[Score]) -> list[Score]:
    """Sort scores: the federated model, then single sites from best to worst, then the references."""
    by_arm = {score.arm: score for score in scored}
    sites = [score for score in scored if score.arm.startswith("site:")]
    sites.sort(key=lambda score: -score.value if not math.isnan(score.value) else math.inf)
    others = [by_arm[arm] for arm in _REFERENCES if arm in by_arm]
    rest = [score for score in scored if score not in sites and score.arm not in (OURS, *_REFERENCES)]
    return [*([by_arm[OURS]] if OURS in by_arm else []), *sites, *others, *rest]


def _bar(score: Score, best: Score | None) -> Bar:
    style = "ours" if score.arm == OURS else "best" if score is best else "site" if ":" in score.arm else "reference"
    label = arm_words(score.arm) + (", the best site" if score is best else "")
    return Bar(label, score.value, score.low, score.high, style)


def _headline(scored: Sequence[Score]) -> str:
    ours = next((score for score in scored if score.arm == OURS and not math.isnan(score.value)), None)
    site = best_site(scored)
    if ours is None:
        return "The federated model has no score on held-out patients."
    if site is None:
        return f"The federated model scores {number_text(ours.value)} on held-out patients; no site alone was scored."
    rivals = f"the best site alone, {arm_words(site.arm).removesuffix(' alone')}"
    match _compared(ours, site.value):
        case "above":
            words = "Training together beat every site alone"
        case "ahead":
            words = "Training together came out ahead of every site alone, by less than these patients can tell"
        case "behind":
            words = f"Training together did not beat {rivals}; the difference is less than these patients can tell"
        case _:
            words = f"Training together did worse than {rivals}"
    if behind := [arm for arm in _RIVALS if _values(scored).get(arm, -math.inf) >= ours.value]:
        words += f"; it is not better than {_listed(list(map(arm_words, behind)), 'or')}"
    return f"{words}."


def _values(scored: Sequence[Score]) -> dict[str, float]:
    """Name of a model -> its score; NaN scores are left out."""
    return {score.arm: score.value for score in scored if not math.isnan(score.value)}


def _references(scored: Sequence[Score]) -> list[str]:
    """One sentence naming the references that the federated model is ahead of; none if it is ahead of none."""
    values = _values(scored)
    ahead = [arm_words(arm) for arm in _RIVALS if values.get(arm, math.inf) < values.get(OURS, -math.inf)]
    return [f"The federated model scores higher than {_listed(ahead, 'and')}."] if ahead else []


def _listed(words: Sequence[str], last: str) -> str:
    """Join words by commas, the last one by the word `last` (and, or)."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _compared(ours: Score, value: float) -> str:
    """Compare the federated model with a value: `above` or `below` if its interval excludes the value, else `ahead` or
    `behind`."""
    if math.isnan(ours.low):
        return "ahead" if ours.value > value else "behind"
    if value < ours.low:
        return "above"
    if value > ours.high:
        return "below"
    return "ahead" if ours.value > value else "behind"


def _tokenizer(scored: Sequence[Score]) -> list[str]:
    """One sentence if a linear probe of the network's inputs does as well as the network; else none."""
    values = _values(scored)
    ours, inputs = values.get(OURS, math.nan), values.get("tokenizer", math.nan)
    if not inputs >= ours:
        return []
    return [
        f"A linear probe of what the tokenizer reads, without any network, reaches {number_text(inputs)}: the network "
        "does no better than its inputs on these labels."
    ]


def _unscored(run: Run) -> Verdict:
    first = "No score of held-out patients is in this folder, so this page cannot say how good the model is."
    done, total = len(run.rounds), run.config.train.rounds
    words = f"{done} of {total} rounds are done, and the run is {run.state}"
    losses = [line["loss"] for line in run.rounds if line.get("loss") is not None]
    if losses:
        words += f"; training loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    told = [first] if run.is_finished or not run.rounds else [first, headline(run)]
    return Verdict(f"{words}.", told)
