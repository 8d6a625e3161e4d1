"""The results as Markdown, and as a few lines for the end of a log. Every crumb arm that lost is named."""

from collections.abc import Iterator
from typing import Any

from linears import layer_counts

Row = dict[str, Any]
WHOLE = {"linear": "forward+backward", "norm": "forward+backward", "block": "forward+backward", "optimizer": "step"}
REFERENCE = "crumb 16-bit"
"""What quantised linears have to beat, beside what others have: it is crumb's, and faster than PEFT's."""
MAX_SUMMARY = 40


def tables(about: dict[str, Any], rows: list[Row]) -> str:
    lines = [f"# Kernels on {about['device']}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in about.items()), "",
              "ms: the GPU's work, all queued beforehand, median (p10 to p90). host: what it takes to queue it. "
              "wall: from an idle GPU to the end. L2 flushed before each run. Peak: beside what was there before, results "
              "included. Launches, peak and saved bytes are of the longest pass. Errors: relative; `weight`: of quantising "
              "it.", ""]
    if about["device"] == "processor":
        lines += ["On a processor, with tiny sizes: this tries the script, the times mean nothing.", ""]
    lines += ["## Against the best other arm", "", *(f"- {line}" for line in verdicts(rows)), ""]
    lines += _sums_table(rows)
    for group in WHOLE:
        cases = list(dict.fromkeys(row["case"] for row in rows if row["group"] == group))
        if cases:
            lines += [f"## {group}", ""]
        for case in cases:
            own = [row for row in rows if row["group"] == group and row["case"] == case]
            lines += [f"### {case}", "", *_case_table(own), ""]
    return "\n".join(lines)


