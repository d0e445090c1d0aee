"""Functions of tensors as programs, on backends that run Python op by op.

JAX compiles by itself. TensorFlow makes a graph of a function. PyTorch records the
operations that a function calls, and then runs these without the function's Python. No
compiler is needed, and recording takes about as long as a few calls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras


def can_trace() -> bool:
    """Whether `trace` supports the backend."""
    return keras.backend.backend() in ("tensorflow", "torch")


def trace(
    function: Callable[..., Any], arguments: Sequence[Any], donated: Sequence[int] = ()
) -> Callable[..., Any]:
    """A program of a pure function.

    Args:
        function: Takes tensors and returns a tuple of tensors. It may use their values
            only in operations; on PyTorch not in `ops.cond` either, nor so that the
            shape of a tensor depends on them.
        arguments: List of tensors; the program is for these shapes and dtypes.
        donated: Numbers of the arguments that the caller won't use again. PyTorch
            writes into them where `torch.scatter` would copy them, if nothing else
            reads them afterwards.

    Returns:
        A function of as many tensors that returns a tuple or list of tensors.

    Raises:
        Exception: The function can't be traced; the error is its own or the backend's.
    """
    if keras.backend.backend() == "torch":
        return _trace_torch(function, arguments, donated)

    import tensorflow as tf

    graph = tf.function(function, autograph=False)
    shapes = [tf.TensorSpec(array.shape, array.dtype) for array in arguments]
    return graph.get_concrete_function(*shapes)


def _trace_torch(function, arguments, donated):
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.dialect.common.cse_pass import CSEPass

    refuse_reads, refuse_shapes = _refuse_reads(), _refuse_shapes()

    def unread(*arguments):
        with refuse_reads, refuse_shapes:
            return function(*arguments)

    program = make_fx(torch.func.functionalize(unread))(*arguments)
    _leave_memory_alone(program.graph)
    _fold_constants(program)
    # Equal operations are computed once.
    program = CSEPass()(program).graph_module
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    _write_in_place(program.graph, [inputs[number] for number in donated])
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def _refuse_reads():
    """A context in which values of tensors can be read by operations only.

    PyTorch itself refuses `item` and `bool` of a tensor that is traced. By the methods
    below it hands out uninitialized memory, which would become a constant.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    tensor = torch.Tensor
    # Printing too: it's meant for each call.
    reads = {tensor.numpy, tensor.__array__, tensor.__dlpack__, tensor.tolist}
    reads |= {tensor.data_ptr, tensor.untyped_storage, tensor.__reduce_ex__}
    reads |= {tensor.__repr__, tensor.__format__}

    class RefuseReads(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in reads:
                raise ValueError(
                    "`function` must use values of tensors in operations only. "
                    f"Received: a call of `Tensor.{function.__name__}`"
                )
            return function(*args, **(kwargs or {}))

    return RefuseReads()


def _refuse_shapes():
    """A context without operations whose result has a shape that depends on values."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def depends(operation, args):
        if torch.Tag.dynamic_output_shape not in operation.tags:
            return False
        if operation is not torch.ops.aten.index.Tensor:
            return True
        dtypes = {index.dtype for index in args[1] if index is not None}
        return not dtypes.isdisjoint((torch.bool, torch.uint8))

    class RefuseShapes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if depends(operation, args):
                raise ValueError(
                    "`function` must use tensors whose shapes don't depend on values. "
                    f"Received: a call of {operation}"
                )
            return operation(*args, **(kwargs or {}))

    return RefuseShapes()


def _leave_memory_alone(graph):
    """Replaces operations that write into their first argument by those that don't.

    Raises:
        ValueError: One has no such twin, or something else may read its argument.
    """
    import torch

    for node in graph.nodes:
        if node.op != "call_function" or not _writes(node.target):
            continue
        packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
        twin = getattr(torch.ops.aten, packet.removesuffix("_"), None)
        source = node.args[0]
        is_own = list(source.users) == [node] and source.op == "call_function"
        if not hasattr(twin, overload) or not is_own or _is_view(source.target):
            raise ValueError(f"`function` must not write to memory. Received: {node}")
        node.target = getattr(twin, overload)


def _writes(target):
    """Whether an operation writes to memory of its arguments."""
    # Python's `getitem`, which takes a tuple of results apart, has no schema.
    return hasattr(target, "_schema") and target._schema.is_mutable


def _is_view(target):
    """Whether an operation's result may share the memory of its arguments."""
    if not hasattr(target, "_schema"):
        return True
    return any(result.alias_info is not None for result in target._schema.returns)


def _fold_constants(program):
    """Computes all that depends on no argument, once."""
    import torch

    constants, number = {}, 0
    for node in list(program.graph.nodes):
        if node.op == "get_attr":
            constants[node] = getattr(program, node.target)
        elif node.op == "call_function" and not _is_random(node.target):
            if all(source in constants for source in node.all_input_nodes):
                args, kwargs = torch.fx.node.map_arg(
                    (node.args, node.kwargs), constants.__getitem__
                )
                constants[node] = node.target(*args, **kwargs)
    for node, value in constants.items():
        is_needed = any(user not in constants for user in node.users)
        if node.op == "get_attr" or not is_needed or not torch.is_tensor(value):
            continue
        name = f"_constant_{number}"
        program.register_buffer(name, value, persistent=False)
        with program.graph.inserting_before(node):
            node.replace_all_uses_with(program.graph.get_attr(name))
        number += 1


def _is_random(target):
    import torch

    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _write_in_place(graph, donated):
    """Lets scatters into donated arguments write there instead of into a copy.

    Only if nothing reads the argument later, or holds a view of it.
    """
    import torch

    aten, seen = torch.ops.aten, set()
    for node in graph.nodes:
        seen.add(node)
        if node.target is not aten.scatter.src or node.args[0] not in donated:
            continue
        others = [user for user in node.args[0].users if user is not node]
        if all(user in seen and user.target is aten.gather.default for user in others):
            node.target = aten.scatter_.src
