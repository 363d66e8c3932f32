"""Every private name of another library that lit_ft uses: where it is, and why nothing else does.

A release may change such a name without a word. Here it fails by name: a use that is not listed, an
entry that nothing uses, and a name that the installed library no longer has.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lit_ft

ROOT = Path(lit_ft.__file__).parent
# Documented in spite of their underscore: of named tuples, against clashes, and in `os`.
PUBLIC = {"_asdict", "_fields", "_exit"}

CHECKPOINT = "torch.distributed.checkpoint"
MODEL = "transformers:PreTrainedModel"
MODULE = "torch.nn:Module"
FAKE = "torch._subclasses.fake_tensor"
PRIVATE = {
    # torch
    "torch._dynamo": ("torch", "tells whether anything was compiled, without importing it"),
    "torch.utils._pytree": ("torch.utils", "is the logger of a warning that is not the user's"),
    "_functorch": ("torch", "holds the switch that lets compiled code run backward twice"),
    "_foreach_mul_": ("torch", "scales all gradients in one kernel; a loop launches hundreds"),
    "_get_layout": ("torch.serialization", "stands in the pickles that checkpoints are read from"),
    "_cdata": ("torch:UntypedStorage", "tells storages apart on meta, where data_ptr() is 0"),
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": (
        "torch.utils._python_dispatch",
        "knows torchao's quantized states without importing torchao",
    ),
    "torch.utils._python_dispatch.TorchDispatchMode": (
        "torch.utils._python_dispatch",
        "sees every operation: torch's own documentation of modes names it",
    ),
    "torch.utils._python_dispatch._disable_current_modes": (
        "torch.utils._python_dispatch",
        "computes with real tensors among fake ones",
    ),
    "_len_torch_dispatch_stack": ("torch._C", "tells torch's own code from code that calls it"),
    "_record_memory_history": (
        "torch.cuda.memory",
        "notes the code of allocations: torch's own guide to snapshots names it",
    ),
    "_dump_snapshot": ("torch.cuda.memory", "as _record_memory_history"),
    "_C": ("torch", "holds _len_torch_dispatch_stack, _storage_Use_Count, _swap_tensor_impl"),
    "_storage_Use_Count": ("torch._C", "tells when autograd adds up gradients in place"),
    "torch._compile": ("torch", "as torch._ops"),
    "torch._dynamo.eval_frame": ("torch._dynamo", "as torch._ops"),
    "torch._ops": ("torch", "is between an operation and its caller, which may be autograd"),
    "_swap_tensor_impl": ("torch._C", "changes the dtype of a fake parameter, as .to() does"),
    "torch.utils._pytree.tree_iter": ("torch.utils._pytree", "finds the tensors of an operation"),
    "torch.utils._pytree.tree_flatten": ("torch.utils._pytree", "as tree_iter"),
    "torch.utils._pytree.tree_unflatten": ("torch.utils._pytree", "as tree_iter, on the way back"),
    "torch._subclasses.fake_tensor.FakeTensorMode": (FAKE, "makes a plan without memory"),
    "torch._subclasses.fake_tensor.FakeTensor": (FAKE, "as FakeTensorMode"),
    "_make_wrapper_subclass": ("torch:Tensor", "puts torchao's fake state where its parts are"),
    "torch._subclasses.fake_tensor.is_fake": (
        FAKE,
        "leaves out a compiled kernel in a plan",
    ),
    "torch._subclasses.fake_tensor.DataDependentOutputException": (
        FAKE,
        "tells that a model has no plan",
    ),
    "torch._subclasses.fake_tensor.DynamicOutputShapeException": (
        FAKE,
        "as DataDependentOutputException",
    ),
    "torch._library.custom_ops.OPDEFS": (
        "torch._library.custom_ops",
        "finds the code of the chunked loss, whose memory a plan must see",
    ),
    "_init_fn": ("torch._library.custom_ops:CustomOpDef", "is that code"),
    "_local_scalar_dense": ("torch.ops:aten", "is how a host reads a tensor"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "torch.ops:aten",
        "needs memory of its own on a GPU, which a plan adds",
    ),
    "_schema": ("torch._ops:OpOverload", "tells operations that work in place"),
    "torch.distributed.tensor._sharding_prop.ShardingPropagator": (
        "torch.distributed.tensor._sharding_prop",
        "tries operations on whole fake tensors, which take no memory",
    ),
    "torch.testing._internal.distributed.fake_pg.FakeStore": (
        "torch.testing._internal.distributed.fake_pg",
        "stands for the other ranks in a plan",
    ),
    "_parameters": (MODULE, "takes small tensors out while the weights change their type"),
    "_buffers": (MODULE, "as _parameters"),
    "_apply": (MODULE, "is what every .to() goes through: bases stay float32"),
    "_load_from_state_dict": (MODULE, "meets a basis of another rank first: a clear error"),
    "_non_persistent_buffers_set": (MODULE, "tells which buffers no checkpoint holds"),
    "_forward_hooks": (MODULE, "shows that a head does more than its product"),
    "_forward_pre_hooks": (MODULE, "as _forward_hooks"),
    "_compiled_call_impl": (MODULE, "tells whether Module.compile() was called"),
    "_orig_mod": ("torch._dynamo:OptimizedModule", "tells what torch.compile has wrapped"),
    "_step_supports_amp_scaling": (
        "torch.optim:Adam",
        "makes the trainer unscale gradients before clipping, not the fused kernel after it",
    ),
    "_last_lr": (
        "torch.optim.lr_scheduler:LambdaLR",
        "must show the rate that a resumed run sets: monitors ask get_last_lr()",
    ),
    "_set_params_and_buffers_to_ignore_for_model": (
        "torch.nn.parallel:DistributedDataParallel",
        "keeps bases, which ranks have anyway, out of DDP's broadcasts",
    ),
    "_ddp_params_and_buffers_to_ignore": (
        "torch.nn.parallel:DistributedDataParallel",
        "holds what a user has excluded already, which the setter would forget",
    ),
    "_MEM_FORMAT_ENCODING": (f"{CHECKPOINT}.metadata", "stands in checkpoints' lists of contents"),
    "_StorageInfo": (f"{CHECKPOINT}.filesystem", "as _MEM_FORMAT_ENCODING"),
    f"{CHECKPOINT}._nested_dict.flatten_state_dict": (
        f"{CHECKPOINT}._nested_dict",
        "gives the names that torch saves an optimizer's state under",
    ),
    f"{CHECKPOINT}._nested_dict.unflatten_state_dict": (
        f"{CHECKPOINT}._nested_dict",
        "as flatten_state_dict, on the way back",
    ),
    f"{CHECKPOINT}._traverse.set_element": (
        f"{CHECKPOINT}._traverse",
        "as unflatten_state_dict, for a part of the names",
    ),
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": (
        "torch.distributed.tensor._utils",
        "tells which rows of a DTensor this rank holds",
    ),
    # Lightning
    "_compiler_ctx": ("lightning.pytorch:LightningModule", "tells that the module is compiled"),
    "_combined_loader": (
        "lightning.pytorch.loops.fit_loop:_FitLoop",
        "drops the loader of the batch size that was given before the found one",
    ),
    "_data_parallel_size": (
        "lightning.pytorch.strategies:ModelParallelStrategy",
        "is the number of all ranks, known late; the constructor's 'auto' is that of the nodes",
    ),
    "_tensor_parallel_size": (
        "lightning.pytorch.strategies:ModelParallelStrategy",
        "as _data_parallel_size",
    ),
    "_save_distributed_checkpoint": (
        "lightning.pytorch.strategies:ModelParallelStrategy",
        "tells a folder from a file, where ours are written otherwise",
    ),
    "_save_checkpoint": (
        "lightning.pytorch.callbacks:ModelCheckpoint",
        "saves outside Lightning's own moments, and writes the score beside the best",
    ),
    "_should_skip_saving_checkpoint": (
        "lightning.pytorch.callbacks:ModelCheckpoint",
        "keeps sanity checks and repeated steps out, as Lightning's own saves do",
    ),
    "_last_global_step_saved": (
        "lightning.pytorch.callbacks:ModelCheckpoint",
        "keeps a resumed run from saving the state that it was given",
    ),
    "_monitor_candidates": (
        "lightning.pytorch.callbacks:ModelCheckpoint",
        "collects the metrics after trainer.validate, where the callback looks away",
    ),
    "_save_monitor_checkpoint": (
        "lightning.pytorch.callbacks:ModelCheckpoint",
        "as _monitor_candidates: saves if they are the best",
    ),
    "_extract_lr": (
        "lightning.pytorch.callbacks:LearningRateMonitor",
        "leaves out groups without a rate, at which the monitor stops the run",
    ),
    # Hydra, transformers and datasets
    "hydra._internal.utils.get_args_parser": (
        "hydra._internal.utils",
        "reads the options as Hydra does: what is composed from them is looked at first",
    ),
    "_keys_to_ignore_on_save": (MODEL, "keeps bases out of exports, and says what is in no file"),
    "_keys_to_ignore_on_load_missing": (MODEL, "says which tensors have their values already"),
    "_move_missing_keys_from_meta_to_device": (MODEL, "leaves tensors with values where they are"),
    "_device_mesh": (MODEL, "tells transformers that the model is sharded"),
    "_is_distributed_loading_by_transformers": (MODEL, "as _device_mesh"),
    "_no_split_modules": (MODEL, "names the blocks; no public name does"),
    "_resolve_parallel_plans": (MODEL, "gives the tensor-parallel plan as it will be applied"),
    "_model_mapping": ("transformers:AutoModelForCausalLM", "finds the class of a configuration"),
    "_get_lr": ("transformers.optimization:Adafactor", "is the rate that Adafactor would choose"),
    "_fingerprint": ("datasets:Dataset", "covers the hub's revision in the cache's key"),
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in {"_", *PUBLIC}


@cache
def names_defined_by(kind: type) -> frozenset[str]:
    """What a class defines: its attributes, and what its methods store on `self`."""
    found = set(vars(kind))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):  # written in C
        return frozenset(found)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__setattr__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return frozenset(found)


def names_of_ours(tree: ast.AST) -> Iterator[str]:
    """What a module of lit_ft defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if isinstance(node, ast.arg):
            yield node.arg
        if isinstance(node, ast.alias):
            yield node.asname or node.name
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            yield node.attr


