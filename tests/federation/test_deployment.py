"""A real deployment on loopback: SuperLink, SuperNodes and workers as processes, over TLS with authentication.

The SuperNode of alpha reaches the coordinator through a recorder, that of beta through the shipped nginx.conf where
this machine has nginx, that of gamma directly. A SuperNode that ends is started again as its shipped unit says.
"""

import gzip
import http.client
import os
import re
import shutil
import signal
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tomli_w
from typer.testing import CliRunner

from client.relay import ask
from panfm.config import RunConfig, dump_toml, experiment_hash, load_run, load_site, parse_run
from panfm.files import read_checked
from panfm.outputs import read_json_lines
from panfm.report.site_evaluation import read_evaluation
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.messages import RoundTask
from panfm.site import Site
from panfm.site.audit_log import AuditLog
from panfm.site.decisions import WritableApprovals
from panfm.site.state import active_runs, end_run
from server.checkpoint import ServerState, load_latest
from server.coordinator import app as coordinator
from server.flower_cli import ROOT, flwr, submit
from server.run_folder import RunFolder
from simulations.engines.deployment import CONNECTION, Deployment, approve, credentials, run_config
from simulations.engines.flower import wait_for_end
from simulations.engines.job import Job
from simulations.engines.processes import Process, free_ports, send_signal, wait_until
from tests.conftest import NO_FLOORS
from tests.federation.conftest import HOLDINGS, RUN, Federation

pytestmark = pytest.mark.slow
LONG_S = 600.0
HOSTS = ROOT / "configs" / "deployment" / "hosts"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(not NGINX, reason="nginx is not installed: apt-get install nginx")
WINDOW = 32
"""So many bytes in a row are no chance."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory, write_site) -> Federation:
    folder = tmp_path_factory.mktemp("deployment")
    for name, organs in HOLDINGS.items():
        write_site(folder / "sites" / name, name, organs)
    return Federation(folder)


@pytest.fixture(scope="module")
def deployment(federation):
    folders = sorted(federation.sites.iterdir())
    with Deployment(federation.folder / "home", federation.folder / "logs") as deployment:
        for folder in folders:
            deployment.start_worker(folder)
        deployment.start_coordinator()
        deployment.doors = {"alpha": start_recorder(deployment), "gamma": deployment.address}
        deployment.doors["beta"] = start_nginx(deployment) if NGINX else deployment.address
        for folder in folders:
            deployment.register(folder)
            command = deployment.supernode(folder, address=deployment.doors[folder.name])
            deployment.start(f"{folder.name}.supernode", *supervised(command))
        deployment.wait_for(folders)
        yield deployment


def start_recorder(deployment: Deployment) -> str:
    [port] = free_ports(1)
    script = Path(__file__).with_name("recorder.py")
    deployment.start("recorder", sys.executable, str(script), str(port), str(deployment.port), str(deployment.home))
    return f"127.0.0.1:{port}"


def start_nginx(deployment: Deployment) -> str:
    """The shipped file, with this machine's names, folders and ports in it, inside the least that nginx wants."""
    [port] = free_ports(1)
    home, text = deployment.home, (HOSTS / "nginx.conf").read_text(encoding="utf-8")
    words = {"listen 443": f"listen 127.0.0.1:{port}", "127.0.0.1:8000": deployment.address}
    words |= {"coordinator.example.org": "localhost", "/etc/panfm": str(home)}
    for shipped, ours in words.items():
        assert shipped in text
        text = text.replace(shipped, ours)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {home / 'nginx'};" for kind in kinds)
    start = f"daemon off; pid {home / 'nginx.pid'}; error_log stderr; {'user root;' if os.geteuid() == 0 else ''}"
    config = home / "nginx.conf"
    config.write_text(f"{start}\nevents {{}}\nhttp {{\naccess_log off; {temporary}\n{text}}}\n", encoding="utf-8")
    deployment.start("nginx", NGINX, "-e", "stderr", "-c", str(config))
    return f"127.0.0.1:{port}"


def supervised(command: list[str]) -> list[str]:
    """What systemd does with the shipped unit."""
    unit = (HOSTS / "panfm-supernode.service").read_text(encoding="utf-8")
    assert "\nRestart=always\n" in unit
    seconds = re.search(r"^RestartSec=(\d+)$", unit, re.MULTILINE)[1]
    return ["bash", "-c", f'while :; do "$@"; sleep {seconds}; done', "supervised", *command]


