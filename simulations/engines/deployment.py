"""Engine `deployment`: the processes of coordinator and hospitals on this machine, over TLS and with authentication.

    coordinator    SuperLink (process isolation, database on disk) and the SuperExec that shows it a secret
    each site      resident worker (`panfm site start`) and a SuperNode whose key the coordinator has registered

The commands are those of `configs/deployment/hosts`, with loopback addresses. It stands beside the other engines
because it answers the same question, how to run the apps on one machine, and must give the same bits.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from panfm.config import RunConfig, experiment_hash, load_run, load_site, site_folders, site_path
from panfm.site.decisions import WritableApprovals
from panfm.site.worker import is_running
from server.flower_cli import ROOT, flwr, submit
from simulations.engines.flower import private_environment, wait_for_end
from simulations.engines.job import Job
from simulations.engines.processes import Process, end, free_ports, is_healthy, start, wait_until

CONNECTION = "deployment"
_CREDENTIALS = ROOT / "configs" / "deployment" / "credentials.sh"
_START_TIMEOUT_S = 300.0


class Deployment:
    """Processes of a coordinator and its sites; all end with the block."""

    def __init__(self, home: Path, logs: Path) -> None:
        """Args: home: keys, certificates, Flower's own files. logs: one file per process."""
        self.home = home
        self.logs = logs
        self.port, *_ = free_ports(1)
        self.environment = private_environment(home)
        self.processes: dict[str, Process] = {}

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            end(process)

    @property
    def address(self) -> str:
        """Address at which the SuperLink listens."""
        return f"127.0.0.1:{self.port}"

    def start_coordinator(self) -> None:
        """Make credentials, start SuperLink and SuperExec, and write the connection under which `flwr` finds them."""
        credentials("coordinator", self.home, "localhost")
        connection = f'address = "{self.address}"\nroot-certificates = "{self.home / "ca.crt"}"\n'
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{connection}'
        (self.home / "config.toml").write_text(text, encoding="utf-8")
        self.start_superlink()
        secret = ["--superexec-auth-secret-file", str(self.home / "superexec.secret")]
        self.start("superexec", "flower-superexec", "--runtime-api-address", self.address, *self._trust(), *secret)

    def start_superlink(self) -> None:
        """Start it, or start it again on the same database, and wait until it answers."""
        words = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
        words = [str(self.home / word) if "." in word else word for word in words]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth"]
        words += ["--database", f"sqlite:///{self.home / 'superlink.db'}?plugin=panfm", "--isolation", "process"]
        words += ["--superexec-auth-secret-file", str(self.home / "superexec.secret")]
        self.start("superlink", "flower-superlink", *words)
        superlink, certificate = self.processes["superlink"], self.home / "ca.crt"
        wait_until(lambda: is_healthy(self.address, certificate), "flower-superlink", _START_TIMEOUT_S, superlink)

    def start_worker(self, folder: Path) -> None:
        """Start the site's worker in the background."""
        self.start(f"{folder.name}.worker", "panfm", "site", "start", str(folder))

    def register(self, folder: Path) -> None:
        """Make a key for a site, and let the coordinator know it."""
        credentials("site", self.home, folder.name)
        key = str(self.home / f"{folder.name}.pub")
        flwr(["supernode", "register", key, CONNECTION, "--name", folder.name], self.environment)

    def start_supernode(self, folder: Path) -> None:
        """Start the site's SuperNode in the background."""
        self.start(f"{folder.name}.supernode", *self.supernode(folder))

    def supernode(
        self, folder: Path, *, address: str = "", key: Path | None = None, trust: list[str] | None = None
    ) -> list[str]:
        """Command line of a site's SuperNode. It knows the worker's socket, and not where the data lie.

        Args:
            folder: The site folder.
            address: Where it finds the coordinator, instead of at the SuperLink's own.
            key: Private key, instead of the site's.
            trust: Flags, instead of those that make it trust the coordinator's certificate.
        """
        socket = site_path(folder, load_site(folder).worker.socket)
        [port] = free_ports(1)
        words = ["flower-supernode", "--superlink", address or self.address]
        words += self._trust() if trust is None else trust
        words += ["--auth-supernode-private-key", str(key or self.home / folder.name)]
        words += ["--host", "127.0.0.1", "--port", str(port)]
        return [*words, "--node-config", f"site-socket={json.dumps(str(socket))}"]

    def wait_for(self, folders: list[Path]) -> None:
        """Wait until every site's worker listens and its SuperNode is online."""
        for folder in folders:
            self.wait_for_worker(folder)
        nodes = [self.processes[f"{folder.name}.supernode"] for folder in folders]
        wait_until(lambda: self.num_online() >= len(folders), "SuperNodes online", _START_TIMEOUT_S, *nodes)

    def wait_for_worker(self, folder: Path) -> None:
        """Wait until a site's worker listens."""
        worker, site = self.processes[f"{folder.name}.worker"], load_site(folder)
        wait_until(lambda: is_running(folder, site), f"worker of {folder.name}", _START_TIMEOUT_S, worker)

    def num_online(self) -> int:
        """SuperNodes that the coordinator sees."""
        nodes = flwr(["supernode", "list", CONNECTION], self.environment)["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def start(self, name: str, *words: str) -> None:
        """Start a process in the background, with a log under its name."""
        self.processes[name] = start(words, self.logs / f"{name}.log", self.environment)

    def _trust(self) -> list[str]:
        return ["--root-certificates", str(self.home / "ca.crt")]


def run(job: Job) -> None:
    """Bring a deployment up, run a federation over it, take it down. Raises RunError unless the run completed."""
    folders = site_folders(job.sites)
    approve(folders, load_run(job.run_dir / "run.toml"))
    with deployed(folders, job.run_dir / "logs") as deployment:
        run_id = submit(CONNECTION, run_config(job), deployment.environment)
        wait_for_end(run_id, CONNECTION, job, deployment.environment)


def approve(folders: Iterable[Path], run: RunConfig) -> None:
    """Approve an experiment at sites, as their operators do with `panfm site approve`."""
    for folder in folders:
        WritableApprovals(folder, load_site(folder)).approve(experiment_hash(run), by="simulation")


def run_config(job: Job) -> dict[str, str]:
    """The run config that the coordinator gives the apps: without the paths of the sites' data."""
    return {key: value for key, value in job.run_config().items() if key != "sites"}


@contextmanager
def deployed(folders: list[Path], logs: Path) -> Iterator[Deployment]:
    """A coordinator and a number of sites, all online."""
    with tempfile.TemporaryDirectory(prefix="panfm-deployment-") as home, Deployment(Path(home), logs) as deployment:
        for folder in folders:
            deployment.start_worker(folder)
        deployment.start_coordinator()
        for folder in folders:
            deployment.register(folder)
            deployment.start_supernode(folder)
        deployment.wait_for(folders)
        yield deployment


def credentials(role: str, folder: Path, name: str) -> None:
    """Certificates of the coordinator, or the key of a site."""
    subprocess.run([str(_CREDENTIALS), role, str(folder), name], check=True)
