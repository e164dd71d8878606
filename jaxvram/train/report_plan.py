"""The memory plan as a section of report.html."""

from pathlib import Path

from jaxvram.train.report_html import GIB, escape, image, mapping, number

PARTS = {
    "arguments": "argument_bytes",
    "temporaries": "temporary_bytes",
    "outputs": "output_bytes",
    "aliased": "aliased_bytes",
}


def memory_section(plan: dict, picture: Path) -> str:
    """The section of plan.json, or how to get one. `picture` is plan.png, shown if it exists."""
    programs = {name: plan[name] for name in ("init", "train", "sample") if isinstance(plan.get(name), dict)}
    if not programs:
        command = escape(f"--mode=plan --card=rtx4070 --workdir={picture.parent}")
        return f'<div class="card"><p>No plan here yet. The same command with <code>{command}</code> adds it.</p></div>'
    capacity, reserved = (number(plan.get(key)) for key in ("capacity_bytes", "reserved_bytes"))
    room = f"{capacity / GIB:.2f} GiB on the card, {reserved / GIB:.2f} GiB of it kept in reserve (hatched)"
    keys = [("train", "arguments"), ("val", "temporaries"), ("third", "outputs that are not donated arguments")]
    keys = "".join(f'<span class="key" style="--c:var(--{role})">{text}</span>' for role, text in keys)
    card = escape(plan.get("card", "Card"))
    bars = "".join(_memory_bar(name, program, capacity, reserved) for name, program in programs.items())
    head = "".join(f'<th class="num">{title}</th>' for title in (*PARTS, "peak"))
    rows = "".join(
        f"<tr><td>{name}</td>"
        + "".join(f'<td class="num">{_size(program.get(key))}</td>' for key in (*PARTS.values(), "peak_bytes"))
        + "</tr>"
        for name, program in programs.items()
    )
    return (
        f'<div class="card"><div class="chart-head"><h3>{card}</h3><small>{room if capacity else ""}</small></div>'
        f'<div class="chart-head">{keys}</div><div class="memory">{bars}</div>'
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div></div>'
        + "".join(_largest(name, program) for name, program in programs.items())
        + (f'<div class="card"><h3>Who owns the peak</h3>{image(picture)}</div>' if picture.is_file() else "")
    )


def _memory_bar(name: str, program: dict, capacity: float, reserved: float) -> str:
    peak = number(program.get("peak_bytes"))
    scale = 100 / max(capacity, peak, 1)
    values = {part: number(program.get(key)) for part, key in PARTS.items()}
    values["outputs"] = max(0.0, values["outputs"] - values.pop("aliased"))
    parts = "".join(f'<i class="{part}" style="width:{scale * value:.2f}%"></i>' for part, value in values.items())
    rest = max(capacity, peak) - capacity + reserved if capacity else 0
    fits = {True: ("good", "FITS"), False: ("bad", "DOES NOT FIT")}.get(program.get("fits"))
    pill = f'<span class="pill {fits[0]}">{fits[1]}</span>' if fits else ""
    return (
        f'<div><b>{name}</b><div class="bar">{parts}<i class="rest" style="width:{scale * rest:.2f}%"></i></div>'
        f"<span>{peak / GIB:.2f} GiB {pill}</span></div>"
    )


def _largest(name: str, program: dict) -> str:
    buffers = [mapping(buffer) for buffer in program.get("largest") or []]
    if not buffers:
        return ""
    code = lambda value: f"<td><code>{escape(value)}</code></td>"
    columns = {"name": "buffer", "shape": "shape", "source": "made by"}
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    rows = "".join(
        f'<tr><td class="num">{_size(buffer.get("bytes"))}</td>'
        + "".join(code(buffer.get(key, "")) for key in columns)
        + "</tr>"
        for buffer in buffers
    )
    return (
        f'<details class="card"{" open" if name == "train" else ""}><summary>Largest buffers of {name}</summary>'
        f'<div class="scroll"><table class="buffers"><tr><th class="num">size</th>{head}</tr>{rows}</table></div>'
        "</details>"
    )


def _size(count) -> str:
    count = number(count)
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
