"""Runs the Triton launchers on tensors that hold no memory and checks every address that a kernel would touch.

The interpreter computes addresses as the compiled kernels do, in int32 where they use int32. Two things are asked: that
no sum or product of int32 wraps, and that each address lies in a tensor of its launch, every one of which gets a region
of 2^44 bytes of its own. Loads return zeros, stores are dropped. Programs at the corners of the grid run, and one in
its middle: the others are millions.
"""

import inspect
import itertools
from contextlib import contextmanager

import numpy as np
from triton.runtime import interpreter

REGION = 44  # bits
real = interpreter._implicit_cvt
real_binary = interpreter.InterpreterBuilder.binary_op


class Wrong(AssertionError):
    """An address outside every tensor of its launch, or an int32 that wrapped."""


class Addresses:
    """reached: the farthest offset, in numbers, from the first of any tensor, by kernel and argument."""

    def __init__(self):
        self.reached, self.tensors, self.kernel = {}, [], ""

    def base_of(self, name, tensor):
        self.tensors.append((name, tensor))
        return (len(self.tensors) << REGION) + (1 << REGION - 1)  # its middle: what is negative stays in it

    def note(self, pointers, mask):
        at = np.asarray(pointers)[np.asarray(mask, dtype=bool)].astype(np.int64)
        for region in np.unique(at >> REGION):
            if not 0 < region <= len(self.tensors):
                raise Wrong(f"{self.kernel}: an address in no tensor's region")
            name, tensor = self.tensors[region - 1]
            inside = at[at >> REGION == region] - (region << REGION) - (1 << REGION - 1)
            least, most = int(inside.min()) // tensor.element_size(), int(inside.max()) // tensor.element_size()
            if least < 0 or most > sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
                raise Wrong(f"{self.kernel}: {name} {tuple(tensor.shape)}, offsets {least:,} to {most:,}")
            self.reached[self.kernel, name] = max(self.reached.get((self.kernel, name), 0), most)

    def binary(self, builder, left, right, op):
        result = real_binary(builder, left, right, op)
        kind = left.dtype.scalar
        if kind.is_int() and kind.primitive_bitwidth == 32:
            exact = op(left.data.astype(np.int64), right.data.astype(np.int64))
            if not np.array_equal(exact, result.data.astype(np.int64)):
                raise Wrong(f"{self.kernel}: {op.__name__} of int32 gives up to {int(np.abs(exact).max()):,}")
        return result

    def load(self, pointers, mask, other, dtype):
        self.note(pointers, mask)
        return np.where(mask, np.zeros((), dtype), other).astype(dtype)

    def store(self, pointers, value, mask):
        self.note(pointers, mask)

    def run(self, executor, args, kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k in inspect.getfullargspec(executor.fn).args}
        bound = inspect.getcallargs(executor.fn, *args, **kwargs)
        self.kernel, self.tensors = executor.fn.__name__, []
        scope = interpreter._patch_lang(executor.fn)
        try:
            values = {n: v if n in executor.constexprs else self.converted(n, v) for n, v in bound.items()}
            grid = tuple(executor.grid(values) if callable(executor.grid) else executor.grid)
            grid += (1,) * (3 - len(grid))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            corners = itertools.product(*({0, n - 1} for n in grid))
            for place in {*corners, tuple(n // 2 for n in grid)}:
                interpreter.interpreter_builder.set_grid_idx(*place)
                executor.fn(**values)
        finally:
            scope.restore()

    def converted(self, name, value):
        if not hasattr(value, "data_ptr"):
            return real(value)
        fake = real(value)  # for its type
        fake.handle.data = np.array([self.base_of(name, value)], dtype=np.uint64)
        return fake


@contextmanager
def addresses():
    """Inside, kernels touch no memory; yields Addresses. Give the launchers tensors on the device "meta"."""
    seen = Addresses()
    builder = interpreter.InterpreterBuilder
    before = interpreter.GridExecutor.__call__, interpreter._interpreter
    interpreter.GridExecutor.__call__ = lambda executor, *args, **kwargs: seen.run(executor, args, kwargs)
    interpreter._interpreter = seen
    builder.binary_op = lambda self, left, right, op: seen.binary(self, left, right, op)
    try:
        yield seen
    finally:
        interpreter.GridExecutor.__call__, interpreter._interpreter = before
        builder.binary_op = real_binary
