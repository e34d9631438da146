"""YAML of which nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text. Raises ValueError, whatever is wrong with it."""
    try:
        return yaml.load(text, Loader=_Once)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Once(yaml.SafeLoader):
    """Plain values only, and no key twice in a mapping: the first would be forgotten without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known: set[Any] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in known:
                what = f"the key {key.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            known.add(key.value)
        return super().construct_mapping(node, deep)
