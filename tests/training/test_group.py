"""What is said of groups of workers that fail, hang, leave and come back, and when a run gives up."""

import threading
import time

import pytest

from pipeline.training import group
from pipeline.training.group import Hub

DIED = """The actor died unexpectedly before finishing this task.
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called
ActorDiedError: The actor died unexpectedly before finishing this task."""
ON_NODE = "The actor died because its node has died. Node Id: 3f\nActorDiedError: The actor died"
PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:554] Connection closed by peer [10.0.0.2]:4711"
STUCK = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation"
KILLED = "worker 1 (process 71 on host) was killed, by someone or by its machine's kernel for want of memory"
STATUS = {"seen": 0, "planned": 1000, "messages": []}


def trained(hub: Hub, workers: int, images: int, to: int) -> None:
    """A group that begins at `images` and gets as far as `to`."""
    hub.starting()
    for rank in range(workers):
        hub.hear(rank, f"worker {rank} (process {70 + rank} on host)", "worker.py:9 agree")
    hub.began(workers, images, images)
    hub.beat({**STATUS, "seen": to})


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        ({0: PEER, 1: DIED}, KILLED),
        ({0: PEER, 1: ON_NODE}, "worker 1 (process 71 on host) was lost with its machine"),
        ({0: PEER}, "worker 1 (process 71 on host) is gone: worker 0 (process 70 on host) lost its connection to it"),
        ({0: PEER, 1: PEER}, "a worker is gone: worker 0 (process 70 on host) lost its connection to it"),
        ({1: "x\nRuntimeError: DefaultCPUAllocator: can't allocate memory: you tried 12 bytes"},
         "worker 1 (process 71 on host) ran out of memory (RuntimeError: DefaultCPUAllocator"),
        ({1: "Traceback\nKeyError: 'x'"}, "worker 1 (process 71 on host) failed: KeyError: 'x'"),
    ],
)  # fmt: skip
def test_the_worker_to_blame_is_named(errors, sentence):
    hub = Hub(600)
    trained(hub, 2, 0, 40)
    assert hub.explain(errors).startswith(sentence)


def test_a_timeout_names_the_silent_worker_else_where_each_one_is():
    hub = Hub(600)
    trained(hub, 2, 0, 40)
    said = hub.explain({0: STUCK})
    assert "worker 0 (process 70 on host) waited 10 minutes (--timeout) for the others" in said
    assert "worker 1 (process 71 on host) in worker.py:9 agree" in said
    hub._workers[1].at = time.monotonic() - 599
    assert hub.explain({0: STUCK}) == (
        "the workers waited 10 minutes (--timeout) for one another: worker 1 (process 71 on host) has given no sign of "
        "life for 599 s"
    )


def test_what_is_lost_and_how_long_it_took_is_told():
    hub = Hub(600)
    trained(hub, 2, 0, 960)
    hub.fault({0: PEER, 1: DIED})
    hub.fault({0: PEER, 1: DIED})  # Ray polls a failed group more than once
    hub._moved -= 7
    hub.starting()
    hub.began(1, 800, 976)
    assert hub.news().messages == [
        f"{KILLED}; training goes back to the newest checkpoint",
        "1 worker goes on from 800 images after 7.0 s; 176 images are trained again",
    ]


def test_a_group_leaves_when_asked_and_loses_nothing():
    hub = Hub(600)
    assert not hub.leave("resize", "there is room for 2 workers")  # none trains yet
    trained(hub, 1, 0, 400)
    assert hub.leave("resize", "there is room for 2 workers")
    assert hub.beat({**STATUS, "seen": 408}) == "resize"
    assert not hub.has_left()
    hub.left()
    assert hub.has_left()
    hub.fault({0: "Left: resize"})  # how rank 0 ends
    hub.starting()
    assert hub.beat({**STATUS, "seen": 408}) == ""
    hub.began(2, 408, 408)
    messages = hub.news().messages
    assert messages[0] == "there is room for 2 workers"
    assert "2 workers go on from 408 images after " in messages[1]
    assert messages[1].endswith("; nothing is lost")


def test_a_wish_to_stop_outlives_a_group():
    hub = Hub(600)
    trained(hub, 2, 0, 400)
    hub.stop()
    hub.fault({1: DIED})
    hub.starting()
    assert hub.beat({**STATUS, "seen": 0}) == "stop"


def test_failures_in_a_row_from_one_checkpoint_end_the_run_and_progress_forgives_them():
    hub = Hub(600)
    for checkpoint in (0, 100, 200, 300, 400, 500):  # each group gets further, however often one fails
        trained(hub, 2, checkpoint, checkpoint + 150)
        hub.fault({1: DIED})
    assert not hub.news().gave_up
    for _ in range(group.RETRIES):
        assert not hub.news().gave_up
        trained(hub, 2, 500, 550)
        hub.fault({1: DIED})
    assert hub.news().gave_up == (f"{KILLED}; 4 times in a row none got beyond the checkpoint at 500 images")


def test_groups_that_fail_before_their_first_step_end_the_run_too():
    hub = Hub(600)
    for _ in range(group.RETRIES + 1):
        hub.starting()
        assert not hub.news().gave_up
        hub.fault({0: "Traceback\nKeyError: 'x'"})
    assert hub.news().gave_up == "worker 0 failed: KeyError: 'x'; 4 times in a row none got beyond the beginning"


def test_what_a_thread_is_doing_is_a_line_of_ours():
    assert group.doing(threading.get_ident()).startswith("group.py:")
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert group.doing(thread.ident) == "no line of ours"
    done.set()
    thread.join()


def test_a_group_whose_machines_are_taken_leaves_once_and_no_other_follows():
    hub = Hub(600)
    trained(hub, 2, 0, 40)
    assert hub.leave("taken", "the machine of worker 1 will be taken away")
    assert not hub.leave("resize", "there is room for more")
    assert hub.beat({**STATUS, "seen": 48}) == "taken"
    hub.starting()
    assert hub.leaving == "taken"
    late = Hub(600)
    trained(late, 2, 0, 40)
    late.leave("taken")
    late.fault({0: PEER, 1: ON_NODE})
    assert late.gave_up == "worker 1 (process 71 on host) was lost with its machine before it had left a checkpoint"
