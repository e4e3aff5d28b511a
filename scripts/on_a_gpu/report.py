"""The report as Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
REFERENCE, COMPILED = "reference", "reference, compiled"
DRY_RUN = "**A dry run on the CPU: it tests the script, and its numbers say nothing about a GPU.**"
PARITY = """\
Each routed layer, forward and backward, by its Triton kernels, against plain PyTorch in float64, without
TF32. An error is the norm of the difference, divided by the norm of the float64 result. Allowed in float32:
{factor} times the error of plain PyTorch in float32 plus {slack:.1e}, at most {largest}. In float64:
{exact:.0e}.

For each layer, the tensor that is nearest to its limit:
"""
SPEED = """\
Training steps (forward, backward, optimizer) in float32, images/s, medians. The fused network takes turns
with the one that it is compared with, and a ratio is the median over neighboring steps. TF32 is as in
training: in convolutions if PyTorch is not told otherwise, never in matrix products.

Floor: a step that only moves what goes into and out of its layers, its parameters, gradients and optimizer
state, at the speed of a copy on this device. Data that stay in a cache can be faster.
"""


def markdown(report: Mapping[str, Any]) -> str:
    """Return the page of a report: machine, outcome of each part, then what each part found."""
    entries = report["parts"]
    lines = [f"# capsexp on {_name(report['machine'])}", "", *_head(report), ""]
    lines += _table(("part", "outcome", "seconds", "limit", ""), map(_part_row, entries))
    for number, entry in enumerate(entries, 1):
        lines += ["", f"## {number}. {entry['title']}", ""]
        section = _SECTIONS[entry["part"]](entry["result"]) if entry["result"] else [entry["message"]]
        lines += section
    return "\n".join(lines) + "\n"


def _part_row(entry: Entry) -> tuple[str, ...]:
    times = [f"{entry[key]:.0f}" for key in ("seconds", "limit")]
    return entry["title"], entry["status"], *times, entry["message"]


def _name(machine: Entry) -> str:
    card = machine.get("gpu")
    return card["name"] if card else f"a CPU ({machine.get('processor', 'unknown')})"


def _head(report: Mapping[str, Any]) -> list[str]:
    machine, card = report["machine"], report["machine"].get("gpu")
    versions = machine.get("versions", {})
    lines = []
    if report["dry_run"]:
        lines += [DRY_RUN, ""]
    if "error" in machine:
        lines += [f"The machine could not be described: {machine['error']}", ""]
    if card:
        memory = f"{card['memory'] / 2**30:.0f} GiB"
        lines.append(f"- {card['name']}, {memory}, compute capability {card['capability']}")
    packages = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "triton", "capsexp"))
    lines.append(f"- driver {machine.get('driver')}, CUDA {machine.get('cuda')}, {packages}")
    cores = f"{machine.get('cores')} cores of {machine.get('processor')}"
    lines.append(f"- Python {machine.get('python')}, {cores}")
    changed = ", with uncommitted changes" if machine.get("dirty") else ""
    lines.append(f"- commit {machine.get('commit')}{changed}")
    lines.append(f"- {report['started']}, {report['seconds']:.0f} s, {report['status']}")
    return lines


def _tests(result: Entry) -> list[str]:
    counts = ", ".join(f"{count} {name}" for name, count in result["counts"].items())
    return [f"{counts}.", *_list(result["failures"])]


def _parity(result: Entry) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for case, answer in result["cases"].items():
        by_layer: dict[str, list[Entry]] = {}
        for tensor in answer.get("tensors", []):
            by_layer.setdefault(tensor["layer"], []).append(tensor)
        if "error" in answer:
            rows.append((case, "", "", answer["error"], "", "", "", "no"))
        rows += [_layer_row(case, layer, tensors) for layer, tensors in by_layer.items()]
    header = ("network", "layer", "tensor", "kernels", "plain", "allowed", "kernels, float64", "ok")
    return [PARITY.format(**result), *_table(header, rows)]


def _layer_row(case: str, layer: str, tensors: Sequence[Entry]) -> tuple[str, ...]:
    worst = max(tensors, key=lambda tensor: (not tensor["ok"], tensor["kernels"] / tensor["allowed"]))
    good = sum(tensor["ok"] for tensor in tensors)
    errors = [f"{worst[way]:.1e}" for way in ("kernels", "plain", "allowed")]
    exact = f"{max(tensor['kernels64'] for tensor in tensors):.1e}"
    return case, layer, worst["tensor"], *errors, exact, f"{good} of {len(tensors)}"


def _speed(result: Entry) -> list[str]:
    header = (
        "network",
        "batch",
        "fused",
        "reference",
        "ratio",
        "compiled",
        "ratio",
        "floor",
        "floor reached",
    )
    lines = [SPEED, *_table(header, map(_speed_row, result["rows"]))]
    speeds = [row["bandwidth"] for row in result["rows"] if "bandwidth" in row]
    return [*lines, "", f"A copy moves {max(speeds) / 1e9:.0f} GB/s."] if speeds else lines


def _speed_row(row: Entry) -> tuple[str, ...]:
    speeds, ratios = row["images/s"], row["ratio"]
    share = row.get("floor, share")
    cells = [_number(speeds.get("routing"))]
    for name in (REFERENCE, COMPILED):
        cells += [_number(speeds.get(name)), _number(ratios.get(name))]
    floor = _number(row.get("floor, images/s"))
    return row["network"], str(row["batch"]), *cells, floor, "" if share is None else f"{share:.1%}"


def _training(result: Entry) -> list[str]:
    return _list(f"{name}: {_number(value)}" for name, value in result.items())


_SECTIONS: dict[str, Callable[[Entry], list[str]]] = {
    "tests": _tests,
    "parity": _parity,
    "speed": _speed,
    "training": _training,
}


def _number(value: object) -> str:
    """Return a number with three or more digits, text as it is, and nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _list(lines: Iterable[str]) -> list[str]:
    return [f"- {_one_line(line)}" for line in lines]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(_one_line, cells)) + " |" for cells in lines]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