def _case_table(rows: list[Row]) -> list[str]:
    passes = list(dict.fromkeys(part for row in rows for part in row.get("passes", {})))
    heads = ["arm", *(f"{part} {what}" for part in passes for what in ("ms", "host", "wall")), "launches", "peak MiB",
             "saved MiB", "weight MiB", "errors", "notes"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["arm"]]
        for part in passes:
            if figures := row["passes"].get(part) if "passes" in row else None:
                cells += [f"{figures['ms']:.4g} ({figures['p10_ms']:.4g} to {figures['p90_ms']:.4g})",
                          f"{figures['host_ms']:.3g}", f"{figures['wall_ms']:.3g}"]
            else:
                cells += ["", "", ""]
        cells.append(str(row.get("launches") or ""))
        cells += [_mib(row.get(name)) for name in ("peak_bytes", "saved_bytes", "weight_bytes")]
        errors = row.get("errors", {}) | ({"weight": row["weight_error"]} if row.get("weight_error") else {})
        cells.append(", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
        cells.append(", ".join(_notes(row)).replace("|", "/"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _notes(row: Row) -> Iterator[str]:
    for name in ("error", "note"):
        if row.get(name):
            yield row[name]
    if "state_bytes" in row:
        yield f"states {_mib(row['state_bytes'])} MiB"
    if row.get("syncs") is not None:
        yield f"waits for the GPU {row['syncs']} times" if row["syncs"] else "never waits for the GPU"
    if "compile_s" in row:
        yield f"compiled in {row['compile_s']:.0f} s"


def _mib(number: int | None) -> str:
    return "" if number is None else f"{number / 2**20:.3g}"


def sums(rows: list[Row], part: str, figure: str) -> dict[int, dict[str, float]]:
    """Of the linears of a whole step of SDXL, by rank and arm; arms that lack a shape are left out."""
    linears = [row for row in rows if row["group"] == "linear" and "rank" in row]
    found: dict[int, dict[str, float]] = {}
    for rank in sorted({row["rank"] for row in linears}):
        for arm in dict.fromkeys(row["arm"] for row in linears):
            own = [row for row in linears if row["rank"] == rank and row["arm"] == arm and part in row["passes"]
                   and "error" not in row]
            if sum(row["times"] for row in own) == sum(layer_counts().values()):
                found.setdefault(rank, {})[arm] = sum(row["times"] * row["passes"][part][figure] for row in own)
    return found


def _sums_table(rows: list[Row]) -> list[str]:
    lines = []
    for rank, arms in sums(rows, "forward+backward", "ms").items():
        others = [sums(rows, part, figure).get(rank, {})
                  for part, figure in (("forward", "ms"), ("forward+backward", "host_ms"), ("forward+backward", "wall_ms"))]
        own = arms.get(REFERENCE)
        lines += [f"## All 722 linears of a step, rank {rank}, each shape as often as SDXL has it", "",
                  f"| arm | forward ms | forward+backward ms | to {REFERENCE} | host | wall |", "|---" * 6 + "|"]
        for arm, whole in arms.items():
            forward, host, wall = (f"{other[arm]:.1f}" for other in others)
            lines.append(f"| {arm} | {forward} | {whole:.1f} | {f'{whole / own:.2f}' if own else ''} | {host} | {wall} |")
        lines.append("")
    return lines


def verdicts(rows: list[Row]) -> list[str]:
    """A line for each of crumb's kernels: in how many cases it lost against the fastest other arm, and where by most."""
    races: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        part = WHOLE[row["group"]]
        if not row["arm"].startswith("crumb") or part not in row.get("passes", {}) or "error" in row:
            continue
        rivals = [other for other in rows
                  if _is_rival(row, other) and part in other.get("passes", {}) and "error" not in other]
        if not rivals:
            continue
        ratios = []
        for figure in ("ms", "wall_ms"):
            best = min(rivals, key=lambda other: other["passes"][part][figure])
            ratios.append((row["passes"][part][figure] / best["passes"][part][figure], best["arm"]))
        races.setdefault(_kernel(row), []).append((ratios[0][0], ratios[1][0], f"{row['case']}, against {ratios[0][1]}"))
    return [_verdict(kernel, results) for kernel, results in races.items()]


def _verdict(kernel: str, results: list[tuple[float, float, str]]) -> str:
    lost = [result for result in results if result[0] > 1]
    lost_wall = sum(wall > 1 for _, wall, _ in results)
    text = f"{kernel}: "
    if lost:
        worst, _, where = max(lost)
        text += f"LOST {len(lost)} of {len(results)}, by most {worst:.2f} times the time ({where})"
    else:
        text += f"won {len(results)} of {len(results)}, at least {1 / max(results)[0]:.2f} times as fast"
    if (best := min(results)[0]) < 1 and lost:
        text += f"; best {1 / best:.2f} times as fast"
    if lost_wall:
        return text + f"; by the wall lost {lost_wall}, by most {max(wall for _, wall, _ in results):.2f}"
    return text + "; by the wall won all"


def _is_rival(row: Row, other: Row) -> bool:
    if (other["group"], other["case"]) != (row["group"], row["case"]) or other["arm"] == row["arm"]:
        return False
    if other["arm"].startswith("crumb"):
        return row["group"] == "linear" and other["arm"] == REFERENCE
    return not other["arm"].startswith("floor") and ("Prodigy" in other["arm"]) == ("Prodigy" in row["arm"])


def _kernel(row: Row) -> str:
    of = {"linear": "linear", "norm": row["case"].split()[0], "block": " ".join(row["case"].split()[:2]), "optimizer": ""}
    return " ".join(part for part in (row["arm"], of[row["group"]]) if part)


def summary(about: dict[str, Any], rows: list[Row]) -> list[str]:
    """At most 40 lines."""
    lines = [f"== {about['device']}, {about['dtype']}, torch {about['torch']}, triton {about['triton']}, "
             f"{about['warmups']} + {about['runs']} runs, {about.get('seconds', 0)} s"]
    for rank, arms in sums(rows, "forward+backward", "ms").items():
        own = arms.get(REFERENCE, 0.0)
        lines.append(f"722 linears, rank {rank}, forward+backward ms: " + ", ".join(
            f"{arm} {whole:.1f}{f' ({whole / own:.2f})' if own else ''}" for arm, whole in arms.items()))
    for case in dict.fromkeys(row["case"] for row in rows if row["group"] in ("block", "optimizer")):
        own = [row for row in rows if row["case"] == case and WHOLE[row["group"]] in row.get("passes", {})]
        lines.append(f"{case}: " + "; ".join(_short(row) for row in own))
    worst: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["arm"].startswith("crumb"):
            for name, error in row.get("errors", {}).items():
                most = worst.setdefault(_kernel(row), {})
                most[name] = max(error, most.get(name, 0))
    errors = "; ".join(f"{kernel} " + " ".join(f"{name} {error:.0e}" for name, error in most.items())
                       for kernel, most in worst.items())
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row.get("error"):
            failed.setdefault(f"{row['group']}: {row['error'][:120]}", []).append(row["arm"])
    tail = [*verdicts(rows), f"errors at most: {errors}",
            *(f"FAILED {len(arms)}x {what} ({'; '.join(dict.fromkeys(arms))})" for what, arms in list(failed.items())[:8])]
    return (lines + tail)[:MAX_SUMMARY]


def _short(row: Row) -> str:
    """ms / wall ms / launches, and bytes."""
    figures = row["passes"][WHOLE[row["group"]]]
    text = f"{row['arm']} {figures['ms']:.3g}/{figures['wall_ms']:.3g}/{row.get('launches')}"
    if row["group"] == "optimizer":
        return f"{text} states {_mib(row['state_bytes'])} MiB waits {row.get('syncs')}"
    return f"{text} saved {_mib(row.get('saved_bytes'))} peak {_mib(row.get('peak_bytes')) or '-'} MiB"
