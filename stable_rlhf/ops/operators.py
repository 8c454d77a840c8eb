"""How the call of an operation, one object, reaches autograd, and torch.compile where it traces.

A registered operator takes tensors, numbers and strings alone: `Form` makes its arguments from the fields of the call's
class. Elsewhere the object goes to the same body as it is, by an autograd function of the same behaviour: torch.library
looks through all arguments once for each of them, which at thirty costs 0.2 ms a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor", float: "float", int: "SymInt", bool: "bool", str: "str", torch.dtype: "ScalarType",
    tuple[bool, ...]: "bool[]",
}  # fmt: skip

Body = Callable[[Any], tuple[Tensor, ...]]


def needs_operator(value: Tensor, backend: str = "") -> bool:
    """Whether a call has to go through a registered operator: torch.compile traces it, or the tensor is of a type that
    stands for others (the references, backend "torch", take all of these but fake tensors as they are)."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():  # make_fx, jit.trace: they see operators alone
        return True
    kind = type(value)
    return kind is not Tensor and kind is not nn.Parameter and (backend != "torch" or hasattr(value, "fake_mode"))


@contextmanager
def autograd_inside(device: torch.device) -> Iterator[None]:
    """Autograd in the body of an operator, where PyTorch has switched it off; autocast is off. What this graph saves is
    its own: a caller's hooks, such as those of checkpoint, count what is saved outside."""
    keys = torch._C.DispatchKey
    autograd, views = keys.AutogradFunctionality, keys.ADInplaceOrView
    with (
        torch._C._SetExcludeDispatchKeyGuard(autograd, False),
        torch._C._SetExcludeDispatchKeyGuard(views, False),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        yield


def refuse_second_derivative(op: str) -> None:
    """At the start of the backward pass of an operation whose gradients were made with its value: under create_graph
    they would pass for constants."""
    if torch.is_grad_enabled():  # once_differentiable costs more than the rest of such a backward pass
        raise RuntimeError(f"{op}: no second derivatives; call backward without create_graph")


class Form:
    """How objects of one class, a NamedTuple or a dataclass, lie in an operator's arguments: field by field.

    An object among the fields takes as many places as it has fields, a field that may be a tensor or a number two.
    """

    def __init__(self, kind: type) -> None:
        names = getattr(kind, "_fields", None) or [field.name for field in dataclasses.fields(kind)]
        hints = get_type_hints(kind)
        self.kind = kind
        self.parts: list[tuple[str, Form | bool]] = []  # each field, and its own form or whether it takes two places
        self.arguments: list[tuple[str, str]] = []  # type and name
        for name in names:
            options = get_args(hints[name]) if hints[name] not in _SCHEMA else ()
            types = [t for t in options or (hints[name],) if t is not type(None)]
            optional = "?" if type(None) in options else ""
            if types[0] not in _SCHEMA:
                form = Form(types[0])
                self.parts.append((name, form))
                self.arguments += form.arguments
            elif Tensor in types and float in types:
                self.parts.append((name, True))
                self.arguments += [("Tensor?", name), ("float?", f"{name}_number")]
            else:
                self.parts.append((name, False))
                self.arguments.append((_SCHEMA[types[0]] + optional, name))

    @property
    def schema(self) -> str:
        return ", ".join(f"{kind} {name}" for kind, name in self.arguments)

    def flat(self, call: Any) -> list[Any]:
        """The arguments of an operator for `call`."""
        flat: list[Any] = []
        for name, part in self.parts:
            value = getattr(call, name)
            if isinstance(part, Form):
                flat += part.flat(value)
            elif part:
                flat += (value, None) if isinstance(value, Tensor) else (None, value)
            else:
                flat.append(value)
        return flat

    def restored(self, flat: Sequence[Any]) -> Any:
        """The call whose arguments they are."""
        return self._next(iter(flat))

    def _next(self, flat: Iterator[Any]) -> Any:
        values = {}
        for name, part in self.parts:
            value = part._next(flat) if isinstance(part, Form) else next(flat)
            if part is True:
                number = next(flat)
                value = number if value is None else value
            values[name] = value
        if issubclass(self.kind, tuple):
            return self.kind(**values)
        restored = object.__new__(self.kind)  # was checked when it was made
        vars(restored).update(values)
        return restored

    def gradients(self, by_name: dict[str, Tensor | None]) -> list[Tensor | None]:
        """What an operator's backward returns: a gradient where there is one, None for all other arguments."""
        return [by_name.get(name) for _, name in self.arguments]


def register_operator(name: str, form: Form, results: int, body: Body, shapes: Body) -> Any:
    """The operator `stable_rlhf::name`: `body` makes its results of a call, `shapes` what they look like."""
    operator = torch.library.custom_op(
        f"stable_rlhf::{name}",
        lambda *flat: body(form.restored(flat)),
        mutates_args=(),
        schema=f"({form.schema}) -> ({', '.join(['Tensor'] * results)})",
    )
    operator.register_fake(lambda *flat: shapes(form.restored(flat)))
    return operator


class Differentiable:
    """An operation with a backward pass, as an operator and as an autograd function.

    Args:
        kind: the class of its calls.
        inputs: the fields of it, tensors or None, that get gradients.
        body, shapes: as in `register_operator`.
        setup: setup(ctx, call, results) keeps what the backward pass needs.
        backward: backward(ctx, *upstream) gives the gradients of the inputs.
        differentiable: how many of the results, the first, autograd is to know. The others are detached.
    """

    def __init__(
        self,
        name: str,
        kind: type,
        inputs: tuple[str, ...],
        results: int,
        *,
        body: Body,
        shapes: Body,
        setup: Callable[[Any, Any, tuple[Tensor, ...]], None],
        backward: Callable[..., Sequence[Tensor | None]],
        differentiable: int,
    ) -> None:
        form = Form(kind)
        self.form, self.inputs, self.differentiable = form, inputs, differentiable
        self.operator = register_operator(name, form, results, body, shapes)
        self.operator.register_autograd(
            lambda ctx, *upstream: tuple(form.gradients(dict(zip(inputs, backward(ctx, *upstream), strict=True)))),
            setup_context=lambda ctx, inputs, output: setup(ctx, form.restored(inputs), output),
        )

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, call: Any, *leaves: Tensor | None) -> tuple[Any, ...]:
                outputs = body(call)
                setup(ctx, call, outputs)
                # Autograd lets what is no tensor pass; each tensor takes it some microseconds.
                return *outputs[:differentiable], outputs[differentiable:]

            @staticmethod
            def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
                return (None, *backward(ctx, *upstream[:differentiable]))

        self.function = Function

    def __call__(self, call: Any) -> tuple[Tensor, ...]:
        leaves = [getattr(call, name) for name in self.inputs]
        if any(leaf is not None and needs_operator(leaf) for leaf in leaves):
            results = self.operator(*self.form.flat(call))
            return *results[: self.differentiable], *(x.detach() for x in results[self.differentiable :])
        *first, others = self.function.apply(call, *leaves)
        return *first, *others


