"""Builds the kit of a hospital: one archive with all that it needs to install its worker and SuperNode.

    panfm-kit-HOSPITAL/   install.py, README.txt, SHA256SUMS, kit.json (names that install.py reads)
                          panfm-*.whl, requirements.txt, requirements-flower.txt (versions and SHA-256 of every package)
                          ca.crt, site.toml, manifest.csv, compose.yaml, units/, and wheels/ where asked for

Everything but ca.crt and the packages comes from the committed files of a clone, so the same commit, options and
package index give the same bytes. Nothing is read of the coordinator's folders but ca.crt.
"""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panfm.config import parse_site
from panfm.data.manifest import COLUMNS
from panfm.data.template import site_text
from panfm.errors import ConfigError, RunError, one_line, reason
from panfm.files import write_atomic

_DEPLOYMENT = Path("configs/deployment")
_REQUIREMENTS = {"requirements.txt": "", "requirements-flower.txt": "[client]"}
"""File of the kit -> extra of panfm that its environment has."""
_UNITS = ("panfm-worker.service", "panfm-supernode.service", "panfm-isolation@.service", "panfm-isolation-site.nft")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_CERTIFICATES = re.compile(r"(\s*-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----)+\s*")


@dataclass(frozen=True)
class KitOptions:
    """Options of a kit: hospital, address of the server, packages, checks."""

    hospital: str
    server: str
    """Name of the coordinator's machine, as in its certificate."""
    port: int = 443
    ca: Path = Path("/etc/panfm/ca.crt")
    """Certificate authorities that the hospital is to trust: certificates only."""
    wheels: Path | None = None
    """Folder of all wheels that the kit is to carry; without it the hospital's pip uses an index."""
    gpu: bool = False
    disk_gib: int = 20
    """Free space that install.py asks for."""


def write_kit(options: KitOptions, source: Path, out: Path) -> str:
    """Write the archive, and beside it OUT.README.txt; returns the archive's SHA-256.

    Args:
        options: What the coordinator decides.
        source: Clone of this project, without uncommitted changes.
        out: New file; its name ends in .tar.gz.
    Raises:
        ConfigError: an option does not hold.
        RunError: the clone has changes, or a package cannot be had.
    """
    readme = out.with_name(f"{out.name}.README.txt")
    _check(options, out, readme)
    commit_time = _commit_time(source)
    with tempfile.TemporaryDirectory(prefix="panfm-kit-") as name:
        work = Path(name)
        committed, folder = work / "source", work / f"panfm-kit-{options.hospital}"
        _extract_commit(source, committed)
        folder.mkdir()
        wheel = _build_wheel(committed, folder, commit_time)
        for file, extra in _REQUIREMENTS.items():
            lines = _requirements(wheel, extra, committed / "constraints.txt", options.wheels, folder / "wheels")
            (folder / file).write_text("".join(lines), encoding="utf-8")
        _fill(options, committed, folder)
        words = _readme_words(options, folder, out.name)
        template = (committed / _DEPLOYMENT / "kit" / "README.txt").read_text(encoding="utf-8")
        inner = words | {"sha256": "the one that the coordinator tells you"}
        (folder / "README.txt").write_text(template.format(**inner), encoding="utf-8")
        _write_sums(folder)
        content = _archive(folder, commit_time)
    digest = hashlib.sha256(content).hexdigest()
    try:
        write_atomic(out, content)
        write_atomic(readme, template.format(**words, sha256=digest).encode())
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({reason(error)})") from error
    return digest


def _check(options: KitOptions, out: Path, readme: Path) -> None:
    """Raises ConfigError, before long work, if an option does not hold."""
    check_hospital(options.hospital)
    if not _HOST_NAME.fullmatch(options.server):
        raise ConfigError(
            f"--server: found {options.server!r:.60}, expected a DNS name such as coordinator.example.org"
        )
    if not out.name.endswith(".tar.gz"):
        raise ConfigError(f"--out: found {str(out)!r:.80}, expected a name that ends in .tar.gz")
    for path in (out, readme):
        if path.exists():
            raise ConfigError(f"{path}: exists, expected a new file")
    try:
        text = options.ca.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ca {options.ca}: cannot be read ({reason(error)})") from error
    if not _CERTIFICATES.fullmatch(text):
        raise ConfigError(f"--ca {options.ca}: expected certificates in PEM form and nothing else")
    if options.wheels and not any(options.wheels.glob("*.whl")):
        raise ConfigError(f"--wheels {options.wheels}: holds no wheel, expected a folder of .whl files")


def check_hospital(name: str) -> None:
    """Raises ConfigError unless a name is one that a site may have."""
    try:
        parse_site(site_text(name))
    except ConfigError as error:
        rule = "lower-case letters, digits, dot, dash, underscore, at most 64"
        raise ConfigError(f"hospital: found {one_line(repr(name), 60)}, expected {rule}") from error


def _git(source: Path, *words: str) -> bytes:
    done = subprocess.run(
        ["git", "-c", f"safe.directory={source.resolve()}", "-C", str(source), *words], capture_output=True, check=False
    )
    if done.returncode:
        raise RunError(f"{source}: git {words[0]}: {one_line(done.stderr.decode(errors='replace'))}")
    return done.stdout


def _commit_time(source: Path) -> int:
    """Time of the clone's commit. Raises RunError if the clone holds anything that is not committed."""
    if changes := _git(source, "status", "--porcelain", "--", "panfm", "configs", "pyproject.toml", "constraints.txt"):
        first, *others = changes.decode(errors="replace").splitlines()
        more = f" and {len(others)} more" if others else ""
        raise RunError(f"{source}: {first.strip()}{more}: not committed; a kit is made of committed files only")
    return int(_git(source, "log", "-1", "--format=%ct"))


