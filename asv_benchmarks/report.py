"""What compare.py has measured, as tables and a figure."""

import statistics
from typing import Any

PHASES = ("train", "evaluate", "backward")
# The table of the README: a label, the library, and which of its ratios.
LINES = {
    "forward + backward, PyTorch as installed": ("torch", "out"),
    "… with memory settings that spare it fresh pages": ("tuned", "out"),
    "evaluation, PyTorch as installed": ("torch", "evaluate"),
    "evaluation, with these memory settings": ("tuned", "evaluate"),
    "without `out=`, forward + backward, PyTorch as installed": ("torch", "fresh"),
    "without `out=`, with these memory settings": ("tuned", "fresh"),
}
TICKS = (0.5, 1, 2, 5, 10, 20, 50)  # of the figure


def milliseconds(row: dict[str, Any], key: str) -> str:
    """Return a time for the table."""
    seconds = row["seconds"].get(key)
    return "-" if seconds is None else f"{seconds * 1e3:.3g}"


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return all rows as text."""
    head = ["case", "copy", "train", "eval", "back", "of bound t/e/b", "fresh t+b", "x base"]
    columns = {"out": "x out", "fresh": "x fresh", "evaluate": "x eval"}
    if any("numbanorm train cold" in row["seconds"] for row in rows):
        columns |= {"cold": "x cold", "cold evaluate": "x cold eval"}
        head.append("cold t+b")
    for name in names:
        head += [f"{name} t+b", *columns.values()]
    lines = [head]

    def both(row: dict[str, Any], name: str, variant: str) -> str:
        parts = (row["seconds"][f"{name} {phase} {variant}"] for phase in ("train", "backward"))
        return f"{sum(parts) * 1e3:.3g}"

    for row in rows:
        bound = "/".join(f"{row['bound'][phase]:.2f}" for phase in PHASES)
        line = [row["case"], milliseconds(row, "numbanorm copy")]
        line += [milliseconds(row, f"numbanorm {phase} out") for phase in PHASES]
        line += [bound, both(row, "numbanorm", "fresh")]
        line += ["-" if row["base"] is None else f"{row['base']:.2f}"]
        line += [both(row, "numbanorm", "cold")] if "cold" in columns else []
        for name in names:
            ratios = row["ratios"].get(name)
            if ratios is None:
                line += ["-"] * (1 + len(columns))
                continue
            line += [both(row, name, "fresh"), *(f"{ratios[key]:.2f}" for key in columns)]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def summary(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return geometric means of the ratios, and the worst, for each group of cases."""
    lines = []
    groups = {}
    for group in dict.fromkeys(group for row in rows for group in row["groups"]):
        members = [row for row in rows if group in row["groups"]]
        # Of two names for the same cases, the narrower one.
        groups[tuple(row["case"] for row in members)] = group, members
    for group, members in groups.values():
        for name in names if group != "masked" else ():
            able = [row for row in members if name in row["ratios"]]
            for key in able[0]["ratios"][name] if able else ():
                found = {row["case"]: row["ratios"][name][key] for row in able}
                mean = f"{statistics.geometric_mean(found.values()):.2f}"
                # Which PyTorch does not have: it is written plainly there.
                own = [found[row["case"]] for row in able if row["layer"] != "switchable"]
                if 0 < len(own) < len(found):
                    mean += f" (without SwitchableNorm {statistics.geometric_mean(own):.2f})"
                least = min(found, key=found.__getitem__)
                lines.append(
                    f"{group}, {name}, {key}: "
                    f"geometric mean {mean}, least {found[least]:.2f} ({least})"
                )
        found = {row["case"]: row["base"] for row in members if row["base"] is not None}
        if found:
            mean, most = (
                statistics.geometric_mean(found.values()),
                max(found, key=found.__getitem__),
            )
            lines.append(
                f"{group}, over base: geometric mean {mean:.2f}, most {found[most]:.2f} ({most})"
            )
    return "\n".join(lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the README, and the cases where PyTorch is faster."""
    plain = [row for row in rows if "plain" in row["groups"]]
    lines, slower = ["| PyTorch's time over ours |", "|---|---|"], []
    for label, (name, key) in LINES.items():
        found = {r["case"]: r["ratios"][name][key] for r in plain if name in r["ratios"]}
        if not found:
            continue
        mean = statistics.geometric_mean(found.values())
        lines.append(f"| {label} | {mean:.1f} ({min(found.values()):.2f}) |")
        if name == "tuned" and key != "fresh":
            cases_ = [f"{case} {found[case]:.2f}" for case in sorted(found, key=found.__getitem__)]
            behind = [text for text in cases_ if float(text.split()[-1]) < 1]
            what = "evaluation" if key == "evaluate" else "forward + backward"
            slower.append(f"- {what}: {', '.join(behind) or 'none'}")
    over = [row["base"] for row in rows if row["groups"] == ["masked"]]
    if over:
        mean = statistics.geometric_mean(over)
        cell = f"{mean:.2f} ({max(over):.2f})"
        lines.append(f"| a mask: our time over that without one, mean (most) | {cell} |")
    return "\n".join([*lines, "", *slower])


def plot(rows: list[dict[str, Any]], names: list[str], path: str) -> None:
    """Draw forward and backward of every case as bars, PyTorch's time over ours."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["groups"] != ["masked"]][::-1]
    figure = Figure(figsize=(8, 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        # A case that a library does not have has no bar.
        values = [row["ratios"].get(name, {}).get("out", 1.0) for row in rows]
        labels = {"torch": "PyTorch as installed", "tuned": "PyTorch tuned", "jax": "JAX",
                  "in_place": "in place", "compile": "torch.compile",
                  "converted": "numbanorm.torch"}  # fmt: skip
        positions = [r + 0.4 - (i + 0.5) * height for r in range(len(rows))]
        axes.barh(positions, [v - 1 for v in values], height, left=1, label=labels[name])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    axes.set(
        xlabel="times faster, forward and backward in training, into out=",
        xscale="log",
        xlim=(TICKS[0], TICKS[-1]),
        ylim=(-0.6, len(rows) - 0.4),
    )
    axes.set_xticks(TICKS, TICKS)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)


def report(rows: list[dict[str, Any]], figure: str | None) -> None:
    """Print all tables, and draw the figure."""
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    print("milliseconds; x: that library's time over ours, forward + backward in training\n")
    print(table(rows, names))
    print("\n" + summary(rows, names))
    print("\n" + markdown(rows))
    if figure:
        plot(rows, names, figure)
