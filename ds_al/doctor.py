"""``python -m ds_al doctor``: what is installed, what this machine has, and what will work on it.

It only looks: no process group is started, nothing is compiled, nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import netrc
import os
import platform
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Status = Literal["ok", "limited", "no"]

DISTRIBUTION = "ds_al"
ESSENTIAL = ("torch", "deepspeed")
"""Packages that must be importable: without them nothing runs."""
PACKAGES = (*ESSENTIAL, "transformers", "datasets", "wandb")
LAUNCHER_PORT = 29500
"""Where ranks meet unless the ``deepspeed`` launcher gets ``--master_port``."""

_IMPORT_FAILS = "import fails"
_STYLES: dict[str, str] = {"ok": "green", "limited": "yellow", "no": "red"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group: the part of the table it belongs to.
        item: what was looked at.
        value: what was found.
        status: ``ok``, ``limited`` (works, within what the remark says) or ``no``.
        remark: what follows from it, and the remedy.
        essential: whether ``no`` means that nothing can be trained here.
    """

    group: str
    item: str
    value: str
    status: Status = "ok"
    remark: str = ""
    essential: bool = False


def add_command(commands: Any) -> None:
    """Adds ``doctor`` to the sub-parsers of ``python -m ds_al``."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed and what will work on this machine",
        description="Exits with 1 where something essential is missing or out of range, else with 0.",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows to this file")
    parser.set_defaults(run=lambda args: run(args.json))


def run(json_path: Path | None = None) -> int:
    """Prints the table, writes the rows to ``json_path`` where one is given, and returns the exit code."""
    with _quiet():
        rows = examine()
    _print(rows)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return exit_code(rows)


def exit_code(rows: list[Row]) -> int:
    """1 where an essential row says ``no``, else 0."""
    return int(any(row.essential and row.status == "no" for row in rows))


def examine() -> list[Row]:
    """All rows, top to bottom. Rows that need PyTorch or DeepSpeed are left out where these do not import."""
    rows = software()
    if any(row.value == _IMPORT_FAILS for row in rows):
        return rows + tools()
    import torch
    from deepspeed.accelerator import get_accelerator

    try:
        accelerator = get_accelerator()
    except Exception as error:  # an accelerator that DS_ACCELERATOR asks for but that is not here
        remark = f"{_one_line(error)}. Correct or unset DS_ACCELERATOR"
        return [*rows, Row("machine", "accelerator", "none", "no", remark, essential=True), *tools()]
    return [*rows, *machine(accelerator), *tools(), *compilation(accelerator), *abilities(accelerator, torch)]


# ---------------------------------------------------------------------------------------------- software


def software() -> list[Row]:
    """Versions, and whether each lies in the range that ds_al's metadata asks for."""
    ranges = supported_ranges()
    version = installed_version(DISTRIBUTION)
    group = "software"
    if version is None:
        remark = "ranges are not checked: install it, as with pip install -e ."
        rows = [Row(group, DISTRIBUTION, "not installed", "limited", remark)]
    else:
        rows = [Row(group, DISTRIBUTION, version)]
    rows.append(_version_row("python", platform.python_version(), ranges.get("python"), essential=True))
    rows += [_package_row(name, ranges.get(name)) for name in PACKAGES]
    rows.append(_account_row())
    commit = _git_commit(Path(__file__).resolve().parents[1])
    return [*rows, Row(group, "git commit", commit)] if commit else rows


def supported_ranges() -> dict[str, SpecifierSet]:
    """Package name (and ``python``) to supported versions; empty where ds_al is not installed."""
    try:
        info = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {}
    requirements = map(Requirement, info.get_all("Requires-Dist") or [])
    ranges = {r.name: r.specifier for r in requirements if not (r.marker and "extra" in str(r.marker))}
    return {"python": SpecifierSet(info["Requires-Python"] or ""), **ranges}


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, or ``None``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package_row(name: str, supported: SpecifierSet | None) -> Row:
    essential = name in ESSENTIAL
    version = installed_version(name)
    if essential:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            remark = f"{_one_line(error)}. Install {name}{supported or ''}"
            return Row("software", name, _IMPORT_FAILS, "no", remark, essential=True)
    if version is None:
        status: Status = "no" if essential else "limited"
        remark = f"what uses it fails: install {name}{supported or ''}"
        return Row("software", name, "not installed", status, remark, essential)
    return _version_row(name, version, supported, essential)


