"""A GPU that is not there: real values, CUDA's rules on which tensors may meet, and host waits.

A tensor on the pretend device wraps one of the CPU and says that it is on `meta`. Inside `gpu()`
every operation is looked at before the CPU computes it: one that CUDA refuses, since its tensors
lie on two devices, raises TwoDevices; one for which the host would wait until the device has come
so far is noted. Why not torch's own fake CUDA tensors: on a build without CUDA they abort the
process as soon as autograd records an operation of theirs, and they have no values, which warm
starts, generation and the export's check read.
Not covered: streams and the order of work on them; memory; what a CUDA kernel computes; operations
that are fused or chosen otherwise on CUDA (attention runs as plain products here).
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
# Whose result, or its size, the host reads, by what torch's CUDA sources say of them.
READING = {
    aten._local_scalar_dense.default: "value",
    aten.nonzero.default: "size",
    aten.masked_select.default: "size",
    aten._unique2.default: "size",
    aten.bincount.default: "size",
    aten.repeat_interleave.Tensor: "size",
    aten.equal.default: "value",
    aten._linalg_check_errors.default: "value",
    aten._linalg_eigh.default: "value",
}
# Collectives of NCCL take tensors of its devices alone.
COLLECTIVES = ("allreduce_", "alltoall_base_", "reduce_scatter_", "_allgather_base_")


class TwoDevices(AssertionError):
    """Tensors of two devices in an operation that CUDA refuses then."""


class Pretend(Tensor):
    """A tensor on the pretend device; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )

    def __init__(self, inner):
        self.inner = inner

    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute outside of `gpu()` too: tests look at results there."""
        return Watch().compute(func, args, kwargs or {})

    def tolist(self):
        """As Tensor's, which refuses subclasses."""
        return self.cpu().tolist()

    def __repr__(self):
        return f"Pretend({self.inner})"


def on_device(tensor):
    """Return whether a tensor lies on the pretend device."""
    return isinstance(tensor, Pretend)


def to_gpu(tensor):
    """Return a copy on the pretend device, without a note of it."""
    return Pretend(tensor.detach().clone())


def values(tensor):
    """Return what a tensor of either device holds, on the CPU, without a note of it."""
    return tensor.inner if on_device(tensor) else tensor


def module_to_gpu(module, buffers=True):
    """Move a module's parameters, and its buffers unless told not to, in place; return it.

    As Module.to does; tied parameters stay one.
    """
    moved = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            new = torch.nn.Parameter(to_gpu(parameter), requires_grad=parameter.requires_grad)
            part._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in part.named_buffers(recurse=False) if buffers else ():
            part._buffers[name] = to_gpu(buffer)
    return module


