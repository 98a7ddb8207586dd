"""Names of torch, Lightning and others that nobody documents: a test for each, and all that the package uses."""

import ast
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import lightning_abpem

FILES = sorted(Path(lightning_abpem.__file__).parent.rglob("*.py"))
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace", "_weakrefset", "_gap"}
"""Private by their looks alone: of named tuples, `os` and the standard library; the end of a figure's name."""


def versions_rise():
    x = torch.zeros(2)
    before = x._version
    x.add_(1)
    return x._version == before + 1


def views_know_their_base():
    x = torch.zeros(2)
    return x[:1]._base is x and x._base is None


def views_are_told():
    x = torch.zeros(2)
    return x[:1]._is_view() and not x._is_view()


def hooks_of_tensors():
    """The table of a tensor, that of a module, and their names are the same word."""
    x: Any = torch.zeros(2, requires_grad=True)
    module = nn.Identity()
    before = x._backward_hooks
    x.register_hook(lambda gradient: None)
    module.register_full_backward_hook(lambda *_: None)
    return before is None and len(x._backward_hooks) == 1 and len(module._backward_hooks) == 1


def hooks_of_modules(name, register, **options):
    def check():
        module = nn.Identity()
        handle = getattr(module, register)(lambda *_: None, **options)
        return list(module.__dict__[name]) == [handle.id]

    return check


def modules_keep(name, put, get):
    """Modules have a table of this name in `__dict__`, and what is put into the module is there."""

    def check():
        module = nn.Module()
        put(module)
        return get(module.__dict__[name])

    return check


def compiled_modules_have_a_call():
    module = nn.Identity()
    before = module._compiled_call_impl
    module.compile(backend="eager")
    return before is None and callable(module._compiled_call_impl)


def calls_go_through_it():
    module: Any = nn.Identity()
    module._call_impl = lambda x: x + 1
    return module(torch.zeros(1)) == 1


def compiled_functions_know_the_plain_one():
    def double(x):
        return 2 * x

    compiled: Any = torch.compile(double, backend="eager")
    return compiled._torchdynamo_orig_callable is double


def compiled_modules_know_the_plain_one():
    module = nn.Identity()
    compiled: Any = torch.compile(module, backend="eager")
    return [name for name, own in compiled.named_modules() if own is module] == ["_orig_mod"]


def marks_of_the_compiler():
    """Compiled calls mark the parameters that they read."""
    module = nn.Linear(2, 2)
    torch.compile(lambda x: module(x), backend="eager")(torch.ones(1, 2))
    marks = module.weight.__dict__
    return len(marks) > 0 and all(name.startswith("_dynamo") for name in marks)


def fused_optimizers_take_a_scale():
    parameter = nn.Parameter(torch.ones(1))
    optimizer: Any = torch.optim.Adam([parameter], lr=1.0, fused=True)
    parameter.grad = torch.ones(1)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()  # which is none, by `found_inf`
    return optimizer._step_supports_amp_scaling and parameter.item() == 1


def nodes_know_their_dtypes():
    x = torch.ones(1, requires_grad=True)
    node: Any = x.half().grad_fn
    return [made.dtype for made in node._input_metadata] == [torch.float16]


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 1
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.count


def scripts_list_their_attributes():
    script = torch.jit.script(Scripted())
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(script._c._type())
    kinds = kind.get_attributes()
    return {name: is_parameter for name, (_, is_parameter) in kinds.items() if name in ("count", "weight")} == {
        "count": False,
        "weight": True,
    }


def scripts_give_and_take_attributes():
    script = torch.jit.script(Scripted())
    script._c.setattr("count", 3)
    return script._c.getattr("count") == 3 and script(torch.ones(1)) == 3


def function_modes_are_listed():
    from torch.overrides import _get_current_function_mode_stack

    with TorchFunctionMode() as mode:
        return _get_current_function_mode_stack()[-1] is mode


