"""What must never happen: code out of a file, a door open to the network, a secret in a record, a tool that reports."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from stores import new_store

from flows import server, ui
from flows.leash import leashed
from tasks import environment, tracking
from tasks.__main__ import main
from tasks.addresses import public_uri
from tasks.params import load_params
from tasks.tracking import Tracker
from tasks.workspace import Workspace

PACKAGES = ("ppo_core", "tasks", "flows")
OURS = [path for package in PACKAGES for path in sorted((tiny.REPOSITORY / package).rglob("*.py"))]
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {
    "torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "eval", "exec", "os.system",
}  # fmt: skip
METHODS = {"to_pickle", "read_pickle", "unsafe_load"}
Seen = Callable[[str], None]


def calls(module: Path) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(node, ast.Call))


def named(call: ast.Call) -> dict[str, str]:
    return {argument.arg: ast.unparse(argument.value) for argument in call.keywords if argument.arg}


@pytest.mark.fault("security: a pickle in our code", expected="none read, none written")
def test_our_code_reads_and_writes_no_pickle(seen: Seen) -> None:
    for module in OURS:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        imported = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & UNPICKLING, module
        for call in calls(module):
            name = ast.unparse(call.func)
            if name == "exec":
                assert module.name == "own_function.py", module  # the reward function that a user names
                continue
            assert name not in CALLS, (module, name)
            assert name.rsplit(".", 1)[-1] not in METHODS, (module, name)
            assert named(call).get("allow_pickle", "False") == "False"
            assert named(call).get("shell", "False") == "False"
            if name == "yaml.load":
                assert named(call) == {"Loader": "_Once"}, module  # a SafeLoader
    seen(f"none in {len(OURS)} modules")


@pytest.mark.fault("security: code that comes with a model", expected="never loaded: said at every call")
def test_every_model_is_loaded_as_safetensors_and_without_code_of_its_own(seen: Seen) -> None:
    loads = 0
    for module in OURS:
        for call in calls(module):
            name = ast.unparse(call.func)
            options = named(call)
            if name.endswith(".from_pretrained") and name != "peft.PeftConfig.from_pretrained":  # that reads JSON
                loads += 1
                assert options["trust_remote_code"] == "False", (module, call.lineno)
                if "Tokenizer" not in name:
                    assert options.get("use_safetensors") == "True" or "gguf_file" in options, (module, call.lineno)
            assert options.get("trust_remote_code", "False") == "False"
    assert loads >= 6
    seen(f"at all {loads} calls")


@pytest.mark.fault("security: a model that names code of its own", expected="refused, not executed")
@pytest.mark.parametrize("kind", ["llama", "of its own"])
def test_code_beside_a_model_is_not_executed(
    workspace: Workspace, kind: str, capsys: pytest.CaptureFixture[str], seen: Seen
) -> None:
    policy, executed = workspace.own_data / "policy", workspace.root / "executed"
    code = f"from pathlib import Path; Path({str(executed)!r}).touch()\nConfig = Model = Tokenizer = None\n"
    (policy / "evil.py").write_text(code)
    names = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model"}
    maps = {key: f"evil.{name}" for key, name in names.items()} | {"AutoTokenizer": ["evil.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((policy / name).read_text()) | {"auto_map": maps}
        (policy / name).write_text(json.dumps(config | ({} if kind == "llama" else {"model_type": "evil"})))
    ended = main(["ingest", "--workspace", str(workspace.root)])
    # A known kind of model is built by the code of transformers.
    assert ended == (0 if kind == "llama" else 3), capsys.readouterr().err
    assert not executed.exists()
    assert not list(workspace.root.glob("models/**/*.py"))
    seen(f"exit {ended}, not executed")


def in_a_process(script: str, **variables: str) -> str:
    """What a script prints whose environment has these variables."""
    command = [sys.executable, "-c", script]
    env = {name: value for name, value in os.environ.items() if name not in environment._DEFAULTS | environment._FIXED}
    env |= {"PYTHONPATH": str(tiny.REPOSITORY), **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()


ASK = """
import os
from tasks import environment
environment.prepare()
from dvc.analytics import is_enabled
from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION
from mlflow.telemetry.utils import is_telemetry_disabled
from prefect._internal.analytics.enabled import is_telemetry_enabled
from prefect.settings import get_current_settings
settings = get_current_settings()
print(is_telemetry_enabled(), settings.server.analytics_enabled, not is_telemetry_disabled(), is_enabled(),
      not HF_HUB_DISABLE_TELEMETRY, os.environ["GX_ANALYTICS_ENABLED"])
