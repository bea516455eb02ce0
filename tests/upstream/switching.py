"""Random switching of adapters, and what each step left: run by test_edited.py with one ms-swift and with another."""
import json
import os
import random
import sys
import threading
import torch
import warnings
from torch import nn

warnings.simplefilter('ignore')


def build(modules_to_save):
    from swift.tuners import LoRAConfig, NEFTuneConfig, SwiftModel
    torch.manual_seed(0)
    base = nn.ModuleDict({name: nn.Linear(4, 4) for name in ('a', 'b', 'head')})
    base.embedding = nn.Embedding(3, 4)
    base.forward = lambda x: base['head'](base['b'](base['a'](x)))
    configs = {
        f'l{i}': LoRAConfig(r=2, target_modules=['a', 'b'], modules_to_save=['head'] if modules_to_save else None)
        for i in range(4)
    }
    if not modules_to_save:
        configs['noise'] = NEFTuneConfig()
    model = SwiftModel(base, configs, inference_mode=True)
    return [model, SwiftModel(model, {})]


def told(models):
    """All that activation is about, in the calling thread."""
    from swift.tuners.utils import ActivationMixin
    found = [sorted(model.active_adapters) for model in models]
    for name, module in models[0].base_model.named_modules():
        if isinstance(module, ActivationMixin):
            found.append([name, sorted(module.get_activated_adapters())])
    for name, parameter in models[0].base_model.named_parameters():
        found.append([name, str(parameter.device), parameter.requires_grad])
    return found + [str(getattr(models[0].base_model.embedding, 'nef_activated', None))]


def step(models, rng, with_offload):
    model, layer = rng.choice(models), rng.choice([models[0].base_model['a'], models[0].base_model['b']])
    names = list(model.adapters)
    offload = rng.choice([None, None, 'cpu', 'meta']) if with_offload else None
    kind = rng.randrange(10)
    try:
        if kind < 6:
            model.set_active_adapters(rng.sample(names, rng.randrange(3)), offload)
        elif kind == 6:
            model.activate_adapter(rng.choice(names))
        elif kind == 7:
            model.deactivate_adapter(rng.choice(names), offload)
        else:
            layer.set_activation(rng.choice(names[:4]), rng.random() < 0.5)
    except Exception as e:
        return type(e).__name__
    return kind


def history(seed, modules_to_save, threads):
    rng, models, found = random.Random(seed), build(modules_to_save), []

    def steps():
        for _ in range(12):
            found.append([step(models, rng, threads == 1), told(models)])

    # A thread that ended may leave its identity, and with it what it activated, to the next.
    end = threading.Event()
    for _ in range(threads):
        done = threading.Event()
        threading.Thread(target=lambda done=done: (steps(), done.set(), end.wait())).start()
        done.wait()
    steps()
    end.set()
    return found


if __name__ == '__main__':
    import swift.tuners.utils
    expected_root, count = sys.argv[1], int(sys.argv[2])
    assert swift.__file__.startswith(expected_root), swift.__file__
    # It takes most of the time and changes nothing that is told.
    swift.tuners.utils.gc_collect = lambda: None
    traces = []
    for seed in range(count):
        for modules_to_save in (False, True):
            for threads in (1, 2):
                os.environ['USE_UNIQUE_THREAD'] = str(int(threads == 1))
                traces.append(history(seed, modules_to_save, threads))
    with open(sys.argv[3], 'w') as f:
        json.dump(traces, f)
