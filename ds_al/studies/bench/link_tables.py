"""Tables of what the links were measured to carry, for documents and, as they are, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def traffic_table(rows: Sequence[Row]) -> str:
    """KiB per micro-batch at every boundary, by ``message_dtype``, beside 1F1B's; then the rounding."""
    lines = [
        "| network | boundary | 1F1B, both ways | AL `fp32` | `bf16` | `int8` | 1F1B over AL: `fp32` | `bf16` | `int8` "
        "| error `bf16` | `int8` |",
        "|---|---:|" + "---:|" * 9,
    ]
    for network, boundary in dict.fromkeys((row["network"], row["boundary"]) for row in rows):
        own = [row for row in rows if (row["network"], row["boundary"]) == (network, boundary)]
        al = {row["message_dtype"]: row for row in own if row["method"] == "streaming"}
        (backprop,) = (row for row in own if row["method"] != "streaming")
        sizes = " | ".join(_kib(row) for row in (backprop, *al.values()))
        ratios = " | ".join(f"{row['times_less']:.2f}" for row in al.values())
        errors = " | ".join(f"{100 * al[name]['relative_error']:.2f} %" for name in ("bf16", "int8"))
        lines.append(f"| {network} | {boundary} | {sizes} | {ratios} | {errors} |")
    wrong = sum(row["bytes"] != row["formula"] for row in rows)
    agree = "all equal to the formula" if not wrong else f"{wrong} differ from the formula, which is in brackets"
    lines += ["", f"KiB per micro-batch of {rows[0]['samples']} samples, P = {rows[0]['stages']}; {agree}."]
    return "\n".join(lines) + "\n"


def _kib(row: Row) -> str:
    size = f"{row['bytes'] / 1024:,.1f}"
    return size if row["bytes"] == row["formula"] else f"{size} ({row['formula'] / 1024:,.1f})"


PUBLISHED = {"streaming": -0.012, "bp_1f1b": -0.51}
"""Change of throughput on a link of 1 Gbit/s, two stages: Yin et al., SOLO, arXiv 2609.35440, of language models."""
PUBLISHED_MBIT = 1000.0


def slow_link_table(rows: Sequence[Row]) -> str:
    """Samples per second at every rate, and beside them the change from no limit; then what each form needs."""
    forms = list(dict.fromkeys((row["method"], row["message_dtype"]) for row in rows))
    lines = [
        "| Mbit/s, each way | a plain transfer | " + " | ".join(_name(*form) for form in forms) + " |",
        "|---|---:|" + "---:|" * len(forms),
    ]
    for rate in dict.fromkeys(row["rate_mbit"] for row in rows):
        own = [row for row in rows if row["rate_mbit"] == rate]
        speed = "no limit" if rate is None else f"{rate:,g}"
        lines.append(f"| {speed} | {own[0]['measured_mbit']:,.0f} | {' | '.join(map(_throughput, own))} |")
    free = [row for row in rows if row["rate_mbit"] is None]
    needs = [f"{row['needed_mbit']:,.0f} Mbit/s" for row in free]
    sizes = [f"{row['bytes_per_micro_batch'] / 1024:,.0f}" for row in free]
    wired = [f"{row['wire_bytes_per_micro_batch'] / 1024:,.0f}" for row in free]
    lines += [
        f"| needs, busier way | | {' | '.join(needs)} |",
        f"| KiB per micro-batch, both ways | | {' | '.join(sizes)} |",
        f"| the same at the interfaces | | {' | '.join(wired)} |",
        "",
        "Samples per second, and the change from no limit. Published, on 1 Gbit/s with two stages: "
        f"{100 * PUBLISHED['streaming']:+.1f} % for local learning, {100 * PUBLISHED['bp_1f1b']:+.0f} % for "
        "back-propagation (Yin et al., SOLO, arXiv 2609.35440: language models on GPUs).",
    ]
    return "\n".join(lines) + "\n"


def _throughput(row: Row) -> str:
    change = "" if row["rate_mbit"] is None else f" ({100 * (row['relative_to_unlimited'] - 1):+.0f} %)"
    return f"{row['samples_per_s']:,.0f}{change}"


def _name(method: str, message_dtype: str) -> str:
    return "1F1B" if method == "bp_1f1b" else f"AL `{message_dtype}`"
