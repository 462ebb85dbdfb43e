"""Findings on the software: installed packages, their supported versions, and the W&B account."""

from __future__ import annotations

import importlib
import netrc
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ds_al.doctor.finding import Finding, Status, one_line
from ds_al.system.versions import release

DISTRIBUTION = "ds_al"
ESSENTIAL = ("torch", "deepspeed")
"""Packages that must be importable: nothing runs without them."""
PACKAGES = (*ESSENTIAL, "transformers", "datasets", "wandb")
IMPORT_FAILS = "import fails"
"""Value of the finding on a package that cannot be imported."""


def software() -> list[Finding]:
    """Returns the findings on versions, and whether each is in the range required by ds_al's metadata."""
    ranges = supported_ranges()
    version = release(DISTRIBUTION)
    group = "software"
    if version is None:
        remark = "ranges are not checked: install it, as with pip install -e ."
        rows = [Finding(group, DISTRIBUTION, "not installed", "limited", remark)]
    else:
        rows = [Finding(group, DISTRIBUTION, version)]
    rows.append(_version_row("python", platform.python_version(), ranges.get("python"), essential=True))
    rows += [_package_row(name, ranges.get(name)) for name in PACKAGES]
    rows.append(_account_row())
    commit = _git_commit(Path(__file__).resolve().parents[2])
    return [*rows, Finding(group, "git commit", commit)] if commit else rows


def supported_ranges() -> dict[str, SpecifierSet]:
    """Maps package names (and ``python``) to supported versions; empty if ds_al is not installed."""
    try:
        info = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {}
    requirements = map(Requirement, info.get_all("Requires-Dist") or [])
    ranges = {r.name: r.specifier for r in requirements if not (r.marker and "extra" in str(r.marker))}
    return {"python": SpecifierSet(info["Requires-Python"] or ""), **ranges}


def _package_row(name: str, supported: SpecifierSet | None) -> Finding:
    essential = name in ESSENTIAL
    version = release(name)
    if essential:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation may raise anything
            remark = f"{one_line(error)}. Install {name}{supported or ''}"
            return Finding("software", name, IMPORT_FAILS, "no", remark, essential=True)
    if version is None:
        status: Status = "no" if essential else "limited"
        remark = f"what uses it fails: install {name}{supported or ''}"
        return Finding("software", name, "not installed", status, remark, essential)
    return _version_row(name, version, supported, essential)


def _version_row(name: str, version: str, supported: SpecifierSet | None, essential: bool) -> Finding:
    if supported is None:
        return Finding("software", name, version, essential=essential)
    if not supported.contains(version, prereleases=True):
        status: Status = "no" if essential else "limited"
        return Finding("software", name, version, status, f"outside {supported}: install {name}{supported}", essential)
    return Finding("software", name, version, "ok", f"supported: {supported}" if str(supported) else "", essential)


def _account_row() -> Finding:
    """Returns the finding on W&B's mode and account. The key itself is never part of the result."""
    mode = os.environ.get("WANDB_MODE") or "not set"
    where = _wandb_account()
    value = f"WANDB_MODE {mode}, {f'account from {where}' if where else 'no account'}"
    if where or mode in ("offline", "disabled", "dryrun"):
        return Finding("software", "wandb account", value)
    remark = "runs stay on this machine (`wandb sync` sends them later): for live ones, `wandb login`"
    return Finding("software", "wandb account", value, "limited", remark)


def _wandb_account() -> str | None:
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    own = os.environ.get("NETRC")
    for path in (own,) if own else ("~/.netrc", "~/_netrc"):
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return "netrc"
        except (OSError, netrc.NetrcParseError):
            continue
    return None


def _git_commit(folder: Path) -> str | None:
    """Returns the commit of the checkout at ``folder``, marked if tracked files differ from it; ``None`` outside a
    checkout."""
    top = _output("git", "-C", str(folder), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder:
        return None
    commit = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
