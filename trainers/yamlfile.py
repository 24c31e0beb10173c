"""YAML files of people: read with line numbers, checked, and explained in plain words.

`read` gives plain data and the line of every key; `explain` turns what pydantic finds wrong into
`file:line: dotted.path: what is wrong`, with the nearest name; `load_run` reads one run.

Scalars follow YAML 1.2's core schema, in which `1e-3` is a number and `on` is text. Nothing but
mappings, lists, text, numbers, booleans and null can be built: PyYAML's composer, no constructor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import Composer, ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from trainers.config import ModuleAssignment, RunConfig
from trainers.errors import InputError, did_you_mean

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
"""Values of a file once its aliases are written out; ends "billion laughs" files."""
MAX_DEPTH = 40
MAX_LINES = 100
"""Problems shown at once."""

Place = tuple[str | int, ...]
"""Keys and list positions from the top, of a file or of a config."""

SHORTHAND = tuple(RunConfig.model_fields["assignment"].default.__class__.model_fields)
"""Module kinds, which stand for `assignment.<kind>` at the top level of a run."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing to change. `str` gives the line that people see."""

    line: int
    file: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.where + ': ' if self.where else ''}{self.text}"


@dataclass
class Document:
    """A YAML file as plain data, with the line of every key and list item."""

    path: Path
    text: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    dropped: list[Place] = field(default_factory=list)
    """Where a value (or a key below) was left out of `data`, with a problem noted."""

    def line(self, place: Place) -> int:
        """Line (from 1) of the key or list item at `place`, or of its nearest parent."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def incomplete(self, place: Place) -> bool:
        """Whether something at or below `place` was left out."""
        return any(dropped[: len(place)] == place for dropped in self.dropped)

    def problem(self, place: Place, text: str, *, line: int | None = None) -> Problem:
        """`text` about `place`, at its line unless another is given."""
        return Problem(line or self.line(place), str(self.path), dotted(place), printable(text))


def read(path: Path | str) -> Document:
    """The document at `path`.

    Raises:
        InputError: unreadable, too big, not UTF-8, not YAML, repeated keys, tags, top level not
            a mapping; one line per problem.
    """
    document = parse(path)
    raise_if(document.problems)
    return document


def parse(path: Path | str) -> Document:
    """Like `read`, but leaves problems that reading can go on after in `Document.problems`."""
    path = Path(path)
    document = Document(path, _read_text(path))
    root = _compose(document)
    if root is None:
        raise InputError(f'{path}:1: the file is empty: write "key: value" lines')
    if not isinstance(root, MappingNode):
        kind = "a list" if isinstance(root, SequenceNode) else "a single value"
        line = root.start_mark.line + 1
        raise InputError(f'{path}:{line}: the top level is {kind}: write "key: value" lines')
    try:
        document.data = _Reading(document).value(root, ())
    except _NoValueError:
        raise_if(document.problems)
    return document


def raise_if(problems: Iterable[Problem]) -> None:
    """Raise an InputError with one line per distinct problem, in the order of the file."""
    lines = [str(problem) for problem in sorted(set(problems))]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"… and {len(lines) - MAX_LINES} more problems"]
    if lines:
        raise InputError("\n".join(lines))


def dotted(place: Place) -> str:
    """`a.b.c`, without list positions: messages show the item itself. Odd keys are quoted."""
    return ".".join(
        part if re.fullmatch(r"[\w.+-]+", part) else json.dumps(part)
        for part in place
        if isinstance(part, str)
    )


def printable(text: str) -> str:
    """One line without control characters: what a file holds cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- text to nodes -----------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder: name a YAML file in it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB: name a YAML file written by hand")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text: save the file as UTF-8") from None