# -- losses, whose gradients are made along with them ------------------------------------------------------------------


def loss_operation(
    name: str, kind: type, inputs: tuple[str, ...], results: int, *, body: Body, shapes: Body
) -> Differentiable:
    """A loss, the first of the results; the last of them are its gradients by the `inputs`, of which the call's `needs`
    says where they are made. An empty tensor stands for one that is not."""

    def setup(ctx: Any, call: Any, outputs: tuple[Tensor, ...]) -> None:
        ctx.needs = call.needs
        ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients would be as large as they are
        ctx.save_for_backward(*outputs[-len(inputs) :])

    def backward(ctx: Any, upstream: Tensor, *_unused: Any) -> list[Tensor | None]:
        refuse_second_derivative(name)
        return _hand_over(ctx, upstream)

    return Differentiable(
        name, kind, inputs, results, body=body, shapes=shapes, setup=setup, backward=backward, differentiable=1
    )


def _hand_over(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The kept gradients times the upstream gradient: in place where nobody can ask for them again, so that autograd
    takes them as they are and no copy is made."""
    kept = ctx.saved_tensors  # once: checkpointing without re-entry hands each of them out a single time
    gradients: list[Tensor | None] = [g if need else None for g, need in zip(kept, ctx.needs, strict=True)]
    traced = torch.compiler.is_compiling() or any(type(g) is not Tensor for g in (*kept, upstream))
    mapped = torch._C._are_functorch_transforms_active()  # by vmap: many upstream gradients at once
    if traced or mapped or torch._C._autograd._get_current_graph_task_keep_graph():
        return [None if g is None else g * upstream for g in gradients]
    if upstream.device.type == "cuda":
        from stable_rlhf.kernels.policy import scale_

        return [None if g is None else scale_(g, upstream) for g in gradients]
    if float(upstream) == 1.0:
        return gradients
    return [None if g is None else g.mul_(upstream) for g in gradients]


def requires_grad(*inputs: Tensor | None) -> tuple[bool, ...]:
    """Where a gradient is asked for."""
    return tuple([torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs])


def shapes_of_gradients(needs: Sequence[bool], *inputs: Tensor | None) -> list[Tensor]:
    """What the gradients of a `loss_operation` look like: contiguous, empty where none is made."""
    like = next(x for x in inputs if x is not None)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else like.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    ]
