# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The configs of a bundle, read as text: each expression by its syntax tree, each component by its name.

``monai.bundle run`` evaluates every string that starts with ``$`` and calls whatever ``_target_`` names. Here nothing is
evaluated: what isn't known to be harmless is a finding.
"""

import ast
import builtins
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver

from bundle.run.config import flat
from bundle.sharing.names import (
    BUILTINS,
    MONAI_GLOBALS,
    OUTPUTS,
    READ_MODES,
    RISKY_KEYS,
    ROOTS,
    STRICT_KEYS,
    component,
    downloads,
    known,
    parameters,
    within,
)

MAX_EXPRESSION = 10_000  # characters
REFERENCES = "__local_refs"  # what MONAI calls the things that an expression refers to by @
WITH_ADDRESSES = ("configs/metadata.json", "large_files.yml", "large_files.yaml", "large_files.json")  # checked elsewhere
CLASSES = ("reader", "writer", "merger_cls")  # arguments that may be a class as well
CUDNN = "torch.backends.cudnn"  # a module, whose switches configs set
PART_OF_ADDRESS = re.compile(r"(?<!\benv)(?<!\bfile)(?<!\bsqlite)://|^\s*(\\\\|//)\w|^\s*(https?|ftp|tcp|s3|gs):/*\s*$")
RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
# Attributes of values. What leads back to a module or to code of the interpreter, or writes, deletes, loads or downloads.
BAD_ATTRIBUTES = set(
    "system popen Popen exec spawn call check_call check_output load_library exec_module load_module hub jit package mro "
    "write_text write_bytes writelines write_results FileIO tofile dump dumps save savetxt savez memmap unlink rmdir "
    "rename move move_into copy_into chmod touch symlink_to hardlink_to link_to truncate load loads open extract "
    "extractall urlopen urlretrieve download request from_file from_pretrained register_class run_cmd query "
    "multiprocessing_context reducer modules".split()
)
# What a value has by the name of a module of the standard library is that module, but for these.
BAD_ATTRIBUTES |= sys.stdlib_module_names - set(
    "array copy numbers profile random select statistics string test time".split()
)
BY_ARGUMENTS = ("eval", "replace", "write")  # harmless or not by what they are called with
HARMLESS_TO = ("to_dict", "to_list", "to_numpy", "to_tensor")  # of pandas, all others that start so write files
BAD_STARTS = ("_", "f_", "gi_", "cr_", "ag_", "tb_", "co_", "func_")
NODES = (
    *(ast.Expression, ast.Expr, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Starred, ast.Slice, ast.IfExp),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Lambda, ast.arguments, ast.arg),
    *(ast.JoinedStr, ast.FormattedValue, ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Subscript),
)


class Configs:
    """What is wrong with the configs of a bundle, which may be stacked in any order.

    Args:
        configs: content of each JSON or YAML file, by its name.
    """

    def __init__(self, configs: dict[str, Any]) -> None:
        self.leaves: dict[str, list[tuple[str, Any]]] = {}
        self.values: dict[str, list[Any]] = {}  # at each id, in any of the files
        self.aliases: dict[str, set[str]] = {name: {module} for name, module in MONAI_GLOBALS.items()}
        self.imports: set[str] = set()  # ids of what an import statement, or a list of them, stands at
        self.configs = configs
        for file, content in configs.items():
            self.leaves[file] = list(flat(content))
            for key, value in self.leaves[file]:
                self.values.setdefault(_id(key), []).append(value)
                if isinstance(value, str) and (found := import_of(value)):
                    _, name, full = found
                    self.aliases.setdefault(name, set()).add(full)
                    place = _id(key)
                    above, _, last = place.rpartition("::")
                    self.imports.add(above if last.isdecimal() and above else place)

    def findings(self) -> Iterator[tuple[str, str, str]]:
        """File, key and fault."""
        for file, leaves in self.leaves.items():
            for key, value in leaves:
                for what in self.value_faults(_id(key), value):
                    yield file, key, what
                if address(value) and file not in WITH_ADDRESSES:
                    yield file, key, f"{short(value)} is an address in the network"
            yield from ((file, key, what) for key, what in _unsafe_loads(self.configs[file]))

    def value_faults(self, key: str, value: Any) -> Iterator[str]:
        name = _named(key)
        if name == "_target_":
            if not isinstance(value, str) or component(value) is None:
                yield f"{short(value)} is called, which is not on the list of what a bundle may use"
        elif name in RISKY_KEYS:
            expected, harmless = RISKY_KEYS[name]
            values = list(self.meant(value))
            fine = all(harmless(each) or (name in CLASSES and _is_class(self, each)) for each in values)
            if not fine or (name in OUTPUTS and any(map(leads_out, values))):
                yield f"{name} is {short(value)} (expected {expected})"
        if not isinstance(value, str):
            return
        if value.startswith("%"):
            path, ids = ConfigParser.split_path_id(value[1:])
            if path.endswith("settings.json"):
                yield f"{short(value)} makes a config of what is a record"
            if path and (path.startswith(("/", "\\", "~")) or ".." in path or path[1:2] == ":"):
                yield f"{short(value)} reads a config outside of the bundle"
            yield from self.reference_faults([ids])
        elif value.startswith("$"):
            yield from self.expression_faults(key, value)
        else:
            yield from self.reference_faults(ReferenceResolver.match_refs_pattern(_absolute(key, value)))

    def meant(self, value: Any, depth: int = 8) -> Iterator[Any]:
        """What a value is, or refers to: what a reference to a reference refers to."""
        text = value.removeprefix("$") if isinstance(value, str) else ""
        if not re.fullmatch(r"@[\w:#]+", text) or not depth:
            yield value
            return
        for ref in ReferenceResolver.match_refs_pattern(text):
            for each in self.values.get(ref, [value]):
                yield from self.meant(each, depth - 1)

    def reference_faults(self, ids: Any) -> Iterator[str]:
        for each in ids:
            place = _id(each)
            for imported in self.imports:
                if f"{place}::".startswith(f"{imported}::") or f"{imported}::".startswith(f"{place}::") or not place:
                    yield f"it refers to {each or 'the whole config'}, which holds imported modules"
                    break

    def expression_faults(self, key: str, value: str) -> Iterator[str]:
        """What is wrong with an expression, as MONAI would hand it to Python."""
        if len(value) > MAX_EXPRESSION:
            yield f"an expression of more than {MAX_EXPRESSION} characters"
            return
        if (found := import_of(value)) is not None:
            yield from () if _may_import(found) else (f"it imports {found[2]}, which is not on the list",)
            return
        value = _absolute(key, value)
        refs = ReferenceResolver.match_refs_pattern(value)
        try:
            tree = ast.parse(ReferenceResolver.update_refs_pattern(value, refs)[1:].lstrip(" \t"), mode="eval")
            yield from dict.fromkeys(Expression(self, tree).faults(tree.body))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            yield f"{short(value)} is no expression that can be read ({type(e).__name__})"


class Expression:
    """What is wrong with one expression."""

    def __init__(self, configs: Configs, tree: ast.AST) -> None:
        self.configs = configs
        nodes = list(ast.walk(tree))
        self.bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}

    def faults(self, node: ast.AST) -> Iterator[str]:
        if not isinstance(node, NODES):
            yield f"it has a {type(node).__name__}"
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and "__" in node.value:
                yield f"a text with a double underscore, {short(node.value)}"
            if isinstance(node.value, str) and PART_OF_ADDRESS.search(node.value):
                yield f"{short(node.value)} is an address in the network"
        elif isinstance(node, ast.arg):
            yield from self.binding_faults(node.arg)
        elif isinstance(node, ast.Subscript) and self.is_reference(node):
            yield from self.configs.reference_faults([node.slice.value])
        elif isinstance(node, ast.Subscript) and self.full_names(node.value) == ["os.environ"]:
            if not (isinstance(node.slice, ast.Constant) and node.slice.value in RANKS):
                yield "it reads the environment"
        elif isinstance(node, ast.Call):
            yield from self.call_faults(node)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            yield from self.name_faults(node)
        else:
            for child in ast.iter_child_nodes(node):
                yield from self.faults(child)

    def binding_faults(self, name: str) -> Iterator[str]:
        """A name that is bound in a part of an expression has its old meaning in the others."""
        if name in dir(builtins) or name in self.configs.aliases or (name.startswith("_") and name.strip("_")):
            yield f"it gives {name} another meaning"

    def is_reference(self, node: ast.AST) -> bool:
        named = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == REFERENCES
        return named and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)

    def full_names(self, node: ast.AST) -> list[str]:
        """All that a name, or a chain of names, can stand for by the configs' imports; nothing for one of a value."""
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.bound:
            return []
        return [".".join([full, *chain]) for full in sorted(self.configs.aliases.get(node.id, ()))]

    def name_faults(self, node: ast.Name | ast.Attribute, called: bool = False) -> Iterator[str]:
        names = self.full_names(node)
        for name in names:
            found = known(name)
            if found is None:
                # an attribute of an allowed class or object, such as Events.STARTED(every=2)
                yield f"{name} is not on the list of what a bundle may use"
            elif found.module:
                yield f"the module {name} itself is used as a value"
            elif not called and not found.home.startswith("bundle.") and STRICT_KEYS.intersection(parameters(found.value)):
                yield f"{name} is handed on, so that its arguments can't be seen"
        if names:
            return
        if isinstance(node, ast.Attribute):
            writes = node.attr.startswith("to_") and node.attr not in HARMLESS_TO
            writes = writes or (node.attr in BY_ARGUMENTS and not called)
            if node.attr in BAD_ATTRIBUTES or node.attr.startswith(BAD_STARTS) or writes:
                yield f"it takes .{node.attr} of a value"
            yield from self.faults(node.value)
        elif isinstance(node.ctx, ast.Store):
            yield from self.binding_faults(node.id)
        elif node.id not in self.bound and node.id not in BUILTINS:
            yield f"{node.id} is not on the list of what a bundle may use"

    def call_faults(self, node: ast.Call) -> Iterator[str]:
        """What is called, and with what: arguments by place count as those by name."""
        if any(keyword.arg is None for keyword in node.keywords):
            yield "it hands on arguments by **, so that they can't be seen"
        special = special_call(node, self.full_names(node.func), self.bound)
        if special is not None:
            yield from special
            for child in (*node.args, *(keyword.value for keyword in node.keywords)):
                if ast.unparse(child) != CUDNN:
                    yield from self.faults(child)
            return
        func, args = node.func, node.args
        if "functools.partial" in self.full_names(func) and args:
            func, args = args[0], args[1:]
            if isinstance(func, ast.Attribute) and func.attr in BY_ARGUMENTS:
                yield f"it takes .{func.attr} of a value"
        if isinstance(func, (ast.Name, ast.Attribute)):
            yield from self.name_faults(func, called=True)
        else:
            yield from self.faults(func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for name in self.full_names(func):
            found = known(name)
            if found and found.home.startswith("bundle."):  # where writer, for one, is no name of a class
                given = {}
                continue
            order = parameters(found.value) if found else []
            risky = [key for key in order if key in RISKY_KEYS]
            if risky and any(isinstance(each, ast.Starred) for each in args):
                yield f"it hands on arguments of {name} by *, so that they can't be seen"
            given |= {key: each for key, each in zip(order, args) if key in RISKY_KEYS}
            if found and found.home == "torch.serialization.load":
                given.setdefault("weights_only", ast.Constant(False))
            if found and downloads(found.value):
                given.setdefault("pretrained", ast.Constant(True))
        for key, each in given.items():
            plain = isinstance(each, ast.Constant)
            if (plain and key in RISKY_KEYS and not RISKY_KEYS[key][1](each.value)) or (not plain and key in STRICT_KEYS):
                yield f"{key} is {short(ast.unparse(each))} (expected {RISKY_KEYS[key][0]})"
        for child in (*args, *(keyword.value for keyword in node.keywords)):
            yield from self.faults(child)


def special_call(node: ast.Call, names: list[str], bound: set[str]) -> list[str] | None:
    """The faults of calls that are allowed in some forms only; None for any other call."""
    plain = [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args]
    called = node.func.id if isinstance(node.func, ast.Name) and not names and node.func.id not in bound else ""
    if called == "open":
        mode = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] or node.args[1:2]
        reads = all(isinstance(each, ast.Constant) and each.value in READ_MODES for each in mode)
        reads = reads and not any(isinstance(each, ast.Starred) for each in node.args)
        return [] if reads and len(node.args) > 0 else ["it opens a file, and not for reading"]
    if called == "print" and any(keyword.arg not in ("sep", "end") for keyword in node.keywords):
        return ["it prints into a file"]
    if called == "setattr":
        cudnn = len(node.args) == 3 and ast.unparse(node.args[0]) == CUDNN and isinstance(plain[1], str)
        return [] if cudnn and isinstance(plain[2], bool) else ["it calls setattr"]
    if isinstance(node.func, ast.Attribute) and not names:
        method, given = node.func.attr, node.args + node.keywords
        if method == "write" and given:
            return ["it writes by .write"]
        if method == "eval" and given:
            return ["it evaluates a text by .eval"]
        if method == "replace" and len(node.args) < 2:
            return ["it renames a file by .replace"]
        if method == "copy" and given:
            return ["it copies a file by .copy"]
        if method == "compile" and given:
            return ["it compiles with settings, which may name a compiler"]
        if method in ("format", "format_map") and not isinstance(node.func.value, ast.Constant):
            return [f"it takes attributes by a text that can't be seen, by .{method}"]
    if names in (["os.environ.get"], ["os.getenv"]):
        return [] if plain[:1] and plain[0] in RANKS else ["it reads the environment"]
    return None


