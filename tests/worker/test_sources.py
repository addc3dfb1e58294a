"""Model sources: every scheme, found, fetched once, or refused with a sentence."""

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shoal.worker.sources import SourceError, default_cache_dir, resolve


def wheel(
    folder: Path, version: str = "1.0", files: tuple[str, ...] = ("tiny_model/m.gguf",)
) -> Path:
    """A wheel of the package tiny-model. It depends on a package that does not exist."""
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    contents = dict.fromkeys(files, f"GGUF {version}") | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n"
        "Requires-Dist: shoal-test-no-such-package\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_model/__init__.py": "raise RuntimeError('a model package is never imported')\n",
    }
    record = "".join(f"{name},,\n" for name in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (contents | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_package_is_installed_once_and_found_again(index: Path, tmp_path: Path) -> None:
    """The first call unpacks the wheel alone, without dependencies; the second needs no wheel."""
    said: list[tuple[str, float | None]] = []
    wheel(index)
    cache = tmp_path / "cache"
    found = resolve("py://tiny-model", None, cache, lambda what, share: said.append((what, share)))
    assert found.revision == "1.0"
    assert found.path.read_text() == "GGUF 1.0"
    assert found.path.is_relative_to(cache / "py" / "tiny-model-1.0")
    assert said[-1] == ("installed tiny-model 1.0", 1.0)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert resolve("py://Tiny_Model", None, cache).path == found.path
    assert not [path for path in (cache / "py").iterdir() if "target" in path.name]


def test_versions_live_side_by_side(index: Path, tmp_path: Path) -> None:
    """The revision picks a version; without one the highest that is there is taken."""
    for version in ("1.9", "1.10"):
        wheel(index, version)
        resolve("py://tiny-model", version, tmp_path)
    assert resolve("py://tiny-model", "1.9", tmp_path).path.read_text() == "GGUF 1.9"
    assert resolve("py://tiny-model", None, tmp_path).path.read_text() == "GGUF 1.10"


def test_many_processes_install_once(index: Path, tmp_path: Path) -> None:
    """Whoever comes second waits for the lock and finds the work done."""
    wheel(index)
    installs: list[str] = []

    def note(what: str, share: float | None) -> None:
        if what.startswith("installed"):
            installs.append(what)

    with ThreadPoolExecutor(4) as pool:
        paths = {
            found.path
            for found in pool.map(
                lambda _: resolve("py://tiny-model", None, tmp_path, note), range(4)
            )
        }
    assert len(paths) == 1
    assert len(installs) == 1


def test_an_installed_package_is_used_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of this environment is read through its metadata and never imported."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel(tmp_path)) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    assert resolve("py://tiny-model").path == site / "tiny_model" / "m.gguf"
    assert "tiny_model" not in sys.modules


def test_a_file_inside_a_package_can_be_named(index: Path, tmp_path: Path) -> None:
    """With several models in a package the URI names one; else the error lists them."""
    wheel(index, files=("tiny_model/a.gguf", "tiny_model/b.gguf"))
    assert resolve("py://tiny-model/b.gguf", None, tmp_path).path.name == "b.gguf"
    assert resolve("py://tiny-model/tiny_model/a.gguf", None, tmp_path).path.name == "a.gguf"
    with pytest.raises(SourceError, match=r"2 \.gguf files, name one in the URI: a\.gguf, b\.gguf"):
        resolve("py://tiny-model", None, tmp_path)
    with pytest.raises(SourceError, match=r"no file c\.gguf"):
        resolve("py://tiny-model/c.gguf", None, tmp_path)


def test_a_package_that_cannot_be_had(index: Path, tmp_path: Path) -> None:
    """The error names the package and version and says what to do; nothing stays behind."""
    with pytest.raises(SourceError, match=r"tiny-model==7\.0.*pip install --no-deps"):
        resolve("py://tiny-model", "7.0", tmp_path)
    assert [path.name for path in (tmp_path / "py").iterdir()] == [".tiny-model.lock"]


def test_an_unusable_cache_directory_is_named(index: Path, tmp_path: Path) -> None:
    """A cache directory that is a file says so, and how to choose another."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SourceError, match="SHOAL_CACHE_DIR"):
        resolve("py://tiny-model", None, blocked)


def test_a_hung_download_ends_at_the_deadline(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip is stopped when the time is up."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(SourceError, match="longer than 2 s"):
            resolve("py://tiny-model", None, tmp_path, None, 2.0)
        _Silent.over.set()
        server.shutdown()


class _Silent(BaseHTTPRequestHandler):
    """Takes a request and does not answer."""

    over = threading.Event()

    def do_GET(self) -> None:
        self.over.wait(20)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_local_paths(tmp_path: Path) -> None:
    """A .gguf file, a directory in Hugging Face's layout, a directory with one .gguf."""
    model = tmp_path / "with space" / "m.gguf"
    model.parent.mkdir()
    model.write_text("GGUF")
    assert resolve(str(model)).path == model
    assert resolve(f"file://{tmp_path}/with%20space/m.gguf").path == model
    assert resolve(f"file://{model.parent}").path == model
    (model.parent / "config.json").write_text("{}")
    (model.parent / "model.safetensors").write_text("")
    assert resolve(f"FILE://{model.parent}").path == model.parent


@pytest.mark.parametrize(
    ("uri", "revision", "complaint"),
    [
        ("s3://bucket/model", None, r"not supported yet: s3:// .*py://, file://, hf://"),
        ("py://", None, "names no model"),
        ("", None, "names no model"),
        ("py://--index-url=http:evil", None, "not a Python package name"),
        ("py://tiny-model", "--pre", "not a revision"),
        ("py://tiny-model", "../../up", "not a revision"),
        ("file://relative.gguf", None, "three slashes"),
        ("file:///models/m.gguf", "v1", "'v1' is asked for; only py:// and hf:// have"),
        ("/models/m.gguf", "v1", "'v1' is asked for; only py:// and hf:// have"),
        ("file://elsewhere/m.gguf", None, "three slashes"),
        ("/no/such/model", None, "no such file or directory: /no/such/model"),
        (__file__, None, r"must be a \.gguf"),
        (str(Path(__file__).parent), None, r"holds no \.gguf file"),
        ("hf://just-a-name", None, "expected hf://organisation/name"),
        ("hf://org/name/../../etc.gguf/x", None, "expected hf://organisation/name"),
        ("hf://org/name@v1", "v2", "asks for v1, the revision says v2"),
    ],
)
def test_wrong_uris_are_refused(
    uri: str, revision: str | None, complaint: str, tmp_path: Path
) -> None:
    """Each mistake gets a sentence that shows the way."""
    with pytest.raises(SourceError, match=complaint):
        resolve(uri, revision, tmp_path)


def test_the_cache_directory_follows_the_environment() -> None:
    """$SHOAL_CACHE_DIR goes before ~/.cache/shoal."""
    assert default_cache_dir({"SHOAL_CACHE_DIR": "/x"}) == Path("/x")
    assert default_cache_dir({}) == Path.home() / ".cache" / "shoal"


COMMIT = "c" * 40


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a download needs."""

    repos: dict[str, dict[str, bytes]]
    served: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            if repo in self.repos and "tree" in path.split("/"):
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in self.repos[repo].items()
                ]
                return self._answer(200, json.dumps(tree).encode())
            if repo in self.repos:
                names = [{"rfilename": name} for name in self.repos[repo]]
                facts = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": names, "tags": []}
                return self._answer(200, json.dumps(facts).encode())
        else:
            parts = path.split("/")
            repo, name = "/".join(parts[:2]), "/".join(parts[4:])
            content = self.repos.get(repo, {}).get(name)
            if content is not None:
                if self.command == "GET":
                    self.served.append(name)
                return self._answer(200, content, ETag=f'"{name}-{len(content)}"')
        return self._answer(404, b"", **{"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A Hub with two models; gives its URL and the list of files it has served."""

    class Handler(_Hub):
        served: list[str] = []  # noqa: RUF012 - one list a class, one class a test
        repos = {  # noqa: RUF012
            "org/safe": {
                "config.json": b"{}",
                "tokenizer.json": b"{}",
                "model.safetensors": b"weights",
                "pytorch_model.bin": b"pickle",
                "modeling_evil.py": b"code",
                "consolidated.safetensors": b"again",
                "onnx/config.json": b"other",
            },
            "org/gguf": {"README.md": b"", "q4.gguf": b"GGUF4", "q8.gguf": b"GGUF8"},
        }

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Handler.served
        server.shutdown()


def resolve_elsewhere(uri: str, home: Path, endpoint: str, **environ: str) -> Any:
    """`resolve` in a process of its own: huggingface_hub reads its environment on import."""
    code = (
        "import json, sys\n"
        "from shoal.worker.sources import resolve, SourceError\n"
        "try:\n"
        "    said = []\n"
        "    found = resolve(sys.argv[1], progress=lambda what, share: said.append(share))\n"
        "    facts = {'path': str(found.path), 'revision': found.revision}\n"
        "    print(json.dumps(facts | {'counted': len([s for s in said[:-1] if s])}))\n"
        "except SourceError as error:\n"
        "    print(json.dumps({'error': str(error)}))\n"
    )
    variables = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **environ,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, uri],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_hub_model_without_pickles_or_code(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """Config, tokenizer and safetensors come; the rest of the repository stays where it is.
    Afterwards the model is there offline too."""
    endpoint, served = hub
    found = resolve_elsewhere("hf://org/safe", tmp_path, endpoint)
    assert found["revision"] == COMMIT
    assert found["counted"] >= 1, "bytes are reported while they come"
    names = sorted(path.name for path in Path(found["path"]).iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(served) == names
    offline = resolve_elsewhere("hf://org/safe", tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert offline["path"] == found["path"]


def test_a_hub_repository_of_ggufs(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """Several quantizations: the error lists them, the URI can name one, only that one comes."""
    endpoint, served = hub
    refused = resolve_elsewhere("hf://org/gguf", tmp_path, endpoint)
    assert "q4.gguf, q8.gguf" in refused["error"]
    found = resolve_elsewhere("hf://org/gguf@main/q8.gguf", tmp_path, endpoint)
    assert Path(found["path"]).read_bytes() == b"GGUF8"
    assert served == ["q8.gguf"]


def test_a_hub_model_that_is_not_there(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """Unknown online and uncached offline are two clear sentences."""
    endpoint, _ = hub
    assert "org/none" in resolve_elsewhere("hf://org/none", tmp_path, endpoint)["error"]
    offline = resolve_elsewhere("hf://org/safe", tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert "not in the Hub's cache" in offline["error"]
