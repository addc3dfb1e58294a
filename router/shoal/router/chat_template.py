"""Chat templates: Jinja in a sandbox, with the conventions of Hugging Face's templates."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The template refuses these messages, or cannot render them."""


class ChatTemplate:
    """One model's template, compiled once. Safe to render from several threads."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens`: `bos_token`, `eos_token`. Raises ChatTemplateError for bad Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is broken: {error}") from error
        # Jinja's own `render` merges these anew each time, which costs more than the rendering.
        self._globals = {
            **self._template.globals,
            "tools": None,
            "documents": None,
            **special_tokens,
        }
        # `render` hands all of them over; as a template's own they are only counted again.
        self._template.globals = {}

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt. Raises ChatTemplateError with the template's own words."""
        try:
            context = self._template.new_context(
                {
                    **self._globals,
                    **variables,
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                },
                shared=True,
            )
            return "".join(self._template.root_render_func(context))
        except SecurityError as error:
            raise ChatTemplateError(f"the chat template does what it may not: {error}") from error
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared as a plain set by Extension)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> str:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