class Watch(TorchDispatchMode):
    """Computes with tensors of both devices and notes waits.

    Attributes:
        waits: how often the host would wait, by "file.function: reason"; reasons are value, size
            (of a result), to host (a copy), to device (a copy out of memory that is not pinned).
    """

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self.pinned = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def compute(self, func, args, kwargs):
        """Judge an operation, let the CPU do it, and put its result where it belongs."""
        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self.pin(args[0].clone())
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        asked = kwargs.get("device")
        device = any(map(on_device, tensors)) if asked is None else asked == GPU
        if func in COPIES:
            device = self.copy(func, args, kwargs, device)
        else:
            self.judge(func, args, kwargs, tensors)
        if kwargs.pop("pin_memory", None):
            return self.pin(func(*args, **kwargs))
        found = self.on_cpu(func, args, kwargs)
        return self.wrapped(found, tensors) if device else found

    def on_cpu(self, func, args, kwargs):
        """Let the CPU do an operation; its views and changes are those of the wrapped tensors."""
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("cpu")}
        args, kwargs = tree_map_only(Pretend, lambda t: t.inner, (args, kwargs))
        if func is aten.histc.default and not args[0].is_floating_point():
            # CUDA's kernel takes integers, the CPU's does not.
            return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def wrapped(self, found, tensors):
        """Return results as tensors of the pretend device; what was changed in place as it was."""
        known = {id(t.inner): t for t in tensors if on_device(t)}

        def wrap(tensor):
            if on_device(tensor):
                return tensor
            return known[id(tensor)] if id(tensor) in known else Pretend(tensor)

        return tree_map_only(Tensor, wrap, found)

    def judge(self, func, args, kwargs, tensors):
        """Raise TwoDevices where CUDA refuses; note what the host waits for."""
        assert not any(t.is_meta and not on_device(t) for t in tensors), "a tensor without values"
        here = [t for t in tensors if not on_device(t)]
        there = [t for t in tensors if on_device(t)]
        if func in INDEXING and there:
            self.judge_index(func, args)
            return
        if func.namespace == "c10d":
            if here and func._opname in COLLECTIVES:
                raise TwoDevices(f"{func}: NCCL takes no tensor of the host")
            return
        leaves = tree_leaves((args, kwargs))
        drawn = any(isinstance(leaf, torch.Generator) for leaf in leaves)
        if drawn and (there or kwargs.get("device") == GPU):
            raise TwoDevices(f"{func}: a generator of the host for a tensor of the device")
        if there and here:
            # A number in a tensor may meet tensors of a device, where each element is by itself.
            single = torch.Tag.pointwise in func.tags and all(t.ndim == 0 for t in here)
            if not single:
                raise TwoDevices(f"{func}: expected all tensors on one device, found two")
        # Some ask for no size that they are told.
        if there and func in READING and kwargs.get("output_size") is None:
            self.note(READING[func])

    def judge_index(self, func, args):
        """Indices may lie on the host: they are copied; a mask's size is read."""
        indexed, indices, *rest = args
        if not on_device(indexed) or any(t.ndim and not on_device(t) for t in rest[:1]):
            raise TwoDevices(f"{func}: expected all tensors on one device, found two")
        for index in indices:
            if index is not None and not on_device(index):
                self.note("to device")
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.note("size")

    def note(self, reason):
        """Count a wait of the innermost function of this project or of another than torch."""
        frame = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.waits[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}: {reason}"] += 1

    def copy(self, func, args, kwargs, device):
        """Note a copy for which the host waits; return whether its result is on the device."""
        if func is aten.copy_.default:
            target, source, *rest = args
            device = on_device(target)
            later = rest[0] if rest else kwargs.get("non_blocking", False)
        else:
            source = args[0]
            later = kwargs.get("non_blocking", False)
        if on_device(source) and not device and not later:
            self.note("to host")
        if device and not on_device(source) and not (later and self.is_pinned(source)):
            self.note("to device")
        return device

    def pin(self, tensor):
        """Call a tensor's memory pinned; it is kept, so that no other gets the same."""
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor):
        """Return whether a tensor of the host lies in pinned memory."""
        return not on_device(tensor) and tensor.untyped_storage().data_ptr() in self.pinned


class Numbers(TorchFunctionMode):
    """Lets numbers of Python become tensors on the host and then be copied, as for a GPU.

    torch forgets them where the device is `meta`.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if func is Tensor.new_tensor and on_device(args[0]) and asked is None:
            kwargs = {"dtype": args[0].dtype} | kwargs
            func, args, asked = torch.tensor, args[1:], GPU
        made = func in (torch.tensor, torch.as_tensor)
        if made and asked is not None and torch.device(asked) == GPU:
            return func(*args, **kwargs | {"device": "cpu"}).to(GPU)
        return func(*args, **kwargs)


@contextmanager
def gpu():
    """Watch what is computed inside; yields the Watch.

    Inference mode is no_grad there: torch has none for tensors that wrap others.
    """
    no_inference = patch.object(
        torch._C, "_InferenceMode", lambda on: torch.set_grad_enabled(not on)
    )
    with no_inference, Watch() as watch, Numbers():
        yield watch


@contextmanager
def unwatched():
    """Leave out of the watch what is done inside, such as reading a checkpoint."""
    with _disable_current_modes():
        yield
