"""Log lines for people (`key=value` behind the words) or for machines (one JSON object a line).

event(log, "startup phase", phase="load", seconds=1.234)
12:00:01 startup phase phase=load seconds=1.234
{"time": "...", "level": "info", "event": "startup phase", "phase": "load", "seconds": 1.234}
"""

import json
import logging
import re
from datetime import UTC, datetime
from typing import TextIO

FORMATS = ("text", "json")

_PLAIN = re.compile(r"[^\s\"=]+")
_FIELDS = "shoal_fields"  # attribute of the log record


def event(log: logging.Logger, words: str, **fields: str | int | float) -> None:
    """Logs that something happened, with what a machine may want to know of it."""
    log.info("%s", words, extra={_FIELDS: fields})


def configure(format_name: str, stream: TextIO, level: str = "info") -> None:
    """Sends all logging of this process to `stream` in one of FORMATS."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if format_name == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Third parties' requests and lock files are of no interest to who runs a worker.
    for name in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname} "
        fields = "".join(f" {key}={_text(value)}" for key, value in _fields(record).items())
        line = f"{stamp} {level}{record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


def _fields(record: logging.LogRecord) -> dict[str, str | int | float]:
    fields: dict[str, str | int | float] = getattr(record, _FIELDS, {})
    return fields


def _text(value: str | int | float) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
