"""Writes the page of the study from its results file, or how to make one where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Results, Row, origin
from ds_al.studies.tables import gpu as tables
from ds_al.studies.tables import parts as of_parts
from ds_al.studies.tables.write import document

Blocks = list[Table | str]


def page(results: Results | None, *, picture: str | None = None) -> str:
    """Returns the text of ``docs/gpu.md``.

    Args:
        results: content of the results file; ``None`` where there is none.
        picture: path of the picture of the trainings, relative to the page, where there is one.
    """
    if results is None:
        return document("# One GPU: not run yet", _ABOUT, *_HOW)
    parts = {row["part"]: row for row in results.rows}
    unfinished = sum(not row["done"] for row in results.rows)
    about = results.header["settings"]
    blocks: Blocks = [
        "# One GPU" + (f": {unfinished} of {len(results.rows)} parts are not finished" if unfinished else ""),
        _ABOUT,
        f"On one {about['gpu']} ({about['memory_bytes'] / 2**30:.0f} GiB), CUDA {about['cuda']}, NCCL {about['nccl']}: "
        f"{origin(results.header)}",
        of_parts.parts(results.rows),
    ]
    for name, blocks_of in _SECTIONS.items():
        if name in parts and parts[name]["rows"]:
            blocks += [f"## {parts[name]['title']}", *blocks_of(parts[name]["rows"])]
    if picture is not None:
        blocks.append(f"![Validation accuracy by epoch]({picture})")
    return document(*blocks, *_HOW)


def _tests(rows: Sequence[Row]) -> Blocks:
    return [_counted(rows), of_parts.tests(rows)]


def _ranks(rows: Sequence[Row]) -> Blocks:
    return [_RANKS, _counted(rows), of_parts.tests(rows)]


def _cost(rows: Sequence[Row]) -> Blocks:
    engines, networks = ([row for row in rows if row["section"] == name] for name in ("engine", "network"))
    blocks: Blocks = []
    if engines:
        blocks += ["Layers that compute nothing, one stage: what is left is the engine.", tables.engines(engines)]
    if networks:
        blocks += [_NETWORKS, tables.networks([{"form": "", "layers": None, **row} for row in networks])]
    return blocks


def _accuracy(rows: Sequence[Row]) -> Blocks:
    return [_ACCURACY, tables.accuracy(rows)]


def _counted(rows: Sequence[Row]) -> str:
    outcomes = [row["outcome"] for row in rows]
    return ", ".join(f"{outcomes.count(each)} {each}" for each in ("passed", "failed", "skipped")) + "."


_SECTIONS = {"tests": _tests, "ranks": _ranks, "cost": _cost, "accuracy": _accuracy}

_ABOUT = """\
What a machine with one GPU shows, in one command and ten minutes: `make gpu` writes `gpu.json` in
[docs/results](results) and this page, which `python run/gpu.py --page-only` makes anew from that file."""

_HOW: Blocks = [
    """\
## How to run it

```
make gpu                                        # with .venv, or else with the python3 of the machine
make gpu ARGS="--data-path DIR --minutes 9"     # where CIFAR-10 lies, and the time of all parts together
make gpu ARGS=--dry-run                         # what would run, and what is missing; on any machine
```

The machine needs one NVIDIA GPU, a C++ compiler, and a Python of 3.11 or later with PyTorch for CUDA and the
dependencies of the package; no network. The command first says which packages are missing, with the line that makes
wheels of them elsewhere, and stops. An image that has PyTorch, transformers, pandas, pyarrow and pytest usually lacks
`deepspeed`, `hjson`, `datasets`, `dill`, `multiprocess`, `pydantic`, `pydantic-core`, `annotated-types` and
`typing-inspection`; W&B is not needed. On a machine without a GPU it says so, writes nothing and exits with 0.

CIFAR-10 is a folder with train and test parquet files, given by `--data-path`, or `cifar10` below `DS_AL_DATA`, in
`shared/data`, or in the `shared/data` beside the repository. Without it the last part fails, by name.

Each part runs in a process of its own, under a time limit: its share of what is left of `--minutes`. One that fails,
hangs or is late ends alone, and stays in the table with its reason and with the rows that it had. The file is written
after each part; the same command, on the same machine and code, continues with the parts that are not done.

`pytest -m cuda` runs the tests alone; `pytest tests/cuda -m cuda --device cpu` tries those of that folder on a
CPU.""",
    """\
| part | limit of 9 minutes | guess |
|---|---:|---:|
| tests marked `cuda`; one stage beside the plain loop: float32, bf16, fp16, recomputed, compiled | 110 s | 90 s |
| P = 2 and 4 ranks on the GPU, by host memory and NCCL, queue depths 1, 2, 4, beside one rank | 110 s | 120 s |
| engine and networks: CPU time, kernels, GPU busy, rho, memory | 74 s | 60 s |
| VGG and ResNet-18 on CIFAR-10: twin, K = 2, K = 4 (`--accuracy-minutes 5`) | 245 s | 260 s |

The guesses are for one H100 and 16 cores, from runs on CPUs. Time that a part leaves goes to those after it.""",
    """\
## Several ranks on one GPU

NCCL refuses two ranks on one device. The test lets each rank claim a host of its own (`NCCL_HOSTID`), which NCCL's
makers do not support, so it runs with `pytest --ranks-share-gpu` alone. Ranks take turns on the GPU: it is a test of
bits and order, and no time is reported.

The same test runs through pinned memory of the host over gloo, whether NCCL refuses or not: it copies each message to
the host and back, and so the number that DeepSpeed's `PipelineEngine` sends when it is made. The host then waits for
the device at each message, and nothing is shown of the path that NCCL takes. `--device cpu` runs both on a CPU.""",
    """\
## Where the host waits for the GPU

Streaming does not wait: the host queues kernels ahead. These wait, by reading, and were not measured: the check of an
overflow (`fp16`, and `bf16` with `check_grad_overflow`), at each step; the LSTM, since torch's packed sequences take
their lengths on the host, in each forward pass; the check of a micro-batch whose tensors are on the GPU before the
engine takes them, on the first stage; message checksums, and headers with `dynamic_shape`, at each message;
a stage inside a group of stages, which reads the state of the random number generators of each message; and stages
that step together (`group_step`), at each step.""",
]

_RANKS = """\
Streaming on P ranks that share the GPU: weights, buffers and optimizer state against those of one rank."""

_NETWORKS = """\
Networks of the published sizes, all layers in one process, float32 (PyTorch's defaults: TF32 in convolutions alone),
AdamW, M = 4. AL steps after every micro-batch, the twin after M. Per micro-batch, medians and ranges of runs that
alternate between the forms: time; rho, the time over that of the twin, beside rho by counted operations; processor time
of the host, which includes waiting where the GPU is far behind; kernels, and the time in which the GPU computes or
copies, by PyTorch's profiler; its share of the time. Memory: the peak of PyTorch's allocator in a batch, beside 16
bytes per parameter (weight, gradient, AdamW's state) plus the activations held for backward
([memory.md](memory.md)); buffers, inputs and workspaces are not counted."""

_ACCURACY = """\
Networks of the published sizes with the recipe `ours` (`ds_configs/cifar10_vgg_ours.json`), float32, one seed, the same
epochs for all: as many as fit. Accuracy is that of the last exit, after the last epoch."""
