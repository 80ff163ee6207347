"""The reference as Markdown, from docstrings, by reading the source: nothing is imported.

A page asks for it by `<!-- reference: NAME ... -->`. A module stands for the names in its
`__all__`, any other name for itself.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
ASKED = re.compile(r"<!-- reference:\s(.*?)-->", re.S)
CODE = re.compile(r"(`[^`]*`)")
WIDEST = 88  # columns of a signature on one line
OPTIONS = {
    "returns_named_value": False,
    "returns_multiple_items": False,
    "warn_unknown_params": False,
    "warn_missing_types": False,
}
KINDS = {
    griffe.DocstringSectionKind.parameters: "Arguments",
    griffe.DocstringSectionKind.attributes: "Attributes",
    griffe.DocstringSectionKind.raises: "Raises",
    griffe.DocstringSectionKind.returns: "Returns",
    griffe.DocstringSectionKind.yields: "Yields",
}


class NoSuchName(LookupError):
    """A page asks for a name that the source does not have, or a docstring names an argument so."""


def filled(page: str) -> str:
    """A page with the reference in place of what asks for it."""
    return ASKED.sub(lambda asked: "\n\n".join(map(reference, asked[1].split())), page)


def reference(path: str) -> str:
    """The reference of a module, a class, a function or a value, as Markdown.

    Raises:
        NoSuchName: the source has no such name, or one of its docstrings an argument too many.
    """
    try:
        item = _resolved(_package()[path.removeprefix("dinov3core.")])
    except KeyError as error:
        raise NoSuchName(f"{path}: not in the source") from error
    if not item.is_module:
        return "\n\n".join(_described(item, 2))
    if item.exports is None:
        raise NoSuchName(f"{path}: has no __all__; name what it should show")
    # Where they are defined: the bare name may be a module's too, as `dinov3core.evals.knn` is.
    sources = [item.imports.get(name, f"{path}.{name}") for name in map(str, item.exports)]
    return "\n\n".join(map(reference, sources))


@functools.cache
def _package() -> griffe.Object:
    return griffe.load(
        "dinov3core",
        search_paths=[ROOT],
        try_relative_path=False,
        docstring_parser="google",
        docstring_options=OPTIONS,
        resolve_aliases=True,
    )


def _resolved(item: griffe.Object | griffe.Alias) -> griffe.Object:
    return item.final_target if item.is_alias else item


def _described(item: griffe.Object, level: int, owner: str = "") -> Iterator[str]:
    """Heading, signature, docstring; of a class also its fields and public methods."""
    name = f"{owner}.{item.name}" if owner else item.name
    yield f"{'#' * level} {name}"
    yield f"```python\n{_signature(item, name)}\n```"
    yield from _docstring(item)
    if not item.is_class:
        return
    members = [member for key, member in item.members.items() if not key.startswith("_")]
    fields = [member for member in members if member.is_attribute and member.annotation]
    # What the signature says already is not said again; that of a NamedTuple is not known.
    told = [field for field in fields if field.docstring or not item.parameters]
    if told:
        yield "\n".join(["**Fields**", "", *map(_field, told)])
    for member in members:
        if member.is_function and member.docstring:
            yield from _described(member, level + 1, name)


def _signature(item: griffe.Object, name: str) -> str:
    if item.is_attribute:
        return f"{name} = {item.value}"
    arguments = list(_arguments(item))
    returned = f" -> {item.returns}" if item.is_function and item.returns else ""
    head = f"class {name}" if item.is_class else name
    if item.is_class and not arguments:
        return head
    line = f"{head}({', '.join(arguments)}){returned}"
    if len(line) <= WIDEST:
        return line
    return "\n".join([f"{head}(", *(f"    {one}," for one in arguments), f"){returned}"])


def _arguments(item: griffe.Object) -> Iterator[str]:
    """The parameters as they are written, with the stars and slashes between their kinds."""
    keyword_only = griffe.ParameterKind.keyword_only
    before = None
    for parameter in item.parameters:
        if parameter.name == "self" or parameter.name == "cls":
            continue
        starred = before in (keyword_only, griffe.ParameterKind.var_positional)
        if parameter.kind is keyword_only and not starred:
            yield "*"
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
        annotation = f": {parameter.annotation}" if parameter.annotation else ""
        equals = " = " if annotation else "="
        default = f"{equals}{parameter.default}" if parameter.required is False else ""
        if parameter.kind in stars:
            default = ""
        yield f"{stars.get(parameter.kind, '')}{parameter.name}{annotation}{default}"
        before = parameter.kind


def _field(field: griffe.Attribute) -> str:
    text = _markdown(" ".join(field.docstring.value.split())) if field.docstring else ""
    return f"* `{field.name}: {field.annotation}` {text}".rstrip()


def _docstring(item: griffe.Object) -> Iterator[str]:
    if item.docstring is None:
        return
    for section in item.docstring.parsed:
        if section.kind is griffe.DocstringSectionKind.text:
            yield _markdown(section.value)
        elif section.kind in KINDS:
            if section.kind is griffe.DocstringSectionKind.parameters:
                _check_arguments(item, [entry.name for entry in section.value])
            yield "\n".join([f"**{KINDS[section.kind]}**", "", *map(_entry, section.value)])
        else:  # a title, a colon and an indented text
            yield f"**{section.title}**: {_markdown(section.value.description)}"


def _entry(entry: griffe.DocstringElement) -> str:
    """One argument, error or result: its name or type, and its text as one paragraph."""
    label = getattr(entry, "name", "") or getattr(entry, "annotation", "")
    text = _markdown(" ".join(entry.description.split()))
    if isinstance(entry, griffe.DocstringReturn | griffe.DocstringYield):
        return f"* {text}"
    return f"* `{label}`: {text}"


def _check_arguments(item: griffe.Object, names: Sequence[str]) -> None:
    """Arguments that a docstring tells of must be in the signature; `rope_*` stands for several."""
    known = [parameter.name for parameter in item.parameters]
    for name in re.split(r",\s*", ", ".join(names)):
        pattern = re.escape(name.lstrip("*")).replace(r"\*", ".*")
        if not any(re.fullmatch(pattern, one.lstrip("*")) for one in known):
            raise NoSuchName(f"{item.path}: its docstring tells of {name}, its signature does not")


def _markdown(text: str) -> str:
    """A text of a docstring, with what Markdown would take for markup outside of code escaped."""
    parts = CODE.split(text)
    parts[::2] = [re.sub(r"([<*])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)
