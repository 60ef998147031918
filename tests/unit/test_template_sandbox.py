"""Templates that would run for ever, fill the memory or reach out of their sandbox end in a line."""

from __future__ import annotations

import time

import pytest

from llama2.records import messages_of
from llama2.tokenizer.jinja_template import TemplateFault, make_seal, render

MOST_SECONDS = 3.0
GROW = "{% set ns = namespace(x=(1,), y=(1,)) %}{% for i in range(60) %}"
HOSTILE = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops without a turn": "{% for i in range(99999) %}{% for j in range(99999) if false %}"
    "{% endfor %}{% endfor %}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "a block that shows itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "text times": "{{ 'x' * 10**9 }}",
    "times text": "{{ 1000000000 * 'x' }}",
    "a list times": "{{ [1] * 1000000000 }}",
    "a power": "{{ 9 ** 999999999 }}",
    "doubled text": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "joined text": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a chain of ~": "{% set x = 'a' * 900000 %}{{ " + "~".join(["x"] * 3000) + " }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "plain output": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "output of a macro": "{% macro f() %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}"
    "{% endmacro %}{{ f() }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "method center": "{{ 'x'.center(1000000000) }}",
    "center of each": "{{ ['x'] | map('center', 1000000000) | list }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% of a computed width": "{{ '%*d' % (1000000000, 1) }}",
    "many %": "{{ ('%s' * 9999) % (('x' * 900000,) * 9999) }}",
    "filter format": "{{ '%1000000000d' | format(1) }}",
    "method format": "{{ '{:1000000000}'.format(1) }}",
    "format of a computed width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "indent": "{{ ('x\n' * 99999) | indent(999) }}",
    "join": "{{ (['x'] * 99999) | join('y' * 900000) }}",
    "method join": "{{ ('y' * 900000).join(['x'] * 99999) }}",
    "replace": "{{ ('x' * 900000) | replace('x', 'y' * 900000) }}",
    "method replace": "{{ ('x' * 900000).replace('', 'y' * 900000) }}",
    "strip": "{{ ('a' * 900000).strip('b' * 900000 + 'a') }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "sum of lists": "{{ ([[0]] * 99999) | sum(start=[]) }}",
    "nested lists": GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested lists as JSON": GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "compared nested lists": GROW
    + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "hashed nested tuples": GROW + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "nested namespaces": GROW + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "comparisons": "{% set a = 'x' * 900000 %}{% for i in range(99999) %}{% if a == 'x' * 900000 %}"
    "{% endif %}{% endfor %}",
    "tests": "{{ (['y'] * 99999) | select('in', 'x' * 900000) | list }}",
    "slices": "{% set a = 'x' * 900000 %}" + "{% set b = a[1:] %}" * 1000,
    "JSON of a wide indentation": "{{ [1] | tojson(indent=1000000000) }}",
    "a date of a wide field": "{{ strftime_now('%999999999Y') }}",
    "too long": "x" * 70000,
    "too many parts": "{% if 1 %}{% endif %}" * 3000 + "{{ 1 }}" * 3000,
    "deep brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "many loops in loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "a long number": "{{ " + "9" * 5000 + " }}",
    "include": "{% include 'other' %}",
    "import": "{% import 'other' as x %}",
    "from import": "{% from 'other' import x %}",
    "extends": "{% extends 'other' %}",
    "a class": "{{ ''.__class__ }}",
    "a class by subscript": "{{ ''['__class__'] }}",
    "a class by attr": "{{ '' | attr('__class__') }}",
    "a class by format": "{{ '{0.__class__}'.format('') }}",
    "a class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ namespace.__init__.__globals__ }}",
    "a change of the conversation": "{{ messages.append(1) }}",
    "a method of bytes": "{{ (1).to_bytes(1000000000) }}",
    "syntax": "{% for %}",
    "an open block": "{% if 1 %}",
    "a filter that is not there": "{{ 1 | urlize }}",
    "a name that is not there": "{{ foo.bar }}",
    "a number divided by zero": "{{ 1 / 0 }}",
}


def written(template: str, **names: str) -> str:
    messages = messages_of([("system", "Be brief."), ("user", "Hi")])
    seal = make_seal(template, messages, names, ["</s>"])
    return render(template, messages, names, seal, prompt=True).text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_a_line(name: str) -> None:
    begin = time.process_time()
    with pytest.raises(TemplateFault) as fault:
        written(HOSTILE[name])

    assert time.process_time() - begin < MOST_SECONDS
    assert str(fault.value)
    assert "\n" not in str(fault.value)


def test_the_message_of_a_template_is_its_own() -> None:
    with pytest.raises(TemplateFault, match=r"^Only two turns, please$"):
        written("{{ raise_exception('Only two\nturns, please') }}")


SAME = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ m.role }}: {{ m['content'] }}"
    "{{ '' if loop.last else ', ' }}{% endfor %}",
    "{%- set ns = namespace(found=false) -%}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "  {% if true %}\n  a\n  {% endif %}\n  b\n",
    "{{ messages[1:] | length }} {{ messages[-1].content[::-1] }} {{ messages | tojson }}",
    "{{ {'b': [1, 2], 'a': None} | tojson(indent=2) }} {{ '<&>é' | tojson }}",
    "{% macro turn(m, end='!') %}{{ m.role | upper ~ end }}{% endmacro %}"
    "{{ messages | map(attribute='role') | map('title') | join(', ') }}{{ turn(messages[0]) }}",
    "{% set x = messages | selectattr('role', 'equalto', 'user') | list %}{{ x[0].content | trim }}"
    "{{ 'a,b'.split(',') | reverse | list }} {{ '%03d' % 7 }} {{ '{:>4}'.format('x') }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ tools is none }}"
    "{{ foo is defined }}{{ foo }}{{ messages[0].missing }}{{ foo | default('d') }}",
    "{% macro f(x) %}[{{ caller(x) }}]{% endmacro %}{% call(x) f('a') %}{{ x }}{% endcall %}",
    "{% filter upper %}ab{{ messages[1].content }}{% endfilter %}"
    "{% set t %}x{{ 1 }}{% endset %}{{ t }}",
    "{{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 1.5 * 2 }} {{ [1] + [2] }} {{ 'a' in 'abc' }}",
    "{{ 'System' in messages[0].content }}{{ messages[0].content.startswith('Be') }}"
    "{{ messages[0].content == 'Be brief.' }}{{ messages[0].content | length }}",
    "{{ (1, 2) }} {{ {'a': 1} }} {{ not true or 1 < 2 <= 2 }} {{ 3 | string ~ '4' }}",
    "{{ bos_token }}{{ messages[0]['content'] + '\n' + eos_token }}{{ 'x' ~ 1 ~ none }}",
]


@pytest.mark.parametrize("template", SAME)
def test_templates_are_rendered_as_by_transformers(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    rows = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        [rows], chat_template=template, add_generation_prompt=True, **names
    )
    assert written(template, **names) == expected[0]


def test_the_date_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1689638400")
    assert written("{{ strftime_now('%d %b %Y') }}") == "18 Jul 2023"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert written("{{ strftime_now('%Y') }}").startswith("20")


def test_a_long_conversation_is_rendered() -> None:
    messages = messages_of([("user", "word " * 200_000)])
    template = "{% for m in messages %}{{ '<s>' ~ m.content.strip() ~ '</s>' }}{% endfor %}"
    seal = make_seal(template, messages, {}, ["</s>"])
    assert len(render(template, messages, {}, seal).text) > 999_000