def trees_are_taken_apart():
    tree = {"a": [torch.ones(1), 2], "b": (3,)}
    leaves, spec = pytree.tree_flatten(tree)
    doubled = pytree.tree_map(lambda x: 2 * x, tree)
    return (
        leaves == pytree.tree_leaves(tree)
        and isinstance(spec, pytree.TreeSpec)
        and pytree.tree_unflatten(leaves, spec) == tree
        and doubled["b"] == (6,)
        and pytree.tree_map_only(int, lambda x: x + 1, tree)["a"] == [torch.ones(1), 3]
    )


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("an overridden function")


def subclasses_can_be_read_plainly():
    x = torch.ones(1).as_subclass(Subclass)
    with torch._C.DisableTorchFunctionSubclass():
        return (x + 1).shape == (1,)


def wrapped_tensors_are_told():
    found = []

    def look(x):
        found.append(torch._C._functorch.is_functorch_wrapped_tensor(x))
        return x

    torch.func.vmap(look)(torch.ones(2))
    return found == [True] and not torch._C._functorch.is_functorch_wrapped_tensor(torch.ones(2))


def metrics_move_by_it():
    class Metric(torchmetrics.MeanMetric):
        def _apply(self, function, *args, **kwargs):
            moved.append(True)
            return super()._apply(function, *args, **kwargs)

    moved: list[bool] = []
    return isinstance(Metric().to("cpu"), Metric) and moved == [True]


def models_know_their_trainer():
    model, trainer = LightningModule(), Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    model.trainer = trainer
    return model._trainer is trainer


def dual_levels_are_counted():
    with forward_ad.dual_level():
        inside = forward_ad._current_level
    return (inside, forward_ad._current_level) == (0, -1)


TABLE = {
    "_version": versions_rise,
    "_base": views_know_their_base,
    "_is_view": views_are_told,
    "_backward_hooks": hooks_of_tensors,
    "_backward_pre_hooks": hooks_of_modules("_backward_pre_hooks", "register_full_backward_pre_hook"),
    "_forward_hooks": hooks_of_modules("_forward_hooks", "register_forward_hook"),
    "_forward_hooks_always_called": hooks_of_modules(
        "_forward_hooks_always_called", "register_forward_hook", always_call=True
    ),
    "_forward_hooks_with_kwargs": hooks_of_modules(
        "_forward_hooks_with_kwargs", "register_forward_hook", with_kwargs=True
    ),
    "_forward_pre_hooks": hooks_of_modules("_forward_pre_hooks", "register_forward_pre_hook"),
    "_forward_pre_hooks_with_kwargs": hooks_of_modules(
        "_forward_pre_hooks_with_kwargs", "register_forward_pre_hook", with_kwargs=True
    ),
    "_state_dict_hooks": hooks_of_modules("_state_dict_hooks", "register_state_dict_post_hook"),
    "_state_dict_pre_hooks": hooks_of_modules("_state_dict_pre_hooks", "register_state_dict_pre_hook"),
    "_load_state_dict_pre_hooks": hooks_of_modules("_load_state_dict_pre_hooks", "register_load_state_dict_pre_hook"),
    "_load_state_dict_post_hooks": hooks_of_modules(
        "_load_state_dict_post_hooks", "register_load_state_dict_post_hook"
    ),
    "_current_level": dual_levels_are_counted,
    "_modules": modules_keep(
        "_modules", lambda own: own.add_module("a", nn.Identity()), lambda own: list(own) == ["a"]
    ),
    "_parameters": modules_keep(
        "_parameters", lambda own: own.register_parameter("a", None), lambda own: own == {"a": None}
    ),
    "_buffers": modules_keep("_buffers", lambda own: own.register_buffer("a", None), lambda own: own == {"a": None}),
    "_non_persistent_buffers_set": modules_keep(
        "_non_persistent_buffers_set",
        lambda own: own.register_buffer("a", None, persistent=False),
        lambda own: own == {"a"},
    ),
    "_compiled_call_impl": compiled_modules_have_a_call,
    "_call_impl": calls_go_through_it,
    "_torchdynamo_orig_callable": compiled_functions_know_the_plain_one,
    "_orig_mod": compiled_modules_know_the_plain_one,
    "_dynamo": marks_of_the_compiler,
    "_step_supports_amp_scaling": fused_optimizers_take_a_scale,
    "_input_metadata": nodes_know_their_dtypes,
    "_type": scripts_list_their_attributes,
    "_c": scripts_give_and_take_attributes,
    "_ConvNd": lambda: issubclass(nn.Conv2d, nn.modules.conv._ConvNd),
    "_BatchNorm": lambda: issubclass(nn.BatchNorm2d, nn.modules.batchnorm._BatchNorm),
    "_NormBase": lambda: issubclass(nn.InstanceNorm2d, nn.modules.batchnorm._NormBase),
    "_get_current_function_mode_stack": function_modes_are_listed,
    "_pytree": trees_are_taken_apart,
    "_C": subclasses_can_be_read_plainly,
    "_functorch": wrapped_tensors_are_told,
    "_trainer": models_know_their_trainer,
    "_tensor_parallel_size": lambda: ModelParallelStrategy(tensor_parallel_size=3)._tensor_parallel_size == 3,
    "_apply": metrics_move_by_it,
    "_plot": lambda: callable(torchmetrics.Metric._plot),
    "_bit_generator": lambda: hasattr(np.random.RandomState(0)._bit_generator, "state"),
}


