"""A Python function of the user's own, which params.yaml names as `module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.errors import ConfigError

KEY = "ppo.reward.function"
"""The parameter that names the function, where it is the one reward."""

log = logging.getLogger(__name__)


class OwnFunction:
    """Scores of responses, checked: one finite number for each."""

    def __init__(self, named: str, own: Path, key: str = KEY) -> None:
        """The function that parameter `key` names, from a file in `own` or what is installed. Raises ConfigError."""
        self.named, self.key = named, key
        self.function = _find(named, own, key)

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Raises ConfigError where the function fails or returns anything else; its traceback goes to the log."""
        try:
            scores = list(self.function(prompts, responses))
        except Exception as error:
            raise _failed(f"{self.named} raised {type(error).__name__}: {error}", self.key, error) from error
        if len(scores) != len(responses):
            what = f"{self.named} returned {len(scores)} scores for {len(responses)} responses"
            raise ConfigError(what, self.key, "return one for each, in their order")
        for prompt, score in zip(prompts, scores, strict=True):
            if not _is_finite(score):
                what = f"{self.named} returned {score!r:.40} for a response to the prompt {prompt!r:.200}"
                raise ConfigError(what, self.key, "return a finite number")
        return [float(score) for score in scores]


def source_file(named: str, own: Path, key: str = KEY) -> Path:
    """The file of the function's module: in `own`, else where it is installed. Raises ConfigError."""
    module = named.partition(":")[0]
    mine = own / f"{module.replace('.', '/')}.py"
    if mine.is_file():
        # Not what data/own itself resolves to: it could be a link, too.
        if not mine.resolve().is_relative_to(own.parent.resolve() / own.name):
            what = f"data/own/{mine.relative_to(own)} leads out of data/own, to {mine.resolve()}"
            raise ConfigError(what, key, "copy it into data/own")
        return mine
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of a package around it
        spec = None
    if spec is None or spec.origin is None or not spec.has_location:
        raise ConfigError(f"there is no module {module}", key, f"write it to data/own/{mine.relative_to(own)}")
    return Path(spec.origin)


def _find(named: str, own: Path, key: str) -> Callable[[list[str], list[str]], Any]:
    module_name, _, name = named.partition(":")
    file = source_file(named, own, key)
    try:
        module = _run(file) if file.is_relative_to(own) else importlib.import_module(module_name)
    except Exception as error:
        raise _failed(f"{file} cannot be imported: {type(error).__name__}: {error}", key, error) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{file} has no function {name}", key, "name one that it defines")
    return function


def _run(file: Path) -> ModuleType:
    """The module of a file, as it is now: no cached bytecode, and no other module of its name is shadowed."""
    module = ModuleType(f"own.{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    exec(compile(file.read_bytes(), file, "exec", dont_inherit=True), module.__dict__)
    return module


def _failed(what: str, key: str, error: Exception) -> ConfigError:
    log.error("%s", what, exc_info=error)
    return ConfigError(what, key, "the log has its traceback")


def _is_finite(score: Any) -> bool:
    try:
        return math.isfinite(score)
    except (TypeError, ValueError, OverflowError):
        return False
