"""hf://org/name[@revision][/file.gguf]: a model of the Hugging Face Hub.

Downloads land in the Hub's own cache (HF_HOME), so other tools share them. HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean elsewhere.
"""

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from shoal.worker.sources.base import (
    Fetch,
    ModelFiles,
    ModelNotFound,
    SourceError,
    checked_revision,
    no_space,
    out_of_space,
    single_gguf,
)

_LOCATION = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[\w./-]+\.gguf))?"
)
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")
# Subfolders hold other formats' copies; `consolidated` is Mistral's second copy of the weights.
_IGNORED = ("*/*", "consolidated*")


def fetch_hub(fetch: Fetch) -> ModelFiles:
    """Downloads config, tokenizer and safetensors, or a .gguf; never pickled weights or code."""
    match = _LOCATION.fullmatch(fetch.location)
    if match is None:
        raise SourceError(f"{fetch.uri}: expected hf://organisation/name[@revision][/file.gguf]")
    inline, asked = match["revision"], checked_revision(fetch)
    if inline and asked and inline != asked:
        raise SourceError(f"{fetch.uri}: the URI asks for {inline}, the revision says {asked}")
    revision = inline or asked
    fetch.progress(f"asking the Hub for {match['repo']}", None)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if match["file"]:
            path = _download_file(match["repo"], match["file"], revision, fetch)
        else:
            path = _download_model(match["repo"], revision, fetch)
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{fetch.uri}: not in the Hub's cache and the Hub cannot be reached; fetch it where"
            " there is a network (shoal fetch) and bring HF_HOME along, or name a file:// path"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        raise _refused(error, match["repo"], revision, fetch) from error
    fetch.progress(f"have {match['repo']}", 1.0)
    return ModelFiles(path, fetch.uri, _commit(path))


def _refused(error: Exception, repo: str, revision: str | None, fetch: Fetch) -> SourceError:
    """The sentence for what the Hub or its client say. RuntimeError is the Xet client's."""
    from huggingface_hub import constants, errors

    if out_of_space(error):
        return no_space(fetch, Path(constants.HF_HUB_CACHE))
    match error:
        case errors.GatedRepoError():
            return ModelNotFound(
                f"{fetch.uri}: {repo} is gated: accept its terms on the Hub, then give a token of"
                " that account in HF_TOKEN"
            )
        case errors.RepositoryNotFoundError():
            return ModelNotFound(
                f"{fetch.uri}: the Hub has no model {repo}, or it is private: then give a token"
                " that may read it in HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return ModelNotFound(f"{fetch.uri}: {repo} has no branch, tag or commit {revision}")
        case errors.EntryNotFoundError():
            return ModelNotFound(f"{fetch.uri}: {repo} has no such file")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SourceError(f"{fetch.uri}: {reason}")


def _download_file(repo: str, file: str, revision: str | None, fetch: Fetch) -> Path:
    from huggingface_hub import hf_hub_download

    what = f"downloading {repo}/{file}"
    fetch.progress(what, None)
    bar = _bar_class(lambda share: fetch.progress(what, share))
    return Path(hf_hub_download(repo, file, revision=revision, tqdm_class=bar))


def _download_model(repo: str, revision: str | None, fetch: Fetch) -> Path:
    from huggingface_hub import snapshot_download

    what = f"downloading {repo}"
    fetch.progress(what, None)
    home = Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[*_SMALL_FILES, "*.safetensors"],
            ignore_patterns=list(_IGNORED),
            tqdm_class=_bar_class(lambda share: fetch.progress(what, share)),
        )
    )
    if any(home.glob("*.safetensors")):
        return home
    name = single_gguf([Path(file) for file in _gguf_names(repo, home)], fetch, repo).name
    return _download_file(repo, name, home.name, fetch)


def _gguf_names(repo: str, home: Path) -> list[str]:
    """Of the repository at the commit of `home`, or of the cache where the Hub is out of reach."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        names = HfApi().list_repo_files(repo, revision=home.name)
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError):
        names = [path.name for path in home.iterdir()]
    return [name for name in names if name.endswith(".gguf") and "/" not in name]


def _bar_class(report: Callable[[float], None]) -> Any:
    """A progress bar that draws nothing and reports the share of bytes that are there.

    The class to hand over as `tqdm_class`, whose declared type differs between releases."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in the stubs alone
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "file": StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn = super().update(n)
            if self._counts_bytes and self.total:
                report(min(1.0, self.n / self.total))
            return drawn

    return Bar


def _commit(path: Path) -> str | None:
    """The Hub's cache keeps a model under snapshots/<commit>."""
    parts = path.parts
    if "snapshots" not in parts:
        return None
    return parts[parts.index("snapshots") + 1]
