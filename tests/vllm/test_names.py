"""What the plugin takes from vLLM by name is there, and is called as it is defined: read from sources, nothing is run.

The sources are those of the installed vLLM, and of a wheel (or a folder that has vllm/) that QTENSOR_VLLM_SOURCES
names: so a version can be looked at that this machine cannot run. `pip download vllm==VERSION --no-deps` gets one.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm"
ATTRIBUTES = [
    # What is wrapped, set, overridden or read, beyond the names that are imported.
    ("vllm.v1.worker.gpu_worker", "Worker", ("reload_weights", "finish_weight_update", "_weight_update_active")),
    ("vllm.v1.worker.gpu_worker", "Worker", ("weight_transfer_engine", "get_model", "model_runner")),
    ("vllm.v1.worker.worker_base", "WorkerBase", ("vllm_config",)),
    ("vllm.v1.worker.gpu_worker", "Worker", ("start_weight_update", "start_draft_weight_update", "update_weights")),
    ("vllm.distributed.weight_transfer.base", "WeightTransferEngine", ("reset_weight_update_target",)),
    ("vllm.distributed.weight_transfer.base", "WeightTransferEngine", ("supports_draft_weight_update",)),
    ("vllm.model_executor.model_loader.reload.types", "LayerReloadingInfo", ("restore_metadata",)),
    ("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig", ("packed_modules_mapping",)),
    ("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig", ("override_quantization_method",)),
    ("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig", ("apply_vllm_mapper", "from_config")),
    ("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase", ("process_weights_after_loading",)),
    ("vllm.model_executor.layers.quantization.online.fp8", "Fp8PerTensorOnlineMoEMethod", ("_setup_kernel",)),
    ("vllm.model_executor.layers.quantization.online.fp8", "Fp8PtpcOnlineMoEMethod", ("_setup_kernel",)),
    ("vllm.model_executor.layers.quantization.online.fp8", "Fp8PerBlockOnlineMoEMethod", ("_setup_kernel",)),
    ("vllm.distributed.parallel_state", "GroupCoordinator", ("cpu_group", "rank_in_group", "world_size")),
    ("vllm.config", "ModelConfig", ("quantization", "hf_config", "dtype", "model", "revision")),
    ("vllm.config.load", "LoadConfig", ("load_format",)),
    ("vllm.platforms.interface", "Platform", ("is_cpu", "is_rocm", "supports_fp8", "is_fp8_fnuz")),
]
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "rl_refit.py"
TRANSFER = "vllm.distributed.weight_transfer"
SIZES = ["input_size_per_partition", "output_partition_sizes", "input_size", "output_size"]


class Sources:
    """The Python files of one vLLM, by module."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._zip = zipfile.ZipFile(place) if place.is_file() else None
        self._names = set(self._zip.namelist()) if self._zip else None

    @functools.cache  # noqa: B019 - of two objects, for the life of the tests
    def module(self, name: str) -> ast.Module | None:
        for file in (name.replace(".", "/") + ".py", name.replace(".", "/") + "/__init__.py"):
            if self._zip is not None and self._names is not None:
                if file in self._names:
                    return ast.parse(self._zip.read(file))
            elif (self.place / file).is_file():
                return ast.parse((self.place / file).read_bytes())
        return None

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a module's name is defined, imports followed: the module, and the node. A submodule is its own node."""
        tree = self.module(module)
        if tree is None:
            return None
        package = module if self.is_package(module) else module.rpartition(".")[0]
        stars = []
        for node in _statements(tree.body):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return module, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                base = _absolute(node, package)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(base)
                    elif (alias.asname or alias.name) == name:
                        return self.find(base, alias.name) or (module, node)
        if (below := self.module(f"{module}.{name}")) is not None:
            return f"{module}.{name}", below
        if any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body) and any(
            isinstance(n, ast.Constant) and n.value == name for n in ast.walk(tree)
        ):
            return module, tree  # Made when it is asked for.
        return next(filter(None, (self.find(base, name) for base in stars)), None)

    def is_package(self, module: str) -> bool:
        file = module.replace(".", "/") + "/__init__.py"
        return file in self._names if self._names is not None else (self.place / file).is_file()

    def has(self, module: str, cls: str, attribute: str) -> bool:
        """Whether a class, or one that it inherits from, has a method, a field, or sets it on `self`."""
        found = self.find(module, cls)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return False
        home, node = found
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef) and part.name == attribute:
                return True
            if isinstance(part, (ast.Assign, ast.AnnAssign)) and attribute in _targets(part):
                return True
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        return any(self.has(home, base.id, attribute) for base in bases if isinstance(base, ast.Name))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's own, those in `if` and `try` included."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try)):
                yield from _statements(getattr(node, part, []))
        for handler in node.handlers if isinstance(node, ast.Try) else ():
            yield from _statements(handler.body)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    found = set()
    for target in targets:
        for part in ast.walk(target):
            if isinstance(part, ast.Name):
                found.add(part.id)
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                found.add(part.attr)
    return found


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _given() -> list[Sources]:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    extra = os.environ.get("QTENSOR_VLLM_SOURCES")
    return [Sources(Path(found.origin).parents[1]), *([Sources(Path(extra))] if extra else [])]


