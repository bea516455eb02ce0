"""The part `refill`: the methods that it adds to ms-swift's `SwiftModel`, in ms-swift's manner.

`edits.py` puts their text into `swift/tuners/base.py`; the tests run them as a second implementation of the plugin's
`update_weighted_adapter`. Nothing here knows the rest of this package.
"""
import math
import torch
from dataclasses import replace
from typing import Literal


class SwiftModel:

    @staticmethod
    def _get_lora_weights(layer, adapter_name):
        """Returns lora_A and lora_B of an adapter in a LoRA layer, or None if the layer has no such adapter."""
        if adapter_name in layer.lora_A:
            return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if adapter_name in layer.lora_embedding_A:
            return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        return None

    def update_weighted_adapter(
        self,
        adapters,
        weights,
        adapter_name,
        combination_type='svd',
        svd_rank=None,
        svd_clamp=None,
        svd_full_matrices=True,
        svd_driver=None,
        density=None,
        majority_sign_method: Literal['total', 'frequency'] = 'total',
    ):
        """
        This method refills an adapter made by `add_weighted_adapter` in place, so that it computes what a new adapter
        made with the same arguments would compute. Its parameters stay the same objects, it stays active or inactive,
        and the cost does not grow with the number of calls. Nothing is changed if an error is raised.

        Args:
            adapters (`list`):
                List of adapter names to be merged.
            weights (`list`):
                List of weights for each adapter.
            adapter_name (`str`):
                Name of the adapter to refill. Its rank must not be smaller than that of the result.
            combination_type (`str`):
                The merging type, see `add_weighted_adapter`, also for all other arguments.
        """
        from swift.tuners.lora_layers import LoraConfig, LoraLayer, LoraModel
        adapters, weights = list(adapters), list(weights)
        if adapter_name not in self.adapters or not self.adapters[adapter_name].weighted:
            raise ValueError(f'Expected an adapter made by `add_weighted_adapter`, found {adapter_name!r}.')
        if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f'Expected a finite weight for each adapter, found {weights} for {adapters}.')
        if adapter_name in adapters:
            raise ValueError(f'Expected other adapters to merge than {adapter_name!r} itself, found {adapters}.')

        lora_model = LoraModel(self.model, None, '')
        lora_model.peft_config = {
            key: value.config
            for key, value in self.adapters.items() if isinstance(value.config, LoraConfig)
        }
        combination_type, rank, target_modules = lora_model._check_add_weighted_adapter(
            adapters, combination_type, svd_rank)
        if rank < 1:
            raise ValueError(f'Expected a positive `svd_rank`, found {svd_rank}.')
        # What a new adapter would have
        cfg = replace(lora_model.peft_config[adapters[0]], target_modules=target_modules)
        scaling = math.sqrt(rank) if cfg.use_rslora else 1.
        if cfg.use_dora != self.adapters[adapter_name].config.use_dora:
            raise ValueError(f'Expected {adapters[0]!r} and {adapter_name!r} to be both with or both without DoRA.')

        def merge(layer, target):
            if combination_type == 'cat':
                loras_A, loras_B = [], []
                for adapter, weight in zip(adapters, weights):
                    if self._get_lora_weights(layer, adapter) is not None:
                        lora_A, lora_B = self._get_lora_weights(layer, adapter)
                        loras_A.append(lora_A * weight * layer.scaling[adapter])
                        loras_B.append(lora_B)
                return torch.cat(loras_A, dim=0), torch.cat(loras_B, dim=1)
            if combination_type.endswith('svd'):
                # Only the shapes of a new adapter are read from these two
                lora_A, lora_B = target
                columns = rank * lora_B.shape[1] // lora_A.shape[0]
                return lora_model._svd_generalized_task_arithmetic_weighted_adapter(
                    combination_type, adapters, weights, rank, layer, lora_A.new_empty(rank, *lora_A.shape[1:]),
                    lora_B.new_empty(lora_B.shape[0], columns, *lora_B.shape[2:]), density, majority_sign_method,
                    svd_clamp, svd_full_matrices, svd_driver)
            return lora_model._generalized_task_arithmetic_weighted_adapter(combination_type, adapters, weights, layer,
                                                                            density, majority_sign_method)

        updates = []
        with torch.no_grad():
            for key, layer in self.model.named_modules():
                if not isinstance(layer, LoraLayer):
                    continue
                target = self._get_lora_weights(layer, adapter_name)
                # Whether a new adapter would be here, as in `inject_adapter`
                is_targeted = '_part_' not in key and not key.endswith(tuple(cfg.modules_to_save or ())) and bool(
                    lora_model._check_target_module_exists(cfg, key))
                if is_targeted and not any(self._get_lora_weights(layer, adapter) for adapter in adapters):
                    raise ValueError(f'Expected {key} to have a LoRA of one of {adapters}, which target it.')
                if target is None and not is_targeted:
                    continue
                if target is None or target[0].is_meta or adapter_name in layer.merged_adapters:
                    raise ValueError(f'Expected {adapter_name!r} to be in {key}, on a device and not merged into it. '
                                     'Load or unmerge it, or add a new adapter.')
                values = [torch.zeros_like(param) for param in target]
                if is_targeted:
                    lora_A, lora_B = merge(layer, target)
                    if lora_A.is_meta:
                        raise ValueError(f'Expected {adapters} to be on a device, found meta in {key}. Load them.')
                    if lora_A.shape[0] > target[0].shape[0]:
                        raise ValueError(f'Expected a rank of at most {target[0].shape[0]}, which {adapter_name!r} has '
                                         f'in {key}, found {lora_A.shape[0]}. Add a new adapter.')
                    # Zeros come after the rank of each group of a convolution
                    groups, columns = target[0].shape[0] // target[1].shape[1], lora_B.shape[1]
                    values[0].unflatten(0, (groups, -1))[:, :columns] = lora_A.unflatten(0, (groups, -1))
                    values[1][:, :columns] = lora_B * (scaling / layer.scaling[adapter_name])
                updates.extend(zip(target, values))
            for param, value in updates:
                param.copy_(value)
