# Copyright (c) ModelScope Contributors. All rights reserved.
import os
import threading
import torch
import unittest
from torch import nn
from unittest import mock

from swift.tuners import LoRAConfig, Swift, SwiftModel
from swift.tuners.lora_layers import LoraLayer


class TestActivation(unittest.TestCase):

    def prepare_model(self, count=3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        configs = {f'lora{i}': LoRAConfig(r=2, lora_dropout=0., target_modules=['0', '1']) for i in range(count)}
        model = Swift.prepare_model(model, configs, inference_mode=True)
        self.layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self.assertEqual(len(self.layers), 2)
        return model

    def assert_active(self, *adapter_names):
        for layer in self.layers:
            self.assertEqual(set(layer.active_adapters), set(adapter_names))

    def test_only_active_adapters_are_deactivated(self):
        model = self.prepare_model(5)
        model.set_active_adapters(['lora0', 'lora1'])
        with mock.patch.object(SwiftModel, 'deactivate_adapter', autospec=True) as deactivate_adapter:
            model.set_active_adapters('lora1')
        deactivate_adapter.assert_called_once_with(model, 'lora0', None)
        for adapter_names in (['lora1'], ['lora0', 'lora2'], [], ['lora3']):
            model.set_active_adapters(adapter_names)
            self.assert_active(*adapter_names)
            self.assertEqual(model.active_adapters, set(adapter_names))

    def test_layers_that_were_switched_elsewhere(self):
        model = self.prepare_model()
        model.set_active_adapters('lora0')
        self.layers[1].set_activation('lora2', True)
        model.set_active_adapters('lora0')
        self.assert_active('lora0')
        # They share the adapters, not the names of the active ones
        other = SwiftModel(model, {})
        other.set_active_adapters('lora1')
        model.set_active_adapters('lora0')
        self.assert_active('lora0')

    @mock.patch.dict(os.environ, {'USE_UNIQUE_THREAD': '0'})
    def test_threads(self):
        model = self.prepare_model()
        model.set_active_adapters('lora0')

        def run():
            self.assert_active()
            model.set_active_adapters(['lora1', 'lora2'])
            model.set_active_adapters('lora1')
            active.append([set(layer.active_adapters) for layer in self.layers])

        active = []
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        self.assertEqual(active, [[{'lora1'}, {'lora1'}]])
        self.assert_active('lora0')
        model.set_active_adapters('lora2')
        self.assert_active('lora2')

    def test_offload(self):
        model = self.prepare_model()
        model.set_active_adapters('lora1')
        inputs = torch.randn(1, 4)
        outputs = model(inputs)
        model.set_active_adapters('lora0')
        with mock.patch('swift.tuners.utils.gc_collect') as gc_collect:
            # Those that are inactive already are offloaded, too
            model.set_active_adapters('lora0', offload='meta')
            self.assertEqual(gc_collect.call_count, 1)
            self.assertTrue(all(layer.lora_A['lora1'].weight.is_meta for layer in self.layers))
            model.deactivate_adapter('lora0', offload='meta')
            self.assertEqual(gc_collect.call_count, 2)
        model.set_active_adapters('lora1')
        self.assertTrue(torch.equal(model(inputs), outputs))


if __name__ == '__main__':
    unittest.main()
