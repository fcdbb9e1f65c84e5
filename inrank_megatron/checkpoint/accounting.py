"""Named shapes held against each other in both directions."""

from collections.abc import Mapping

_SHOWN = 4

Shape = tuple[int, ...]


def differences(
    there: Mapping[str, Shape], here: Mapping[str, Shape], *, expected: str = "here"
) -> str | None:
    """The number of tensors that only one side has or that differ in shape, with the first of them.

    Args:
        there: name and shape of every tensor of a file. here: of those that the model has.
        expected: the word for ``here``.

    Returns:
        Words for a message, ``None`` where nothing differs.
    """
    names = [*here, *sorted(there.keys() - here.keys())]
    differing = [name for name in names if here.get(name) != there.get(name)]
    if not differing:
        return None
    shown = "; ".join(
        f"{name} is {_shown(there.get(name))} there, {_shown(here.get(name))} {expected}"
        for name in differing[:_SHOWN]
    )
    return f"{len(differing)} ({shown})"


def _shown(shape: Shape | None) -> str:
    return "absent" if shape is None else str(list(shape))
