"""The methods that PEFT's `LoraModel` and ms-swift's `SwiftModel` get: what a caller gives becomes a value here."""
from dataclasses import fields, replace
from typing import Any, List, Literal, Optional

from ..lora.combination import MergeOptions
from ..lora.composition import Composition
from .adapters import Adapters
from .checks import check_new_name
from .refill import add, refill
from .undo import Undo


def add_weighted_adapter(
    self: Any,
    adapters: List[str],
    weights: List[float],
    adapter_name: str,
    combination_type: str = 'svd',
    svd_rank: Optional[int] = None,
    svd_clamp: Optional[float] = None,
    svd_full_matrices: bool = True,
    svd_driver: Optional[str] = None,
    density: Optional[float] = None,
    majority_sign_method: Literal['total', 'frequency'] = 'total',
) -> None:
    """Adds a new adapter by merging the given adapters with the given weights.

    Like PEFT's `LoraModel.add_weighted_adapter`, with one more combination type, and with `svd` computed from
    the low-rank factors. The adapter can be refilled by `update_weighted_adapter` later. Does nothing where an
    adapter of that name exists.

    Args:
        adapters: Names of the adapters to merge.
        weights: A weight for each of them, of any sign.
        adapter_name: Name of the new adapter.
        combination_type: One of `linear`, `cat`, `svd`, `ties`, `ties_svd`, `dare_linear`, `dare_ties`,
            `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune`, `magnitude_prune_svd`, or `average` (the fusion
            of LoraRetriever, arXiv:2402.09997: A = Σ wⱼAⱼ, B = Σ wⱼBⱼ, the scaling kept). A single adapter is
            merged by `linear` whatever is given, except by `average`.
        svd_rank: Rank of the new adapter for the types that end in `svd`; by default the largest of the adapters'.
        svd_clamp: A quantile in [0, 1], to clamp the factors of an `svd` with.
        svd_full_matrices: Passed on to `torch.linalg.svd` where a clamp could see the difference.
        svd_driver: The cuSOLVER method for `torch.linalg.svd`, on CUDA only: `gesvd`, `gesvdj` or `gesvda`.
        density: The fraction of values to keep, for `ties*`, `dare_*` and `magnitude_prune*`.
        majority_sign_method: `total` or `frequency`, for `ties*` and `dare_ties*`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the adapters cannot be merged this way. The model is as it was.
    """
    if isinstance(adapter_name, str) and adapter_name in self.peft_config:
        return
    composition = _new_composition(
        adapters, weights, adapter_name,
        MergeOptions(combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density,
                     majority_sign_method))
    with Undo() as undo:
        add(Adapters.of(self), composition, adapter_name, undo)
        undo.commit()


def swift_add_weighted_adapter(
    self: Any,
    adapters: List[str],
    weights: List[float],
    adapter_name: str,
    combination_type: str = 'svd',
    svd_rank: Optional[int] = None,
    svd_clamp: Optional[float] = None,
    svd_full_matrices: bool = True,
    svd_driver: Optional[str] = None,
    density: Optional[float] = None,
    majority_sign_method: Literal['total', 'frequency'] = 'total',
) -> None:
    """Adds a new adapter by merging the given adapters with the given weights, and makes it the only active one.

    Like PEFT's `LoraModel.add_weighted_adapter`, with one more combination type, `average`, and with `svd` computed
    from the low-rank factors. The adapter can be refilled by `update_weighted_adapter` later. One of that name that
    exists already becomes the only active one, and nothing else is done.

    Args:
        adapters: Names of the adapters to merge.
        weights: A weight for each of them, of any sign.
        adapter_name: Name of the new adapter.
        combination_type: One of the types of `update_weighted_adapter`. A single adapter is merged by `linear`
            whatever is given, except by `average`.
        svd_rank: See `update_weighted_adapter`, like all that follow.
        svd_clamp: See `update_weighted_adapter`.
        svd_full_matrices: See `update_weighted_adapter`.
        svd_driver: See `update_weighted_adapter`.
        density: See `update_weighted_adapter`.
        majority_sign_method: See `update_weighted_adapter`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the adapters cannot be merged this way. The model is as it was.
    """
    if isinstance(adapter_name, str) and adapter_name in self.adapters:
        self.set_active_adapters(adapter_name)
        return
    composition = _new_composition(
        adapters, weights, adapter_name,
        MergeOptions(combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density,
                     majority_sign_method))
    with Undo() as undo:
        add(Adapters.of(self), composition, adapter_name, undo)
        self.set_active_adapters(adapter_name)
        undo.commit()