SOURCES = _given()
every_source = pytest.mark.parametrize("vllm", SOURCES, ids=lambda s: s.place.name)


def _imports(tree: ast.AST) -> Iterator[tuple[str, str, bool]]:
    """(module, name, whether it may be absent) of what the plugin imports of vLLM: it may where an ImportError is
    caught."""
    guarded: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
            for part in (*node.body, *node.handlers):
                guarded.update(map(id, ast.walk(part)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield node.module or "", alias.name, id(node) in guarded
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            module = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if str(module).startswith("vllm."):
                yield str(module), "", id(node) in guarded


def _plugin() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PLUGIN.glob("*.py")):
        yield path.name, ast.parse(path.read_text(encoding="utf-8"))


@every_source
def test_every_name_is_there(vllm: Sources) -> None:
    wanted = [(file, *found) for file, tree in _plugin() for found in _imports(tree)]
    assert len(wanted) > 40
    lacking = [
        (file, module, name)
        for file, module, name, optional in wanted
        if not optional and (vllm.module(module) is None if not name else vllm.find(module, name) is None)
    ]
    assert lacking == []


@every_source
def test_the_newer_of_two_ways_is_there(vllm: Sources) -> None:
    """What is imported in a `try` is what supported versions have now; the other way is for older ones."""
    wanted = {
        ("vllm.model_executor.layers.fused_moe", "RoutedExperts"),
        ("vllm.model_executor.model_loader.reload.layerwise", "get_layerwise_info"),
        ("vllm.model_executor.model_loader.reload.layerwise", "initialize_layerwise_reload"),
        ("vllm.model_executor.model_loader.reload.layerwise", "finalize_layerwise_reload"),
        ("vllm.model_executor.model_loader.reload.meta", "SKIP_TENSORS"),
        ("vllm.model_executor.layers.attention", "is_deferred_attention_layer"),
        ("vllm.model_executor.layers.fused_moe.router.cpu_router", ""),
    }
    assert {w for w in wanted if (vllm.find(*w) if w[1] else vllm.module(w[0])) is None} == set()


@every_source
def test_functions_are_called_as_they_are_defined(vllm: Sources) -> None:
    wrong, seen = [], 0
    for file, tree in _plugin():
        origin = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                origin |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or any(isinstance(a, ast.Starred) for a in call.args):
                continue
            place = _callee(call.func, origin)
            found = vllm.find(*place) if place else None
            if found is None or not isinstance(found[1], ast.FunctionDef) or any(k.arg is None for k in call.keywords):
                continue
            seen += 1
            if not _fits(call, found[1].args):
                wrong.append(f"{file}:{call.lineno}: {ast.unparse(call)} of ({ast.unparse(found[1].args)})")
    assert seen >= 10
    assert wrong == []


def _callee(func: ast.expr, origin: dict[str, tuple[str, str]]) -> tuple[str, str] | None:
    """The module and name of `name(...)` or `module.name(...)`."""
    if isinstance(func, ast.Name):
        return origin.get(func.id)
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id in origin:
        return ".".join(origin[func.value.id]), func.attr
    return None


def _fits(call: ast.Call, args: ast.arguments) -> bool:
    positional = [a.arg for a in (*args.posonlyargs, *args.args)]
    given = {*positional[: len(call.args)], *(str(k.arg) for k in call.keywords)}
    if len(call.args) > len(positional) and args.vararg is None:
        return False
    known = {*positional, *(a.arg for a in args.kwonlyargs)}
    needed = set(positional[: len(positional) - len(args.defaults)])
    needed |= {a.arg for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None}
    return needed <= given and (given <= known or args.kwarg is not None)


@every_source
def test_what_is_wrapped_overridden_and_read_is_there(vllm: Sources) -> None:
    lacking = [
        f"{module}.{cls}.{attribute}"
        for module, cls, attributes in ATTRIBUTES
        for attribute in attributes
        if not vllm.has(module, cls, attribute)
    ]
    assert lacking == []


@every_source
def test_linear_layers_create_weights_by_these_names(vllm: Sources) -> None:
    found = vllm.find("vllm.model_executor.layers.linear", "LinearMethodBase")
    assert found is not None
    create = next(n for n in ast.walk(found[1]) if isinstance(n, ast.FunctionDef) and n.name == "create_weights")
    assert [a.arg for a in create.args.args[1:]] == ["layer", *SIZES, "params_dtype"]


def _methods(tree: ast.AST) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@every_source
def test_the_transport_of_the_example_is_what_the_base_of_weight_transfer_wants(vllm: Sources) -> None:
    """Every abstract method, with its arguments; a base that wants one more makes no engine of it."""
    found = vllm.find(f"{TRANSFER}.base", "WeightTransferEngine")
    assert found is not None
    wanted = {
        name: [arg.arg for arg in method.args.args]
        for name, method in _methods(found[1]).items()
        if any(ast.unparse(decorator) == "abstractmethod" for decorator in method.decorator_list)
    }
    assert {"start_weight_update", "receive_weights", "finish_weight_update"} <= wanted.keys()
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    engine = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "SharedFileEngine")
    made = _methods(engine)
    assert {name: [arg.arg for arg in made[name].args.args] for name in wanted if name in made} == wanted
    calls = {ast.unparse(n.func) for n in ast.walk(engine) if isinstance(n, ast.Call)}
    assert {"reload.initialize_layerwise_reload", "reload.finalize_layerwise_reload"} <= calls


