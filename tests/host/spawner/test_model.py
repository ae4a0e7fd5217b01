"""A model of the spawner, and the spawner: whatever is asked in whatever order, twice or late, both say the same."""

import contextlib
import itertools
import os
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Values
from hypothesis.stateful import RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from running_spawner import Refusal, eventually, processes_of

MOST = 16  # uids of the pool
_numbers = itertools.count()


def machine_for(spawner):
    """Return the class of machines that drive this very spawner; what one leaves running the next finds gone."""
    bundle = spawner.bundle("waiting", {"app.R": "Sys.sleep(1e6)"})
    brief = spawner.bundle("brief", {"app.R": "quit(status = 3)"})

    class Machine(RuleBasedStateMachine):
        """`running` and `ended` are the model: the ids, with the uid or the reason of the end."""

        workers = Values("workers")
        gone = Values("gone")
        waiting = Values("waiting")

        def __init__(self):
            super().__init__()
            self.clients = [spawner.client() for _ in range(2)]
            self.running = {}
            self.ended = {}
            self.sent = {}  # stops without an answer yet: number → id, of the first client

        def teardown(self):
            self.late_answers_come_for_every_stop()
            for name in list(self.running):
                self.clients[0].call("stop", id=name, grace=0)
            for client in self.clients:
                spawner.clients.remove(client)
                client.close()
            eventually(lambda: not processes_of(spawner.uids), "every process is gone")
            assert spawner.leftovers() == {}

        def refused(self, code, op, **fields):
            with pytest.raises(Refusal) as refusal:
                self.clients[1].call(op, **fields)
            assert refusal.value.code == code

        @precondition(lambda self: len(self.running) < 5)
        @rule(target=workers, which=st.integers(0, 1))
        def spawn(self, which):
            name = f"model{next(_numbers):08}"
            worker = spawner.spawn(self.clients[which], name, bundle)
            assert worker.uid in spawner.uids
            assert worker.uid not in {other.uid for other in self.running.values()}
            self.running[name] = worker
            return name

        @rule(target=gone)
        def spawn_one_that_ends_by_itself(self):
            name = f"model{next(_numbers):08}"
            spawner.spawn(self.clients[0], name, brief)
            result = spawner.result(self.clients[1], name)
            assert (result["reason"], result["status"]) == ("exited", 3)
            self.ended[name] = "exited"
            return name

        @rule(name=workers)
        def spawn_it_again(self, name):
            if name not in self.running and name not in self.ended:  # forgotten with the spawner's last run
                return
            reading, writing = os.pipe2(os.O_CLOEXEC)
            with contextlib.ExitStack() as last:
                last.callback(os.close, reading)
                last.callback(os.close, writing)
                with pytest.raises(Refusal, match="worker_exists"):
                    self.clients[0].call("spawn", (writing,), id=name, kind="app", app="another-app", bundle=bundle)

        @rule(target=gone, name=consumes(workers))
        def stop(self, name):
            if name not in self.running:
                return multiple()
            worker = self.running[name]
            result = self.clients[1].call("stop", id=name, grace=0)["result"]
            assert result["reason"] == "stopped"
            self.is_over(name, worker, "stopped")
            return name

        @rule(name=gone)
        def stop_it_again(self, name):
            if name not in self.ended:
                self.refused("unknown_worker", "stop", id=name)
                return
            assert self.clients[1].call("stop", id=name, grace=0)["result"]["reason"] == self.ended[name]

        @rule(target=waiting, name=workers, times=st.integers(1, 3))
        def ask_for_a_stop_and_do_not_wait(self, name, times):
            if name not in self.running:
                return multiple()
            for _ in range(times):
                self.sent[self.clients[0].send("stop", id=name, grace=0)] = name
            self.late_answers_come_for_every_stop()
            return name

        def late_answers_come_for_every_stop(self):
            while self.sent:
                message, _ = self.clients[0].receive()
                name = self.sent.pop(message["seq"])
                assert message["ok"]["id"] == name
                assert message["ok"]["result"]["reason"] == "stopped"
                if name in self.running:
                    self.is_over(name, self.running[name], "stopped")

        def is_over(self, name, worker, why):
            del self.running[name]
            self.ended[name] = why
            assert not processes_of(range(worker.uid, worker.uid + 1))
            assert not (spawner.runtime_dir / name).exists()

        @rule(op=st.sampled_from(["stop", "list"]))
        def ask_about_one_that_never_was(self, op):
            self.refused("unknown_worker", op, id="neverthere")

        @rule()
        def say_hello_again(self):
            client = spawner.client()
            with pytest.raises(Refusal, match="hello_first"):
                client.call("hello", version=1)
            with pytest.raises(EOFError):
                client.receive()
            spawner.clients.remove(client)
            client.close()

        @rule()
        def ask_before_saying_hello(self):
            client = spawner.client(greet=False)
            with pytest.raises(Refusal, match="hello_first"):
                client.call("list")
            spawner.clients.remove(client)
            client.close()

        @rule(name=workers)
        def send_one_request_twice(self, name):
            if name not in self.running and name not in self.ended:
                return
            for _ in range(2):  # a number that was used before means nothing to the spawner, and it repeats it
                self.clients[1]._seq = itertools.count(7)
                found = self.clients[1].call("list", id=name)
                if "descriptor" in found:
                    os.close(found["descriptor"])
                assert found["workers"][0]["id"] == name

        @rule()
        def restart_the_spawner(self):
            if self.restarted > 1:  # each takes its time
                return
            Machine.restarted += 1
            spawner.end()
            spawner.start()
            self.clients = [spawner.client() for _ in range(2)]
            self.ended.clear()

        restarted = 0  # of all machines together

        @invariant()
        def both_say_the_same(self):
            listed, after = {}, None
            while True:
                page = self.clients[1].call("list", after=after)
                listed |= {worker["id"]: worker for worker in page["workers"]}
                if not page["more"]:
                    break
                after = page["workers"][-1]["id"]
            assert {name for name, worker in listed.items() if not worker["result"]} == {*self.running}
            for name, worker in self.running.items():
                assert (listed[name]["uid"], listed[name]["pid"]) == (worker.uid, worker.pid)
            for name, why in self.ended.items():
                assert listed[name]["result"]["reason"] == why

        @invariant()
        def every_uid_is_in_one_hand(self):
            client = spawner.client(greet=False)
            free = client.hello()["uids_free"]
            spawner.clients.remove(client)
            client.close()
            assert free == MOST - len(self.running)

    return Machine


@pytest.mark.timeout(300)
def test_the_spawner_and_its_model_agree_whatever_is_asked_in_whatever_order(spawner):
    machine = machine_for(spawner)
    began = time.monotonic()
    machine.TestCase.settings = settings(
        max_examples=8, stateful_step_count=15, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase().runTest()
    assert spawner.process.poll() is None, spawner.audit_text()
    print(f"{next(_numbers)} workers in {time.monotonic() - began:.0f} s")
