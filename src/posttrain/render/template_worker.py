"""The child process that renders chat templates. Run by path; imports only the standard library and jinja2.

A chat template is a program that came with a model. Jinja's sandbox keeps it from the interpreter's internals, but
bounds neither time nor memory, so it runs here, under limits that the kernel enforces, with an empty environment.

Frames on stdin and stdout: four bytes of length (big endian), then JSON. A request is
    {"template": text, "rows": [variables, …], "cpu_s": seconds, "max_characters": count}
and is answered by one frame per row, in order:
    {"text": …, "generation": [[start, end], …]}   or   {"error": kind, "message": …}
`generation` holds the character spans of the template's {% generation %} blocks.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

COMPILED_TEMPLATES = 64  # templates kept compiled
MAX_TEMPLATE_CHARACTERS = 2_000_000


class GenerationBlocks(jinja2.ext.Extension):
    """The tag pair {% generation %} … {% endgeneration %} that template authors put around what the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Compile the block into a call that records where its text lies."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller: Callable[[], str]) -> str:
        text = caller()
        environment: Any = self.environment
        start = sum(len(piece) for piece in environment.rendered_pieces)
        environment.generation_spans.append((start, start + len(text)))
        return text


class TemplateNamespace(jinja2.utils.Namespace):
    """Jinja's namespace, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute must not begin with an underscore: {name!r}")


class DictMaker:
    """`dict(...)` and `dict.fromkeys(...)` for templates, without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A new dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """dict.fromkeys."""
        return dict.fromkeys(*args)


def raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(pattern: str) -> str:
    """The present date and time in a template's format."""
    return datetime.now().strftime(pattern)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: keys in their order, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that Hugging Face's tokenizers give to chat templates."""
    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=DictMaker(), namespace=TemplateNamespace
    )
    environment.rendered_pieces = []
    environment.generation_spans = []
    made: jinja2.sandbox.ImmutableSandboxedEnvironment = environment
    return made


def render(template: jinja2.Template, variables: dict[str, Any]) -> dict[str, Any]:
    """One conversation's text and generation spans; raises what the template raises."""
    environment: Any = template.environment
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    environment.rendered_pieces, environment.generation_spans = pieces, spans
    for piece in template.generate(**variables):
        pieces.append(piece)
    return {"text": "".join(pieces), "generation": spans}


def answer(compiled: OrderedDict[str, jinja2.Template], source: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Render one row; every failure becomes an error record that names its kind."""
    try:
        if source not in compiled:
            if len(source) > MAX_TEMPLATE_CHARACTERS:
                return {
                    "error": "syntax",
                    "message": f"the template is longer than {MAX_TEMPLATE_CHARACTERS} characters",
                }
            compiled[source] = make_environment().from_string(source)
            while len(compiled) > COMPILED_TEMPLATES:
                compiled.popitem(last=False)
        compiled.move_to_end(source)
        return render(compiled[source], variables)
    except MemoryError:
        return {"error": "memory", "message": "out of memory"}
    except jinja2.exceptions.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": "security", "message": str(error)}
    except jinja2.exceptions.TemplateError as error:
        return {"error": "template", "message": str(error)}
    except RecursionError:
        return {"error": "template", "message": "recursion too deep"}
    except Exception as error:  # noqa: BLE001 - whatever a template's expressions raise is the answer to the request
        return {"error": "template", "message": f"{type(error).__name__}: {error}"}


def limit_resources(memory_bytes: int) -> None:
    """Bound address space above what is in use now; no core files, no files written, few descriptors."""
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - keeps pathlib out of the worker
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, in_use + memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 16)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def allow_cpu(seconds: float) -> None:
    """Let the process use this much more processor time; the kernel kills it beyond."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def read_frame(stream: BinaryIO) -> Any:
    """The next frame's value, or None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    return json.loads(stream.read(struct.unpack(">I", head)[0]))


def write_frame(stream: BinaryIO, value: Any) -> None:
    """Write and flush one frame."""
    body = json.dumps(value).encode("ascii")
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def main() -> None:
    """Answer requests until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    compiled: OrderedDict[str, jinja2.Template] = OrderedDict()
    make_environment().from_string("{% for a in [1] %}{{ a | tojson }}{% endfor %}").render()  # imports before limits
    limit_resources(int(sys.argv[1]))
    while (request := read_frame(requests)) is not None:
        for variables in request["rows"]:
            allow_cpu(request["cpu_s"])
            result = answer(compiled, request["template"], variables)
            if len(result.get("text", "")) > request["max_characters"]:
                result = {
                    "error": "memory",
                    "message": f"the text is longer than {request['max_characters']} characters",
                }
            try:
                write_frame(answers, result)
            except MemoryError:
                write_frame(answers, {"error": "memory", "message": "out of memory"})


if __name__ == "__main__":
    main()