def imported_or_quoted(node: ast.AST) -> Iterator[str]:
    """The full names of other libraries in an import, or in a string such as "torch._dynamo"."""
    if isinstance(node, ast.ImportFrom) and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from re.findall(r"^(?:torch|lightning|transformers|peft)(?:\.\w+)+$", node.value)


def looked_up(node: ast.AST) -> Iterator[str]:
    """The name in `x.name`, and in `getattr(x, "name")` and its like."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    if (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr")
        and isinstance(node.args[1], ast.Constant)
    ):
        yield node.args[1].value


def asked_of_super(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()":
            yield node.attr


def used_in_class(tree: ast.ClassDef, kind: type) -> Iterator[str]:
    """The names that a class of lit_ft overrides or shares with other libraries' base classes."""
    ours = {*names_of_ours(tree), *(name for node in ast.walk(tree) for name in looked_up(node))}
    for base in kind.__mro__:
        if base is not object and not base.__module__.startswith("lit_ft"):
            yield from ours & names_defined_by(base)


@cache
def uses() -> dict[str, set[str]]:
    """The private names of other libraries in lit_ft, with the files that use them."""
    trees = {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
    ours = {name for tree in trees.values() for name in names_of_ours(tree)}
    found: dict[str, set[str]] = {}

    def add(name: str, path: Path) -> None:
        found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())

    for path, tree in trees.items():
        for node in ast.walk(tree):
            for full in imported_or_quoted(node):
                if not full.startswith("lit_ft") and any(map(is_private, full.split("."))):
                    add(full, path)
            for name in looked_up(node):
                if is_private(name) and name not in ours:
                    add(name, path)
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        module = import_module(".".join(parts).removesuffix(".__init__"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            kind = getattr(module, node.name, None)
            # A class in a function has bases that only a call knows.
            named = used_in_class(node, kind) if isinstance(kind, type) else asked_of_super(node)
            for name in filter(is_private, named):
                add(name, path)
    return found


def has(owner: Any, name: str) -> bool:
    """Whether a module or class has the name, or an instance will: its code stores or asks it."""
    if hasattr(owner, name):
        return True
    if isinstance(owner, ModuleType):
        try:
            return bool(import_module(f"{owner.__name__}.{name}"))
        except ImportError:
            return False
    return any(name in names_defined_by(base) for base in owner.__mro__)


def test_every_private_name_is_listed_with_its_reason() -> None:
    unlisted = {name: sorted(files) for name, files in uses().items() if name not in PRIVATE}
    assert not unlisted, "list them in PRIVATE, with the reason why no public name serves"


def test_every_listed_name_is_used() -> None:
    assert not PRIVATE.keys() - uses().keys()


@pytest.mark.parametrize("name", PRIVATE)
def test_the_installed_library_has_the_name(name: str) -> None:
    where, reason = PRIVATE[name]
    module, _, kind = where.partition(":")
    owner = import_module(module)
    owner = getattr(owner, kind) if kind else owner
    assert has(owner, name.rpartition(".")[2]), f"{where} has lost {name}, which {reason}"