@every_source
@pytest.mark.parametrize("engine", ["nccl_engine", "ipc_engine"])
def test_vllms_own_transfers_begin_and_end_by_what_the_plugin_stands_in_for(vllm: Sources, engine: str) -> None:
    """They look the functions up in the package of reloads when an update begins and ends, and load by the model."""
    tree = vllm.module(f"{TRANSFER}.{engine}")
    assert tree is not None
    methods = _methods(tree)
    for method, function in (
        ("start_weight_update", "initialize_layerwise_reload"),
        ("finish_weight_update", "finalize_layerwise_reload"),
    ):
        imports = [n for n in ast.walk(methods[method]) if isinstance(n, ast.ImportFrom)]
        assert [n.module for n in imports if function in [a.name for a in n.names]] == [
            "vllm.model_executor.model_loader.reload"
        ]
        calls = [n for n in ast.walk(methods[method]) if isinstance(n, ast.Call) and ast.unparse(n.func) == function]
        assert [ast.unparse(n.args[0]) for n in calls] == ["self.model"]
    assert "self.model.load_weights" in ast.unparse(methods["receive_weights"])


@every_source
def test_a_worker_forgets_an_update_whose_chunk_failed_and_not_one_whose_end_failed(vllm: Sources) -> None:
    """So the plugin ends it for the worker after a failed end (`entry._end_of_update`), and there alone."""
    found = vllm.find("vllm.v1.worker.gpu_worker", "Worker")
    assert found is not None
    methods = _methods(found[1])
    forget = "self._weight_update_active = False"
    handlers = {
        name: [ast.unparse(n) for n in ast.walk(methods[name]) if isinstance(n, ast.ExceptHandler)]
        for name in ("update_weights", "finish_weight_update")
    }
    assert any(forget in text and "reset_weight_update_target" in text for text in handlers["update_weights"])
    assert not any(forget in text for text in handlers["finish_weight_update"])
    assert forget in ast.unparse(methods["finish_weight_update"])


@every_source
def test_what_is_absent_is_noticed(vllm: Sources) -> None:
    linear = "vllm.model_executor.layers.linear"
    assert vllm.find(linear, "LinearBase") is not None
    assert vllm.find(linear, "LinearBass") is None
    assert vllm.module("vllm.model_executor.layers.linears") is None
    assert not vllm.has(linear, "LinearBase", "no_such_attribute")
    function = vllm.find("vllm.model_executor.model_loader.utils", "process_weights_after_loading")
    assert function is not None
    assert isinstance(function[1], ast.FunctionDef)
    for call, fits in (("f(a, b, c)", True), ("f(a)", False), ("f(a, b, c, d, e, f)", False), ("f(a, b, x=c)", False)):
        node = ast.parse(call, mode="eval").body
        assert isinstance(node, ast.Call)
        assert _fits(node, function[1].args) == fits


@every_source
def test_the_weight_cache_takes_no_layers_that_do_not_say_so(vllm: Sources) -> None:
    """docs/snapshots.md says what vLLM's daemon wants: GPUs, and layers that ask for processed weights."""
    cache = "vllm.model_executor.model_loader.weight_cache.protocol"
    if vllm.module(cache) is None:
        pytest.skip("this vLLM has no weight cache")
    checks = {name: vllm.find(cache, name) for name in ("check_ipc_platform_support", "check_ipc_quant_support")}
    text = {name: ast.unparse(found[1]) for name, found in checks.items() if found is not None}
    assert "current_platform.is_cuda_alike()" in text["check_ipc_platform_support"]
    assert "not quant_method.supports_pre_processed_weights" in text["check_ipc_quant_support"]
    found = vllm.find("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase")
    assert found is not None
    assert "supports_pre_processed_weights: bool = False" in ast.unparse(found[1])
    assert not any("supports_pre_processed_weights" in path.read_text() for path in PLUGIN.glob("*.py"))
    process = vllm.find("vllm.model_executor.model_loader.utils", "process_weights_after_loading")
    assert (
        process is not None
    )  # The engine's side of it asks the same, before a layer's weights are taken as processed.
    refusing = [
        n for n in ast.walk(process[1]) if isinstance(n, ast.If) and any(isinstance(s, ast.Raise) for s in n.body)
    ]
    tests = [ast.unparse(n.test) for n in refusing]
    assert any("not quant_method.supports_pre_processed_weights" in test for test in tests), tests
