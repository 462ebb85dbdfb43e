"""Times this tree beside a commit, in turns: the start of many ranks, the overhead of the engine, sleeping layers.

    python .ci/speed.py COMMIT start --ranks 16       seconds until all ranks have joined, built, and trained a batch
    python .ci/speed.py COMMIT overhead               processor time of a micro-batch (run/bench.py --overhead)
    python .ci/speed.py COMMIT sleeping               time of a batch of layers that sleep (run/bench.py --sleeping)

Each turn runs the commit, in a worktree of its own, and then this tree. The medians and their ratio are printed; a
machine with other work gives none that mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path.cwd().resolve()
sys.path.insert(0, str(ROOT))  # ranks take over the path
BENCHES = {
    "overhead": (["--overhead"], ("method", "stage"), "cpu_us"),
    "sleeping": (["--sleeping", "--methods", "streaming"], ("method", "stages", "micro_batches"), "seconds"),
}
Times = dict[str, float]


def started() -> list[float]:
    """Worker: the times at which this rank has joined, has built an engine, and has trained a batch."""
    import ds_al
    from ds_al.parallel.world import join_world
    from tests.support.networks import mlp_layers

    assert Path(ds_al.__file__).resolve().is_relative_to(ROOT), f"ds_al comes from {ds_al.__file__}"
    import torch

    stages = int(os.environ["WORLD_SIZE"])
    join_world()
    times = [time.time()]
    module = ds_al.ALPipelineModule([mlp_layers()[0], *[mlp_layers()[1]] * (stages - 1)], num_classes=4, base_seed=7)
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2, "steps_per_print": None}
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    engine, *_ = ds_al.initialize(model=module, config=config)
    times.append(time.time())
    engine.train_batch(iter([(torch.randn(8, 12), torch.randint(4, (8,)))] * 2))
    engine.flush()
    return [*times, time.time()]


def start(count: int) -> Times:
    """Seconds from the start of the ranks until the last one was there."""
    from ds_al.launch.ranks import run_ranks, start_quickly

    start_quickly()
    run_ranks(f"{Path(__file__).stem}:started", 1)  # the process that ranks are forked from has then imported all
    begin = time.time()
    ranks = run_ranks(f"{Path(__file__).stem}:started", count, timeout=600.0)
    names = ("joined", "engine built", "batch trained")
    return {name: max(rank[number] for rank in ranks) - begin for number, name in enumerate(names)}


def bench(kind: str, options: list[str]) -> Times:
    """Rows of a measurement by name."""
    arguments, names, value = BENCHES[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        command = [sys.executable, "run/bench.py", *arguments, *options, "--json", str(path)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return {" ".join(f"{name} {row[name]}" for name in names): row[value] for row in rows}


def against(args: argparse.Namespace, options: list[str]) -> None:
    """Runs both trees in turns, and prints the medians."""
    found: dict[Path, list[Times]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), args.commit], check=True)
        try:
            for turn in range(args.turns):
                for root in (tree, ROOT):
                    command = [sys.executable, str(Path(__file__).resolve()), args.commit, args.what, "--here"]
                    command += ["--ranks", str(args.ranks), *options]
                    env = {**os.environ, "PYTHONPATH": str(root)}
                    text = subprocess.run(command, check=True, cwd=root, env=env, text=True, stdout=subprocess.PIPE)
                    found.setdefault(root, []).append(json.loads(text.stdout.splitlines()[-1]))
                print(f"turn {turn + 1} of {args.turns}", file=sys.stderr, flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)
    for name in found[ROOT][0]:
        before, after = (statistics.median(turn[name] for turn in found[root]) for root in (tree, ROOT))
        print(f"{name}: {before:.4g} at {args.commit}, {after:.4g} here, ratio {after / before:.3f}")


def main() -> None:
    """One command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("what", choices=["start", *BENCHES], help="further options are those of run/bench.py")
    parser.add_argument("--ranks", type=int, default=16, help="of start (default: 16)")
    parser.add_argument("--turns", type=int, default=5, help="runs of each tree (default: 5)")
    parser.add_argument("--here", action="store_true", help="times the tree of the current directory alone, once")
    args, options = parser.parse_known_args()
    if not args.here:
        against(args, options)
    else:
        print(json.dumps(start(args.ranks) if args.what == "start" else bench(args.what, options)))


if __name__ == "__main__":
    main()