def _extract_commit(source: Path, target: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(_git(source, "archive", "--format=zip", "HEAD"))) as archive:
        archive.extractall(target)


def _build_wheel(committed: Path, folder: Path, commit_time: int) -> Path:
    """Build panfm's wheel; its bytes depend on the commit and the build tool's version only."""
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    _pip("wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), str(committed), commit_time=commit_time)
    [wheel] = folder.glob("*.whl")
    return wheel


def _requirements(wheel: Path, extra: str, constraints: Path, wheels: Path | None, copies: Path) -> list[str]:
    """Lines of a requirements file: every package that panfm with this extra needs, with version and SHA-256.

    With `wheels` packages come from there alone, and are copied.
    """
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", *source, "--report", str(report)]
        _pip("install", *words, "--constraint", str(constraints), f"{wheel}{extra}")
        packages = json.loads(report.read_text(encoding="utf-8"))["install"]
    lines = []
    for package in packages:
        name, version = str(package["metadata"]["name"]).lower(), package["metadata"]["version"]
        if name == "panfm":
            lines.append(f"./{wheel.name} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
            continue
        file = _local_file(package)
        if file and wheels:
            copies.mkdir(exist_ok=True)
            shutil.copyfile(file, copies / file.name)
        lines.append(f"{name}=={version} --hash=sha256:{_digest(package, file)}\n")
    return sorted(lines)


def _local_file(package: dict[str, Any]) -> Path | None:
    """The file of a package that pip found in a folder; None if it was in an index."""
    from urllib.parse import unquote, urlsplit

    url = urlsplit(package["download_info"]["url"])
    return Path(unquote(url.path)) if url.scheme == "file" else None


def _digest(package: dict[str, Any], file: Path | None) -> str:
    if file:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    digest = package["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
    if not digest:
        raise RunError(f"{package['metadata']['name']}: the package index tells no SHA-256; use --wheels")
    return str(digest)


def _pip(*words: str, commit_time: int | None = None) -> None:
    environment = os.environ | ({} if commit_time is None else {"SOURCE_DATE_EPOCH": str(commit_time)})
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise RunError(f"pip {words[0]}: {one_line(' '.join(errors[-2:]))}")


def _fill(options: KitOptions, committed: Path, folder: Path) -> None:
    """Write all but packages, README and sums, with the hospital's and the server's names in them."""
    deployment, address = committed / _DEPLOYMENT, f"{options.server}:{options.port}"
    names = {"coordinator.example.org:443": address, "/etc/panfm/example-hospital": f"/etc/panfm/{options.hospital}"}
    hosts = deployment / "hosts"
    (folder / "units").mkdir()
    for file in _UNITS:
        text = _filled((hosts / file).read_text(encoding="utf-8"), names)
        (folder / "units" / file).write_text(text, encoding="utf-8")
    compose = _filled((hosts / "compose.yaml").read_text(encoding="utf-8"), names)
    (folder / "compose.yaml").write_text(compose, encoding="utf-8")
    shutil.copyfile(deployment / "kit" / "install.py", folder / "install.py")
    (folder / "ca.crt").write_bytes(options.ca.read_bytes())
    (folder / "manifest.csv").write_text(f"{','.join(COLUMNS)}\n", encoding="utf-8")
    (folder / "site.toml").write_text(_site_toml(options), encoding="utf-8")
    told = {"hospital": options.hospital, "server": options.server, "port": options.port, "gpu": options.gpu}
    told |= {"disk-gib": options.disk_gib, "machine": platform.machine()}
    told |= {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    (folder / "kit.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _filled(text: str, names: dict[str, str]) -> str:
    for shipped, ours in names.items():
        text = text.replace(shipped, ours)
    return text


def _site_toml(options: KitOptions) -> str:
    """The commented description of a site, with the sections on worker and coordinator filled."""
    text = site_text(options.hospital)
    for shipped, ours in {
        'socket = ".panfm/run/worker.sock"': 'socket = "/run/panfm/worker.sock"',
        "users = []": 'users = ["flower"]',
        '# group = "panfm"': 'group = "flower"',
        'address = "coordinator.example.org:443"': f'address = "{options.server}:{options.port}"',
        'root-certificates = "ca.crt"': 'root-certificates = "/etc/panfm/ca.crt"',
        'key = "supernode.key"': f'key = "/etc/panfm/{options.hospital}"',
    }.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, ours)
    parse_site(text)
    return text


def _readme_words(options: KitOptions, folder: Path, archive: str) -> dict[str, object]:
    title = f"Kit of {options.hospital}, for the federation at {options.server}:{options.port}"
    words: dict[str, object] = {"hospital": options.hospital, "server": options.server, "port": options.port}
    words |= {"archive": archive, "folder": folder.name, "machine": platform.machine(), "underline": "=" * len(title)}
    words["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    words["lines"] = len((folder / "install.py").read_text(encoding="utf-8").splitlines())
    return words


def _write_sums(folder: Path) -> None:
    """Write SHA256SUMS, in the form of sha256sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def _archive(folder: Path, commit_time: int) -> bytes:
    """A .tar.gz of a folder, with sorted names and nothing of this machine: no owner, no time but the commit's."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=commit_time, filename="") as squeezed,
        tarfile.open(fileobj=squeezed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted([folder, *folder.rglob("*")]):
            entry = tarfile.TarInfo(str(path.relative_to(folder.parent)))
            entry.mtime = commit_time
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            else:
                content = path.read_bytes()
                entry.mode, entry.size = 0o644, len(content)
                archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
