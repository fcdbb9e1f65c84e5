"""Rows as tables."""


def print_table(title: str, rows: list[dict]) -> None:
    """Markdown, so that a table can go into a document as it is printed."""
    heads = [head.replace("_", " ") for head in rows[0]]
    print(f"{title}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(_text(value) for value in row.values())} |")


def _text(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