def import_of(value: str) -> tuple[ast.stmt | None, str, str] | None:
    """(statement, name in expressions, what is imported) of an import, as MONAI takes the first one; None for others."""
    if not value.startswith("$") or "import" not in value:
        return None
    try:
        body = ast.parse(value[1:]).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not body or not isinstance(body[0], (ast.Import, ast.ImportFrom)):
        return None
    alias = body[0].names[0]
    full = f"{body[0].module}.{alias.name}" if isinstance(body[0], ast.ImportFrom) else alias.name
    return (body[0] if len(body) == 1 and len(body[0].names) == 1 else None), alias.asname or alias.name, full


def _may_import(found: tuple[ast.stmt | None, str, str]) -> bool:
    statement, _, full = found
    if statement is None or getattr(statement, "level", 0):
        return False
    root = full.partition(".")[0]
    return known(full) is not None or (root in ROOTS and isinstance(statement, ast.Import) and "._" not in full)


def _unsafe_loads(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Components that load a pickle unless an argument says not to, or that are handed on without their arguments."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        yield from _unsafe_loads(value, f"{key}#{name}" if key else str(name))
    if isinstance(content, dict) and content.get("compile_kwargs"):
        yield f"{key}#compile_kwargs" if key else "compile_kwargs", f"expected {RISKY_KEYS['compile_kwargs'][0]}"
    if isinstance(content, dict) and isinstance(target := content.get("_target_"), str) and not target.startswith("$"):
        found = component(target)
        if found and found.home == "torch.serialization.load" and content.get("weights_only") is not True:
            yield key, "torch.load without weights_only true unpickles whatever the file holds"
        if found and "pretrained" not in content and downloads(found.value):
            yield key, f"{target} downloads weights (expected pretrained false)"
        open_ended = STRICT_KEYS.intersection(parameters(found.value if found else None)) - content.keys()
        if found and content.get("_mode_") == "callable" and open_ended and not found.home.startswith("bundle."):
            yield key, f"{target} is handed on, so that its {', '.join(sorted(open_ended))} can't be seen"


def leads_out(value: Any) -> bool:
    """Whether an expression of a place begins, or a part of its path does, outside of the bundle."""
    if not (isinstance(value, str) and value.startswith("$")):
        return False
    try:
        refs = ReferenceResolver.match_refs_pattern(value)
        tree: ast.AST = ast.parse(ReferenceResolver.update_refs_pattern(value, refs)[1:].strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False  # which is told elsewhere
    joined = [arg for node in ast.walk(tree) if isinstance(node, ast.Call) for arg in node.args]
    while isinstance(tree, ast.BinOp):
        tree = tree.left
    return any(isinstance(each, ast.Constant) and not within(each.value) for each in (tree, *joined))


def address(value: Any) -> bool:
    """Whether a value is an address in the network."""
    found = re.match(r"\s*(\w[\w+.\-]*)://|\s*\\\\\w", value) if isinstance(value, str) else None
    return found is not None and found[1] not in ("env", "file", "sqlite")


def _is_class(configs: Configs, value: Any) -> bool:
    """Whether a reader or writer is given as a class by its name, in an expression."""
    if not isinstance(value, str) or not re.fullmatch(r"\$[\w.]+", value):
        return False
    names = Expression(configs, tree := ast.parse(value[1:], mode="eval")).full_names(tree.body)
    return bool(names) and all((found := known(name)) is not None and inspect.isclass(found.value) for name in names)


def _id(key: Any) -> str:
    """A key or reference as MONAI takes it, with all keys above: ``+train#handlers`` is ``train::handlers``."""
    return ReferenceResolver.normalize_id(str(key)).replace("::+", "::").removeprefix("+")


def _named(key: str) -> str:
    """The last name of a key, without places in a list."""
    return next((part for part in reversed(key.split("::")) if not part.isdecimal()), "")


def _absolute(key: str, value: str) -> str:
    """A text with its relative references made absolute, as MONAI does."""
    try:
        return ConfigParser.resolve_relative_ids(key, value)
    except ValueError:
        return value


def short(value: Any) -> str:
    """A value for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= 70 else f"{text[:67]}..."
