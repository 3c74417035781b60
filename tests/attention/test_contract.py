"""The code keeps the contract in `spec/`: names, parameters, order, defaults, annotations, abstract and static marks."""

from __future__ import annotations

import abc
import ast
import dataclasses
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch

SPEC = Path(__file__).parents[2] / "spec"
MODULES = ("fastvideo.attention.backends.abstract", "fastvideo.attention.layer")


@dataclasses.dataclass(frozen=True)
class Item:
    """One directive of the documents: `kind` is `class`, `method`, `attribute` or `data`."""

    module: str
    kind: str
    owner: str
    text: str
    options: dict[str, str]
    body: str

    @property
    def name(self) -> str:
        return re.match(r"\w+", self.text)[0]

    def __str__(self) -> str:
        return ".".join(filter(None, [self.owner, self.name]))


def read_items(module: str) -> list[Item]:
    text = (SPEC / f"{module}.md").read_text()
    items, owner = [], ""
    for match in re.finditer(r"^`{4,5}\{py:(\w+)\} (.+)\n((?::.*\n|   .*\n)*)((?:(?!^`{4,5}).*\n)*)", text, re.MULTILINE):
        kind, signature, options, body = match.groups()
        if kind == "class":
            owner = re.match(r"\w+", signature)[0]
        pairs = re.findall(r"^:(\w+): *(?:>\n +)?(.*)$", options, re.MULTILINE)
        is_member = kind in ("method", "attribute")
        items.append(Item(module, kind, owner if is_member else "", signature, dict(pairs), body))
    return items


ITEMS = [item for module in MODULES for item in read_items(module)]


def of_kind(kind: str) -> list[Item]:
    return [item for item in ITEMS if item.kind == kind]


def resolve(item: Item) -> object:
    module = importlib.import_module(item.module)
    return getattr(getattr(module, item.owner), item.name) if item.owner else getattr(module, item.name)


def evaluate(annotation: ast.expr) -> object:
    source = ast.unparse(annotation)
    names = {"torch": torch, "typing": typing, "fastvideo": importlib.import_module("fastvideo")}
    return eval(source, names)


def check_parameters(spec_signature: str, function: object, *, skip_self: bool) -> None:
    declared = ast.parse(f"def {spec_signature}: ...").body[0]
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function)
    actual = list(signature.parameters.values())[1 if skip_self else 0 :]
    spec_arguments = declared.args
    defaults = [None] * (len(spec_arguments.args) - len(spec_arguments.defaults)) + spec_arguments.defaults
    assert len(actual) >= len(spec_arguments.args)
    for argument, default, parameter in zip(spec_arguments.args, defaults, actual, strict=False):
        assert parameter.name == argument.arg
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert hints.get(parameter.name) == evaluate(argument.annotation), parameter.name
        expected = inspect.Parameter.empty if default is None else ast.literal_eval(default)
        assert parameter.default == expected, parameter.name
    added = actual[len(spec_arguments.args) :]
    if spec_arguments.kwarg is not None:
        last = added.pop()
        assert (last.name, last.kind) == (spec_arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD)
        annotation = spec_arguments.kwarg.annotation
        assert hints.get(last.name) == (None if annotation is None else evaluate(annotation))
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in added), "additions are keyword-only"
    if declared.returns is not None:
        expected = evaluate(declared.returns)
        assert hints["return"] == (type(None) if expected is None else expected)


def test_the_documents_are_read_whole() -> None:
    names = {str(item) for item in ITEMS}
    assert len(of_kind("class")) == 8
    assert len(of_kind("method")) == 14
    assert {"AttentionBackend.get_name", "AttentionImpl.preprocess_qkv", "T", "DistributedAttention_VSA.forward"} <= names
    assert {"AttentionBackend.accept_output_buffer", "AttentionMetadata.current_timestep"} <= names


@pytest.mark.parametrize("item", of_kind("class"), ids=str)
def test_class(item: Item) -> None:
    cls = resolve(item)
    assert f"{cls.__module__}.{cls.__qualname__}" == item.options["canonical"]
    if "(" in item.text:
        check_parameters(item.text.replace(item.name, "init", 1), cls.__init__, skip_self=True)
    bases = re.search(r"^Bases: (.+)$", item.body, re.MULTILINE)
    wanted = re.findall(r"\{py:obj\}`([\w.]+)`", bases[1]) if bases else []
    ancestors = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
    ancestors |= {"torch.nn.Module"} if issubclass(cls, torch.nn.Module) else set()  # its canonical name is longer
    for name in wanted:
        if name != "fastvideo.attention.backends.abstract.T":
            assert name in ancestors
    if "typing.Generic" in wanted:
        assert cls.__parameters__ == (importlib.import_module(item.module).T,)
    if "typing.Protocol" in wanted:
        assert typing.is_protocol(cls) if hasattr(typing, "is_protocol") else cls._is_protocol


@pytest.mark.parametrize("item", of_kind("method"), ids=str)
def test_method(item: Item) -> None:
    owner = getattr(importlib.import_module(item.module), item.owner)
    is_static = isinstance(inspect.getattr_static(owner, item.name), staticmethod)
    assert is_static == ("staticmethod" in item.options)
    is_abstract = item.name in getattr(owner, "__abstractmethods__", ())
    assert is_abstract == ("abstractmethod" in item.options)
    check_parameters(item.text, getattr(owner, item.name), skip_self=not is_static)


@pytest.mark.parametrize("item", of_kind("attribute"), ids=str)
def test_attribute(item: Item) -> None:
    owner = getattr(importlib.import_module(item.module), item.owner)
    assert typing.get_type_hints(owner)[item.name] is {"bool": bool, "int": int}[item.options["type"]]
    if item.options["value"] == "None":  # the documents' way of writing "no default"
        field = next(field for field in dataclasses.fields(owner) if field.name == item.name)
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING
    else:
        assert getattr(owner, item.name) == ast.literal_eval(item.options["value"])


def test_type_variable() -> None:
    (item,) = of_kind("data")
    assert item.options["value"] == "'TypeVar(...)'"
    assert isinstance(resolve(item), typing.TypeVar)


def test_abstract_classes_are_abc() -> None:
    from fastvideo.attention.backends import abstract

    for cls in (abstract.AttentionBackend, abstract.AttentionImpl, abstract.AttentionMetadataBuilder):
        assert isinstance(cls, abc.ABCMeta)


def test_package_reexports_the_contract() -> None:
    import fastvideo.attention as package

    for item in ITEMS:
        if item.kind in ("class", "data"):
            assert getattr(package, item.name) is resolve(item)
    for name in ("attention", "explain", "get_attn_backend", "register_attn_backend", "use_attn_backend"):
        assert callable(getattr(package, name))


def test_asdict_zerocopy_holds_the_same_objects() -> None:
    from fastvideo.attention import AttentionMetadata

    @dataclasses.dataclass
    class Metadata(AttentionMetadata):
        table: torch.Tensor

    table = torch.arange(3)
    metadata = Metadata(current_timestep=5, table=table)
    assert metadata.asdict_zerocopy()["table"] is table
    assert metadata.asdict_zerocopy({"table"}) == {"current_timestep": 5}
    with pytest.raises(ValueError, match=r"no fields of Metadata: \['tabel'\]"):
        metadata.asdict_zerocopy({"tabel"})
