"""`file:` and `hub:` sources: only what was pinned, from where it may come."""

from __future__ import annotations

import functools
import hashlib

import datasets
import httpx
import pyarrow.parquet as pq
import pytest
import tiny
from huggingface_hub.errors import RepositoryNotFoundError

from tasks.data import sources
from tasks.data.sources import digest, fetch, files_of
from tasks.data_params import DataSource, SourceParams
from tasks.errors import ConfigError, DataError, ServiceError
from tasks.params import check_params

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# file:


def of_own(path, **more):
    return SourceParams(source=f"file:{path}", **more)


def test_a_file_of_ones_own_is_read_where_it_lies(own, get):
    (own.own_data / "sub").mkdir()
    file = own.own_data / "sub" / "a.jsonl"
    file.write_bytes(b"{}")
    fetched = get(of_own("sub", file="a.jsonl"))
    assert (fetched.path, fetched.label) == (file, "data/own/sub/a.jsonl")
    assert (
        get(of_own("sub/a.jsonl", sha256=hashlib.sha256(b"{}").hexdigest())).sha256 == hashlib.sha256(b"{}").hexdigest()
    )


def test_a_changed_or_missing_file_of_ones_own_is_refused(own, get):
    (own.own_data / "a.jsonl").write_bytes(b"{}")
    found = hashlib.sha256(b"{}").hexdigest()
    with pytest.raises(DataError, match=f"data/own/a.jsonl — has changed: expected sha256 {'1' * 64}, found {found}"):
        get(of_own("a.jsonl", sha256="1" * 64))
    with pytest.raises(DataError, match=r"data/own/b\.jsonl — there is no such file"):
        get(of_own("b.jsonl"))


def test_paths_and_links_that_leave_the_folder_are_refused_with_their_target(own, get, tmp_path):
    outside = tmp_path / "outside.jsonl"
    outside.write_bytes(b"{}")
    (own.own_data / "link.jsonl").symlink_to(outside)
    (own.own_data / "folder").mkdir()
    (own.own_data / "folder" / "model.safetensors").symlink_to(outside)
    for path in ("link.jsonl", "../../../outside.jsonl", str(outside), "folder"):
        with pytest.raises(DataError, match=f"leads out of data/own, to {outside}"):
            get(of_own(path))
    (own.own_data / "real.jsonl").write_bytes(b"{}")
    (own.own_data / "inner.jsonl").symlink_to(own.own_data / "real.jsonl")
    assert get(of_own("inner.jsonl")).path.read_bytes() == b"{}"