_TAG = "tag:yaml.org,2002:"
_PATTERNS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
    "str": re.compile(r".*", re.DOTALL),
}
"""YAML 1.2's core schema (yaml.org/spec/1.2.2, section 10.3.2), in the order of matching."""


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Text to nodes. There is no constructor, so no tag can build anything."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.depth >= MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        self.depth += 1
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name in ("null", "bool", "int", "float"):
    _pattern = re.compile(f"(?:{_PATTERNS[_name].pattern})\\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, None)


def _compose(document: Document) -> Node | None:
    try:
        node: Node | None = _Loader(document.text).get_single_node()
    except ReaderError as error:
        line = document.text.count("\n", 0, error.position) + 1
        # Of text (not bytes) PyYAML gives the character's number.
        raise InputError(
            f"{document.path}:{line}: control character U+{error.character:04X}: remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise InputError("\n".join(_syntax_errors(document, error))) from None
    return node


_SYNTAX = {
    "mapping values are not allowed": 'a ":" where none can be: put text with ": " in quotes, '
    "or look at the line above",
    "could not find expected ':'": 'no ":" after a key: write "key: value"',
    "expected <block end>": "does not line up with the lines above: align keys of one mapping, "
    "and start every item of a list with '- '",
    "expected ',' or": "a bracket is not closed, or a comma is missing: check [ ] and { }",
    "expected the node content": "a value is missing here: check brackets and commas",
    "unexpected end of stream": "a quote is not closed: add the closing quote",
    "unexpected document separator": "a quote is not closed: add the closing quote",
    "expected a single document": 'more than one document: remove the "---" line',
    "found undefined alias": "no anchor of this name comes before: a text that starts with * needs quotes",
    "found duplicate anchor": "two anchors of one name: rename one",
    "cannot start any token": "a text cannot start with this character: put it in quotes",
    "unknown escape character": "an unknown \\ escape in double quotes: use single quotes",
    "undefined tag handle": "tags are not allowed: remove the part that starts with !",
    "nested more than": f"nested more than {MAX_DEPTH} levels deep: write it flatter",
}


def _syntax_errors(document: Document, error: yaml.MarkedYAMLError) -> list[str]:
    rows = document.text.split("\n")
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    if line <= len(rows) and "\t" in _indent(rows[line - 1]):
        tabs = [n for n, row in enumerate(rows, start=1) if "\t" in _indent(row) and row.strip()]
        return [f"{document.path}:{n}: a tab in the indentation: use spaces" for n in tabs or [line]]
    problem = f"{error.context or ''} {error.problem or ''}".strip()
    # What was opened and never closed is found where it was opened, not at the end of the file.
    if error.context_mark and ("expected ',' or" in problem or "unexpected" in problem):
        line = error.context_mark.line + 1
    text = next((plain for sign, plain in _SYNTAX.items() if sign in problem), f"not YAML: {problem}")
    return [f"{document.path}:{line}: {text}"]


def _indent(row: str) -> str:
    return row[: len(row) - len(row.lstrip())]


# --- nodes to plain data -----------------------------------------------------------------------


class _NoValueError(Exception):
    """A node that has no value; its problem is noted."""


class _Reading:
    """Turns nodes into plain data and notes lines and problems in the document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0
        self.open: set[int] = set()

    def value(self, node: Node, place: Place) -> Any:
        """Plain data of `node`. Raises _NoValueError."""
        self.document.lines.setdefault(place, node.start_mark.line + 1)
        self.count += 1
        if self.count > MAX_VALUES:
            raise InputError(f"{self.document.path}: more than {MAX_VALUES:,} values: use fewer aliases")
        if isinstance(node, ScalarNode):
            return self._scalar(node, place)
        assert isinstance(node, MappingNode | SequenceNode)
        kind = "map" if isinstance(node, MappingNode) else "seq"
        if node.tag != _TAG + kind:
            raise self._bad(place, _tag_text(node.tag))
        if id(node) in self.open:
            raise self._bad(place, "an alias that holds itself: write the value out")
        self.open.add(id(node))
        try:
            return self._mapping(node, place) if isinstance(node, MappingNode) else self._list(node, place)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: MappingNode, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, place)
            if key is None:
                continue
            if key in seen:
                text = f"the key is given twice (first on line {seen[key]}): remove one"
                self._note((*place, key), text, line)
                continue
            seen[key] = self.document.lines[(*place, key)] = line
            try:
                result[key] = self.value(value_node, (*place, key))
            except _NoValueError:
                continue
        return result

    def _list(self, node: SequenceNode, place: Place) -> list[Any]:
        result: list[Any] = []
        for item in node.value:
            here = (*place, len(result))
            self.document.lines.pop(here, None)
            try:
                result.append(self.value(item, here))
            except _NoValueError:
                continue
        return result

    def _key(self, node: Node, place: Place) -> str | None:
        line = node.start_mark.line + 1
        if not isinstance(node, ScalarNode):
            self._note(place, "a key must be plain text: put it in quotes", line)
        elif node.tag.removeprefix(_TAG) not in _PATTERNS:
            self._note(place, _tag_text(node.tag), line)
        elif any("\ud800" <= character <= "\udfff" for character in node.value):
            self._note(place, "a key with half of a character (\\ud800 to \\udfff): rename it", line)
        elif not node.value:
            self._note(place, 'a key is missing before ":"', line)
        elif node.value == "<<" and node.style is None:
            self._note(place, '"<<" is not part of YAML 1.2: write the keys out', line)
        else:
            return str(node.value)
        self.document.dropped.append(place)
        return None

    def _scalar(self, node: ScalarNode, place: Place) -> Any:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind not in _PATTERNS:
            raise self._bad(place, _tag_text(node.tag))
        if not _PATTERNS[kind].fullmatch(text):
            raise self._bad(place, f"{show(text)} is not of the type !!{kind}: remove the tag")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self._bad(place, "half of a character (\\ud800 to \\udfff): write the character itself")
        if kind == "int":
            return self._integer(text, place)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return {"null": None, "bool": text.lower() == "true"}.get(kind, text)

    def _integer(self, text: str, place: Place) -> int:
        # YAML 1.1 reads 010 as eight and YAML 1.2 as ten. A file that means two things is an error.
        if re.match(r"[-+]?0[0-9]", text):
            plain = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)
            raise self._bad(place, f'leading zero in {text}: write {plain}, or "{text}" for text')
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        digits = text[2:] if base != 10 else text
        # Far below the length at which int() gets slow, and what tables and generators can hold.
        if len(digits) > 32 or not -(1 << 63) <= (number := int(digits, base)) < 1 << 63:
            raise self._bad(place, f"{text[:12]}… is too large: whole numbers go up to {(1 << 63) - 1}")
        return number

    def _note(self, place: Place, text: str, line: int | None = None) -> None:
        self.document.problems.append(self.document.problem(place, text, line=line))

    def _bad(self, place: Place, text: str) -> _NoValueError:
        self._note(place, text)
        self.document.dropped.append(place)
        return _NoValueError()


def _tag_text(tag: str) -> str:
    name = "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag
    return f"tag {json.dumps(name)} is not allowed: remove it"


# --- parts of a run ----------------------------------------------------------------------------


@dataclass
class Layer:
    """The part of a config that one place of a file sets, with where each of its keys stands."""

    data: dict[str, Any]
    origin: dict[Place, Place]
    """Place in the config → place in the file."""

    def leaves(self) -> list[Place]:
        """Places in the config whose values this layer sets."""
        parents = {place[:n] for place in self.origin for n in range(len(place))}
        return [place for place in self.origin if place and place not in parents]


def plain_layer(data: dict[str, Any]) -> Layer:
    """A layer for a config that has the very structure of its file."""
    return Layer(data, {(): ()})


def run_layer(value: Mapping[str, Any], place: Place) -> Layer:
    """The layer of a part of a RunConfig that stands at `place` of a file.

    `attn` and `mlp` at its top stand for `assignment.attn` and `assignment.mlp`, and a bare
    manifold name for `{manifold: name}`.
    """
    layer = Layer({}, {(): place})
    for key in sorted(value, key=lambda key: key not in SHORTHAND):
        config = ("assignment", key) if key in SHORTHAND else (key,)
        set_value(layer, config, value[key], (*place, key))
    return layer


def set_value(layer: Layer, config: Place, value: Any, place: Place) -> None:
    """Set what the config holds at `config` to the value that stands at `place` of the file."""
    layer.origin[config] = place
    if len(config) == 2 and config[0] == "assignment" and isinstance(value, str):
        value = {"manifold": value}
        layer.origin[(*config, "manifold")] = place
    elif isinstance(value, dict):
        for key in value:
            set_value(layer, (*config, key), value[key], (*place, key))
        if value:
            return
    for key in reversed(config):
        value = {key: value}
    layer.data = merge(layer.data, value)


def twice(document: Document, value: Mapping[str, Any], place: Place) -> list[Problem]:
    """Problems of a part that sets `attn` and `assignment.attn` both."""
    explicit = value.get("assignment")
    both = [k for k in SHORTHAND if k in value and isinstance(explicit, dict) and k in explicit]
    return [document.problem((*place, k), f'"assignment.{k}" sets this too: remove one') for k in both]


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`low` with what `high` sets on top, mapping by mapping. Neither is changed."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def load_run(path: Path | str) -> RunConfig:
    """The run in a YAML file; `attn:` and `mlp:` may stand at its top level.

    Raises:
        InputError: one line per problem.
    """
    document = parse(path)
    layer = run_layer(document.data, ())
    problems = document.problems + twice(document, document.data, ())
    try:
        run = RunConfig.model_validate(layer.data)
    except ValidationError as error:
        raise_if(problems + explain(error, document, [layer]))
        raise
    raise_if(problems)
    return run


# --- what pydantic found, in plain words -------------------------------------------------------


def explain(
    error: ValidationError,
    document: Document,
    layers: Sequence[Layer],
    *,
    schema: type[BaseModel] = RunConfig,
    keep: Callable[[Place, bool], bool] = lambda _config, _joint: True,
) -> list[Problem]:
    """Problems behind `error`, each at the place of the file that it comes from.

    Args:
        error: of `schema`, validated on the merged data of `layers`.
        layers: later ones override earlier ones.
        keep: which errors to report, by their place in the config and whether they are joint:
            about how fields of a section go together, not about one value.
    """
    problems = []
    for item in error.errors(include_url=False):
        config: Place = item["loc"]
        joint = item["type"] == "value_error" and "properties" in (node_at(schema, config) or {})
        if not keep(config, joint):
            continue
        place = _culprit(str(item["ctx"]["error"]), config, layers) if joint else place_of(config, layers)
        whole = place[:-1] if place and isinstance(place[-1], int) else place
        if item["type"] in ("missing", "too_short") and document.incomplete(whole):
            continue  # a consequence of what is reported already
        problems.append(document.problem(place, _text(item, schema)))
    return problems


def place_of(config: Place, layers: Sequence[Layer]) -> Place:
    """Where `config` stands in the file: in the last layer that knows it best."""
    config = tuple(part for part in config if part != "[key]")
    for size in range(len(config), -1, -1):
        for layer in reversed(layers):
            if config[:size] in layer.origin:
                return layer.origin[config[:size]] + config[size:]
    return config


def _culprit(message: str, config: Place, layers: Sequence[Layer]) -> Place:
    """Where to change a combination: the last layer that sets a field that the message names."""
    words = re.findall(r"\w+", message)
    for layer in reversed(layers):
        named = {
            str(key[-1]): place
            for key, place in layer.origin.items()
            if key[: len(config)] == config and key and key[-1] in words
        }
        if named:
            return named[min(named, key=words.index)]
    return place_of(config, layers)


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def node_at(model: type[BaseModel], config: Place) -> dict[str, Any] | None:
    """The JSON schema of what `model` holds at `config`; None where it holds nothing."""
    node: Any = _schema(model)
    for part in config:
        node = _given(model, _resolve(model, node))
        if isinstance(part, int):
            prefix = node.get("prefixItems", [])
            node = prefix[part] if part < len(prefix) else node.get("items")
        elif "properties" in node:
            node = node["properties"].get(part)
        else:
            node = next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties"))
        if not isinstance(node, dict):
            return None
    node = _resolve(model, node)
    section = _given(model, node)
    return section if "properties" in section else node


def _given(model: type[BaseModel], node: dict[str, Any]) -> dict[str, Any]:
    """The schema of an optional value that is not null."""
    return _resolve(model, next((one for one in node.get("anyOf", []) if one.get("type") != "null"), node))


def _resolve(model: type[BaseModel], node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        resolved: dict[str, Any] = _schema(model)["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return resolved
    return node


def places(model: type[BaseModel], config: Place = ()) -> list[Place]:
    """Every place of `model` that holds a value, sections included."""
    node = node_at(model, config) or {}
    below = [place for key in node.get("properties", {}) for place in places(model, (*config, key))]
    return ([config] if config else []) + below


def _text(item: Any, schema: type[BaseModel]) -> str:
    config, kind, value = item["loc"], item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"unknown key{_nearest_key(config, schema)}"
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if kind == "missing" and isinstance(config[-1], int):
        config, kind = config[:-1], "too_short"
    node = node_at(schema, config) or {}
    if "[key]" in config:
        node = {"type": "string", "pattern": item["ctx"].get("pattern", "")}
    if kind == "missing":
        return f"the key is missing: give {describe(schema, node)}"
    if kind in ("too_short", "string_too_short") and not value:
        return f"empty: give {describe(schema, node)}"
    choices = node.get("enum") or ([node["const"]] if "const" in node else None)
    if choices and isinstance(value, str):
        return f"unknown {config[-1]} {_quoted(value)}{did_you_mean(value, choices)}"
    return f"wants {describe(schema, node)}, given {show(value)}{_fix(node, value)}"


def _nearest_key(config: Place, schema: type[BaseModel]) -> str:
    key = str(config[-1])
    if "." in key:
        return f': write "{key.split(".", 1)[1]}:" below "{key.split(".")[0]}:"'
    elsewhere = [dotted(place) for place in places(schema) if place[-1] == key]
    if elsewhere:
        return f" here (did you mean {' or '.join(_quoted(name) for name in elsewhere)}?)"
    allowed = list((node_at(schema, config[:-1]) or {}).get("properties", {}))
    if len(config) == 1 and schema is RunConfig:
        allowed += SHORTHAND
    return did_you_mean(key, allowed)


def describe(model: type[BaseModel], node: Mapping[str, Any]) -> str:
    """What a JSON schema node wants, in plain words."""
    example = f" such as {node['examples'][0]}" if "examples" in node else ""
    if "anyOf" in node:
        return " or ".join(describe(model, _resolve(model, option)) for option in node["anyOf"]) + example
    if "enum" in node or "const" in node:
        return "one of " + ", ".join(map(str, node.get("enum") or [node["const"]]))
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(node)
    if kind == "array":
        items = node.get("prefixItems", [node.get("items", {})])
        count = f" of {node['maxItems']}" if "maxItems" in node else ""
        each = describe(model, _resolve(model, items[0]))
        return f"a list{count}" + (example or (f", each {each}" if each != "a value" else " of values"))
    if "properties" in node:
        mapping = "a mapping with the keys " + ", ".join(node["properties"])
        return f"a manifold name or {mapping}" if _is_module(node) else mapping
    if kind == "string" and "pattern" in node:
        return "a name of 1 to 64 lower-case letters, digits, . _ - that starts with a letter or digit"
    plain = {"boolean": "true or false", "string": "text", "null": "null", "object": "a mapping"}
    return plain.get(str(kind), "a value") + example


def _is_module(node: Mapping[str, Any]) -> bool:
    return bool(node.get("title") == ModuleAssignment.__name__)


def _bounds(node: Mapping[str, Any]) -> str:
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most"}
    words["exclusiveMaximum"] = "below"
    found = [f"{text} {_number(node[key])}" for key, text in words.items() if key in node]
    return " " + " and ".join(found) if found else ""


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def show(value: Any) -> str:
    """A value in a message: short, on one line, and clear about its type."""
    if isinstance(value, str):
        return f"the text {_quoted(value)}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else "a mapping" if isinstance(value, dict) else f"{value!r}"


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else text[:59] + "…", ensure_ascii=False)


def _fix(node: Mapping[str, Any], value: Any) -> str:
    """What to write instead, where that is plain."""
    kinds = {node.get("type"), *(option.get("type") for option in node.get("anyOf", []))}
    if isinstance(value, str) and kinds & {"integer", "number"}:
        plain = value.replace("_", "").replace(",", "")
        if re.fullmatch(r"[-+]?[0-9]+|[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?", plain):
            return f" (write {plain}{'' if plain != value else ' without quotes'})"
    if isinstance(value, float) and "integer" in kinds and value.is_integer():
        return f" (write {value:.0f})"
    if isinstance(value, str) and "boolean" in kinds and value.lower() in _FLAGS:
        return f" (write {_FLAGS[value.lower()]})"
    if value is None and _is_module(node):
        return " (write none)"
    if isinstance(value, (int, float)) and "string" in kinds:
        return " (put it in quotes)"
    return ""


_FLAGS = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