@pytest.mark.parametrize("name", TABLE)
def test_private_name(name):
    assert TABLE[name](), f"{name} is no longer what the package takes it for"


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *product(("test", "validate", "predict"), ("inference_mode", "max_batches", "num_dataloaders")),
        *product(("test", "validate"), ("verbose",)),
    ],
)
def test_undocumented_name_of_a_loop(stage, name):
    """`inference_mode` and `verbose` are asked for with a default: were they gone, nothing else would tell."""
    loop = getattr(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), f"{stage}_loop")
    assert hasattr(type(loop), name) or name in vars(loop)


# ------------------------------------------------------------------------------------------------ what the package uses


def is_private(name):
    return re.fullmatch(r"_[A-Za-z](\w*[^\W_])?", name) is not None


def own_names(trees):
    """Attributes, functions and classes that the package defines itself."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_super(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "super"


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_names():
    """Private attributes of the classes that the package's objects are not of, but are used with."""
    script, trainer = torch.jit.script(Scripted()), Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))])
    objects = [torch.ones(1), nn.Identity(), script, LightningModule(), optimizer, trainer, trainer.strategy]
    objects += [trainer.test_loop, trainer.validate_loop, trainer.predict_loop, trainer.precision_plugin]
    return {name for own in objects for name in dir(own) if is_private(name)}


def private_uses(tree, own, foreign):
    """Yield private names that others define: attributes, names in strings, parts of imports."""
    here = own_names([tree])
    words = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    words |= {id(part) for node in ast.walk(tree) if is_slots(node) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if (
                node.attr not in own
                or (node.attr in foreign - here and not is_self(node.value))
                or is_super(node.value)
            ):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words:
            if is_private(node.value) and (node.value not in own or node.value in foreign):
                yield node.value
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("lightning_abpem"):
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from (name for name in parts if is_private(name))


def is_slots(node):
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__"


def test_every_private_name_in_use_is_in_the_table():
    trees = [ast.parse(path.read_text()) for path in FILES]
    own, foreign = own_names(trees), foreign_names()
    used = {name for tree in trees for name in private_uses(tree, own, foreign)}
    assert used - DOCUMENTED == set(TABLE)


def test_uses_are_found_in_any_form():
    tree = ast.parse(
        "from torch.a._b import _c\n"
        "class A:\n    __slots__ = ('_p',)\n    def _m(self): self._own = x._d, self._m, super()._f\n"
        "getattr(x, '_e')\nx._version\ny._own\nf'{x}_step'\n"
    )
    found = set(private_uses(tree, own_names([tree]) | {"_version", "_f"}, {"_version", "_own"}))
    assert found == {"_b", "_c", "_d", "_e", "_f", "_version"}
