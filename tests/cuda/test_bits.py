"""On a GPU one stage leaves the bits of the plain loop on that GPU: in float32, bfloat16 and float16, and recomputed.

Torch computes some operations of a GPU in another order each time. The plain loop therefore runs twice: where its own
bits differ, nothing can be said about the engine, and the test says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import test_exactness as exactness
from tests.compute import test_compute as compute
from tests.optim import test_precision as precision
from tests.support.engines import State, different
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.cuda, pytest.mark.distributed]

CASES: list[dict[str, Any]] = [
    {"method": "streaming"},
    {"method": "sequential", "optimizer": "momentum", "steps_per_batch": 1},
    {"method": "streaming", "optimizer": "muon", "steps_per_batch": 2, "layer_gradient_clipping": 0.05},
]


def beside_the_plain_loop(
    where: str, cases: list[Any], train: Callable[[Any], State], loop: Callable[[Any], State]
) -> None:
    """Trains each case by the engine and twice by the plain loop, and compares all bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for case in cases:
        got = {name: value.cpu() for name, value in train(case).items()}
        want, again = ({name: value.cpu() for name, value in loop(case).items()} for _ in range(2))
        moving = different(want, again)
        assert not moving, f"torch itself leaves other bits each time on {where}, of {len(moving)}: {moving[:5]}"
        names = different(got, want)
        assert not names, f"{case}: {len(names)} of {len(want)} differ from the plain loop: {names[:5]}"


def in_float32(network: str, where: str) -> None:
    """Worker."""
    beside_the_plain_loop(
        where,
        CASES,
        lambda case: exactness.trained(network, [case])[0],
        lambda case: exactness.expected(network, case, device=where),
    )


def in_low_precision(network: str, where: str) -> None:
    """Worker."""
    beside_the_plain_loop(
        where,
        precision.CASES,
        lambda case: precision.trained(network, [case])[0],
        lambda case: precision.in_sequence(network, case, device=where),
    )


def recomputed(networks: list[str], where: str) -> None:
    """Worker."""
    beside_the_plain_loop(
        where,
        networks,
        lambda network: compute.trained([{"network": network, "interval": 1}])[0],
        lambda network: compute.expected(network, device=where),
    )


def compiled() -> None:
    """Worker: compiled code leaves the same bits each time, and nearly those of the eager layers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    case = {"network": "mlp", "layers": 2}
    eager, one, two = compute.trained([case, {**case, "compile": {}}, {**case, "compile": {}}])
    assert different(one, two) == []
    for name, value in eager.items():
        assert torch.allclose(value.float(), one[name].float(), atol=2e-2), name


def on(device: str) -> dict[str, str]:
    """Variables of ranks that compute the same bits each time on a device."""
    return {"DS_ACCELERATOR": device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def start(worker: Callable[..., None], device: str, **arguments: Any) -> None:
    run_ranks(f"{__name__}:{worker.__name__}", 1, env=on(device), **arguments)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_one_stage_leaves_the_bits_of_the_plain_loop(network: str, device: str) -> None:
    start(in_float32, device, network=network, where=device)


@pytest.mark.parametrize("network", ["mlp", "vgg", "transformer"])
def test_low_precision_leaves_the_bits_of_the_plain_loop_with_masters(network: str, device: str) -> None:
    start(in_low_precision, device, network=network, where=device)


def test_recomputed_layers_leave_the_bits_of_the_plain_loop(device: str) -> None:
    start(recomputed, device, networks=["mlp", "vgg", "transformer"], where=device)


def test_compiled_layers_leave_the_same_bits_each_time(device: str) -> None:
    start(compiled, device)
