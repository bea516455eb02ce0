"""The LoRA variant that gives each row of a batch the A and B of its own: what PEFT calls in a LoRA layer.

`LoraVariant` is PEFT's own hook, so that no `forward` is patched. A layer computes its part of a whole batch by two
batched products.
"""
import functools
import inspect
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor
from typing import Any, Dict, NoReturn, Optional, Tuple

from ..errors import RowsError


class RowsVariant(LoraVariant):  # type: ignore[misc]  # PEFT has no types
    """What PEFT calls in a LoRA layer for an adapter whose rows differ.

    Args:
        name: the name of the layer, for messages.

    Attributes:
        A: the rows' A, shape (rows, r, in_features); None where the rows are not to be read.
        B: the rows' B, shape (rows, out_features, r).
        is_in_text: whether the batch of a layer is that of the tokens: not so in the tower of another modality.
    """

    def __init__(self, name: str):
        self.name = name
        self.A: Optional[Tensor] = None
        self.B: Optional[Tensor] = None
        self.is_in_text = True

    def read(self, A: Optional[Tensor], B: Optional[Tensor]) -> None:
        """Reads other rows from now on, or none."""
        self.A, self.B = A, B

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """A no-op: PEFT calls it where it makes an adapter anew."""

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Returns the result of a layer with, for each row, what that row's A and B add.

        Args:
            module: the layer.
            active_adapter: the fused adapter.
            x: the input, rows in front; n · rows of them where each row comes n times in a row (beams).
            result: what the base layer made of it.

        Raises:
            RowsError: it cannot be told which row a value belongs to.
        """
        # Past `Module.__getattr__`, for this is called for every layer and token.
        children = module._modules
        holder = children['lora_A']._modules.get(active_adapter)
        A, B = self._rows(module, active_adapter, x, is_embedding=holder is None)
        scaling = module.scaling[active_adapter]
        if holder is None:
            like = module.lora_embedding_A[active_adapter]
        else:
            like = holder._parameters['weight']
        if A.dtype != like.dtype or A.device != like.device:
            # The model was cast or moved since.
            self.A, self.B = A, B = A.to(like.device, like.dtype), B.to(like.device, like.dtype)
        if holder is None:
            return _embedding(module, A, B, scaling, x, result)
        if A.ndim > 3:
            return _convolution(module, active_adapter, A, B, scaling, x, result)
        return _linear(A, B, scaling, x, result)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> NoReturn:
        """Raises RowsError: base weights cannot hold a fusion for each row."""
        raise RowsError(f'Adapter {active_adapter!r} is expected to be one fusion to be merged into the base weights, '
                        f'found a fusion for each row of a batch in layer {self.name!r}: compose one sample first.')

    merge_unsafe = unmerge = merge_safe

    def __reduce__(self) -> NoReturn:
        raise RowsError('A model that is pickled is expected to hold no fusion for each row of a batch, which is no '
                        f'part of a checkpoint, found one in layer {self.name!r}: compose one sample first.')

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'RowsVariant':
        new = RowsVariant(self.name)
        new.is_in_text = self.is_in_text
        # A copied model has its rows in one piece of memory, too: torch copies a storage once.
        new.A, new.B = (None if value is None else value.__deepcopy__(memo) for value in (self.A, self.B))
        return new

    def _rows(self, module: LoraLayer, adapter: str, x: Tensor, is_embedding: bool) -> Tuple[Tensor, Tensor]:
        """Returns A and B, a row for each of `x`, or for each n adjacent ones where they repeat."""
        A, B = self.A, self.B
        if A is None or B is None:
            raise RowsError(f'Adapter {adapter!r} is expected to hold a fusion for each row of a batch, found none '
                            f'in layer {self.name!r}: they were lost when it grew, or when an error left them half '
                            'written. Compose again.')
        # A layer that wraps it may be new, and in training mode by itself.
        if module._modules['base_layer'].training and module.get_base_layer().training:
            raise RowsError(f'Layer {self.name!r} is expected to be in evaluation mode while each row of a batch has '
                            'its own fusion, found training mode: call `model.eval()`, or compose one sample.')
        if module._forward_pre_hooks and _is_mixed(module):
            raise RowsError(f'Layer {self.name!r} is expected to get no `adapter_names` while each row of a batch has '
                            'its own fusion: leave them out, or compose one sample.')
        if len(A) > 1 and (not self.is_in_text or x.ndim < (2 if is_embedding else 3) or x.shape[0] % len(A)):
            kind = 'tokens of all rows in one heap or another batch' if self.is_in_text else 'another modality'
            raise RowsError(
                f'Layer {self.name!r} is expected to get the {len(A)} rows that were composed in front (or each of '
                f'them n times in a row), found {kind}, an input of shape {tuple(x.shape)}: compose a batch of the '
                "right size, or leave the layer out of the adapters' target modules, or compose the samples one by "
                'one.')
        return A, B


def _linear(A: Tensor, B: Tensor, scaling: float, x: Tensor, result: Tensor) -> Tensor:
    rows, shape = len(A), result.shape
    if x.ndim != 3 or x.shape[0] != rows:
        # Rows that repeat, and dimensions between the rows and the features, are one dimension for the products.
        x, result = x.reshape(rows, -1, x.shape[-1]), result.reshape(rows, -1, shape[-1])
    low = torch.bmm(x, A.mT)
    if type(scaling) is float and result.dtype == low.dtype == B.dtype:
        return torch.baddbmm(result, low, B.mT, alpha=scaling).view(shape)
    return (result + torch.bmm(low, B.mT) * scaling).view(shape)


def _embedding(module: LoraLayer, A: Tensor, B: Tensor, scaling: float, x: Tensor, result: Tensor) -> Tensor:
    rows = len(A)
    tokens = x.reshape(rows, 1, -1).expand(-1, A.shape[1], -1)
    # (rows, r, tokens): what the tokens have in A, whose columns are the vocabulary.
    low = A.gather(2, tokens)
    added = torch.bmm(low.mT, B.mT) * scaling
    scale = module._get_embed_scale() if hasattr(module, '_get_embed_scale') else None
    if scale is not None:
        added = added * scale.to(added.dtype)
    return result + added.view(result.shape)


def _convolution(module: LoraLayer, adapter: str, A: Tensor, B: Tensor, scaling: float, x: Tensor,
                 result: Tensor) -> Tensor:
    added = []
    for of_A, of_B, part in zip(A, B, x.chunk(len(A))):
        low = module.lora_A[adapter]._conv_forward(part, of_A, None)
        added.append(module.lora_B[adapter]._conv_forward(low, of_B, None))
    return result + torch.cat(added) * scaling


def _is_mixed(module: LoraLayer) -> bool:
    """Whether PEFT computes an adapter for some rows alone: its hook gives each layer the names."""
    return any('adapter_names' in getattr(hook, 'keywords', ()) for hook in module._forward_pre_hooks.values())


@functools.lru_cache(maxsize=None)
def reads_variants(layer_class: type) -> bool:
    """Returns whether LoRA layers of a class ask for variants. PEFT's layers for some quantized weights do not."""
    forward = inspect.unwrap(getattr(layer_class, 'forward'))
    return 'lora_variant' in forward.__code__.co_names