def child_of(process: Process) -> int:
    """The one process that a supervisor has started and that is at work."""
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    return int(child)


def connections(path: Path) -> int:
    """Ends of a Unix socket that the kernel knows, the listening one among them."""
    lines = Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()
    return sum(line.endswith(f" {path}") for line in lines)


def restart_worker(deployment: Deployment, folder: Path, number: signal.Signals = signal.SIGTERM) -> None:
    send_signal(deployment.processes[f"{folder.name}.worker"], number)
    deployment.start_worker(folder)
    deployment.wait_for_worker(folder)


def freeze_until_asked(workers: Mapping[int, Path]) -> None:
    """Stop workers while no question is open, and wait until the next round's question waits for each.

    Right after a round the connection of its question may still be open.

    Args:
        workers: Site folder of each worker, by its process id.
    """
    sockets = [folder / ".panfm" / "run" / "worker.sock" for folder in workers.values()]
    is_frozen = False
    while not is_frozen:
        wait_until(lambda: all(connections(socket) == 1 for socket in sockets), "workers are idle", LONG_S)
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        is_frozen = all(connections(socket) == 1 for socket in sockets)
        if not is_frozen:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
    wait_until(lambda: all(connections(socket) > 1 for socket in sockets), "workers are asked", LONG_S)


def begin(federation: Federation, deployment: Deployment, job: Job, *operators: str) -> str:
    """Approve a job at the sites of these operators, or at all, and submit it; returns Flower's id of the run."""
    approve([federation.sites / name for name in operators or HOLDINGS], load_run(job.run_dir / "run.toml"))
    return submit(CONNECTION, run_config(job), deployment.environment)


@pytest.fixture(scope="module")
def finished(federation, deployment) -> Job:
    """A run of three rounds with private experts, in which a worker and then the SuperLink were killed."""
    overrides = ("train.rounds=3", "federation.min-sites=3", "model.backbone=director-experts")
    job, beta = federation.job("run", *overrides), federation.sites / "beta"
    rounds = job.run_dir / "rounds.jsonl"
    run_id = begin(federation, deployment, job)
    wait_until(lambda: len(read_json_lines(rounds)) >= 1, "round 1", LONG_S)
    freeze_until_asked({deployment.processes["beta.worker"].pid: beta})
    restart_worker(deployment, beta, signal.SIGKILL)
    wait_until(lambda: len(read_json_lines(rounds)) >= 2, "round 2", LONG_S)
    send_signal(deployment.processes["superlink"], signal.SIGKILL)
    deployment.start_superlink()
    wait_for_end(run_id, CONNECTION, job, deployment.environment)
    return job


def test_a_run_with_a_worker_and_the_superlink_killed_gives_the_bits_of_the_local_engine(federation, finished):
    assert [line["rejected"] for line in read_json_lines(finished.run_dir / "rounds.jsonl")] == [{}, {}, {}]
    for name in HOLDINGS:
        lines = list(AuditLog(Site(federation.sites / name).state_dir).lines())
        assert [line["round"] for line in lines] == [None, 1, 2, 3]
    overrides = ("train.rounds=3", "federation.min-sites=3", "model.backbone=director-experts")
    expected, model = federation.run("local", *overrides), "model/model.safetensors"
    assert (finished.run_dir / model).read_bytes() == (expected / model).read_bytes()


def captured(deployment: Deployment, way: str) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(deployment.home.glob(f"*.{way}")))


def state_after(job: Job, number: int, folder: Path) -> ServerState:
    """The server's checkpoint of one round."""
    shutil.copy(job.run_dir / "checkpoint" / f"round-{number:06d}.state", folder)
    return load_latest(folder)