def update_weighted_adapter(
    self: Any,
    adapters: List[str],
    weights: List[float],
    adapter_name: str,
    combination_type: Optional[str] = None,
    svd_rank: Optional[int] = None,
    svd_clamp: Optional[float] = None,
    svd_full_matrices: bool = True,
    svd_driver: Optional[str] = None,
    density: Optional[float] = None,
    majority_sign_method: Literal['total', 'frequency'] = 'total',
) -> None:
    """Refills an adapter that `add_weighted_adapter` made, in place, with other adapters or other weights.

    Afterwards `adapter_name` computes what a new adapter made by `add_weighted_adapter` with these arguments would
    compute. Its parameters stay the same objects at the same addresses, with their dtype and device, and which
    adapters are active does not change; the cost does not depend on how many adapters there are. Only where the new
    sources need a larger rank, or layers that it lacks, does it grow, which is logged.

    Args:
        adapters: Names of the adapters to merge.
        weights: A weight for each of them, of any sign.
        adapter_name: Name of the adapter to refill.
        combination_type: One of the types of `add_weighted_adapter`: `linear`, `cat`, `svd`, `ties`, `ties_svd`,
            `dare_linear`, `dare_ties`, `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune`,
            `magnitude_prune_svd`, or `average`: A = Σ wⱼAⱼ, B = Σ wⱼBⱼ (the fusion of LoraRetriever,
            arXiv:2402.09997, §4.2.2, with wⱼ = 1/k). The sources' scaling s is kept: the delta is s · B · A. Where
            scalings differ, Aⱼ and Bⱼ are multiplied by √sⱼ first and s is 1, so that each source keeps its own
            delta wⱼ²sⱼBⱼAⱼ. By default the type, with its options, that the adapter was made or last filled with;
            options that are given besides, and are not their defaults, replace those.
        svd_rank: Rank of the result for the types that end in `svd`; by default the largest of the sources' ranks.
        svd_clamp: A quantile in [0, 1], to clamp the factors of an `svd` with.
        svd_full_matrices: Passed on to `torch.linalg.svd` where a clamp could see the difference.
        svd_driver: The cuSOLVER method for `torch.linalg.svd`, on CUDA only: `gesvd`, `gesvdj` or `gesvda`.
        density: The fraction of values to keep, for `ties*`, `dare_*` and `magnitude_prune*`.
        majority_sign_method: `total` or `frequency`, for `ties*` and `dare_ties*`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `adapter_name` was not made by `add_weighted_adapter` or is merged into the base weights, or the
            adapters cannot be merged this way. The model is as it was, bit by bit.
    """
    found = Adapters.of(self)
    record = found.record(adapter_name)
    given = MergeOptions(MergeOptions.combination_type if combination_type is None else combination_type, svd_rank,
                         svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method).checked()
    if combination_type is None:
        changed = [item.name for item in fields(given) if getattr(given, item.name) != item.default]
        given = replace(record.options, **{name: getattr(given, name) for name in changed})
    with Undo() as undo:
        refill(found, Composition.of(adapters, weights, given), adapter_name, undo)
        undo.commit()


def _new_composition(adapters: List[str], weights: List[float], adapter_name: str,
                     options: MergeOptions) -> Composition:
    check_new_name(adapter_name)
    return Composition.of(adapters, weights, options.checked())
