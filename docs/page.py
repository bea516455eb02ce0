"""The picture of the page in the README: `PYTHONPATH=tests/serve:benchmarks python docs/page.py docs/page.png`.

Of a real server, with the model and three of the LoRAs of `swift-patch demo`, in the browser that the tests use.
"""
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault('LOG_LEVEL', 'ERROR')

from browser import Page, open_browser  # noqa: E402
from server import serving  # noqa: E402

from swift_patch.demo.tasks import build_tasks, write_jsonl  # noqa: E402
from swift_patch.demo.training import pretrain_base, train_adapter  # noqa: E402
from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE, build_tiny_qwen2  # noqa: E402

NAMES = ('library', 'museum', 'zoo')
QUESTION = 'what pen is zebras?'


def main(path: str) -> None:
    tasks = build_tasks()
    with tempfile.TemporaryDirectory() as folder, open_browser() as driver:
        model_dir = build_tiny_qwen2(Path(folder, 'tiny-qwen2'))
        pretrain_base(model_dir, [sample for name in NAMES for sample in tasks[name].pretrain])
        adapters = {}
        for name in NAMES:
            dataset = write_jsonl(tasks[name].train, Path(folder, f'{name}.jsonl'))
            adapters[name] = str(train_adapter(model_dir, dataset, Path(folder, name)))
        with serving(str(model_dir), adapters, '--model_type', MODEL_TYPE, '--template', TEMPLATE, '--ui') as server:
            driver.set_window_size(1280, 1360)
            page = Page(driver, server.url)
            page.wait_until_loaded()
            page.show_settings()
            page.show_columns(3)
            page.show_settings()
            # The base model, which knows last year's pen; half of a LoRA that knows this year's; more of it.
            page.unpick('A', 0)
            page.unpick('B', 0)
            for name, adapter in (('B', 'zoo'), ('C', 'zoo'), ('C', 'museum')):
                page.pick(name, adapter)
            page.move('C', 0, 20)
            page.move('C', 1, -20)
            page.ask(QUESTION)
            page.wait_for('done', *'ABC')
            for name in 'ABC':
                page.request(name, 'python' if name == 'B' else 'curl')
            driver.execute_script('document.activeElement.blur(); window.scrollTo(0, 0)')
            driver.save_screenshot(path)
            print({name: (page.answer(name), page.told(name)) for name in 'ABC'})


if __name__ == '__main__':
    main(sys.argv[1])