def windows(array: np.ndarray) -> list[bytes]:
    """Bytes from all over an array, none of which are there by chance."""
    content = array.tobytes()
    starts = range(0, len(content) - WINDOW + 1, max(WINDOW, len(content) // 8 // WINDOW * WINDOW))
    found = [content[start : start + WINDOW] for start in starts]
    return [each for each in found if len(set(each)) > WINDOW // 4]


@pytest.fixture(scope="module")
def alphas_last(federation, finished, tmp_path_factory) -> RoundTask:
    """What alpha was asked in the last round."""
    run = load_run(finished.run_dir / "run.toml").model_copy(update={"cohort": None})
    before = state_after(finished, 2, tmp_path_factory.mktemp("checkpoint"))
    left = list(AuditLog(federation.sites / "alpha" / ".panfm" / "state").lines())[-1]
    groups = {name: before.groups[name] for name, _, _ in left["arrays"]}
    assert set(groups) == {"backbone", "head", "director", "stream:brain-mr", "stream:heart-mr"}
    return RoundTask(before.run_id, 3, dump_toml(run), groups, before.profile)


def test_a_capture_of_what_passed_holds_the_shared_groups_and_nothing_private(federation, deployment, alphas_last):
    """The control: the same search finds the shared groups, on their way down and up."""
    alpha = federation.sites / "alpha"
    up, down = captured(deployment, "up"), captured(deployment, "down")
    for name, array in alphas_last.groups.items():
        assert all(window in down for window in windows(array)), name
    for name, array in replay(alpha, alphas_last).items():
        assert all(window in up for window in windows(array)), name
    private = {}
    for path in (alpha / ".panfm" / "state" / "runs" / alphas_last.run_id).glob("round-*.state"):
        private |= {f"{path.stem} {name}": array for name, array in safetensors.numpy.load(read_checked(path)).items()}
    for kind in ("student.", "teacher.", "optimiser.", ".experts.", ".router."):
        assert any(kind in name for name in private), kind
    for image in alpha.glob("*.nii.gz"):
        content = gzip.decompress(image.read_bytes())
        private[image.name] = np.frombuffer(content, np.uint8)
    passed = up + down
    assert [name for name, array in private.items() if any(window in passed for window in windows(array))] == []
    for word in (*(f"alpha-{number}" for number in range(6)), ".nii", "manifest", str(alpha), str(federation.folder)):
        assert word.encode() not in up, word


def replay(folder: Path, task: RoundTask) -> Mapping[str, np.ndarray]:
    """The arrays that the worker answers when a client on its machine asks a round again."""
    return ask(str(folder / ".panfm" / "run" / "worker.sock"), Frame(Kind.ROUND, task.to_records())).records.arrays


def test_a_replayed_round_tells_nothing_new_and_changes_nothing(federation, deployment, alphas_last):
    alpha = federation.sites / "alpha"
    state = (alpha / ".panfm" / "state" / "runs" / alphas_last.run_id / "round-000003.state").read_bytes()
    passed, lines = captured(deployment, "up"), len(list(AuditLog(alpha / ".panfm" / "state").lines()))
    for _ in range(2):
        for name, array in replay(alpha, alphas_last).items():
            assert array.tobytes() in passed, name
    assert (alpha / ".panfm" / "state" / "runs" / alphas_last.run_id / "round-000003.state").read_bytes() == state
    assert len(list(AuditLog(alpha / ".panfm" / "state").lines())) == lines + 2  # on record all the same


def test_sites_score_the_model_on_labels_that_never_leave_them(federation, deployment, finished, monkeypatch):
    """`python -m server evaluate` over the same messages; beta's operator names no column.

    Labels differ between sites, for Flower carries an array with the same content only once: the score of alpha
    would not pass the recorder if gamma had sent an equal one before.
    """
    monkeypatch.setenv("FLWR_HOME", str(deployment.home))
    named = {"may-leave": ["updates", "counts", "evaluation"], "evaluation-labels": ["old"]}
    for name in HOLDINGS:
        labels = (0, 1, 0, 1, 0, 1) if name == "alpha" else (0, 0, 0, 1, 1, 1)
        rows = [f"{name}-{number},{label},{number}.25" for number, label in enumerate(labels)]
        (federation.sites / name / "labels.csv").write_text("\n".join(["subject,old,dose", *rows]) + "\n")
        limit(federation.sites / name, labels="labels.csv", **(named if name != "beta" else {}))
    try:
        words = ["evaluate", str(finished.run_dir), "--task", "old", "--connection", CONNECTION]
        done = CliRunner().invoke(coordinator, words)
    finally:
        for name in HOLDINGS:
            limit(federation.sites / name)
    assert done.exit_code == 0, done.output
    assert "left out: old: beta: LimitError: this site's limits.evaluation-labels lacks 'old'" in done.output
    scores = read_evaluation(finished.run_dir).columns["old"].sites
    assert {site: (score.metric, score.patients) for site, score in scores.items()} == {
        "alpha": ("auc", 5),
        "gamma": ("auc", 5),
    }
    assert scores["alpha"].value != scores["gamma"].value
    last = list(AuditLog(Site(federation.sites / "alpha").state_dir).lines())[-1]
    assert last["summed"] == {"purpose": "evaluation", "labels": {"old": ["auc"]}}
    assert [name for name, _, _ in last["arrays"]] == ["score/auc"]
    up = captured(deployment, "up")
    assert b"score/auc" in up
    for word in (b"alpha-1", b"dose", b"labels.csv"):
        assert word not in up, word


def test_nobody_else_gets_in(federation, deployment):
    """Another authority's certificate, a key that nobody registered, plain text: each ends, none comes online."""
    others = federation.folder / "other-authority"
    credentials("coordinator", others, "localhost")
    credentials("site", others, "stranger")
    alpha, own = federation.sites / "alpha", deployment.home / "alpha"
    foreign = ["--root-certificates", str(others / "ca.crt")]
    doors = {
        "unregistered": (others / "stranger", None, "Failed to activate"),
        "other-authority": (own, foreign, "CERTIFICATE_VERIFY_FAILED"),
        "plain-text": (own, ["--insecure"], "Insecure connection is enabled"),
    }
    for name, (key, trust, _) in doors.items():
        deployment.start(name, *deployment.supernode(alpha, key=key, trust=trust))
    for name, (*_, reason) in doors.items():
        process = deployment.processes[name]
        assert process.wait(timeout=LONG_S) != 0, name
        assert reason in (deployment.logs / f"{name}.log").read_text(encoding="utf-8"), name
    assert deployment.num_online() == len(HOLDINGS)


def post(deployment: Deployment, address: str, path: str) -> int:
    """The status that a stranger is answered with, who has no key but trusts the certificate."""
    context = ssl.create_default_context(cafile=deployment.home / "ca.crt")
    connection = http.client.HTTPSConnection(address, timeout=60, context=context)
    try:
        connection.request("POST", path, b"", {"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("route", ["runtime/acquire-task", "fleet/pull-messages", "fleet/activate-node"])
def test_a_stranger_at_the_routes_is_turned_away(deployment, route):
    assert post(deployment, deployment.address, f"/v1/{route}") == 401


def test_the_superlink_listens_on_loopback_only(deployment):
    """Its control routes have no other guard: whoever reaches them may start a run."""
    listening = {line.split()[1] for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]}
    assert {each for each in listening if each.endswith(f":{deployment.port:04X}")} == {
        f"0100007F:{deployment.port:04X}"
    }
    assert "--host 127.0.0.1 " in (HOSTS / "panfm-superlink.service").read_text(encoding="utf-8")


HIDDEN = ("v1/control/list-runs", "v1/control/start-run", "v1/control/register-node", "v1/runtime/acquire-task")
AROUND = ("v1/fleet/../control/list-runs", "v1/fleet/%2e%2e/control/list-runs", "v1/fleet/..%2fcontrol/list-runs")


@needs_nginx
@pytest.mark.parametrize("path", [*HIDDEN, *AROUND, "/v1/control/list-runs", "V1/control/list-runs", "docs", "health"])
def test_nginx_publishes_no_other_route(deployment, path):
    assert post(deployment, deployment.doors["beta"], f"/{path}") == 404


@needs_nginx
def test_nginx_lets_a_stranger_reach_fleet_routes_that_refuse_him(deployment):
    assert post(deployment, deployment.doors["beta"], "/v1/fleet/pull-messages") == 401
    assert post(deployment, deployment.address, "/v1/control/list-runs") == 200  # so 404 was the proxy's doing


def limit(folder: Path, *, labels: str = "", **limits) -> None:
    table = {"labels": labels} if labels else {}
    (folder / "site.toml").write_text(
        tomli_w.dumps({"name": folder.name, **table, "limits": NO_FLOORS | limits}), encoding="utf-8"
    )


def test_limits_of_the_sites_win(federation, deployment):
    """beta gives a question no time, gamma has approved no such experiment: both refuse, in one line; alpha goes on.

    The workers are not started again.
    """
    beta, gamma = federation.sites / "beta", federation.sites / "gamma"
    limit(beta, **{"seconds-per-round": 0.001})
    try:
        job = federation.job("limits", "train.rounds=1", "federation.min-sites=1")
        wait_for_end(begin(federation, deployment, job, "alpha", "beta"), CONNECTION, job, deployment.environment)
    finally:
        limit(beta)
    [line] = read_json_lines(job.run_dir / "rounds.jsonl")
    assert list(line["sites"]) == ["alpha"]
    assert line["rejected"] == {}
    sites = (job.run_dir / "sites.json").read_text(encoding="utf-8")
    assert "site beta: LimitError: took longer than this site's limits.seconds-per-round (0.001)" in sites
    pending = r"site gamma: PendingApprovalError: experiment [0-9a-f]{64} waits for this site's approval"
    assert re.search(pending, sites)
    assert list(AuditLog(gamma / ".panfm" / "state").lines())[-1]["kind"] == "error"


def test_an_approval_that_is_revoked_between_rounds_is_in_force_in_the_next_question(federation, deployment):
    job = federation.job("revoked", "train.rounds=200", "federation.min-sites=2")
    gamma, rounds = federation.sites / "gamma", job.run_dir / "rounds.jsonl"
    experiment, register = (
        experiment_hash(load_run(job.run_dir / "run.toml")),
        WritableApprovals(gamma, load_site(gamma)),
    )
    run_id = begin(federation, deployment, job)
    wait_until(lambda: len(read_json_lines(rounds)) >= 1, "round 1", LONG_S)
    register.reject(experiment, by="operator")
    wait_until(lambda: "gamma" in read_json_lines(rounds)[-1]["rejected"], "gamma refuses", LONG_S)
    register.approve(experiment, by="operator")
    wait_until(lambda: "gamma" in read_json_lines(rounds)[-1]["sites"], "gamma answers again", LONG_S)
    flwr(["stop", run_id, CONNECTION], deployment.environment)
    for folder in federation.sites.iterdir():  # so that the next run may ask them
        for name in active_runs(state := folder / ".panfm" / "state", load_site(folder).limits):
            end_run(state, name)
    reasons = {line["rejected"]["gamma"] for line in read_json_lines(rounds) if line["rejected"]}
    assert reasons == {f"LimitError: experiment {experiment} is rejected by this site's operator"}


def large() -> RunConfig:
    """85 million parameters, for the one site that holds livers."""
    text = "\n".join(line for line in RUN.splitlines() if not line.startswith(("brain-mr", "heart-mr")))
    return parse_run(f'{text}\n[model]\nsize = "base"\n[federation]\nmin-sites = 1\n')


@pytest.mark.long
def test_a_reply_of_300_mb_arrives(federation, deployment):
    run = large()
    run = run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1, "local_steps": 1})})
    job = Job(federation.sites, federation.folder / "large")
    RunFolder.create(job.run_dir, run)
    wait_for_end(begin(federation, deployment, job), CONNECTION, job, deployment.environment)
    [line] = read_json_lines(job.run_dir / "rounds.jsonl")
    assert line["rejected"] == {}
    assert list(line["sites"]) == ["gamma"]
    assert sum(line["bytes_up"].values()) > 300e6
    assert np.isfinite(line["loss"])


