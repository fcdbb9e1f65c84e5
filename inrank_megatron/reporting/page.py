"""Self-contained pages of figures and tables, which both reports are."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from inrank_megatron.reporting.glance import Answer
from inrank_megatron.reporting.tables import Table


class Picture(NamedTuple):
    """A figure on a page: ``data``, PNG; ``alt``, what it shows, in words; ``table``, its points."""

    title: str
    caption: str
    data: str
    alt: str
    table: Table


def picture(image: bytes, *, title: str, caption: str, alt: str, table: Table) -> Picture:
    return Picture(title, caption, base64.b64encode(image).decode(), alt, table)


def png(figure: Figure) -> bytes:
    """Drawn at 150 dots per inch."""
    stream = io.BytesIO()
    figure.set_dpi(150)
    # `savefig` would draw twice, once to find the layout, which drawing does by itself.
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def render(
    *,
    title: str,
    lead: str,
    answers: Mapping[str, Sequence[Answer]],
    pictures: Sequence[Picture],
    tables: Sequence[Table],
    **more: Any,
) -> str:
    """The page.

    ``answers``: of each run by its name. ``more``: ``generator``, ``learnt``, ``notice``, ``sample``,
    ``tiles``.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=PackageLoader("inrank_megatron", "reporting")
    )
    questions = list(dict.fromkeys(answer.question for own in answers.values() for answer in own))
    by_question = {
        question: [next((a for a in own if a.question == question), None) for own in answers.values()]
        for question in questions
    }
    parts = {"generator": "InRank-Megatron", "learnt": "", "notice": "", "sample": {}, "tiles": []} | more
    return environment.get_template("report.html.j2").render(
        title=title,
        lead=lead,
        runs=list(answers),
        questions=by_question,
        pictures=pictures,
        tables=tables,
        **parts,
    )
