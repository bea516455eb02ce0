"""A rank that shares tasks as `swift-patch infer` does. Whoever started it says what each task does, one by one."""
import json
import os
import sys
import threading
from functools import partial
from multiprocessing.connection import Client
from torch import distributed
from typing import Any, Dict

from swift_patch.futures import settled
from swift_patch.inference.ranks import RankDied, Ranks, Terminated, ToldByMain, joined


def start(environment: Dict[str, str], *arguments: Any) -> None:
    """Becomes a rank, in a process that was forked."""
    os.environ.update(environment)
    sys.exit(main(*arguments))


def main(address: str, delivered: str, num_tasks: int) -> int:
    """Returns the exit status that `swift-patch infer` would have."""
    rank = int(os.environ.get('RANK', 0))
    test = Client(address)
    test.send((rank, os.getpid()))

    def ask(what: str, about: Any = None) -> Any:
        """Tells the test what this rank is about to do, and does what it says."""
        test.send((what, about))
        kind, *content = test.recv()
        if kind == 'raise':
            raise content[0]
        if kind == 'alone':
            # The one that hears the others ends when they do.
            for thread in set(threading.enumerate()) - {threading.main_thread()}:
                thread.join()
        return content[0] if content else None

    def answer(task: int) -> Any:
        told = ask('task', task)
        # What cannot be pickled.
        return threading.Lock() if told == 'lock' else f'{task} by {rank}' if told is None else told

    def deliver(task: int, value: str) -> None:
        if value == 'full':
            test.send(('full', None))
            raise ValueError('the disk is full')
        with open(delivered, 'a') as file:
            file.write(json.dumps([task, value]) + '\n')

    def run(ranks: Ranks) -> None:
        number = ranks.from_main(lambda: ask('main'))
        if ranks.size > 1:
            # As ms-swift's arguments do; at the same port.
            distributed.init_process_group('gloo')
            distributed.barrier()
        ask('from_main', number)
        ranks.share(range(num_tasks), lambda task: settled(partial(answer, task)), deliver)

    try:
        with joined() as ranks:
            run(ranks)
    except ToldByMain:
        return 2
    except ValueError as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    except Terminated as e:
        print(f'terminated: {e}', file=sys.stderr)
        return 143
    except RankDied as e:
        print(f'died: {e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    # What the test asks last.
    ask('end', threading.active_count())
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
