"""What a router needs to turn text into a model's token ids, read from the model's files.

A worker hands this to routers (`GetModel`) and never tokenizes itself. No transformers: a
GGUF's tokenizer is rebuilt from its metadata, a Hugging Face directory's is passed on.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from shoal.api.v1 import engine_pb2
from shoal.worker import gguf_tokenizer
from shoal.worker.gguf_header import read_header

_SAMPLING_DEFAULTS: Final = (
    # Key of generation_config.json and field of Sampling, and whether it is an integer.
    ("temperature", False),
    ("top_p", False),
    ("top_k", True),
    ("min_p", False),
    ("typical_p", False),
    ("repetition_penalty", False),
)


class TokenizerError(ValueError):
    """The model's tokenizer cannot be used; the message names the file and what is wrong."""


def load_tokenizer(model: Path) -> engine_pb2.Tokenizer:
    """The tokenizer of a .gguf file or of a directory with tokenizer.json.

    `tokenizer_json` adds a beginning-of-sequence token by itself where the model wants one
    (encode with special tokens); `add_bos_token` tells whether it does. Raises TokenizerError.
    """
    if model.is_file():
        return _of_gguf(model)
    return _of_directory(model)


def default_sampling(model: Path) -> engine_pb2.Sampling:
    """The sampling settings its authors recommend; empty where the model says nothing."""
    sampling = engine_pb2.Sampling()
    if model.is_file():
        return sampling
    config = _read_json(model / "generation_config.json")
    for key, whole in _SAMPLING_DEFAULTS:
        value = config.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            setattr(sampling, key, int(value) if whole else float(value))
    return sampling


def _of_gguf(path: Path) -> engine_pb2.Tokenizer:
    try:
        found = gguf_tokenizer.from_metadata(read_header(path).metadata)
    except gguf_tokenizer.UnsupportedTokenizer as error:
        raise TokenizerError(f"{path}: {error}") from error
    return engine_pb2.Tokenizer(
        tokenizer_json=found.tokenizer.to_str().encode(),
        # Broken UTF-8 in a file must not keep the worker from answering.
        chat_template=found.chat_template.encode("utf-8", "replace").decode(),
        bos_token=found.bos_token,
        eos_token=found.eos_token,
        add_bos_token=found.add_bos_token,
    )


def _of_directory(directory: Path) -> engine_pb2.Tokenizer:
    file = directory / "tokenizer.json"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise TokenizerError(
            f"{directory} has no tokenizer.json; save it there with a fast tokenizer's"
            " save_pretrained"
        ) from None
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{file}: {error}") from error
    config = _read_json(directory / "tokenizer_config.json")
    bos = _token_text(config.get("bos_token"))
    first = tokenizer.encode("").ids[:1]
    return engine_pb2.Tokenizer(
        tokenizer_json=content,
        chat_template=_chat_template(directory, config),
        bos_token=bos,
        eos_token=_token_text(config.get("eos_token")),
        add_bos_token=bool(bos) and first == [tokenizer.token_to_id(bos)],
    )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str:
    """chat_template.jinja, else the template in the config, which may be a list of named ones."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _token_text(token: object) -> str:
    """A special token is written as a string, or as an object with its options."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file, or an empty one where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: expected an object, found {type(content).__name__}")
    return content
