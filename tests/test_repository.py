"""What is written down in more than one place says the same everywhere: paths, stages, commands, names of files."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from tiny import REPOSITORY

from tasks.params import Params, dump_params, load_params
from tasks.stages import STAGES
from tasks.workspace import Workspace

GRAPH = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
HERE = Workspace(REPOSITORY)
OUTPUTS = {
    "ingest": [HERE.canonical, HERE.probes, HERE.base_model, HERE.judge_base, HERE.reward_base],
    "validate": [HERE.report("validate")],
    "reward_model": [HERE.reward_model, HERE.judge, HERE.report("reward_model")],
    "ppo": [HERE.critic, HERE.policy, HERE.cycles_csv],
    "evaluate": [HERE.report("evaluate"), HERE.samples],
    "register": [],
}
PASSING_ON = {
    "addresses", "errors", "fingerprint", "processes", "run_folder", "run_tags", "stages", "strict_yaml",
    "tracking", "workspace", "workspace_lock",
}  # fmt: skip
"""Modules of tasks/ that move and record what others compute: a change of them changes no output."""
SHIPPED = {"register": {REPOSITORY / "tasks" / "registration" / "cycle_model.py"}}
"""Code that a stage does not import but puts into what it leaves."""
PACKAGES = ("ppo_core", "tasks", "flows")
WHOLE = (REPOSITORY / "ppo_core", REPOSITORY / "tasks" / "probes")
"""Packages that a stage depends on as a whole."""
MODULES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
DOCUMENTS = [path for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))) if path.exists()]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
LOCKS = [REPOSITORY / "requirements.lock", REPOSITORY / "requirements-dev.lock"]


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def entries(stage: str, kind: str) -> dict[str, Any]:
    """deps, outs, metrics or plots of a stage with their settings."""
    listed = GRAPH[stage].get(kind, [])
    return {name: {} for name in listed if isinstance(name, str)} | {
        k: v for entry in listed if isinstance(entry, dict) for k, v in entry.items()
    }


@cache
def imports(module: Path) -> frozenset[Path]:
    """Modules of ppo_core and tasks that this one imports when it runs."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            places = [REPOSITORY / name.replace(".", "/") for name in names]
            found |= {path for place in places if (path := place.with_suffix(".py")).exists()}
            # A package's own module may say what it is made of (probes); most say only what they are for.
            found |= {path for place in places if (path := place / "__init__.py").exists() and _runs(path)}
    return frozenset(found)


