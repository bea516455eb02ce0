# Copyright (c) ModelScope Contributors. All rights reserved.
import torch
import unittest
from torch import nn
from transformers import Conv1D

from swift.tuners import LoRAConfig, Swift

SOURCES, WEIGHTS = ['lora2', 'lora0', 'lora1'], [0.5, -0.2, 0.3]


class TestWeightedAdapter(unittest.TestCase):

    def setUp(self):
        torch.manual_seed(0)
        targets = {'lora3': ['0'], 'lora4': ['1']}
        configs = {}
        for i in range(5):
            target_modules = targets.get(f'lora{i}', ['0', '1'])
            configs[f'lora{i}'] = LoRAConfig(r=4, lora_alpha=2 * i + 2, lora_dropout=0., target_modules=target_modules)
        configs['lora2'].use_rslora = True
        model = nn.Sequential(nn.Linear(8, 6), Conv1D(10, 6))
        self.model = Swift.prepare_model(model, configs, inference_mode=True)
        self.layers = [self.model.base_model[0], self.model.base_model[1]]
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                if 'lora_' in name:
                    param.copy_(torch.randn_like(param))
        self.model.add_weighted_adapter(SOURCES, [1.] * 3, 'fused', 'cat')
        self.inputs = torch.randn(3, 8)

    def get_params(self):
        return [param for name, param in self.model.named_parameters() if 'fused' in name.split('.')]

    def assert_close(self, *adapter_names):
        outputs = []
        for adapter_name in adapter_names:
            self.model.set_active_adapters(adapter_name)
            outputs.append(self.model(self.inputs))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)

    def test_update_is_like_a_new_adapter(self):
        density = dict(density=0.4)
        types = [('linear', {}), ('cat', {}), ('svd', {}), ('svd', dict(svd_rank=2)), ('svd', dict(svd_clamp=0.9)),
                 ('ties', density), ('ties_svd', density), ('magnitude_prune', density),
                 ('dare_linear', dict(density=1))]
        before = [(id(param), param.data_ptr()) for param in self.get_params()]
        for i, (combination_type, options) in enumerate(types):
            for adapters, weights in ((SOURCES, WEIGHTS), (['lora1'], [0.7]), (['lora3', 'lora0'], [0.5, 0.5])):
                with self.subTest(str((combination_type, options, adapters))):
                    name = f'new{i}{len(adapters)}'
                    self.model.add_weighted_adapter(adapters, weights, name, combination_type, **options)
                    self.model.update_weighted_adapter(adapters, weights, 'fused', combination_type, **options)
                    self.assert_close('fused', name)
        self.assertEqual([(id(param), param.data_ptr()) for param in self.get_params()], before)

    def test_update_zeroes_what_the_sources_do_not_touch(self):
        self.model.update_weighted_adapter(['lora3'], [1.], 'fused')
        self.assertFalse(self.layers[1].lora_B['fused'].weight.any())
        self.assert_close('fused', 'lora3')

    def test_update_keeps_what_is_active(self):
        self.model.set_active_adapters('lora0')
        self.model.update_weighted_adapter(SOURCES, WEIGHTS, 'fused')
        self.assertEqual(self.model.active_adapters, {'lora0'})

    def test_update_refuses(self):
        self.model.add_weighted_adapter(['lora3'], [1.], 'narrow', 'linear')
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        for adapters, weights, adapter_name, combination_type in (
            (SOURCES, WEIGHTS, 'lora3', 'linear'),  # somebody trained it
            (SOURCES, WEIGHTS, 'missing', 'linear'),
            (['lora0', 'missing'], [1., 1.], 'fused', 'linear'),
            (['lora0', 'fused'], [1., 1.], 'fused', 'svd'),
            (['lora0'], [1., 1.], 'fused', 'linear'),
            (['lora0'], [float('nan')], 'fused', 'linear'),
            ([], [], 'fused', 'linear'),
            (SOURCES + ['lora0'], WEIGHTS + [1.], 'fused', 'cat'),  # a larger rank
            (['lora0'], [1.], 'narrow', 'linear'),  # another layer
            (SOURCES, WEIGHTS, 'fused', 'missing'),
        ):
            with self.assertRaises(ValueError):
                self.model.update_weighted_adapter(adapters, weights, adapter_name, combination_type)
        self.layers[1].merge(adapter_names=['fused'])
        with self.assertRaises(ValueError):
            self.model.update_weighted_adapter(SOURCES, WEIGHTS, 'fused')
        self.layers[1].unmerge()
        for key, value in self.model.state_dict().items():
            torch.testing.assert_close(value, before[key])


if __name__ == '__main__':
    unittest.main()
