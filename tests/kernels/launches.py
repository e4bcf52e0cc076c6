"""What is launched on a device, counted on a CPU: torch's operators but views, and kernels of Triton's.

Stand-ins that plain engines have too take from here what a kernel is, so nothing of the project's is imported with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


@contextmanager
def counted() -> Iterator[list[str]]:
    """Yield the names of what is launched, a growing list; what Triton's interpreter does itself is left out."""
    from vllm_redrafter.kernels.launch import Launch

    names: list[str] = []
    run = Launch.run

    def counted_run(self: Launch) -> None:
        names.append(self.kernel.__name__)
        with _disable_current_modes():
            run(self)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if launches_a_kernel(function, result, (args, kwargs)):
                names.append(function.name())
            return result

    with patch.object(Launch, "run", counted_run), Mode():
        yield names


def launches_a_kernel(function: Any, result: Any, given: Any) -> bool:
    """Return whether an operator of torch's runs something on a device."""
    # a view is no kernel, and memory comes with what was in it before
    return (any(are_fresh(result, given)) or function._schema.is_mutable) and "empty" not in function.name()


def are_fresh(result: Any, given: Any) -> list[bool]:
    """Return for every tensor of a result whether its memory is none of what was given."""
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(given)}
    return [tensor.untyped_storage().data_ptr() not in places for tensor in tensors_of(result)]


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Return all tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
