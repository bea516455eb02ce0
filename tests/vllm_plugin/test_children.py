"""The processes of an engine are out of reach of signals to the one that started them, and end with it."""
import psutil
import subprocess
import sys

PARENT = """
import multiprocessing, os, sys, time
from swift_patch.vllm_plugin.children import settle, starting_children

def child():
    settle()
    print(os.getpid(), os.getpgid(0) == os.getpid(), flush=True)
    time.sleep(1000)

if __name__ == '__main__':
    with starting_children():
        multiprocessing.get_context('spawn').Process(target=child).start()
    time.sleep(1000)
"""


def test_a_child_ends_with_its_parent_however_that_ends(tmp_path):
    (tmp_path / 'parent.py').write_text(PARENT)
    with subprocess.Popen([sys.executable, tmp_path / 'parent.py'], stdout=subprocess.PIPE, text=True) as parent:
        number, is_apart = parent.stdout.readline().split()
        child = psutil.Process(int(number))
        assert is_apart == 'True' and child.is_running()
        parent.kill()
    psutil.wait_procs([child], 30)
    assert not child.is_running()
