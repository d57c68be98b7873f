"""Chat templates are programs of strangers: bounded, and harmless to the host."""

from __future__ import annotations

import os
import resource
import time

import pytest

from posttrain.core import RenderError, user
from posttrain.render import Renderer, Tokenizer
from posttrain.render.template_process import Limits, RenderedText, TemplateFailure, TemplateProcess, render_template

ROW = {"messages": [{"role": "user", "content": "x"}]}
HOSTILE = {
    "{% for i in range(10**9) %}{% endfor %}": ("template",),
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": ("time",),
    "{% macro f(n) %}{% for i in range(50) %}{{ f(n + 1) }}{% endfor %}{% endmacro %}{{ f(0) }}": ("template", "time"),
    "{{ 'x' * 10**10 }}": ("memory",),
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}": ("memory",),
    "{% for i in range(99999) %}{{ 'y' * 1000 }}{% endfor %}": ("memory",),
    "{{ [[1] * 10**8] * 10 }}": ("memory",),
    "{{ 9 ** (9 ** 9) }}": ("time", "template"),
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": ("security",),
    "{{ cycler.__init__.__globals__.os.system('true') }}": ("security",),
    "{{ (messages | attr('__class__')) }}": ("security", "template"),
    "{{ messages.append(1) }}": ("security",),
    "{{ messages[0].update({'role': 'z'}) }}": ("security",),
    "{{ namespace(__class__=1) }}": ("security",),
    "{% if %}": ("syntax",),
    "{% include 'secrets' %}": ("template",),
    "{{ raise_exception('no such role') }}": ("template",),
    "{{ missing.attribute }}": ("template",),
}


@pytest.fixture(scope="module")
def process() -> TemplateProcess:
    return TemplateProcess(Limits(seconds=1.0, memory_bytes=256 * 2**20))


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_fail_within_bounds_and_the_next_one_renders(process: TemplateProcess, template: str) -> None:
    before = time.monotonic()
    result = process.render(template, [ROW])[0]
    if isinstance(result, RenderedText):  # attr() of a dunder gives an undefined, which prints nothing
        assert result.text == ""
    else:
        assert result.kind in HOSTILE[template]
        assert isinstance(result.error(), RenderError)
    assert time.monotonic() - before < 30
    assert process.render("{{ messages[0].content }}!", [ROW]) == [RenderedText("x!")]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB: the host did not grow with it


def test_a_row_that_kills_the_worker_costs_only_itself(process: TemplateProcess) -> None:
    template = "{{ 'x' * size }}"
    rows = [{"size": 1}, {"size": 10**10}, {"size": 3}]
    first, second, third = process.render(template, rows)
    assert (first, third) == (RenderedText("x"), RenderedText("xxx"))
    assert isinstance(second, TemplateFailure)
    assert second.kind == "memory"


def test_the_worker_sees_no_environment_and_no_files(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    process.close()
    process.render("a", [ROW])
    assert process._child is not None
    with open(f"/proc/{process._child.pid}/environ", "rb") as environ:  # noqa: PTH123
        assert b"hush" not in environ.read()
    with open(f"/proc/{process._child.pid}/limits") as limits:  # noqa: PTH123
        text = limits.read()
    assert [line.split()[3] for line in text.splitlines() if line.startswith("Max file size")] == ["0"]


def test_thousands_of_rows_share_a_worker_and_a_compiled_template(process: TemplateProcess) -> None:
    process.render("{{ n }}", [{"n": 0}])
    worker = process._child
    results = process.render("{{ n }}", [{"n": n} for n in range(3000)])
    assert results == [RenderedText(str(n)) for n in range(3000)]
    assert process._child is worker


def test_a_dead_worker_is_replaced(process: TemplateProcess) -> None:
    process.render("a", [ROW])
    assert process._child is not None
    os.kill(process._child.pid, 9)
    process._child.wait()
    assert process.render("a", [ROW]) == [RenderedText("a")]


def test_the_environment_is_hugging_faces(process: TemplateProcess) -> None:
    cases = {
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}": "13",
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}": "1",
        "{{ {'b': '<é>', 'a': 1} | tojson }}": '{"b": "<é>", "a": 1}',
        "{{ {'b': 1} | tojson(indent=2) }}": '{\n  "b": 1\n}',
        "a\n  {% if true %}\nb\n  {% endif %}\nc": "a\nb\nc",
        "{{ dict(a=1)['a'] }}{{ dict.fromkeys(['k'], 2)['k'] }}": "12",
        "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}": "2",
        "{{ strftime_now('%Y') | length }}": "4",
    }
    for template, text in cases.items():
        assert process.render(template, [ROW]) == [RenderedText(text)]
    tagged = process.render("ab{% generation %}cd{% endgeneration %}e", [ROW])
    assert tagged == [RenderedText("abcde", ((2, 4),))]


def test_a_renderer_turns_failures_into_errors_that_say_what(small: Tokenizer) -> None:
    with pytest.raises(RenderError, match=r"refuses these messages: roles must alternate"):
        Renderer(small, "{{ raise_exception('roles must alternate') }}").prompt([user("a")])
    with pytest.raises(RenderError, match="not valid Jinja"):
        Renderer(small, "{% for %}").render([user("a")])


def test_a_template_that_overruns_row_after_row_is_given_up(process: TemplateProcess) -> None:
    results = process.render("{{ 'x' * 10**10 }}", [ROW] * 500)
    assert len(results) == 500
    assert all(isinstance(result, TemplateFailure) and result.kind == "memory" for result in results)


def test_a_forked_process_has_a_worker_of_its_own() -> None:
    assert render_template("{{ n }}", [{"n": 1}]) == [RenderedText("1")]
    child = os.fork()
    if child == 0:
        os._exit(0 if render_template("{{ n }}", [{"n": 2}]) == [RenderedText("2")] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render_template("{{ n }}", [{"n": 3}]) == [RenderedText("3")]
