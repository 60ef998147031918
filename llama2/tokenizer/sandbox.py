"""The environment in which a checkpoint's chat template is rendered: it always ends, and soon.

A template is a program that somebody else wrote. Jinja's sandbox keeps it from files and from
Python's insides, and lets it run for ever and fill the memory. Here each step is counted while it
is rendered: the compiled template calls the `Budget` in every turn of a loop, in every macro and
around every operation that makes a value, and what could grow at one stroke (`*`, `%`, padding,
`join`, `replace`) is measured before it is done. No value is then ever larger than a bound, so no
single operation takes long, and the clock is looked at between them. That works in any thread and
on any system, which neither signals nor helper processes do.

The same operations keep apart what was said in messages (`said`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llama2.tokenizer import bounds
from llama2.tokenizer.bounds import Overrun
from llama2.tokenizer.said import Said, Seal, holds_said, mark

SECONDS = 0.5  # of a processor, for one rendering; an honest template needs a thousandth
_NODES = 15_000  # of a template, each of which takes up to 40 microseconds to compile
_OFTEN = 2000  # steps between two looks at the clock, each about 0.1 microseconds
_LARGE = 10_000  # characters after which the clock is looked at
_MADE = 64  # largest values that may be made in all

_BUDGET: ContextVar[Budget] = ContextVar("budget")


class Budget:
    """Counts the steps and the characters of one rendering.

    `most` is the largest size of a value, in characters and items. Overrun for what goes beyond.
    """

    def __init__(self, seal: Seal, most: int) -> None:
        self.seal, self.most = seal, most
        self._left, self._room = _MADE * most, most
        self._steps, self._next = 0, _OFTEN
        self._end = time.thread_time() + SECONDS

    def spend(self, steps: int, size: int = 0) -> None:
        """Count steps, and characters that they make."""
        self._steps += steps + size // 100
        self._left -= size
        if self._left < 0:
            raise Overrun(f"it makes more than {_MADE * self.most:,} characters")

        if self._steps >= self._next or size > _LARGE:
            self._next = self._steps + _OFTEN
            if time.thread_time() > self._end:
                raise Overrun(f"it is not done after {SECONDS:g} seconds")

    def allow(self, size: int) -> None:
        """Overrun for a value that would be too large."""
        if size > self.most:
            raise Overrun(f"it makes a value of more than {self.most:,} characters")

    def write_out(self, size: int) -> None:
        """Count characters of the result; Overrun where it becomes too large."""
        self._room -= size
        if self._room < 0:
            raise Overrun(f"it writes more than {self.most:,} characters")

    def take(self, value: Any) -> Any:
        """Return a value that was made, counted."""
        size = bounds.measure(value, self.most)
        self.allow(size)
        self.spend(5, size)
        return value

    def write(self, value: Any) -> str:
        """Return a value as text that may be joined to other text."""
        if type(value) is Said:
            text = self.seal.put(value)
        elif isinstance(value, str):
            text = value
        else:
            self.allow(bounds.measure(value, self.most))
            text = str(value)
            if holds_said(value):
                text = self.seal.put(text)

        self.allow(len(text))
        self.spend(5, len(text))
        return text


@contextmanager
def spend_from(budget: Budget) -> Iterator[Budget]:
    """Count what templates do in this block, in this thread."""
    token = _BUDGET.set(budget)
    try:
        yield budget
    finally:
        _BUDGET.reset(token)


# --- what the compiled template calls ---
def _tick(steps: int, size: int) -> None:
    _BUDGET.get().spend(steps, size)


def _tick_test(value: bool, steps: int) -> bool:
    _BUDGET.get().spend(steps)
    return value


def _check(value: Any) -> Any:
    return _BUDGET.get().take(value)


@pass_context
def _finalize(_: Context, value: Any) -> str:
    # asking for the context keeps Jinja from computing constants while it compiles
    return _BUDGET.get().write(value)


def _concat(values: list[Any]) -> str:
    """Join texts, as `~` does."""
    budget = _BUDGET.get()
    if all(type(value) is Said for value in values):
        budget.allow(sum(map(len, values)))
        return Said("".join(values))

    parts = list(map(budget.write, values))
    budget.allow(sum(map(len, parts)))
    return "".join(parts)


@pass_environment
def _join(environment: Any, *args: Any, **kwargs: Any) -> Any:
    budget = _BUDGET.get()
    return budget.take(bounds.join_attributes(budget, environment, *args, **kwargs))


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter of a function that takes the budget."""

    def call(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        return budget.take(function(budget, *args, **kwargs))

    return call


class _Counting(NodeTransformer):
    """Puts calls of the budget into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count each turn, and each item that a loop passes over."""
        self.generic_visit(node)
        if node.test is not None:
            steps = nodes.Const(_weigh(node.test)[0])
            count = _call("_tick_test", nodes.Const(True), steps)
            node.test = nodes.And(count, node.test).set_lineno(node.lineno)

        return _count_body(node)

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        """Count each call."""
        self.generic_visit(node)
        return _count_body(node)

    visit_CallBlock = visit_Macro
    visit_Block = visit_Macro

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        """Leave the filter of a block where it is."""
        node.body = [self.visit(child) for child in node.body]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Have `~` join under the budget."""
        self.generic_visit(node)
        parts = nodes.List(node.nodes)
        parts.set_lineno(node.lineno)
        return _call("_concat", parts)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Count what a slice copies."""
        self.generic_visit(node)
        return _call("_check", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        """Count what a list holds: nested ones grow with each level."""
        self.generic_visit(node)
        return _call("_check", node)

    visit_Dict = visit_List
    visit_Compare = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """Count what a tuple holds, unless it names variables."""
        self.generic_visit(node)
        return _call("_check", node) if node.ctx == "load" else node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError(f"line {node.lineno} imports another template")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


def _call(name: str, value: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    call = nodes.Filter(value, name, list(args), [], None, None)
    call.set_lineno(value.lineno or 1)
    return call


def _count_body(node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
    steps, size = _weigh(*node.body)
    tick = nodes.ExprStmt(_call("_tick", nodes.Const(steps), nodes.Const(size)))
    node.body.insert(0, tick.set_lineno(node.lineno))
    return node


def _weigh(*parts: nodes.Node) -> tuple[int, int]:
    """Return how many nodes parts of a template have, and the characters of their plain text."""
    steps = size = 0
    stack = list(parts)
    while stack:
        node = stack.pop()
        steps += 1
        size += len(node.data) if isinstance(node, nodes.TemplateData) else 0
        stack += node.iter_child_nodes()

    return steps, size


# --- the environment ---
class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, whose templates are rendered inside `spend_from`."""

    intercepted_binops = frozenset(bounds.OPERATORS)

    def __init__(self, **options: Any) -> None:
        # nothing is computed while a template is compiled
        super().__init__(optimized=False, finalize=_finalize, cache_size=0, **options)
        self.filters = {name: _guard(self.filters[name], name) for name in bounds.FILTERS}
        self.filters |= {"_tick": _tick, "_tick_test": _tick_test}
        self.filters |= {"_check": _check, "_concat": _concat, "join": _join}
        self.filters |= {"replace": _own(bounds.replace), "tojson": _own(bounds.dump_json)}
        tests: Any = self.tests
        self.tests = {name: _guard(test, "") for name, test in tests.items()}
        self.globals["namespace"] = SafeNamespace
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        if _weigh(template)[0] > _NODES:
            raise Overrun(f"it has more than {_NODES:,} parts")

        _Counting().generic_visit(template)
        template.set_environment(self)
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may see an attribute: of plain values those that are known."""
        for kind, names in bounds.METHODS.items():
            if isinstance(obj, kind):
                return attr in names

        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse an attribute at once."""
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is not allowed")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        budget = _BUDGET.get()
        if isinstance(left, str) or isinstance(right, str):
            left, right = bounds.seal_operands(budget, operator, left, right)

        bounds.check_operator(budget, operator, left, right)
        return budget.take(self.binop_table[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an object."""
        budget = _BUDGET.get()
        owner, name = _find_method(__obj)
        if isinstance(owner, str):
            for scope in ("_loop_vars", "_block_vars"):  # which Jinja hands to its own objects
                kwargs.pop(scope, None)

            return budget.take(bounds.call_text(budget, owner, name, __obj, args, kwargs))

        value = super().call(__context, __obj, *args, **kwargs)
        if isinstance(__obj, Macro) or isinstance(value, Iterator):
            return value  # its parts were counted, or will be

        return budget.take(value)


def _find_method(function: Any) -> tuple[Any, str]:
    """Return the object of a bound method and its name; of a wrapped `format` the text's."""
    inner = getattr(function, "__wrapped__", function)
    owner = getattr(function, "__self__", getattr(inner, "__self__", None))
    return owner, getattr(function, "__name__", "")


def _guard(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a filter or a test that is measured; a test has no name."""
    wanted = getattr(function, "jinja_pass_arg", None)
    wanted = getattr(wanted, "name", None)

    @pass_context
    def call(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        first: list[Any] = []
        if wanted is not None:
            sources = {
                "context": context,
                "eval_context": context.eval_ctx,
                "environment": context.environment,
            }
            first = [sources[wanted]]

        if not name:
            budget.spend(5, bounds.measure_text(value, *args))
            return function(*first, value, *args, **kwargs)

        value, args = bounds.prepare_filter(budget, name, value, args, kwargs)
        result = function(*first, value, *args, **kwargs)
        if isinstance(result, Iterator):
            budget.spend(5)
            return result

        written = name == "string" and holds_said(value)  # a whole list, say
        if isinstance(result, str) and (isinstance(value, Said) or written):
            result = mark(result)

        return budget.take(result)

    return call


class SafeNamespace(Namespace):
    """A namespace, for `{% set ns.name = ... %}`, without names that Python knows."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)

        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")
