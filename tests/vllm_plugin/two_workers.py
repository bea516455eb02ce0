"""Two workers, each in a process of its own, in bfloat16: run by `test_worker.py`."""
import sys
from engines import PROMPTS, Stock, answers, engine_of, mixtures_of
from pathlib import Path

from swift_patch import AdapterLibrary


def main(model_dir, adapters, folder):
    engine = engine_of(model_dir, tensor_parallel_size=2, dtype='bfloat16')
    library = AdapterLibrary.from_folder(adapters)
    stock = Stock(model_dir, {name: str(library.path(name)) for name in library}, folder)
    mixtures = mixtures_of(engine, library)
    composition = mixtures.composer.composition
    samples = [(['l0', 'l1'], [0.5, 0.75]), (['l4', 'l2'], [0.5, -0.25])]
    found = [mixtures.request(composition(*sample, 'mixture')) for sample in samples]
    expected = [stock.request(*sample, 'cat') for sample in samples]
    assert answers(engine, found) == answers(engine, expected)

    broken = mixtures.request(composition({'l3': 0.5}))
    (adapters / 'l3' / 'adapter_model.safetensors').unlink()
    told = answers(engine, [found[0], broken, found[1]])
    alone = [answers(engine, [request], [prompt])[0] for request, prompt in zip(found, (PROMPTS[0], PROMPTS[2]))]
    assert told == [alone[0], 'error', alone[1]]

    # More than the queues between the processes hold.
    for number in range(30):
        try:
            engine.llm_engine.add_lora(broken)
            reason = ''
        except Exception as e:  # as vLLM tells what went wrong in another process
            reason = str(e)
        assert 'l3' in reason, reason
        if number % 10 == 0:
            assert answers(engine, [found[0], None, found[1]], PROMPTS)[::2] == alone


if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
