import copy
import shutil
import tempfile
import torch
import unittest
from peft import LoraConfig
from swift.tuners import LoRAConfig, Swift, SwiftModel
from swift.tuners.utils import SwiftAdapter
from swift.tuners.weighted_adapter.composer import FusionComposer
from torch import nn
from transformers import Conv1D
from typing import Dict, List
from unittest import mock

SOURCES, WEIGHTS = ['lora2', 'lora0', 'lora1'], [0.5, -0.2, 0.3]
TARGETS = ['embedding', 'linear', 'conv1d', 'conv2d']


class Net(nn.Module):
    """One layer of every kind that LoRA tuners of SWIFT know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 6)
        self.conv1d = Conv1D(10, 6)
        self.conv2d = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, ids):
        hidden = self.conv1d(torch.tanh(self.linear(self.embedding(ids))))
        return self.conv2d(torch.tanh(hidden).unsqueeze(1))


def prepare_model(count: int = 4, **kwargs) -> SwiftModel:
    configs = {
        f'lora{i}': LoRAConfig(r=4, lora_alpha=2 * i + 2, lora_dropout=0., target_modules=TARGETS, **kwargs)
        for i in range(count)
    }
    return randomize(Swift.prepare_model(Net(), configs, inference_mode=True))


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if 'lora_' in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model


def factors(model: nn.Module, adapter_name: str) -> List[torch.Tensor]:
    return [param for name, param in model.named_parameters() if adapter_name in name.split('.')]


def deltas(model: nn.Module, adapter_name: str) -> Dict[str, torch.Tensor]:
    """scaling * B @ A by layer."""
    result = {}
    for name in TARGETS:
        layer = model.get_submodule(name)
        if name == 'embedding':
            lora_A, lora_B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        result[name] = layer.scaling[adapter_name] * lora_B.detach().flatten(1) @ lora_A.detach().flatten(1)
    return result


class TestWeightedAdapter(unittest.TestCase):

    def setUp(self):
        print(('Testing %s.%s' % (type(self).__name__, self._testMethodName)))
        self.tmp_dir = tempfile.mkdtemp()
        self.ids = torch.arange(10).reshape(2, 5)

    def tearDown(self):
        shutil.rmtree(self.tmp_dir)
        super().tearDown()

    def assert_close(self, actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_update_is_like_a_new_adapter(self):
        for combination_type in ['linear', 'cat', 'svd', 'ties', 'magnitude_prune', 'average']:
            options = {'density': 0.4} if combination_type in ('ties', 'magnitude_prune') else {}
            with self.subTest(combination_type):
                model = prepare_model()
                model.add_weighted_adapter(['lora3', 'lora1'], [0.4, 0.6], 'fused', combination_type, **options)
                model.update_weighted_adapter(SOURCES, WEIGHTS, 'fused')
                model.add_weighted_adapter(SOURCES, WEIGHTS, 'new', combination_type, **options)
                for name, delta in deltas(model, 'new').items():
                    self.assert_close(deltas(model, 'fused')[name], delta)

    def test_cat_is_the_sum_of_the_deltas(self):
        model = prepare_model()
        model.add_weighted_adapter(['lora3'] * 3, [1., 1., 1.], 'fused', 'cat')
        model.update_weighted_adapter(SOURCES, WEIGHTS, 'fused', 'cat')
        sources = [deltas(model, name) for name in SOURCES]
        for name, delta in deltas(model, 'fused').items():
            self.assert_close(delta, sum(weight * source[name] for weight, source in zip(WEIGHTS, sources)))

    def test_update_is_in_place(self):
        model = prepare_model()
        model.add_weighted_adapter(['lora3', 'lora1'], [0.4, 0.6], 'fused', 'linear')
        before = [(id(param), param.data_ptr()) for param in factors(model, 'fused')]
        modules = len(list(model.modules()))
        for weight in (0.1, 0.2, 0.3):
            model.update_weighted_adapter(['lora0', 'lora2'], [weight, 1 - weight], 'fused')
        self.assertEqual([(id(param), param.data_ptr()) for param in factors(model, 'fused')], before)
        self.assertEqual(len(list(model.modules())), modules)
        self.assertEqual(model.active_adapters, {'fused'})

    def test_update_refuses_what_was_trained(self):
        model = prepare_model()
        before = copy.deepcopy(model.state_dict())
        with self.assertRaises(ValueError):
            model.update_weighted_adapter(SOURCES[:2], WEIGHTS[:2], 'lora3')
        with self.assertRaises(ValueError):
            model.update_weighted_adapter(SOURCES[:2], WEIGHTS[:2], 'not_there')
        for name, value in model.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]))

    def test_update_of_bad_input_changes_nothing(self):
        model = prepare_model()
        model.add_weighted_adapter(SOURCES, WEIGHTS, 'fused', 'linear')
        before = [param.clone() for param in factors(model, 'fused')]
        for adapters, weights in ((['lora0',
                                    'not_there'], [0.5,
                                                   0.5]), (['lora0'], [0.5,
                                                                       0.5]), ([], []), (['lora0'], [float('nan')])):
            with self.assertRaises((TypeError, ValueError)):
                model.update_weighted_adapter(adapters, weights, 'fused')
        for param, value in zip(factors(model, 'fused'), before):
            self.assertTrue(torch.equal(param, value))

    def test_update_of_peft_model(self):
        model = None
        for i in range(3):
            config = LoraConfig(r=4, lora_alpha=2 * i + 2, target_modules=TARGETS)
            if model is None:
                model = Swift.prepare_model(Net(), config, adapter_name='lora0')
            else:
                model.add_adapter(f'lora{i}', config)
        randomize(model)
        model.add_weighted_adapter(['lora0', 'lora1'], [0.4, 0.6], 'fused', 'linear')
        model.update_weighted_adapter(SOURCES, WEIGHTS, 'fused')
        model.add_weighted_adapter(SOURCES, WEIGHTS, 'new', 'linear')
        for name, delta in deltas(model.base_model.model, 'new').items():
            self.assert_close(deltas(model.base_model.model, 'fused')[name], delta)

    def test_set_active_adapters(self):
        model = prepare_model()
        base = model.base_model
        for active in (['lora1'], ['lora0', 'lora2'], [], ['lora3']):
            model.set_active_adapters(active)
            self.assertEqual(model.active_adapters, set(active))
            for name in TARGETS:
                self.assertEqual(set(base.get_submodule(name).active_adapters), set(active))
            expected = Net().eval()
            with torch.no_grad():
                for name in TARGETS:
                    module = expected.get_submodule(name)
                    for adapter in active:
                        delta = deltas(base, adapter)[name]
                        delta = delta.T if name in ('embedding', 'conv1d') else delta
                        module.weight += delta.reshape(module.weight.shape)
                self.assert_close(model(self.ids), expected(self.ids))

    def test_set_active_adapters_touches_what_differs(self):
        model = prepare_model()
        model.set_active_adapters('lora1')
        with mock.patch('swift.tuners.utils.ActivationMixin.set_activation') as set_activation:
            model.set_active_adapters('lora1')
        self.assertEqual(set_activation.call_count, 0)

    def test_offload(self):
        model = prepare_model()
        model.set_active_adapters('lora1')
        expected = model(self.ids)
        model.set_active_adapters('lora0', offload='meta')
        self.assertTrue(model.linear.lora_A['lora1'].weight.is_meta)
        model.set_active_adapters('lora1')
        self.assertTrue(torch.equal(model(self.ids), expected))
        with self.assertRaises(NotImplementedError):
            SwiftAdapter.offload(model.linear, 'lora1', 'linear', 'disk')

    def test_save_and_load(self):
        for kwargs in ({}, {'use_rslora': True}, {'use_dora': True}):
            with self.subTest(str(kwargs)):
                model = prepare_model(2, **kwargs)
                model.save_pretrained(self.tmp_dir)
                loaded = SwiftModel.from_pretrained(Net(), self.tmp_dir)
                for name in ('lora0', 'lora1'):
                    model.set_active_adapters(name)
                    loaded.set_active_adapters(name)
                    self.assertTrue(torch.equal(model(self.ids), loaded(self.ids)))

    def test_fusion_composer(self):
        model = prepare_model()
        composer = FusionComposer(model, merge_method='mixture')
        for adapters in (['lora0', 'lora1'], ['lora2', 'lora3']):
            composer.compose(adapters)
            fused = next(iter(model.active_adapters))
            for name, delta in deltas(model, fused).items():
                self.assert_close(delta, sum(deltas(model, source)[name] for source in adapters) / 2)


if __name__ == '__main__':
    unittest.main()
