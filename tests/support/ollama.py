"""What Ollama makes of a Modelfile: how it reads the file, and renders a chat by its template.

Of Go's text/template, this knows what lit_ft writes. It was compared with Go 1.27 and with the
code of Ollama of August 2026.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

ACTION = re.compile(r'(\{\{(?:"(?:\\.|[^"\\])*"|[^"])*?\}\})', re.DOTALL)
TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[()]|[^\s()]+')
FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "gt": lambda a, b: a > b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda of, start: of[start:],
    "and": lambda a, b: b if a else a,
}


class Modelfile(NamedTuple):
    """The commands of a Modelfile."""

    model: str
    template: str
    system: str
    stops: list[str]


def read_modelfile(text: str) -> Modelfile:
    """Read commands as Ollama does: a quoted value goes on to the first line that ends it."""
    found: dict[str, Any] = {"FROM": "", "TEMPLATE": "", "SYSTEM": "", "stop": []}
    lines = iter(text.split("\n"))
    for line in lines:
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        while (said := unquoted(value)) is None:
            value += "\n" + next(lines)
        said = "".join(c for c in said if c.isprintable() or c in "\n\t")
        assert name in found, name
        found[name] = [*found[name], said] if name == "stop" else said
    return Modelfile(found["FROM"], found["TEMPLATE"], found["SYSTEM"], found["stop"])


def unquoted(value: str) -> str | None:
    value = value.strip()
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            ends = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if ends else None
    return value


def prompt_of(
    modelfile: Modelfile, messages: list[dict[str, str]], think: bool | None = None
) -> str:
    """Return the prompt that Ollama sends for a chat."""
    if modelfile.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": modelfile.system}, *messages]
    system = [message["content"] for message in messages if message["role"] == "system"]
    names = {"Role": "role", "Content": "content", "Thinking": "reasoning_content"}
    values = {
        "System": "\n\n".join(system),
        "Messages": [{to: one.get(of, "") for to, of in names.items()} for one in messages],
        "Think": bool(think),
        "IsThinkSet": think is not None,
    }
    return execute(modelfile.template, values)


def execute(template: str, values: dict[str, Any]) -> str:
    """Return what Go writes for a template and its values."""
    nodes, rest = parsed(iter(ACTION.split(template)))
    assert rest == ""
    return "".join(written(nodes, values, {"$": values}))


def parsed(parts: Iterator[str]) -> tuple[list[Any], str]:
    """Return the nodes up to the action that ends them, and that action."""
    nodes: list[Any] = []
    for part in parts:
        if not part.startswith("{{"):
            nodes.append(part)
            continue
        action = part[2:-2].strip()
        keyword = action.split()[0]
        if keyword in ("else", "end"):
            return nodes, action
        nodes.append(branches(parts, action) if keyword in ("if", "range") else (action,))
    return nodes, ""


def branches(parts: Iterator[str], action: str) -> tuple[Any, ...]:
    body, end = parsed(parts)
    if end.startswith("else if"):
        return action, body, [branches(parts, end.removeprefix("else "))]
    otherwise, end = parsed(parts) if end == "else" else ([], end)
    assert end == "end"
    return action, body, otherwise


def written(nodes: list[Any], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif node[0].startswith("range "):
            names, _, of = node[0].removeprefix("range ").partition(":=")
            for i, each in enumerate(value(of, dot, variables)):
                inner = dict(zip(re.findall(r"\$\w+", names), (i, each), strict=True))
                yield from written(node[1], each, variables | inner)
        elif node[0].startswith("if "):
            holds = value(node[0].removeprefix("if "), dot, variables)
            yield from written(node[1] if holds else node[2], dot, variables)
        elif ":=" in node[0]:
            name, _, of = node[0].partition(":=")
            variables[name.strip()] = value(of, dot, variables)
        else:
            yield value(node[0], dot, variables)


def value(expression: str, dot: Any, variables: dict[str, Any]) -> Any:
    """Return the value of a pipeline of one command."""

    def operands(tokens: Iterator[str]) -> Any:
        found = []
        for token in tokens:
            if token == ")":
                break
            found.append(operands(tokens) if token == "(" else operand(token))
        head, *arguments = found
        return head(*arguments) if arguments else head

    def operand(token: str) -> Any:
        if token[0] == '"' or token.isdigit():
            return ast.literal_eval(token)
        if token in FUNCTIONS:
            return FUNCTIONS[token]
        name, _, field = token.partition(".")
        of = variables[name] if name else dot
        return of[field] if field else of

    return operands(iter(TOKEN.findall(expression)))
