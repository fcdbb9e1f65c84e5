"""Draws the diagrams of the concept pages: ``python docs/scripts/figures.py`` writes ``docs/figures``."""

from collections.abc import Callable, Iterable
from pathlib import Path
from xml.sax.saxutils import escape

FIGURES = Path(__file__).parents[1] / "figures"
INK, SOFT, FROZEN, U, V, BUFFER, WIRE = (
    "#1f2933",
    "#7b8794",
    "#d9dee4",
    "#2f6fb2",
    "#3c9a5f",
    "#b9d3ee",
    "#c2571a",
)
STYLE = f'font-family="Helvetica, Arial, sans-serif" fill="{INK}"'


def rect(x: float, y: float, w: float, h: float, fill: str, *, dash: bool = False) -> str:
    dashes = ' stroke-dasharray="4 3"' if dash else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{INK}"{dashes}/>'


def text(x: float, y: float, words: str, *, size: int = 14, anchor: str = "middle", fill: str = INK) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">'
        f"{escape(words)}</text>"
    )


def line(points: Iterable[tuple[float, float]], *, color: str = INK, arrow: bool = False, dash=False) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    end = ' marker-end="url(#head)"' if arrow else ""
    dashes = ' stroke-dasharray="5 4"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{end}{dashes}/>'


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    head = (
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        f'<path d="M0,0 L9,4 L0,8 z" fill="{INK}"/></marker></defs>'
    )
    body = "\n".join([f"<title>{escape(title)}</title>", head, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" {STYLE}>\n<rect width="{width}" height="{height}" fill="white"/>\n'
        f"{body}\n</svg>\n"
    )


def factors() -> str:
    """W = W0 + U V in the first phase, U* V* after the switch."""
    parts = [
        text(185, 28, "first phase: W = W0 + U V", size=16),
        rect(30, 60, 120, 120, FROZEN),
        text(90, 125, "W0"),
        text(90, 205, "frozen, O x I", size=12, fill=SOFT),
        text(170, 126, "+", size=20),
        rect(195, 60, 18, 120, U),
        rect(213, 60, 22, 120, BUFFER),
        rect(235, 60, 30, 120, "white", dash=True),
        text(204, 52, "r", size=12),
        text(224, 52, "b", size=12),
        text(230, 205, "U, O x (r + b)", size=12, fill=SOFT),
        rect(285, 60, 120, 18, V),
        rect(285, 78, 120, 22, BUFFER),
        rect(285, 100, 120, 30, "white", dash=True),
        text(345, 205, "V, (r + b) x I", size=12, fill=SOFT),
        line([(430, 120), (520, 120)], arrow=True),
        text(475, 105, "switch", size=14),
        text(475, 142, "once", size=12, fill=SOFT),
        text(650, 28, "second phase: W = U* V*", size=16),
        rect(560, 60, 26, 120, U),
        text(573, 52, "r", size=12),
        text(573, 205, "U*, O x r", size=12, fill=SOFT),
        rect(610, 60, 120, 26, V),
        text(670, 205, "V*, r x I", size=12, fill=SOFT),
        text(400, 240, "dark: columns of the rank r    light: buffer b, trained too", size=13, fill=SOFT),
        text(400, 260, "dashed: allocated for growth, zero and out of use", size=13, fill=SOFT),
    ]
    return svg(800, 280, "The two forms of a factorised weight", parts)


def phases() -> str:
    """A run of InRank-Efficient in time."""
    left, top, width, switch = 70, 60, 680, 300
    steps = [left + 30 * n for n in range(1, 10)]
    heights = [175, 160, 152, 148, 146, 145, 145, 145, 145]
    stairs: list[tuple[float, float]] = [(left, 205)]
    for x, y in zip(steps, heights, strict=True):
        stairs += [(x, stairs[-1][1]), (x, y)]
    stairs += [(left + switch, 145), (left + width, 145)]
    checks = [line([(x, 210), (x, 220)], color=SOFT) for x in steps]
    parts = [
        f'<rect x="{left}" y="{top}" width="{switch}" height="150" fill="#eef3f9"/>',
        f'<rect x="{left + switch}" y="{top}" width="{width - switch}" height="150" fill="#eef7f1"/>',
        text(left + switch / 2, top - 14, "phase 1: train U and V, W0 frozen", size=14),
        text(left + switch + (width - switch) / 2, top - 14, "phase 2: train U* and V*", size=14),
        line([(left, 210), (left + width + 20, 210)], arrow=True),
        text(left + width, 240, "step", size=13),
        line([(left, 210), (left, top)]),
        text(left - 30, 140, "rank", size=13),
        line(stairs, color=U),
        *checks,
        text(left + 150, 240, "a rank check every --rank-check-interval steps", size=12, fill=SOFT),
        line([(left + switch, top), (left + switch, 225)], color=WIRE, dash=True),
        text(left + switch, 258, "switch", size=13, fill=WIRE),
        text(left + 8, 90, "gradient of the first batch", size=12, anchor="start", fill=SOFT),
        text(left + 8, 106, "gives the first columns", size=12, anchor="start", fill=SOFT),
        text(left + switch + 10, 90, "no W0, no buffer, no rank checks:", size=12, anchor="start", fill=SOFT),
        text(
            left + switch + 10,
            106,
            "fewer parameters, less work per step",
            size=12,
            anchor="start",
            fill=SOFT,
        ),
    ]
    return svg(800, 275, "A run of InRank-Efficient in time", parts)


def rank_check() -> str:
    """How a check turns a spectrum into a rank. The ratios are those of the formula on these values."""
    values, length = [10.0, 8.0, 6.5, 4.0, 2.4, 1.5, 1.0, 0.6], 32
    full = [*values, *[0.0] * (length - len(values))]
    ratio = [1 - _variance([0.0] * r + full[r:]) / _variance(full) for r in range(1, 9)]
    rank = next(r for r, value in enumerate(ratio, 1) if value >= 0.9)
    parts = [text(400, 28, "one rank check: r = 2 before, buffer b = 6, threshold 0.9", size=16)]
    for n, (value, explained) in enumerate(zip(values, ratio, strict=True), 1):
        x, h = 60 + 62 * (n - 1), 13 * value
        fill = U if n <= 2 else V if n <= rank else BUFFER
        parts += [
            rect(x, 200 - h, 44, h, fill),
            text(x + 22, 220, f"{n}", size=13),
            text(x + 22, 244, f"{explained:.2f}", size=13, fill=V if n == rank else SOFT),
        ]
    parts += [
        text(585, 90, "largest singular values of the", size=13, anchor="start"),
        text(585, 110, "update U V - U0 V0", size=13, anchor="start"),
        text(600, 220, "candidate rank", size=13, anchor="start", fill=SOFT),
        text(600, 244, "explained ratio", size=13, anchor="start", fill=SOFT),
        text(
            400,
            280,
            f"the first ratio of at least 0.9 is at {rank}: the rank grows from 2 to {rank}, and {rank - 2} "
            "new random columns refill the buffer",
            size=13,
        ),
    ]
    return svg(800, 300, "A rank check", parts)


def _variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def tensor_parallel() -> str:
    """A column-parallel layer of the second phase on two ranks: what is stored and what is sent."""
    parts = [text(400, 28, "a column-parallel U V on two ranks, forward pass", size=16)]
    for rank, y in ((0, 50), (1, 200)):
        parts += [
            f'<rect x="20" y="{y}" width="760" height="120" fill="#f7f9fb" stroke="{SOFT}"/>',
            text(34, y + 18, f"rank {rank}", size=13, anchor="start", fill=SOFT),
            rect(50, y + 45, 60, 50, "white"),
            text(80, y + 74, "x", size=14),
            text(80, y + 112, "T/2 x I", size=12, fill=SOFT),
            line([(112, y + 70), (168, y + 70)], arrow=True),
            rect(170, y + 50, 90, 26, V),
            text(215, y + 68, "V", size=14, fill="white"),
            text(215, y + 94, "stores r x I/2", size=12, fill=SOFT),
            text(215, y + 110, "V gathered per step", size=12, fill=WIRE),
            line([(262, y + 70), (318, y + 70)], arrow=True),
            rect(320, y + 58, 24, 26, "white"),
            text(332, y + 76, "z", size=14),
            text(332, y + 112, "T/2 x r", size=12, fill=SOFT),
            line([(346, y + 70), (448, y + 70)], arrow=True),
            text(397, y + 60, "all-gather z", size=12, fill=WIRE),
            rect(450, y + 45, 24, 50, "white"),
            text(462, y + 74, "z", size=14),
            text(462, y + 112, "T x r", size=12, fill=SOFT),
            line([(476, y + 70), (538, y + 70)], arrow=True),
            rect(540, y + 40, 26, 60, U),
            text(553, y + 74, "U", size=14, fill="white"),
            text(553, y + 114, "stores O/2 x r", size=12, fill=SOFT),
            line([(568, y + 70), (628, y + 70)], arrow=True),
            rect(630, y + 45, 90, 50, "white"),
            text(675, y + 74, "y", size=14),
            text(675, y + 112, "T x O/2", size=12, fill=SOFT),
        ]
    parts += [
        line([(397, 128), (397, 252)], color=WIRE, dash=True),
        text(
            400,
            350,
            "T tokens, I input and O output features, rank r. A dense layer would all-gather",
            size=13,
        ),
        text(
            400,
            368,
            "the input, T x I. Here z, T x r, crosses between the ranks, and once per step V, r x I.",
            size=13,
        ),
    ]
    return svg(800, 385, "Tensor parallelism of a factorised layer", parts)


def zero() -> str:
    """Bytes per trained parameter on one of four replicas, BF16 with AdamW."""
    replicas = 4
    kinds = (("BF16 parameters", 2, 3, FROZEN), ("FP32 gradients", 4, 2, V), ("FP32 master weights", 4, 1, U))
    kinds += (("AdamW moments", 8, 1, BUFFER),)
    parts = [
        text(400, 28, f"bytes per trained parameter on one of {replicas} replicas, BF16, AdamW", size=16)
    ]
    for stage in range(4):
        y, x, total = 60 + 46 * stage, 130.0, 0.0
        parts.append(text(115, y + 21, f"ZeRO {stage}", size=14, anchor="end"))
        for _, size, sharded_from, fill in kinds:
            stored = size / replicas if stage >= sharded_from else size
            parts.append(rect(x, y, 28 * stored, 32, fill))
            x, total = x + 28 * stored, total + stored
        parts.append(text(x + 10, y + 21, f"{total:g}", size=14, anchor="start"))
    for n, (name, _, sharded_from, fill) in enumerate(kinds):
        x, y = 130 + 330 * (n % 2), 258 + 24 * (n // 2)
        parts += [
            rect(x, y - 12, 16, 16, fill),
            text(x + 24, y + 1, f"{name}: sharded from stage {sharded_from}", size=13, anchor="start"),
        ]
    parts.append(
        text(400, 318, "A frozen W0 has only the 2 bytes of its BF16 parameters.", size=13, fill=SOFT)
    )
    return svg(800, 335, "What a replica stores under each ZeRO stage", parts)


DRAWN: dict[str, Callable[[], str]] = {
    "factors.svg": factors,
    "phases.svg": phases,
    "rank_check.svg": rank_check,
    "tensor_parallel.svg": tensor_parallel,
    "zero.svg": zero,
}


def main() -> None:
    """Write every figure."""
    for name, draw in DRAWN.items():
        (FIGURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
