"""Notes each operation of a run, above autograd, and refuses what no Program can hold."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.autograd_function import custom_function_call
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from metafast.kernels.noise import Noise
from metafast.program.aliases import Aliases, written
from metafast.program.interception import (
    OtherCoins,
    ValueReads,
    forget_optimised_scripts,
    functions_kept_whole,
    in_this_thread,
    other_random_states,
    refuse_backward_hooks,
)
from metafast.program.noise import Draw, Source, above_autograd, draws, replacement
from metafast.program.operation import (
    DETACHING,
    CaptureError,
    Constant,
    FunctionCall,
    Input,
    Made,
    Operation,
    Recording,
    Ref,
    Weight,
    by_name,
    refs_in,
)
from metafast.program.refusals import (
    DROPOUT,
    PASSING_ON,
    READS_VALUES,
    failure,
    refuse_draw,
    remedy_of_reading,
    selects,
    value_reader,
)
from metafast.program.user_lines import error_line, user_line

_SEEDS = itertools.count(0x6D65_7461_6661_7374)
"""Seeds that no model sets by itself."""


class Recorder(SchemaCheckMode, Source):
    """Notes each operation of a run (see ``record``).

    torch lets three classes of modes in at the PreDispatch key; this one takes the place of ``SchemaCheckMode``.

    Attributes:
        recording: what has been noted.
        inputs: the tensors that the module is given.
    """

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self.model = model
        self.inputs = inputs
        self.recording = Recording(inputs=[t.shape for t in inputs], dtypes=[t.dtype for t in inputs])
        self.aliases = Aliases(self.emit, self.refuse)
        for i, tensor in enumerate(inputs):
            self.aliases.enter(tensor, Input(i))
        for name, parameter in model.named_parameters():
            self.aliases.enter(parameter, Weight(name))
        for buffer in model.buffers():
            self.aliases.enter(buffer, Constant(buffer))
        self.paths = {module: name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.traits: dict[Made, tuple[bool, bool]] = {}
        self.drawn: set[Ref] = set()
        self.refusal: CaptureError | None = None
        self.failure: tuple[BaseException | None, str] = None, ""
        self.inside: type | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to leave this class out of it

    # What a run may do is decided in __torch_dispatch__; SchemaCheckMode's own entry would clear its lists.
    def __enter__(self) -> Recorder:
        TorchDispatchMode.__enter__(self)
        return self

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Records all that this thread does in the ``with`` block.

        Meanwhile torch's default generator, which all threads share, has a seed by which one that the model sets is
        told from it. No two recordings have the same, so that other threads do not draw the same numbers twice; a seed
        that they set is lost.
        """
        refuse_backward_hooks(self.model)
        states = other_random_states()
        with ExitStack() as stack:
            stack.callback(torch.set_rng_state, torch.get_rng_state())
            self.seed = next(_SEEDS)
            torch.default_generator.manual_seed(self.seed)
            # TorchScript's optimiser would take gradients into its own hands, where no operation can be seen.
            stack.enter_context(torch.jit.optimized_execution(False))
            forget_optimised_scripts(self.model)
            enter, leave = in_this_thread(self._enter_module), in_this_thread(self._leave_module)
            stack.callback(register_module_forward_pre_hook(enter).remove)
            stack.callback(register_module_forward_hook(leave, always_call=True).remove)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(above_autograd(self))
            stack.enter_context(functions_kept_whole(self))
            stack.enter_context(ValueReads(self))
            try:
                yield
            except Exception as error:
                if self.refusal is not None or isinstance(error, CaptureError):
                    raise self.refusal or error from None
                raise failure(self.model, self._place_of(error), self.inputs, error) from error
        if self.refusal is not None:  # and the module caught it
            raise self.refusal
        if states != other_random_states():
            raise OtherCoins(type(self.model).__name__)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs ``func`` and notes it."""
        kwargs = kwargs or {}
        if self.silent:
            return func(*args, **kwargs)
        if self.inside is not None:
            self._check_closure(func, args, kwargs)
            return func(*args, **kwargs)
        if draws(func, args, kwargs):
            return self._drawn(func, args, kwargs)
        refs, named = self.refs(args), self.refs(kwargs)
        self._refuse_values(func, refs, named)
        if func._schema.is_mutable:
            self.aliases.check(func, args, kwargs)
        # The call itself goes to the kernels that the module would reach without a recorder.
        with torch._C._DisablePythonDispatcher():
            out = func(*args, **kwargs)
        if func._schema.is_mutable and self.aliases.changed(func, args, kwargs, refs, named):
            return out
        self.note(func, refs, named, out)
        return out

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Computes what draws random numbers of numbers from a counter, and notes both."""
        compute = replacement(func)
        seeded = torch.default_generator.initial_seed() != self.seed
        refuse_draw(func, kwargs, (compute is not None, seeded), self.refuse)
        assert compute is not None
        with self:
            return compute(self, by_name(func, args, kwargs))

    def numbers(self, noise: Noise, like: Tensor | None, device: torch.device) -> Tensor:
        """Notes a draw; where it takes its shape from a value of the batch, other batches may give it another one."""
        noise = replace(noise, number=self.recording.draws)
        self.recording.draws += 1
        read = () if like is None else (self._ref(like),)
        with self.unseen():
            value = Draw(noise).numbers(torch.zeros(1, dtype=torch.int64, device=device), 0)
        ref = self.emit(Draw(noise), read, {}, [value])[0]
        self.traits[ref] = True, False
        self.drawn.add(ref)
        self.aliases.enter(value, ref)
        return value

    def whole(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Notes a call of ``function`` as one operation."""
        refs = self.refs(tensors)
        with self.unseen():
            out = function(*tensors)
        self.note(function, refs, {}, out)
        return out

    def note(self, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Notes a call that changed nothing, with what it returned."""
        tensors = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple | list) else []
        # What comes back as it went in, as from ``contiguous`` or from dropout in evaluation, is no operation.
        if isinstance(out, Tensor) and not self.aliases.knows(out) and self._passes_on(target, args, out):
            self.aliases.enter(out, args[0])
            return
        fresh = [t for t in tensors if isinstance(t, Tensor) and not self.aliases.knows(t)]
        if fresh:
            made = self.emit(target, args, kwargs, tensors)
            for tensor, ref in zip(tensors, made, strict=True):
                if isinstance(tensor, Tensor) and not self.aliases.knows(tensor):
                    self.aliases.enter(tensor, ref)

    def _passes_on(self, target: Any, args: Any, out: Tensor) -> bool:
        """Says whether ``out`` is the first argument itself: the same memory, and the same gradient."""
        if not torch.is_grad_enabled() or target in DETACHING or not args or not isinstance(args[0], Ref):
            return False
        packet = getattr(target, "overloadpacket", None)
        return packet in DROPOUT or (packet in PASSING_ON and self.aliases.is_same(args[0], out))

    def emit(self, target: Any, args: Any, kwargs: Any, results: Sequence[Any]) -> list[Made]:
        """Adds an operation that makes ``results`` and returns their values."""
        number = len(self.recording.operations)
        grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        called = target, tuple(args), dict(kwargs), grad, _autocast()
        self.recording.operations.append(Operation(*called, user_line(), self.path(), self.leaf(), len(results)))
        sources = refs_in((args, kwargs))
        data = any(self.is_data(ref) for ref in sources)
        carries = grad and target not in DETACHING and any(self.carries(ref) for ref in sources)
        made = [Made(number, part) for part in range(len(results))]
        if not self.drawn.isdisjoint(sources):
            self.drawn.update(made)
        for ref, result in zip(made, results, strict=True):
            if isinstance(result, Tensor):
                self.recording.values[ref] = result.shape, result.dtype
                self.traits[ref] = data, carries and result.is_floating_point()
        return made

    def release(self) -> None:
        """Lets go of the tensors of the run, which it and its aliases would keep until garbage is collected."""
        self.aliases.forget()
        self.inputs = []

    def refs(self, tree: Any) -> Any:
        """Replaces the tensors among arguments by the values that they are."""
        return tree_map_only(Tensor, self._ref, tree)

    def is_data(self, ref: Ref) -> bool:
        """Says whether a value depends on the samples or on a parameter, and so differs from task to task."""
        return self.traits[ref][0] if isinstance(ref, Made) else isinstance(ref, Input | Weight)

    def carries(self, ref: Ref) -> bool:
        """Says whether a gradient may go back through a value."""
        return self.traits[ref][1] if isinstance(ref, Made) else isinstance(ref, Input | Weight)

    def constants_of(self, ref: Ref) -> list[Tensor]:
        """Lists the buffers and constants that a value is made of."""
        return [source.tensor for source in self.recording.behind([ref]) if isinstance(source, Constant)]

    def read(self, tensor: Tensor, how: str) -> None:
        """Takes note that Python reads the numbers of ``tensor``: it may where they are the same for every task."""
        self._read_value(self._ref(tensor), how)

    def where(self) -> str:
        """Names the user's line that is being run, or else the module."""
        return user_line() or self._module()

    def _module(self) -> str:
        """Names the innermost module that is being run."""
        if not self.stack:
            return type(self.model).__name__
        return f"module {self.path()!r} ({type(self.stack[-1]).__name__})"

    def _place_of(self, error: Exception) -> str:
        """Names the user's line that raised ``error``, or else the module."""
        raised, module = self.failure
        return error_line(error) or (module if raised is error else type(self.model).__name__)

    def path(self) -> str:
        """Returns the name of the innermost module that is being run."""
        return next((self.paths[m] for m in reversed(self.stack) if m in self.paths), "")

    def leaf(self) -> str:
        """Returns the class of the innermost module, where it has no modules of its own."""
        inner = self.stack[-1] if self.stack else None
        return "" if inner is None or inner._modules else type(inner).__name__

    def refuse(self, what: str, remedy: str) -> CaptureError:
        """Makes the error that says why the run cannot become a Program."""
        # It is kept, because what raises it may be caught on its way: an arithmetic operator of torch turns it into
        # Python's own error of operands.
        self.refusal = CaptureError(f"{type(self.model).__name__} {what} at {self.where()}. {remedy}")
        return self.refusal

    def uses_torch_func(self) -> CaptureError:
        """Makes the error that says that the run maps or differentiates a function."""
        return self.refuse("uses torch.func", "Write out what it computes, or use torch.autograd.Function")

    def function(self, cls: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a ``torch.autograd.Function`` and notes it as one operation, which has the Function's own derivative."""
        if cls.__module__ == "torch.utils.checkpoint":
            run, _, *rest = args
            return run(*rest)
        refs, named = self.refs(args), self.refs(kwargs)
        given = _tensors((args, kwargs))
        self.inside, self.allowed = cls, {id(tensor) for tensor in given}
        try:
            out = apply(*args, **kwargs)
        finally:
            self.inside = None
        self.note(FunctionCall(cls), refs, named, out)
        return out

    def finish(self, output: Tensor) -> None:
        """Takes note of what the module returned."""
        ref = self._ref(output)
        if not self.is_data(ref) or not output.is_floating_point():
            raise CaptureError(
                f"{type(self.model).__name__}.forward returns a tensor of {output.dtype} that "
                f"{'holds no real numbers' if self.is_data(ref) else 'does not depend on its input'}; the loss needs "
                "real numbers that do"
            )
        self.recording.output = ref

    def _ref(self, tensor: Tensor) -> Ref:
        """Returns the value that ``tensor`` holds now."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise self.uses_torch_func()
        if not self.aliases.knows(tensor) and tensor.requires_grad and not self.aliases.shares(tensor):
            raise self.refuse(
                "uses a tensor that requires a gradient and is not registered in it",
                "Make it an nn.Parameter of the model, or detach it",
            )
        with self.unseen():
            return self.aliases.ref(tensor)

    def _refuse_values(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuses operations whose result tells values of the data to Python, or takes its shape from them."""
        if torch.Tag.data_dependent_output in func.tags or func in READS_VALUES:
            for ref in refs_in((args, kwargs)):
                self._read_value(ref, value_reader(func))
        elif torch.Tag.dynamic_output_shape in func.tags and selects(func, args, self.is_data, self._dtype):
            raise self.refuse(
                "makes a tensor whose shape depends on values of the data",
                "Tasks are computed together: keep the shape and use torch.where, or a product with a mask",
            )

    def _dtype(self, ref: Ref) -> torch.dtype:
        if isinstance(ref, Made):
            return self.recording.values[ref][1]
        return self.inputs[ref.number].dtype if isinstance(ref, Input) else torch.float32

    def _read_value(self, ref: Ref, how: str) -> None:
        if self.is_data(ref):
            what = "random number" if ref in self.drawn else "value of the data"
            raise self.refuse(f"reads a {what} by {how}", remedy_of_reading())
        self.recording.guards += self.constants_of(ref)

    def _check_closure(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuses a Function that draws, writes to tensors from outside, or reads others than its arguments."""
        name = getattr(self.inside, "__name__", "")
        if draws(func, args, kwargs):
            raise self.refuse(
                f"calls {name}, whose forward draws random numbers by {func.overloadpacket.__name__},",
                "Draw them before and pass them to apply",
            )
        if func._schema.is_mutable and any(map(self.aliases.shares, written(func, args, kwargs))):
            raise self.refuse(f"calls {name}, which changes its input in place,", "Return a new tensor instead")
        for tensor in _tensors((args, kwargs)):
            if id(tensor) not in self.allowed and self.aliases.knows(tensor) and self.is_data(self.aliases.ref(tensor)):
                raise self.refuse(
                    f"calls {name}, whose forward reads a tensor that is not among its arguments,",
                    "Pass it to apply",
                )

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self.stack.append(module)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and error is not self.failure[0]:
            self.failure = error, self._module()
        self.stack.pop()


@custom_function_call.py_impl(Recorder)
def _mapped_function(recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    """Refuses a ``torch.autograd.Function`` inside of torch.vmap and the like, which torch takes apart by itself."""
    raise recorder.uses_torch_func()


def _tensors(tree: Any) -> list[Tensor]:
    """Lists the tensors among arguments."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _autocast() -> tuple[str, torch.dtype] | None:
    """Returns device and dtype of the autocast that is on, if one is."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device)
    return None