def test_the_digest_of_a_folder_covers_names_and_contents(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a").write_bytes(b"1")
    first = digest(tmp_path / "f")
    assert first == hashlib.sha256(f"{hashlib.sha256(b'1').hexdigest()}  a\n".encode()).hexdigest()
    (tmp_path / "f" / "a").rename(tmp_path / "f" / "b")
    assert digest(tmp_path / "f") != first


@pytest.mark.parametrize("file", ["x/*/../../../elsewhere/*.json", "../*.json", "/etc/*", "a.tar.gz!../b.json"])
@pytest.mark.parametrize("source", ["file:data", f"hub:some/data@{COMMIT}"])
def test_a_file_or_pattern_that_leads_out_of_its_source_is_refused(file, source):
    raw = tiny.tiny_params()
    for key in ("file", "ratings_file"):
        raw["ingest"]["data"] = [{"source": source, "format": "ratings", key: file}]
        with pytest.raises(ConfigError, match=rf"ingest\.data\.0\.{key} — .*leads out of the source"):
            check_params(raw)


def test_a_pattern_follows_no_link_out_of_ones_own_folder(own, tmp_path):
    outside = tmp_path / "outside.jsonl"
    outside.write_bytes(b"{}")
    for name in ("data", "beside"):
        (own.own_data / name).mkdir()
    (own.own_data / "data" / "link").symlink_to(own.own_data / "beside")
    (own.own_data / "beside" / "good.jsonl").write_bytes(b"{}")
    source = DataSource(source="file:data", file="*/*.jsonl", format="hh")
    _, files = files_of(source, own, tmp_path)
    assert [file.label for file in files] == ["data/own/data/link/good.jsonl"]
    (own.own_data / "beside" / "leak.jsonl").symlink_to(outside)
    with pytest.raises(DataError, match=f"link/leak.jsonl — leads out of data/own, to {outside}"):
        files_of(source, own, tmp_path)


# hub:


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What `snapshot_download` was asked for; it answers with a folder."""
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(sources, "snapshot_download", download)
    return asked


def test_a_model_of_the_hub_is_fetched_at_its_commit_without_pickles(hub, get):
    fetched = get(SourceParams(source=f"hub:some/model@{COMMIT}"))
    assert (hub["name"], hub["repo_type"], hub["revision"]) == ("some/model", "model", COMMIT)
    assert "*.safetensors" in hub["allow_patterns"]
    assert not {"*", "*.bin", "*.pt", "*.py"} & set(hub["allow_patterns"])
    assert fetched.version == COMMIT


def test_a_data_file_of_the_hub_is_fetched_alone(hub, get, tmp_path):
    (tmp_path / "snapshot" / "train.jsonl").write_bytes(b"{}")
    fetched = get(DataSource(source=f"hub:some/data@{COMMIT}", file="train.jsonl", format="hh"))
    assert (hub["repo_type"], hub["allow_patterns"]) == ("dataset", ["train.jsonl"])
    assert fetched.sha256 == hashlib.sha256(b"{}").hexdigest()
    with pytest.raises(DataError, match="holds no test"):
        get(DataSource(source=f"hub:some/data@{COMMIT}", file="test.jsonl", format="hh"))


def test_a_second_file_of_a_hub_source_is_fetched_itself(hub, get, tmp_path):
    (tmp_path / "snapshot" / "ratings.txt").write_bytes(b"1")
    source = DataSource(
        source=f"hub:some/data@{COMMIT}", file="texts.txt", ratings_file="ratings.txt", format="ratings"
    )
    assert get(source, file=source.ratings_file).sha256 == hashlib.sha256(b"1").hexdigest()
    assert hub["allow_patterns"] == ["ratings.txt"]


@pytest.mark.parametrize(
    ("file", "asked", "found"),
    [
        ("*.jsonl", ["*.jsonl"], ["a.jsonl"]),
        ("deep/*.jsonl", ["deep/*.jsonl"], ["deep/b.jsonl"]),
        ("**/*.jsonl", ["**/*.jsonl", "*.jsonl"], ["a.jsonl", "deep/b.jsonl"]),
    ],
)
def test_a_pattern_of_a_hub_source_fetches_the_files_that_are_like_it(hub, own, tmp_path, file, asked, found):
    (tmp_path / "snapshot" / "deep").mkdir()
    for name in ("a.jsonl", "deep/b.jsonl"):
        (tmp_path / "snapshot" / name).write_bytes(b"{}")
    _, files = files_of(DataSource(source=f"hub:some/data@{COMMIT}", file=file, format="hh"), own, tmp_path)
    assert sorted(set(hub["allow_patterns"])) == sorted(asked)
    assert [file.path.relative_to(tmp_path / "snapshot").as_posix() for file in files] == found


@pytest.mark.parametrize(
    "source",
    [
        SourceParams(source=f"hub:some/model@{COMMIT}"),
        DataSource(source=f"hub:some/data@{COMMIT}", file="*.json", format="hh"),
    ],
)
def test_the_digest_of_a_hub_folder_is_of_what_was_asked_for_alone(hub, own, tmp_path, source):
    (tmp_path / "snapshot" / "config.json").write_bytes(b"{}")
    first = files_of(source, own, tmp_path)[0] if source.file else fetch(source, own, tmp_path)
    (tmp_path / "snapshot" / "README.md").write_bytes(b"in the cache, for somebody else")
    second = files_of(source, own, tmp_path)[0] if source.file else fetch(source, own, tmp_path)
    line = f"{hashlib.sha256(b'{}').hexdigest()}  config.json\n"
    assert first.sha256 == second.sha256 == hashlib.sha256(line.encode()).hexdigest()


def test_a_hub_source_must_say_its_commit(get):
    with pytest.raises(ConfigError, match="revision 'main' can move"):
        get(SourceParams(source="hub:some/model@main"))


def test_a_split_of_the_hub_is_read_by_datasets(get, monkeypatch):
    asked = {}

    def load(name, subset, **options):
        asked.update(options, name=name, subset=subset)
        return datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    fetched = get(DataSource(source=f"hub:some/data@{COMMIT}", subset="harmless", split="test", format="hh"))
    assert asked.pop("cache_dir").endswith(COMMIT)  # what is cached of another revision is not taken for this one
    assert asked == {"name": "some/data", "subset": "harmless", "split": "test", "revision": COMMIT}
    assert pq.read_table(fetched.path).to_pylist() == [{"chosen": "a", "rejected": "b"}]
    assert fetched.sha256 == hashlib.sha256(fetched.path.read_bytes()).hexdigest()


def test_a_split_out_of_reach_is_a_service_error(get):
    with pytest.raises(ServiceError, match="some/data@"):  # the tests run with HF_HUB_OFFLINE
        get(DataSource(source=f"hub:some/data@{COMMIT}", format="hh"))


def test_a_split_that_is_not_there_is_a_data_error(get, monkeypatch):
    def load(*_, **__):
        raise ValueError("Unknown split")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="Unknown split"):
        get(DataSource(source=f"hub:some/data@{COMMIT}", split="tset", format="hh"))


def test_a_hub_out_of_reach_is_a_service_error(get, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "snapshot_download", functools.partial(sources.snapshot_download, cache_dir=tmp_path))
    with pytest.raises(ServiceError, match="some/model@"):
        get(SourceParams(source=f"hub:some/model@{COMMIT}"))


def test_a_repository_the_hub_does_not_know_is_a_data_error(get, monkeypatch):
    def unknown(*_, **__):
        raise RepositoryNotFoundError(
            "no such repository", response=httpx.Response(404, request=httpx.Request("GET", "x:"))
        )

    monkeypatch.setattr(sources, "snapshot_download", unknown)
    with pytest.raises(DataError, match="no such repository"):
        get(SourceParams(source=f"hub:some/model@{COMMIT}"))