def _runs(module: Path) -> bool:
    """Whether it holds anything but a docstring."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return len(tree.body) > (ast.get_docstring(tree) is not None)


def code_of(stage: str) -> set[Path]:
    """The modules that decide what a stage leaves."""
    found: set[Path] = set()
    waiting = [REPOSITORY / "tasks" / f"{stage}.py"]
    while waiting:
        module = waiting.pop()
        if module not in found and module.stem not in PASSING_ON:
            found.add(module)
            waiting += imports(module)
    return found


def test_the_graph_has_the_stages_in_their_order() -> None:
    assert tuple(GRAPH) == STAGES
    assert [GRAPH[stage]["cmd"] for stage in STAGES] == [f"python -m tasks {stage}" for stage in STAGES]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_module_and_a_section(stage: str) -> None:
    assert (REPOSITORY / "tasks" / f"{stage}.py").exists()
    sections = {field.alias or name for name, field in Params.model_fields.items()}
    assert stage in sections
    assert stage in yaml.safe_load(HERE.params.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_graph_writes_where_the_workspace_says(stage: str) -> None:
    written = [*entries(stage, "outs"), *entries(stage, "metrics"), *entries(stage, "plots")]
    assert sorted(written) == sorted(map(named, [*OUTPUTS[stage], HERE.metrics(stage)]))


@pytest.mark.parametrize("stage", STAGES)
def test_small_results_go_to_git_large_ones_to_the_cache_and_nothing_persists(stage: str) -> None:
    small = entries(stage, "metrics") | entries(stage, "plots")
    assert all(settings["cache"] is False for settings in small.values())
    assert all(not settings for settings in entries(stage, "outs").values())
    assert not GRAPH[stage].keys() - {"cmd", "params", "deps", "outs", "metrics", "plots"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_earlier_outputs_and_on_files_that_exist(stage: str) -> None:
    earlier = STAGES[: STAGES.index(stage)]
    made = {name for other in earlier for kind in ("outs", "metrics", "plots") for name in entries(other, kind)}
    assert [name for name in entries(stage, "deps") if name not in made and not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_runs_and_on_no_other(stage: str) -> None:
    listed = {REPOSITORY / name for name in entries(stage, "deps")}
    runs = code_of(stage) | SHIPPED.get(stage, set())
    for package in listed & set(WHOLE):  # named as a folder
        part = {path for path in runs if path.parent == package}
        assert part
        runs = runs - part | {package}
    listed_code = {path for path in listed if path.suffix == ".py" or path in WHOLE}
    assert sorted(map(named, listed_code)) == sorted(map(named, runs))


@pytest.mark.parametrize("stage", STAGES)
def test_tracked_parameters_are_in_params_yaml(stage: str) -> None:
    plain = yaml.safe_load(HERE.params.read_text(encoding="utf-8"))
    for name in GRAPH[stage]["params"]:
        value: Any = plain
        for key in name.split("."):
            assert key in value, f"{name}: DVC refuses to run where it is missing"
            value = value[key]


def test_params_yaml_is_valid_and_its_values_are_known() -> None:
    assert dump_params(load_params(HERE.params)).keys() >= set(STAGES)


def test_git_leaves_the_large_results_alone() -> None:
    large = [name for stage in STAGES for name in entries(stage, "outs")]
    ignored = subprocess.run(
        ["git", "check-ignore", *large], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ignored.stdout.split() == large


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_a_module_stays_short(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) < 300


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_nothing_is_unpickled(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not calls & {"torch.load", "numpy.load", "np.load"}


def test_the_makefile_runs_modules_that_exist() -> None:
    for module in re.findall(r"python -m ((?:flows|tasks)[\w.]*)", MAKEFILE):
        place = REPOSITORY / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, flags=re.MULTILINE)
    assert set(phony.split()) == TARGETS
    assert set(re.findall(r'"make (\w+) ', MAKEFILE)) == TARGETS - {"help"}


def test_ci_and_the_container_run_targets_of_the_makefile() -> None:
    assert "make test" in (REPOSITORY / ".ci/run").read_text(encoding="utf-8").splitlines()
    dockerfile = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["make"]\nCMD ["align"]' in dockerfile
    (prepared,) = re.findall(r"^RUN make \.venv/(\S+)", dockerfile, flags=re.MULTILINE)
    assert f"align: $(VENV)/{prepared}\n" in MAKEFILE
    (copied,) = re.findall(r"^COPY \S+ Makefile (.+) \./$", dockerfile, flags=re.MULTILINE)
    assert f"$(VENV)/{prepared}: {copied}\n" in MAKEFILE


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_documents_name_files_modules_and_targets_that_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    made = [*(path for paths in OUTPUTS.values() for path in paths), HERE.work, HERE.own_data, REPOSITORY / "metrics"]
    links = [document.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)]
    folders = "|".join(("benchmarks", "docs", "tests", *PACKAGES))
    paths = [REPOSITORY / path for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text)]
    assert [p for p in links + paths if not p.exists() and not any(p.is_relative_to(m) for m in made)] == []
    modules = re.findall(r"python -m ((?:flows|tasks)\.[\w.]+)", text)
    assert [module for module in modules if not (REPOSITORY / f"{module.replace('.', '/')}.py").exists()] == []
    assert set(re.findall(r"(?:^|`|\$ |&& )make ([a-z]+)", text, flags=re.MULTILINE)) <= TARGETS


@pytest.mark.parametrize("lock", LOCKS, ids=named)
def test_every_locked_package_is_exact_and_hashed(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    packages = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert len(packages) > 10
    assert [line for line in packages if not re.match(r"[\w.-]+==\S+ (; .+ )?\\$", line)] == []
    assert text.count("--hash=sha256:") >= len(packages)
    assert not re.search(r"^(torch|triton|nvidia-\S+)==", text, flags=re.MULTILINE)
    assert not re.search(r"--index|--find-links|file:|https?://", text)


def test_locks_hold_what_is_asked_for() -> None:
    locked = {}
    for lock in LOCKS:
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert locked.setdefault(name, version) == version, f"{name} differs between the locks"
    for file in ("requirements.in", "requirements-dev.in"):
        lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
        for requirement in (Requirement(line) for line in lines if line and not line.startswith(("#", "-"))):
            assert requirement.specifier.contains(locked[requirement.name]), requirement
    assert locked["fastapi"] == "0.150.0"


def test_every_imported_library_is_asked_for() -> None:
    files = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("requirements.in", "requirements-torch.txt")]
    asked = re.findall(r"^([\w-]+)", "\n".join(files), flags=re.MULTILINE)
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    libraries = imported - sys.stdlib_module_names - set(PACKAGES)
    missing = {n for n in libraries if not {d.lower().replace("_", "-") for d in distributions[n]} & set(asked)}
    assert missing == set()