print(MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get(), settings.results.persist_by_default,
      os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the tools themselves say in an environment that allows pickles and sets nothing else."""
    home = str(tmp_path_factory.mktemp("home"))
    allowing = {name: "1" for name in environment._FIXED} | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"}
    env = {name: value for name, value in os.environ.items() if name not in environment._DEFAULTS} | allowing
    env |= {"PYTHONPATH": str(tiny.REPOSITORY), "HOME": home, "PREFECT_HOME": home}
    for ci in ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST"):  # where some stay silent anyway
        env.pop(ci, None)
    told = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    return told.stdout.splitlines()


@pytest.mark.fault("security: an environment that allows pickles", expected="not honoured")
def test_the_environment_cannot_allow_pickles(asked: list[str], seen: Seen) -> None:
    assert asked[1] == "False False 0"
    seen("MLflow, Prefect, torch: off")


@pytest.mark.fault("security: tools that report home", expected="off by default, each of them")
def test_every_tool_says_itself_that_it_reports_nothing(asked: list[str], seen: Seen) -> None:
    assert asked[0] == "False False False False False false"
    # The same for workers, whose environment prefect.yaml sets; and DVC's switch by file, for `dvc` by hand.
    definitions = yaml.safe_load((tiny.REPOSITORY / "prefect.yaml").read_text())["definitions"]["environment"]
    assert definitions.items() <= environment._DEFAULTS.items()
    assert "analytics = false" in (tiny.REPOSITORY / ".dvc" / "config").read_text()
    seen("Prefect, its server, MLflow, DVC, Hugging Face: off")


# Doors


@pytest.mark.fault("security: a server that the network can reach", expected="all on loopback")
def test_servers_listen_on_loopback_only(tmp_path: Path, seen: Seen) -> None:
    assert server.HOST == "127.0.0.1"
    assert "--host=127.0.0.1" in server.prefect_command(1)
    mlflow = ui._dashboards(Workspace(tmp_path), 1, 2)[1].command
    assert mlflow[mlflow.index("--host") + 1] == "127.0.0.1"
    written = [*OURS, tiny.REPOSITORY / "Dockerfile", tiny.REPOSITORY / "prefect.yaml", tiny.REPOSITORY / "Makefile"]
    assert [path for path in written if "0.0.0.0" in path.read_text(encoding="utf-8")] == []
    seen("127.0.0.1")


@pytest.mark.fault("security: data bases and logs of our servers", expected="for their user alone")
def test_what_a_server_writes_is_for_its_user_alone(tmp_path: Path, seen: Seen) -> None:
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).touch(); print('written', flush=True)"
    with leashed([sys.executable, "-c", script, str(tmp_path / "base.db")], tmp_path / "log", {}) as child:
        child.wait(60)
    assert (tmp_path / "base.db").stat().st_mode & 0o777 == 0o600
    seen("mode 0600")


# Secrets


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://user:s3cret@host:5000/api", "http://host:5000/api"),
        ("postgresql+psycopg2://user:s3/cr@et@host/db?sslmode=require&password=s3cret", "postgresql+psycopg2://host/db"
         "?sslmode=require&password=***"),
        ("https://s3cret@host/x", "https://host/x"),
        ("https://host/x?api_key=s3cret", "https://host/x?api_key=***"),
        ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200/api"),
        ("sqlite:////home/me/a@b/mlflow.db", "sqlite:////home/me/a@b/mlflow.db"),
        ("mlflow server --uri mysql://user:s3cret@host/db --port 1", "mlflow server --uri mysql://host/db --port 1"),
    ],
)  # fmt: skip
def test_addresses_are_shown_without_their_secrets(address: str, shown: str) -> None:
    assert public_uri(address) == shown


def test_a_password_leaves_the_tracking_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3%2Fcret@host:1/mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    environment.prepare()
    assert os.environ["MLFLOW_TRACKING_URI"] == "https://host:1/mlflow"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "s3/cret")


def test_the_address_of_a_data_base_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:s3cret@host/db")
    mlflow = ui._dashboards(Workspace(tmp_path), 1, 2)[1]
    assert "s3cret" not in " ".join(mlflow.command)
    assert mlflow.env["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:s3cret@host/db"


SECRETS = {
    "HF_TOKEN": "hf_canary41",
    "PIP_INDEX_URL": "https://me:canary42@127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
    "MLFLOW_TRACKING_USERNAME": "canary43",
    "MLFLOW_TRACKING_PASSWORD": "canary44",
    "PREFECT_API_KEY": "canary45",
    "PREFECT_SERVER_API_AUTH_STRING": "me:canary46",
    "AWS_SECRET_ACCESS_KEY": "canary47",
}
"""Everything by which a user can hand a secret to one of the tools."""
CANARY = re.compile(rb"canary4\d")


def holding(*roots: Path) -> list[Path]:
    files = [path for root in roots for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if CANARY.search(path.read_bytes())]


@pytest.mark.fault("security: secrets in the environment", expected="in no record, log or artifact")
def test_no_secret_reaches_the_records(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], seen: Seen
) -> None:
    new_store(workspace)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    argv = ["--workspace", str(workspace.root)]
    assert main(["ingest", *argv]) == 0
    params = load_params(workspace.params)
    report = workspace.report("validate")
    report.mkdir(parents=True)
    (report / "report.md").write_text("fine")
    with Tracker.open(workspace, "0" * 16, params) as tracker:
        tracker.log_stage("validate", {"rows": 1}, report)
    run = tracker.client.get_run(tracker.run_id)
    assert not CANARY.search(repr(run.to_dictionary()).encode())
    # An index and a hub that do not answer are told about, too.
    policy = {"source": "pypi:x==1", "sha256": "0" * 64, "file": "x"}
    for source in (policy, {"source": f"hub:a/b@{'0' * 40}"}):
        raw: dict[str, Any] = yaml.safe_load(workspace.params.read_text())
        raw["ingest"]["policy"] = source
        workspace.params.write_text(yaml.safe_dump(raw))
        assert main(["ingest", *argv]) == 9
    out, err = capfd.readouterr()
    assert "does not answer" in err
    assert not CANARY.search((out + err).encode())
    assert holding(workspace.root) == []
    (workspace.root / "planted").write_text("canary41")
    assert holding(workspace.root) == [workspace.root / "planted"]  # the search finds what is there
    assert tracking.tracking_uri(workspace).startswith("sqlite:")
    seen(f"{len(SECRETS)} planted, 0 found")


@pytest.mark.fault_slow
@pytest.mark.timeout(580)
@pytest.mark.fault("security: secrets in the environment of a whole run", expected="in no file; no pickle among them")
def test_a_whole_run_leaves_no_secret_and_no_pickle(workspace: Workspace, tmp_path: Path, seen: Seen) -> None:
    secrets = {name: value for name, value in SECRETS.items() if not name.startswith("PREFECT")}
    own = {"PREFECT_HOME": str(tmp_path / "prefect"), "HOME": str(tmp_path / "home"), **secrets}
    (tmp_path / "home").mkdir()
    told = subprocess.run(
        [sys.executable, "-m", "flows.align"],
        cwd=workspace.root,
        env={**os.environ, **own, "GIT_CONFIG_GLOBAL": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    assert not CANARY.search((told.stdout + told.stderr).encode())
    assert holding(workspace.root, tmp_path / "prefect", tmp_path / "home") == []
    files = [path for root in (workspace.root, tmp_path / "prefect") for path in root.rglob("*") if path.is_file()]
    pickled = [path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")]
    # DVC keeps an index of its own; it is outside of what is shared, and nothing of a run.
    assert [path for path in pickled if ".dvc" not in path.parts and ".git" not in path.parts] == []
    assert [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")] == []
    data_base = tmp_path / "prefect" / "prefect.db"
    assert data_base.stat().st_mode & 0o077 == 0
    assert not list((tmp_path / "prefect").glob("storage/*"))
    seen(f"0 secrets, 0 pickles in {len(files)} files")