def test_a_supernode_killed_in_a_round_and_started_again_within_a_minute_comes_back(federation, deployment):
    """Its round goes on without it; it is refused while its old session lives, gets in, and takes up its own state.

    Flower says that it is gone, unless it is back before anybody has looked; then the round waits for its deadline.
    """
    overrides = ("train.rounds=60", "federation.min-sites=2", "federation.round-timeout-s=120.0")
    job = federation.job("supernode", *overrides)
    gamma, rounds = federation.sites / "gamma", job.run_dir / "rounds.jsonl"
    run_id = begin(federation, deployment, job)
    wait_until(lambda: len(read_json_lines(rounds)) >= 1, "round 1", LONG_S)
    worker = deployment.processes["gamma.worker"].pid
    freeze_until_asked({worker: gamma})
    os.kill(child_of(deployment.processes["gamma.supernode"]), signal.SIGKILL)
    os.kill(worker, signal.SIGCONT)

    def is_back() -> bool:
        lines = read_json_lines(rounds)
        lost = [line["round"] for line in lines if "gamma" in line["rejected"]]
        return bool(lost) and "gamma" in lines[-1]["sites"] and lines[-1]["round"] > lost[0]

    wait_until(is_back, "gamma is back", LONG_S)
    flwr(["stop", run_id, CONNECTION], deployment.environment)
    lines = read_json_lines(rounds)
    [lost] = [line for line in lines if line["rejected"]]
    assert list(lost["rejected"]) == ["gamma"]
    back = next(line for line in lines if line["round"] > lost["round"] and "gamma" in line["sites"])
    assert back["sites"]["gamma"]["state_round"] == lost["round"]  # the worker had finished the round that was lost
    assert "Failed to activate" in (deployment.logs / "gamma.supernode.log").read_text(encoding="utf-8")
    assert deployment.num_online() == len(HOLDINGS)
