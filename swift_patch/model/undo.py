"""What to do where something fails: callbacks, the values of tensors that are overwritten, and the tree of modules."""
import torch
from collections import OrderedDict
from contextlib import ExitStack
from torch import Tensor, nn
from typing import Any, Dict, List, Mapping

# Where copies begin in memory, in bytes: a multiple of the size of any element.
_ALIGNMENT = 64


class Undo(ExitStack):
    """Undoes what its callbacks undo, last first, unless `commit` is called before its end."""

    def __init__(self) -> None:
        super().__init__()
        self._spare: Dict[torch.device, Tensor] = {}
        self._memory: Dict[torch.device, Tensor] = {}
        self._used: Dict[torch.device, int] = {}

    def reserve(self, spare: Dict[torch.device, Tensor], nbytes: Mapping[torch.device, int], tensors: int) -> None:
        """Makes room for the values of tensors.

        Args:
            spare: memory from the last time, by device; `commit` puts this memory there for the next time, since on a
                CPU new memory costs more than the copy.
            nbytes: the bytes that the values take on each device.
            tensors: how many tensors there are at most.
        """
        # Taken out, so that no other thread uses it meanwhile.
        before = dict(spare)
        spare.clear()
        self._spare = spare
        for device, size in nbytes.items():
            size += tensors * _ALIGNMENT
            memory = before.get(device)
            if memory is None or len(memory) < size:
                memory = torch.empty(size, dtype=torch.uint8, device=device)
            self._memory[device] = memory

    def keep(self, tensor: Tensor) -> None:
        """Keeps the values of a tensor, to put them back."""
        memory, begin = self._memory.get(tensor.device), self._used.get(tensor.device, 0)
        end = begin + tensor.nbytes
        if memory is None or end > len(memory):
            values = tensor.data.clone()
        else:
            values = memory[begin:end].view(tensor.dtype).view(tensor.shape)
            values.copy_(tensor.data)
            self._used[tensor.device] = -(-end // _ALIGNMENT) * _ALIGNMENT
        self.callback(_put_back, tensor, values)

    def pass_to(self, other: 'Undo') -> None:
        """Has `other` undo what this would undo, and keep the memory for it."""
        other.push(self.pop_all().__exit__)
        other._spare, other._memory, other._used = self._spare, self._memory, self._used
        self._memory = {}

    def commit(self) -> None:
        """Keeps what was done."""
        self.pop_all()
        self._spare.update(self._memory)


class Tree:
    """The tree of a model as it is now: modules, parameters, attributes, what needs a gradient; but not the values.

    PEFT does more than add LoRA layers when it adds an adapter: it wraps layers, saved modules and tokens, and freezes
    parameters. Whatever it did is undone by what is written down here, not by a list of what it is known to do.

    Args:
        root: the model, with the tuner around it.
    """

    def __init__(self, root: nn.Module):
        self._modules = [(module, dict(module.__dict__)) for module in root.modules()]
        containers = [container for module, _ in self._modules for container in _containers(module)]
        # Nearly all are empty, and are put back so: a copy of each would set off the garbage collector many times.
        self._empty = [container for container in containers if not container]
        self._filled = [(container, container.copy()) for container in containers if container]
        self._parameters = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._known = {id(parameter) for parameter, _ in self._parameters}

    def restore(self) -> None:
        """Puts everything back. The containers stay the same objects."""
        for module, attributes in self._modules:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for container in self._empty:
            container.clear()
        for container, content in self._filled:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in self._parameters:
            if parameter.requires_grad != requires_grad:
                with torch.inference_mode(parameter.is_inference()):
                    parameter.requires_grad_(requires_grad)

    def is_new(self, parameter: Tensor) -> bool:
        """Returns whether a parameter was not in the tree."""
        return id(parameter) not in self._known


def copied_containers(value: Any) -> Any:
    """Returns a dict, list or set as a copy, with copies of those that are values of a dict; anything else as it is."""
    if not _is_container(value):
        return value
    copied = value.copy()
    if type(value) is dict:
        copied.update((key, inner.copy()) for key, inner in value.items() if _is_container(inner))
    return copied


def _put_back(tensor: Tensor, values: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.data.copy_(values)


def _containers(module: nn.Module) -> List[Any]:
    """Returns every dict, list and set among a module's attributes, and in their dicts."""
    found = [value for value in module.__dict__.values() if _is_container(value)]
    # ms-swift keeps what is active by thread and, in that, by adapter.
    return found + [inner for value in found if type(value) is dict for inner in value.values() if _is_container(inner)]


def _is_container(value: Any) -> bool:
    # By the exact type: a class of somebody else may do more than hold items.
    return type(value) in (dict, list, set, OrderedDict)