def _version_row(name: str, version: str, supported: SpecifierSet | None, essential: bool) -> Row:
    if supported is None:
        return Row("software", name, version, essential=essential)
    if not supported.contains(version, prereleases=True):
        status: Status = "no" if essential else "limited"
        return Row("software", name, version, status, f"outside {supported}: install {name}{supported}", essential)
    return Row("software", name, version, "ok", f"supported: {supported}" if str(supported) else "", essential)


def _account_row() -> Row:
    """W&B's mode and whether there is an account. The key itself is never read into the result."""
    mode = os.environ.get("WANDB_MODE") or "not set"
    where = _wandb_account()
    value = f"WANDB_MODE {mode}, {f'account from {where}' if where else 'no account'}"
    if where or mode in ("offline", "disabled", "dryrun"):
        return Row("software", "wandb account", value)
    remark = "runs stay on this machine (`wandb sync` sends them later): for live ones, `wandb login`"
    return Row("software", "wandb account", value, "limited", remark)


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
    """The commit of the checkout at ``folder``, marked where files differ from it; ``None`` elsewhere."""
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


# ----------------------------------------------------------------------------------------------- machine


def machine(accelerator: Any) -> list[Row]:
    """Accelerator, communication and hardware."""
    import torch

    group, name = "machine", accelerator.device_name()
    chosen = "DS_ACCELERATOR" if os.environ.get("DS_ACCELERATOR") else "found by DeepSpeed"
    rows = [
        Row(group, "accelerator", name, remark=chosen),
        _backend_row(accelerator.communication_backend_name()),
        *_device_rows(accelerator),
        Row(group, "cores", str(cores()), remark=f"of {os.cpu_count()} in the machine"),
        Row(group, "memory", _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
    ]
    threads, setting = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    remark = f"OMP_NUM_THREADS={setting}" if setting else "OMP_NUM_THREADS is not set: every rank takes as many"
    return [*rows, Row(group, "torch threads", f"{threads} per process", remark=remark)]


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _backend_row(backend: str) -> Row:
    from torch import distributed

    checks: dict[str, Callable[[], bool]] = {
        "nccl": distributed.is_nccl_available,
        "gloo": distributed.is_gloo_available,
    }
    if not distributed.is_available() or not checks.get(backend, lambda: True)():
        remark = f"this build of PyTorch has no {backend}: install one that has"
        return Row("machine", "communication", backend, "no", remark, essential=True)
    return Row("machine", "communication", backend)


def _device_rows(accelerator: Any) -> Iterator[Row]:
    if accelerator.device_name() == "cpu":
        yield Row("machine", "device", _processor())
        return
    for index in range(accelerator.device_count()):
        name = accelerator.device_name(index)
        if name.startswith("cuda"):
            import torch

            name = f"{name} {torch.cuda.get_device_name(index)}"
        yield Row("machine", "device", f"{name}, {_gib(accelerator.total_memory(index))}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


# ----------------------------------------------------------------------------------------- tools, compiler


def tools() -> list[Row]:
    """Compiler, ninja and numactl, as the shell finds them."""
    cxx, ninja, numactl = compiler(), shutil.which("ninja"), shutil.which("numactl")
    missing_ninja = "not on PATH: activate the environment that holds it, or install ninja"
    missing_numactl = "the launcher's --bind_cores_to_rank fails without it: leave that out, or install numactl"
    return [
        Row("tools", "C++ compiler", cxx)
        if cxx
        else Row("tools", "C++ compiler", "none", "limited", "install g++, or set CXX"),
        Row("tools", "ninja", ninja) if ninja else Row("tools", "ninja", "none", "limited", missing_ninja),
        Row("tools", "numactl", numactl) if numactl else Row("tools", "numactl", "none", "limited", missing_numactl),
    ]


def compiler() -> str | None:
    """The C++ compiler that PyTorch's extensions would be built with."""
    return shutil.which(os.environ.get("CXX") or "c++")


def compilation(accelerator: Any) -> list[Row]:
    """Whether the op that DeepSpeed loads at every start on CPU, for shared memory, is or can be built."""
    if accelerator.device_name() != "cpu" or sys.platform != "linux":
        return []
    item, built = "shared-memory op", _shared_memory_op_is_built()
    if not shutil.which("ninja"):
        remark = "DeepSpeed does not start on CPU without ninja, even if the op is compiled: see ninja"
        return [Row("tools", item, "cannot be loaded", "no", remark, essential=True)]
    if (lock := _op_folder() / "lock").exists():
        remark = f"being compiled, or {lock} was left by a killed compilation: then remove it, DeepSpeed waits for it"
        return [Row("tools", item, "locked", "limited", remark)]
    if built:
        return [Row("tools", item, "compiled", remark="as long as TORCH_EXTENSIONS_DIR stays the same")]
    if not compiler():
        remark = "no compiler: DeepSpeed does not start on CPU. Install g++, or set CXX"
        return [Row("tools", item, "cannot be compiled", "no", remark, essential=True)]
    remark = "DeepSpeed's shared-memory op compiles at the first start, about 20-35 s, once"
    return [Row("tools", item, "not compiled yet", remark=remark)]


def _shared_memory_op_is_built() -> bool:
    return (_op_folder() / "deepspeed_shm_comm.so").is_file()


def _op_folder() -> Path:
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        folder = Path(root)
    else:
        kind = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
        folder = Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_{kind}"
    return folder / "deepspeed_shm_comm"


# --------------------------------------------------------------------------------- what works and what not


def abilities(accelerator: Any, torch: Any) -> list[Row]:
    """What will and what will not work here."""
    group, on_cpu = "works here", accelerator.device_name() == "cpu"
    streaming = (
        streaming_on_cores(cores(), torch.get_num_threads())
        if on_cpu
        else streaming_on_devices(accelerator.device_name(), accelerator.device_count())
    )
    gpus, has_nccl = torch.cuda.device_count(), torch.distributed.is_nccl_available()
    if has_nccl and gpus:
        nccl = Row(group, "NCCL", f"{gpus} GPU{'s' * (gpus > 1)}")
    else:
        why = "no GPU was found" if has_nccl else "this build of PyTorch has none"
        nccl = Row(group, "NCCL", "no", "no", f"{why}: ranks on CPU talk over gloo")
    so_far = "refused by ds_al so far: train in fp32"
    return [
        streaming,
        nccl,
        Row(group, "fp16", "no", "no", "not on a CPU: train in fp32" if on_cpu else so_far),
        Row(group, "bf16", "no", "no", so_far),
        Row(group, "ZeRO", "no", "no", 'refused by ds_al so far: leave "zero_optimization" out, or at stage 0'),
        _compile_row(on_cpu),
        port_row(LAUNCHER_PORT),
    ]


def streaming_on_cores(cores: int, threads: int) -> Row:
    """How many stages can work at the same time on ``cores`` with ``threads`` each."""
    group, item, side_by_side = "works here", "streaming", cores // threads
    if side_by_side > 1:
        value = f"up to {side_by_side} ranks at once"
        each = f"{threads} thread{'s' * (threads > 1)}"
        remark = f"{cores} cores, {each} per rank. More ranks train too, but take turns"
        return Row(group, item, value, remark=remark)
    if cores > 1:
        remark = f"2 ranks x {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores // 2} or less"
    else:
        remark = "any number of ranks trains, but they share one core: nothing is gained in time"
    return Row(group, item, "ranks take turns", "limited", remark)


def streaming_on_devices(name: str, devices: int) -> Row:
    """How many stages can work at the same time on ``devices`` accelerators, one rank each."""
    group, item = "works here", "streaming"
    if devices > 1:
        return Row(group, item, f"up to {devices} ranks", remark="one per device")
    return Row(group, item, "1 rank", "limited", f"one {name} device: for more ranks set DS_ACCELERATOR=cpu")


def _compile_row(on_cpu: bool) -> Row:
    group, item = "works here", "torch.compile"
    if not compiler():
        return Row(group, item, "no", "no", "needs a C++ compiler: install g++, or set CXX")
    if not on_cpu and importlib.util.find_spec("triton") is None:
        return Row(group, item, "no", "no", "needs triton: install it")
    remark = 'the tools are there; the config\'s "compile" block is refused by ds_al so far'
    return Row(group, item, "yes", "limited", remark)


def port_row(port: int) -> Row:
    """Whether ranks can meet at ``port``. It is bound for a moment, and nothing listens."""
    item = f"port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            remark = "the launcher's default port is taken: give another by --master_port, or make PORT=..."
            return Row("works here", item, "in use", "limited", remark)
    return Row("works here", item, "free", remark="the launcher's default")


# ------------------------------------------------------------------------------------------------ output


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences log lines and warnings of libraries while they are imported and asked."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _print(rows: list[Row]) -> None:
    table = Table("item", "value", "status", "remark", box=box.SIMPLE_HEAD)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        status = f"[{_STYLES[row.status]}]{row.status}[/]"
        ends = following is not None and following.group != row.group
        table.add_row(escape(row.item), escape(row.value), status, escape(row.remark), end_section=ends)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    broken = [row.item for row in rows if row.essential and row.status == "no"]
    if broken:
        console.print(f"Not ready to train: {', '.join(broken)}", style="red")
    else:
        console.print("Ready to train.", style="green")
