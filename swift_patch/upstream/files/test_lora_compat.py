# Copyright (c) ModelScope Contributors. All rights reserved.
import shutil
import tempfile
import torch
import unittest
from torch import nn
from transformers import Conv1D

from swift.tuners import LoRAConfig, Swift, SwiftModel


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 6)
        self.conv1d = Conv1D(10, 6)
        self.conv2d = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, ids):
        hidden = self.conv1d(torch.tanh(self.linear(self.embedding(ids))))
        return self.conv2d(torch.tanh(hidden).unsqueeze(1))


class TestLoraCompat(unittest.TestCase):

    def setUp(self):
        self.tmp_dir = tempfile.mkdtemp()
        self.ids = torch.arange(10).reshape(2, 5)
        # The second one extends the layers that the first one made
        config = {'r': 4, 'lora_dropout': 0., 'target_modules': ['embedding', 'linear', 'conv1d', 'conv2d']}
        self.model = Swift.prepare_model(Net(), {name: LoRAConfig(**config) for name in ('lora0', 'lora1')}).eval()
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                if 'lora_' in name:
                    param.copy_(torch.randn_like(param))

    def tearDown(self):
        shutil.rmtree(self.tmp_dir)

    def test_save_and_load(self):
        self.model.save_pretrained(self.tmp_dir)
        loaded = SwiftModel.from_pretrained(Net(), self.tmp_dir)
        base_outputs = Net()(self.ids)
        for adapter_name in ('lora0', 'lora1'):
            self.model.set_active_adapters(adapter_name)
            loaded.set_active_adapters(adapter_name)
            outputs = self.model(self.ids)
            self.assertFalse(torch.allclose(outputs, base_outputs))
            self.assertTrue(torch.equal(outputs, loaded(self.ids)))

    def test_load_embedding_of_peft(self):
        embedding = self.model.base_model.embedding
        lora_A = torch.randn_like(embedding.lora_embedding_A['lora0'])
        lora_B = torch.randn_like(embedding.lora_embedding_B['lora0'])
        prefix = 'base_model.model.embedding.lora_embedding_'
        self.model.load_state_dict({f'{prefix}A': lora_A, f'{prefix}B': lora_B}, adapter_name='lora0')
        self.assertTrue(torch.equal(embedding.lora_embedding_A['lora0'], lora_A))
        self.assertTrue(torch.equal(embedding.lora_embedding_B['lora0'], lora_B))


if __name__ == '__main__':
    unittest.main()
