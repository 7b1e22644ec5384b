"""Writes reference pages of CSV tables, and of the files in the folders of sites, runs and fine-tunings.

Tests compare these entries with the columns that the code reads, and with the files and keys of a real run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from simulations.documents.markdown import cell, prose, table

Entries = Mapping[str, str]
"""Name of a column, key or file -> its meaning."""


@dataclass(frozen=True)
class Part:
    """One table of a page: heading, introduction, and entries."""

    title: str
    about: str
    entries: Entries
    kind: str = "column"


MANIFEST: Entries = {
    "subject": "Patient: the unit of splits, intervals and privacy. Spelled in one way throughout the table.",
    "stream": "`<organ>-<modality>`, e.g. `brain-mr`, with a suffix for one kind of image of several: `brain-mr.t1`.",
    "path": "Image, absolute or relative to the table: NIfTI, or PNG, JPEG and the like.",
    "split": "`train`, `val` or `test`; train when empty. One per subject.",
    "mask": "Image of the same shape; kept beside the image for labels made from it, not trained on.",
    "session": "Visit of the subject; may be empty for subjects with one.",
}
QUARANTINE: Entries = {
    "subject": "As in the manifest.",
    "stream": "As in the manifest.",
    "path": "As in the manifest.",
    "copy": "Which of the rows with this subject, stream and path, from 1.",
    "voxels": "Hash of the image's content, by which it is known under another path; empty where it cannot be read.",
    "reason": "What the check found, and what it expected.",
}
LABELS: Entries = {
    "subject": "As in the manifest; one row per subject.",
    "any other": "A label: two words or 0 and 1 (yes or no), three to twenty words (classes), or numbers. Empty, `na`, "
    "`n/a`, `#n/a`, `nan`, `null`, `unknown` and `?` mean that it is not known. Columns that this does not settle need "
    "`labels.toml`.",
}
EXPECTED_SITES: Entries = {
    "site": "Name of the site, as in its site.toml.",
    "subjects": "Patients that it is expected to have.",
    "any stream": "Patients with images of that stream; an empty cell says that the site does not have the stream.",
}
FEATURES: Entries = {
    "subjects": "Text [N]: patient of each row.",
    "sessions": "Text [N]: visit of each row; only if the manifest has sessions.",
    "splits": "Text [N]: train, val or test.",
    "features": "float32 [N, E]: the embeddings.",
    "streams": "Text [S]: names of the streams that were embedded.",
    "present": "bool [N, S]: whether each row has each stream.",
    "pooling": "Text: how the embeddings were read off the model.",
    "model_hash": "SHA-256 of the model's weights.",
}
SITE_FOLDER: Entries = {
    "site.toml": "The site's own description and limits: [keys](site-toml.md).",
    "manifest.csv": "Table of its images: [columns](tables.md#manifestcsv).",
    "labels.csv": "Table of its labels, if there is one. Never leaves the site.",
    "labels.toml": "How columns of the label table are read, where that cannot be told from their values.",
    "quarantine.csv": "Rows of the manifest that every run leaves out; `panfm site check --quarantine` writes it.",
    ".panfm/cache/*.npy": "Prepared images, one file per stream and setting. May be removed; it is made anew.",
    ".panfm/alone/*.safetensors": "In a simulation: models that the site reached alone, for the next run of the "
    "same description. May be removed.",
    ".panfm/state/runs/<run id>/round-*.state": "The site's private part of a run after a round (teacher, optimiser, "
    "heads or experts that stay); the last three rounds.",
    ".panfm/state/runs/<run id>/frozen.safetensors": "Parameters of the run that are not trained.",
    ".panfm/state/runs/<run id>/asked.json": "Digests of the questions that were asked, by round.",
    ".panfm/state/runs/<run id>/reply.kept": "Last reply of a private run, repeated for the identical question; "
    "goes with the next one.",
    ".panfm/state/runs/<run id>/ended": "Present if `panfm site end` has ended the run.",
    ".panfm/state/departures.jsonl": "Audit log, a chained line for each message that left; see `panfm site log`.",
    ".panfm/state/departures.anchor": "End of the audit log's chain: a log that was cut off is noticed.",
    ".panfm/state/site.log": "Errors of the site, whole; from 16 MiB on a new file is begun, the old is site.log.1.",
    ".panfm/state/label-sums.digest": "Digest of the tasks, patients and labels summed; another set is refused.",
    ".panfm/state/input-sums.digest": "Digests of the patients and images whose inputs were summed, by stream; others "
    "are refused.",
    ".panfm/state/evaluations.json": "Digests of the patients and labels on which models were evaluated, and of the "
    "questions, by column; others are refused.",
    ".panfm/state/ledger.anchor": "End of the ledger's chain; without it the ledger is refused.",
    ".panfm/state/.*": "Locks.",
    ".panfm/ledger/ledger.jsonl": "Privacy spent on these patients by all runs. Back it up; never delete it.",
    ".panfm/run/worker.sock": "Socket of the resident worker; present while it runs.",
    ".panfm/run/worker.lock": "Locked while a worker runs.",
}
RUN_FOLDER: Entries = {
    "run.toml": "The description with all defaults: [keys](run-toml.md).",
    "inputs.json": "Constants of the tokenizers' inputs by stream, the sites whose sums they come from, and who gave "
    "none (`left-out`), in a run with `input-constants`.",
    "sites.json": "Subjects and streams that sites reported when they joined: [keys](#sitesjson).",
    "rounds.jsonl": "One line per round: [keys](#roundsjsonl).",
    "probe.json": "Scores of all probes, in a simulation with held-out patients: [keys](#probejson).",
    "evaluation.json": "Scores that sites told of their own labels, and who told none (`left_out`), by column; "
    "`python -m server evaluate` adds to it.",
    "command.json": "In a simulation: changes by `--set` at its start, and by `--extend` since.",
    "data.json": "In a simulation of own folders: hashes of the images and labels of each place, which `--resume` "
    "compares.",
    "report.json": "In a simulation with held-out patients: parts of the report besides probes and rounds "
    "(places of embedded subjects, small example images, routing of experts, CPU seconds).",
    "report.html": "The report, one file; `panfm report` writes it anew.",
    "status.html": "Progress while the run goes on, one file.",
    "now.json": "The step that a run of real sites is at: since when, who has answered, who has not, who is left out "
    "and why, and since when it waits for enough sites.",
    "events.jsonl": "History of the run, one line per event (`time`, `run`, `round`, `kind`, `site`, `words`, "
    "`details`); lines are only added. [Monitoring](../monitoring.md).",
    "alerts.toml": "Whom the server tells of events, in a run with `--alerts`. Never sent to a site.",
    "alerts.jsonl": "Alerts that went out, one line each.",
    "submitting": "Present while `start`, `resume` or `keep` hands the run to Flower.",
    "checkpoint/round-*.state": "State of the server after a round, from which `--resume` goes on.",
    "checkpoint/label-sums-*.safetensors": "Sums of features and labels, from the sites' answers until "
    "the model is written.",
    "checkpoint/run.toml": "The description as it was in the first round.",
    "model/model.safetensors": "Weights of the trained model.",
    "model/metadata.json": "Facts about the model: [keys](#modelmetadatajson).",
    "model/run.toml": "The description as the sites received it.",
    "model/probe.safetensors": "Probe of all sites from sums of features and labels, in a run with `probe.tasks`; with "
    "`probe.lda-shrinkage` its discriminant analysis as well.",
    "model/head.safetensors": "Weights of the head that a run with `[task]` has trained.",
    "model/task.json": "Task of that head: kind, outputs.",
    "model/whitening.safetensors": "Whitening of the embeddings, of `features.whitening` or `panfm whiten`.",
    "start.safetensors": "Parameters that the run starts from, in a run with `[start]`.",
    "frozen.safetensors": "Parameters that the run does not train, in a run with `train.parts`.",
    "expected-sites.csv": "The coordinator's table of sites: [columns](tables.md#expected-sitescsv).",
    "ended.json": "`state` and `reason`, where a run ended without a model.",
    "flower.json": "Flower's id of the run and its connection, in a run over real sites.",
    "ledger/*": "Privacy spent by a run with `[site-dp]`.",
    "tensorboard/*": "Events for TensorBoard.",
    "mlflow.db": "Rounds for MLflow, where `tracking.loggers` names it.",
    "mlflow/**": "The description, and images of a simulation, for MLflow, where `tracking.loggers` names it.",
    "wandb/**": "Rounds for Weights & Biases, where `tracking.loggers` names it.",
    "sites/<site>/**": "In a simulation: the private state of each site, as in `.panfm/state` of its folder.",
    ".lock": "Locked while a process is at work in the folder.",
    ".evaluation.lock": "Locked while sites are asked for an evaluation.",
    ".turn": "Locked while `keep`, `resume` or `stop` decides whether the run goes on.",
    ".alerts-*.lock": "Locked while a process sends an alert by webhook or mail.",
}
FINETUNE_FOLDER: Entries = {
    "finetune.toml": "The settings, as the command's options name them.",
    "checkpoint.state": "State of the training, from which `--resume` goes on.",
    "result.json": "`scores` with 95 % intervals by patient, `patients`, `streams`, `notes` and losses (`training`).",
    "model/model.safetensors": "Weights of the tuned encoder.",
    "model/head.safetensors": "Weights of the head.",
    "model/task.json": "Task of the head: kind, outputs, classes.",
    "model/run.toml": "The description of the model that it was tuned from.",
    "model/metadata.json": "As in a run folder, with `task`, `fine-tuned-on` (patients) and `model-hash` (SHA-256 of "
    "the weights).",
    "masks/masks.csv": "For a segmentation: `subject`, `stream`, `image` and `mask` of each test image.",
    "masks/*": "The predicted masks, on the grids of their images.",
}
SITES_JSON: Entries = {
    "privacy": "Privacy claim of the run, to patients or to sites; `none` without a claim.",
    "sites": "Site -> `subjects`, `streams` (stream -> subjects; null where withheld), `versions` of its software, and "
    "`groups`: hashes of the parameters that it would exchange.",
    "coverage": "Stream -> site -> subjects.",
    "failed": "One line for each site that cannot take part, with the reason.",
}
ROUNDS: Entries = {
    "round": "Number, from 1.",
    "counts": "False: the run ended in this round for want of a quorum; left out in all others.",
    "asked": "Sites that were asked.",
    "phase": "`train`.",
    "seconds": "From the round's start to the new global parameters.",
    "loss": "Mean training loss of the sites that report theirs, weighted as the backbone is.",
    "sites": "Site whose update counted -> its values, below.",
    "late": "Sites that had not answered when the round ended.",
    "worker_lost": "Sites that answered after their worker had gone away, or was not there, and came back.",
    "rejected": "Site -> why its answer was refused.",
    "away": "Site -> since when it has not answered; asked again at growing intervals.",
    "moved": "Site whose name went over to another node -> the node before.",
    "coverage": "Stream -> sites that trained it.",
    "bytes_down": "Group of parameters -> bytes sent to all sites.",
    "bytes_up": "Group of parameters -> bytes received from all sites.",
    "profile": "Stream -> mean saliency over the sites; 1 is a fair share. Null without a site that has two streams.",
    "privacy": "Privacy claim of the run.",
    "faults": "Site -> monitor that has gone wrong -> a line that says so. [Monitoring](../monitoring.md#monitors).",
    "epsilon": "Site -> privacy spent so far, in a private run.",
    "gate": "`measure`, `before`, `kept` and `missing`, in a run with `[gate]`.",
}
SITE_LINE: Entries = {
    "sites.<site>.seconds": "Until its answer was there.",
    "sites.<site>.state_round": "Round of the private state that it started from.",
    "sites.<site>.loss": "Its mean training loss.",
    "sites.<site>.validation_loss": "Loss on its val split, in rounds that measure it.",
    "sites.<site>.num_skipped": "Local steps that were skipped since their gradient was not finite.",
    "sites.<site>.saliency": "Stream -> share of the model's attention, 1 is a fair share.",
    "sites.<site>.monitors": "Monitor -> its number. [Monitoring](../monitoring.md#monitors).",
    "sites.<site>.weights": "Group of parameters -> its weight in the mean, before caps.",
    "sites.<site>.shares": "Group of parameters -> its share of the mean, after caps.",
    "sites.<site>.norms": "Group of parameters -> L2 norm of its update.",
    "sites.<site>.bytes_down": "Bytes of parameters sent to it.",
    "sites.<site>.bytes_up": "Bytes of its update.",
}
METADATA: Entries = {
    "name": "Name of the run.",
    "run-id": "Id by which sites know the run.",
    "experiment": "Hash of the description, by which sites approve the experiment.",
    "rounds": "Rounds behind the model.",
    "sites": "Sites that contributed.",
    "streams": "Stream -> how its images are prepared.",
    "parameters": "Group of parameters -> how many were trained.",
    "frozen-parameters": "Group of parameters -> how many stayed as the run started them.",
    "privacy": "Privacy claim of the run.",
    "pooling": "How embeddings are read off the model.",
    "start": "SHA-256 of the weights that the run started from; null without.",
    "panfm": "Version.",
    "intended-use": "Research; not a medical device.",
    "gate": "`measure` and `round` of the model that was kept, in a run with `[gate]`.",
    "probe": "Patients, sites and leave-one-out R2 of the probe of all sites, in a run with `probe.tasks`.",
    "whitening": "SHA-256 of the whitening, where there is one.",
}
PROBE: Entries = {
    "scores": "`arm` (the model that was probed), `group` (of labels), `metric` (auc or r2), `value`, `low` and "
    "`high` (95 % bootstrap over test subjects), `num_labels`.",
    "task": "Scores of each model that has learned the `[task]` of a run: as `scores`.",
    "benefit": "Scores of the models that a site could keep, on its own patients: as `scores`; arms that end in "
    "` minus own` are differences to the site's own model.",
    "missing": "Arm -> AUC with organs taken away: `auc`, `auc_missing_<n>`, `auc_drop_<organ>`, `auc_only_<organ>`, "
    "`auc_no_dominant`.",
    "balance": "Arm -> `effective_rank` of its features.",
    "subjects": "`fit` and `test`: patients that probes were fitted and tested on.",
    "notes": "Lines about what was left out, or promised.",
    "streams": "Arm -> stream -> AUC of a probe on this stream alone.",
    "few_labels": "Arm -> `auc_<n>`: mean AUC of probes fitted on n patients.",
    "labels": "As `scores`, for every label by itself.",
    "known": "Label -> `fit` and `test`: patients for whom it is known.",
    "leakage": "What embeddings say only of the organs present or of a patient's site: `arm`, `kind`, `metric`, "
    "`value`, `low`, `high`, `chance`.",
    "unmatched": "Place -> subjects with images and no row of labels, and the other way round.",
}
TABLES = (
    Part("manifest.csv", "The images of a site.", MANIFEST),
    Part("labels.csv", "Labels of a site's patients, for probes.", LABELS),
    Part("quarantine.csv", "Rows of the manifest that are left out.", QUARANTINE),
    Part("expected-sites.csv", "Sites that a coordinator expects, `python -m server roster`.", EXPECTED_SITES),
    Part("features.npz", "Embeddings that `panfm embed` writes; arrays of NumPy.", FEATURES, kind="array"),
)
FOLDERS = (
    Part(
        "A site's folder",
        "As `panfm site init` and the worker make it; site.toml may name other places.",
        SITE_FOLDER,
        kind="file",
    ),
    Part(
        "A run folder",
        "All that a run leaves at the coordinator, or on the machine of a simulation.",
        RUN_FOLDER,
        kind="file",
    ),
    Part("A folder of a fine-tuning", "What `panfm finetune` leaves.", FINETUNE_FOLDER, kind="file"),
    Part("sites.json", "", SITES_JSON, kind="key"),
    Part("rounds.jsonl", "", {**ROUNDS, **SITE_LINE}, kind="key"),
    Part("model/metadata.json", "", METADATA, kind="key"),
    Part("probe.json", "", PROBE, kind="key"),
)


def tables_page() -> str:
    """Write the page of CSV tables as Markdown."""
    about = "Tables are CSV: commas, UTF-8, decimal points, a first line with the columns in any order."
    return _page("Tables", about, TABLES)


def folders_page() -> str:
    """Write the page of folders as Markdown."""
    about = (
        "`*` stands for any name, `**` for any path. Files are written whole or not at all, so that any of them may be "
        "read during a run."
    )
    return _page("Files of a site and of a run", about, FOLDERS)


def _page(title: str, about: str, parts: tuple[Part, ...]) -> str:
    lines = [f"# {title}\n", f"{about}\n"]
    for part in parts:
        lines.append(f"## {part.title}\n")
        if part.about:
            lines.append(f"{prose(part.about)}\n")
        rows = [(f"`{name}`", cell(text)) for name, text in part.entries.items()]
        lines.append(table((part.kind, "meaning"), rows))
    return "\n".join(lines)
