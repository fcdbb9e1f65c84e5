"""A YAML file of any content, read with care: it may be damaged, hostile or not there."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from inrank_megatron.errors import UserError
from inrank_megatron.pointers import refuse_pointer

LARGEST_FILE = 2**24
"""Characters that no configuration file has."""


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises UserError for what is not such a file."""
    refuse_pointer(Path(path))
    try:
        with open(path, encoding="utf-8") as file:  # a pipe of the shell's, too
            text = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); give a configuration file in YAML") from None
    if len(text) > LARGEST_FILE:
        raise UserError(f"{path}: is longer than {LARGEST_FILE} characters; give a configuration file")
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # tags such as !!int let the library fail in many ways
        reason = str(error)[:300] or type(error).__name__
        raise UserError(f"{path}: not valid YAML; correct it: {' '.join(reason.split())}") from None


class _Loader(yaml.SafeLoader):
    """YAML that refuses a setting given twice, of which it would take the last, and a list or mapping that
    occurs in several places: lists of such lists are billions of entries to whoever shows them.
    """

    def construct_mapping(self, node, deep=False):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                raise ValueError(f"{name} is given {times} times")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent, index):
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise ValueError("an alias (*name) of a list or mapping; write it out")
        return node
