"""Report sections that tell what a model's features are about: monitors by round and site, and leakage at the end."""

from panfm.report.blocks import Figure, Figures, Paragraph, Section, Table, absent
from panfm.report.charts import Bar, interval_bars
from panfm.report.console_tables import LEAKAGE_WORDS, leakage_rows, number_text, score_text
from panfm.report.round_sections import by_site_chart
from panfm.report.run_files import Run
from panfm.report.verdict import OURS, arm_words

_TITLES = {
    "effective-rank": "Effective rank of the features",
    "feature-deviation": "Deviation of the features",
    "teacher-entropy": "Entropy of the teacher",
    "saliency-entropy": "Entropy of the saliency",
    "experts-used": "Experts in use",
    "presence-leakage": "Presence leakage: what features tell only of organs present",
    "validation-auc": "AUC of a probe on the site's own validation patients",
}
_MOST_FAULTS = 20


def monitors_section(run: Run) -> Section:
    """Make the section with the monitors of each site by round, and the rounds in which one went wrong."""
    key, title = "monitors", "Does the model still tell patients apart?"
    told = {site: list(zip(*run.series(site, "monitors"), strict=True)) for site in run.site_names}
    figures: list[Figure] = []
    for name, words in _TITLES.items():
        points = {
            site: [(at, of[name]) for at, of in pairs if of.get(name) is not None] for site, pairs in told.items()
        }
        figures += by_site_chart(words, words.split()[0].lower(), points).figures
    if not figures:
        return absent(key, title, "No site reported monitors: its limits do not name them, or the run is private.")
    words = (
        "Numbers of a site's last batch of a round. Effective rank: in how many directions patients differ; at 1 all "
        "lie on a line. Deviation: 0 if all patients look alike to the model, 1 if they differ in every direction. "
        "Entropies: 1 if the model leans on all organs alike, or its teacher prefers nothing; 0 if on one."
    )
    faults = [words for line in run.rounds for of in line.get("faults", {}).values() for words in of.values()]
    rows = [(words,) for words in faults[-_MOST_FAULTS:]]
    wrong = [Table(("what went wrong",), rows, f"The last of {len(faults)}")] if rows else []
    sentence = Paragraph(words if rows else f"{words} None of them went wrong.")
    return Section(key, title, [sentence, *wrong, Figures(figures)])


def leakage_section(run: Run) -> Section | None:
    """Make the section with what embeddings say only of organs present and of sites; None if it was not measured."""
    if run.probe is None or not run.probe.leakage:
        return None
    arms, rows = leakage_rows(run.probe)
    words = (
        "A good embedding says what a patient has, not what was scanned or where. Organs: held-out patients are shown "
        "to the model with many sets of their organs; share of the variance of embeddings that the set alone explains, "
        "and AUC of a linear probe for an organ's presence (.5 by chance). Site: patients outside training; share of "
        "the variance between sites, and how often a linear probe names the right site, beside a probe that knows "
        "nothing but the organs that a patient has. Where the two are level, sites are known by their organs alone."
    )
    table = Table(("embedding says only", *map(arm_words, arms), "chance"), rows, "Leakage, with 95 % intervals")
    figures = []
    for kind, metric in dict.fromkeys((score.kind, score.metric) for score in run.probe.leakage):
        scores = [score for score in run.probe.leakage if (score.kind, score.metric) == (kind, metric)]
        bars = [Bar(arm_words(score.arm), score.value, score.low, score.high, _style(score.arm)) for score in scores]
        bars.append(Bar("chance", scores[0].chance))
        text = {arm_words(score.arm): score_text(score) for score in scores} | {"chance": number_text(scores[0].chance)}
        named = LEAKAGE_WORDS[kind, metric]
        figures.append(Figure(named, interval_bars(bars, start=0.5 if metric == "auc" else 0.0, axis=named, text=text)))
    return Section("leakage", "What embeddings tell besides the patient", [Paragraph(words), table, Figures(figures)])


def _style(arm: str) -> str:
    return "ours" if arm == OURS else "reference"
