"""The fleet against a spawner that speaks the real protocol and misbehaves: starts, ends, adoption, how many."""

import asyncio
import contextlib
import errno
import os
import sqlite3

import pytest
from running_control import until

from blockyard_api.errors import Unavailable
from blockyard_api.workers.life import State
from blockyard_spawner import protocol


async def ended(control, spawned):
    worker = control.fleet.find(spawned.id)
    if worker is not None:
        await worker.ended.wait()
    return worker


async def refused(control, path="/app/plain/", **more):
    answer = await control.ask(path, **more)
    assert not answer.forwarded
    assert answer.status in (502, 503), answer.text
    assert control.alive
    return answer


async def why_refused(control, name="plain"):
    """Be refused, and return what the app's owner is told."""
    await refused(control, f"/app/{name}/")
    return control.fleet.setback(control.catalog.named(name))


# --- a spawner that misbehaves ---------------------------------------------------------------------------------------


def without(*names):
    def rewrite(message):
        return {**message, "ok": {key: value for key, value in message["ok"].items() if key not in names}}

    return rewrite


WRONG = {
    "no uid": without("uid"),
    "a uid that is no number": lambda message: {**message, "ok": {**message["ok"], "uid": [1]}},
    "no map": lambda message: {**message, "ok": 3},
    "neither answer nor error": lambda message: {"seq": message["seq"]},
    "an error that is none": lambda message: {"seq": message["seq"], "error": None},
    "no number": lambda message: {"ok": message["ok"]},
    "a number that is a list": lambda message: {**message, "seq": [1]},
    "no map at all": lambda _: protocol.reply()[:0] + b"\x93\x01\x02\x03",
    "no msgpack": lambda _: b"\xc1\xc1",
}


@pytest.mark.parametrize("reply", WRONG.values(), ids=WRONG)
async def test_a_wrong_reply_to_a_spawn_costs_that_start_and_nothing_else(control, clock, reply):
    await control.app()
    control.spawner.rewrite["spawn"] = reply
    assert "start" in (await refused(control)).text
    control.spawner.rewrite.clear()
    await control.fleet.sweep()
    assert not control.spawner.running()  # what was started all the same is ended
    await clock.advance(5)
    assert await control.visit()


@pytest.mark.parametrize("reply", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("operation", ["hello", "list", "stop"])
async def test_a_wrong_reply_to_anything_else_does_not_end_the_daemon(control, clock, operation, reply):
    await control.app()
    await control.visit()
    control.spawner.rewrite[operation] = reply
    control.spawner.stop()
    control.spawner.start()
    await clock.advance(400)
    control.fleet.end_idle()
    for _ in range(1000):  # it is asked again and again
        if not control.fleet.all():
            break
        await clock.advance(0.5)
        await asyncio.sleep(0.002)
    assert not control.fleet.all()
    assert control.alive
    control.spawner.rewrite.clear()
    await control.fleet.sweep()
    assert not control.spawner.running()


async def test_a_spawner_that_hangs_up_in_the_middle_of_a_spawn_is_told_and_forgiven(control, clock):
    await control.app()
    control.spawner.hang_up.add("spawn")
    assert "spawner" in await why_refused(control)
    control.spawner.hang_up.clear()
    await clock.advance(5)
    assert await control.visit()


async def test_a_spawner_that_never_answers_is_given_up_and_its_late_worker_ended(control, clock):
    await control.app()
    control.spawner.hold.add("spawn")
    asking = asyncio.create_task(control.ask("/app/plain/"))
    await until(lambda: control.spawner.held)
    await clock.advance(16)
    assert (await asking).status == 503
    control.spawner.hold.clear()
    control.spawner.release()  # with a descriptor that nobody waits for
    await control.fleet.sweep()
    assert not control.spawner.running()


async def test_a_reply_that_comes_as_its_caller_gives_up_leaves_no_descriptor_open(control):
    request = protocol.Spawn(0, "a" * 32, "app", "plain", bundle="b" * 32)
    control.spawner.hold.add("spawn")
    asking = asyncio.create_task(control.services.spawner.spawn(request, 2))
    await until(lambda: control.spawner.held)
    control.spawner.release()
    control.services.spawner._connection.read()  # the reply is there, and its caller not awake yet
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_a_spawner_that_is_gone_is_told_at_once_and_found_again(control, clock):
    await control.app()
    visitor = await control.visit()
    control.spawner.stop()
    assert "spawner" in await why_refused(control)
    assert (await control.ask("/app/plain/", visitor.cookie)).end().forwarded
    control.spawner.start()
    await clock.advance(5)
    assert await control.visit()


async def test_a_refusal_is_told_in_the_spawners_words_and_leaves_no_worker(control):
    await control.app()
    control.spawner.refuse = ("no_free_uid", "All uids are in use.")
    assert "All uids are in use." in await why_refused(control)
    assert not control.fleet.all()


async def test_a_visitor_is_told_of_an_end_once_it_is_written_down_for_the_owner(control):
    await control.app()
    control.spawner.refuse = ("no_free_uid", "All uids are in use.")
    database = control.state / "blockyard.db"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as other:
        # in a thread: the daemon, which may be writing itself, ends that in this loop. Nobody else can write until
        await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
        asyncio.get_running_loop().call_later(0.3, other.execute, "ROLLBACK")
        await refused(control)
        assert other.execute("SELECT status FROM workers").fetchall() == [("ended",)]


async def test_a_daemon_that_lost_its_spawner_still_ends_cleanly(start):
    control = await start()
    await control.app()
    await control.visit()
    control.spawner.stop()
    await until(lambda: control.services.spawner._connection.closed)
    await control.stop_daemon()
    control.spawner.start()
    await control.start_daemon()
    assert len(control.fleet.all()) == 1


# --- starts and ends -------------------------------------------------------------------------------------------------


async def test_a_failing_app_is_started_ever_more_seldom(control, clock):
    await control.app()
    control.spawner.serves = False
    for _ in range(5):
        asking = asyncio.create_task(control.ask("/app/plain/"))
        (spawned,) = await until(control.spawner.running)
        await until(lambda: control.fleet.all()[0].socket is not None)
        control.spawner.exit(spawned.id, 1)
        assert "exited with status 1" in (await asking).text
        for _ in range(20):
            await refused(control)
        await clock.advance(61)
    assert len(control.spawner.workers) == 5


async def test_a_worker_that_does_not_answer_in_time_is_stopped_and_told_as_that(start, clock):
    control = await start("proxy.worker_start_timeout = '20s'")
    await control.app()
    control.spawner.serves = False
    asking = asyncio.create_task(control.ask("/app/plain/"))
    (spawned,) = await until(control.spawner.running)
    await until(lambda: control.fleet.all()[0].socket is not None)
    await asyncio.sleep(0.05)
    await clock.advance(21)
    assert "did not answer within 20 s" in (await asking).text
    assert "stop" in spawned.told


@pytest.mark.parametrize("answered", [True, False], ids=["its worker does not answer", "its spawn is not answered"])
async def test_an_app_that_is_stuck_in_its_start_keeps_no_other_app_waiting(control, answered):
    for name in ("stuck", "plain"):
        await control.app(name, max_sessions_per_worker=1)
    control.spawner.serves = False
    control.spawner.hold |= set() if answered else {"spawn"}
    stuck = asyncio.create_task(control.ask("/app/stuck/"))
    (spawned,) = await until(control.spawner.running)
    if answered:
        await until(lambda: control.fleet.all()[0].socket is not None)
    control.spawner.serves = True
    control.spawner.hold.clear()
    for _ in range(3):  # each a worker more
        assert await control.visit("plain")
    await control.change("plain", pre_warmed_sessions=1)
    await until(lambda: [worker.state for worker in control.fleet.all()].count(State.ACTIVE) == 4, "a warm worker")
    assert control.fleet.find(spawned.id).state is State.STARTING
    assert not stuck.done()
    control.spawner.release()
    await control.spawner.serve(spawned.id)
    assert (await stuck).end().forwarded


async def test_an_answer_that_is_not_http_is_no_readiness(start, clock):
    control = await start("proxy.worker_start_timeout = '20s'")
    await control.app()
    control.spawner.answer = b"SSH-2.0-OpenSSH_9.2\r\n"
    asking = asyncio.create_task(control.ask("/app/plain/"))
    await until(control.spawner.running)
    await asyncio.sleep(0.1)
    await clock.advance(21)
    assert "did not answer" in (await asking).text


async def test_a_worker_of_another_uid_at_the_socket_is_ended_as_an_impostor(control):
    await control.app()
    control.spawner.uid += 1
    assert "impostor" in await why_refused(control)
    assert not control.spawner.running()


async def test_a_limit_that_no_message_can_hold_is_refused_when_it_is_set(control):
    await control.app()
    with pytest.raises(Exception, match="below 1024t"):
        await control.change("plain", memory_limit="999999999999t")
    await control.change("plain", memory_limit="1023t")
    assert await control.visit()


async def test_a_memory_kill_is_told_with_the_limit_that_was_hit(control):
    await control.app(memory_limit="512m")
    served = await control.visit()
    worker = control.worker_of(served)
    control.spawner.exit(worker.id, 137, oom_kills=1)
    await worker.ended.wait()
    assert worker.end_reason == "used more than 512 MB of memory"


async def test_a_status_that_is_no_signal_is_told_as_the_app_gave_it(control):
    await control.app()
    worker = control.worker_of(await control.visit())
    control.spawner.exit(worker.id, 255)
    await worker.ended.wait()
    assert worker.end_reason == "exited with status 255"


async def test_a_log_that_cannot_be_written_does_not_end_the_worker(control):
    await control.app()
    control.spawner.serves = False
    control.spawner.words = b"first words\n"
    directory = control.state / "logs"
    directory.rmdir()
    directory.write_text("not a directory")
    asking = asyncio.create_task(control.ask("/app/plain/"))
    (spawned,) = await until(control.spawner.running)
    await control.spawner.serve(spawned.id)
    assert (await asking).end().forwarded
    assert control.alive


# --- how many --------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_full_says_so_and_makes_room_of_what_nobody_uses(start, clock):
    control = await start("proxy.max_workers = 2\nproxy.idle_worker_timeout = '1h'")
    await control.app("crowd")
    await control.app("late")
    for _ in range(2):
        await control.visit("crowd")
    assert "as many workers" in (await refused(control, "/app/late/")).text
    assert len(control.fleet.all()) == 2  # both are held
    await clock.advance(20)  # their pages never opened a WebSocket
    assert "as many workers" in (await refused(control, "/app/late/")).text
    await until(lambda: len(control.fleet.all()) == 1, "room")
    assert await control.visit("late")
    assert control.spawner.most_running == 2


async def test_a_warm_worker_is_not_taken_for_room(start, clock):
    control = await start("proxy.max_workers = 1")
    await control.app("warm", pre_warmed_sessions=1)
    await control.app("late")
    await control.quiet()
    for _ in range(3):
        await refused(control, "/app/late/")
    await clock.advance(1000)
    assert [worker.request.app for worker in control.spawner.workers.values()] == ["warm"]


async def test_workers_of_an_app_are_no_more_than_its_setting_and_warm_ones_count(control):
    await control.app(max_workers_per_app=2, pre_warmed_sessions=5)
    await control.quiet()
    assert len(control.spawner.running()) == 2
    assert [(await control.ask("/app/plain/")).end().forwarded for _ in range(3)] == [True, True, False]
    assert len(control.spawner.workers) == 2


async def test_lowering_what_a_worker_may_hold_starts_no_others_in_the_place_of_what_it_holds(control):
    await control.app(max_sessions_per_worker=4, pre_warmed_sessions=1)
    for _ in range(4):
        await control.visit()
    await control.quiet()
    before = len(control.spawner.running())
    await control.change("plain", max_sessions_per_worker=1)
    await control.quiet()
    assert len(control.spawner.running()) == before


async def test_an_idle_worker_ends_and_the_warm_ones_an_app_wants_stay(start, clock):
    control = await start("proxy.idle_worker_timeout = '100s'")
    await control.app(pre_warmed_sessions=1)
    for _ in range(3):
        await control.visit()
    await control.quiet()
    assert len(control.spawner.running()) == 4
    await clock.advance(120)
    control.fleet.end_idle()
    await until(lambda: len(control.spawner.running()) == 1, "the end of the idle ones")
    (warm,) = control.spawner.running()
    await clock.advance(1000)
    control.fleet.end_idle()
    await control.quiet()
    assert control.spawner.running() == [warm]


# --- the next run of this daemon -------------------------------------------------------------------------------------


async def test_a_visitor_finds_his_worker_again_and_nobody_else_is_given_it(control):
    await control.app()
    mine = await control.visit()
    _, _ = await control.socket("plain", mine.cookie)
    worker = control.worker_of(mine).id
    await control.stop_daemon()
    control.spawner.hold.add("list")
    await control.start_daemon(adopted=False)
    other = asyncio.create_task(control.ask("/app/plain/"))
    back = asyncio.create_task(control.ask("/app/plain/", mine.cookie))
    await until(lambda: control.spawner.held)
    assert not other.done()
    control.spawner.hold.clear()
    control.spawner.release()
    again, stranger = (await back).end(), (await other).end()
    assert control.worker_of(again).id == worker
    assert again.cookie is None
    assert control.worker_of(stranger).id != worker


async def test_an_adoption_that_fails_half_way_is_done_again_without_anything_twice(control, clock):
    await control.app()
    cookies = [(await control.visit()).cookie for _ in range(3)]
    await control.stop_daemon()
    asked = 0

    def fail_the_second(message):
        nonlocal asked
        asked += 1
        return b"\xc1" if asked == 3 else message  # after the list of all, and one worker

    control.spawner.rewrite["list"] = fail_the_second
    await control.start_daemon(adopted=False)
    await until(lambda: asked >= 3)
    assert not control.fleet.adopted.is_set()
    await clock.advance(1)
    await until(control.fleet.adopted.is_set, "adoption")
    assert len(control.fleet.all()) == len({worker.id for worker in control.fleet.all()}) == 3
    assert len(control.fleet.lives()) == 3
    for cookie in cookies:
        assert (await control.ask("/app/plain/", cookie)).end().forwarded
    assert len(control.spawner.workers) == 3


async def test_a_worker_that_ends_while_it_is_being_adopted_is_told_as_ended(control):
    await control.app()
    worker = control.worker_of(await control.visit()).id
    await control.stop_daemon()
    control.spawner.hold.add("list")
    await control.start_daemon(adopted=False)
    await until(lambda: control.spawner.held)
    control.spawner.exit(worker, 0)
    control.spawner.hold.clear()
    control.spawner.release()
    await until(control.fleet.adopted.is_set)
    assert not control.fleet.all()
    with sqlite3.connect(control.state / "blockyard.db") as database:
        assert database.execute("SELECT status FROM workers").fetchall() == [("ended",)]


async def test_a_daemon_that_ends_before_it_found_its_spawner_forgets_nobody(control):
    await control.app()
    cookie = (await control.visit()).cookie
    await control.stop_daemon()
    control.spawner.stop()
    await control.start_daemon(adopted=False)
    await control.stop_daemon()
    control.spawner.start()
    await control.start_daemon()
    answer = (await control.ask("/app/plain/", cookie)).end()
    assert answer.cookie is None
    assert len(control.spawner.workers) == 1


async def test_an_orphan_that_takes_its_time_does_not_cost_others_their_sessions(control):
    await control.app()
    cookies = [(await control.visit()).cookie for _ in range(2)]
    await control.stop_daemon()
    with sqlite3.connect(control.state / "blockyard.db") as database:
        database.execute("DELETE FROM workers WHERE id = (SELECT worker_id FROM sessions ORDER BY rowid LIMIT 1)")
    control.spawner.hold.add("stop")
    await control.start_daemon()
    await until(lambda: control.spawner.held, "the orphan's stop")
    await control.sessions.save()
    assert (await control.ask("/app/plain/", cookies[1])).end().cookie is None
    control.spawner.hold.clear()
    control.spawner.release()


async def test_while_the_daemon_stops_no_worker_is_started(control):
    await control.app(pre_warmed_sessions=0)
    control.fleet.detach()
    assert "stopping" in (await refused(control)).text
    await control.change("plain", pre_warmed_sessions=2)
    assert not control.spawner.workers


async def test_placing_before_the_adoption_is_an_error_with_a_sentence(control):
    made = await control.app()
    control.fleet.adopted.clear()
    with pytest.raises(Unavailable, match="only just starting"):
        control.fleet.place(made, "key", "192.0.2.1")
    control.fleet.adopted.set()


async def test_every_state_a_worker_was_left_in_can_be_taken_over(control):
    await control.app()
    worker = control.worker_of(await control.visit()).id
    for state in ("starting", "draining", "active", "stopping", "nonsense"):
        await control.stop_daemon()
        with sqlite3.connect(control.state / "blockyard.db") as database:
            database.execute("UPDATE workers SET status = ?", (state,))
        await control.start_daemon()
        adopted = control.fleet.find(worker)
        await until(lambda adopted=adopted: adopted.state in (State.ACTIVE, State.DRAINING), state)


async def test_a_worker_is_not_idle_while_a_visitor_sends_or_receives_for_longer_than_the_time_for_it(start, clock):
    control = await start("proxy.idle_worker_timeout = '100s'")
    await control.app()
    visitor = await control.visit()
    upload = await control.ask("/app/plain/session/x/upload/1", visitor.cookie, method=b"POST")
    worker = control.worker_of(upload)
    await clock.advance(101)
    control.fleet.end_idle()
    assert not worker.over.done()
    upload.end()
    control.fleet.end_idle()  # it has just been used
    assert not worker.over.done()
    await clock.advance(101)
    control.fleet.end_idle()
    assert worker.over.result() == "idle"


async def test_an_open_websocket_alone_does_not_keep_a_worker(start, clock):
    control = await start("proxy.idle_worker_timeout = '100s'")
    await control.app()
    visitor = await control.visit()
    socket_, _ = await control.socket("plain", visitor.cookie)
    worker = control.worker_of(socket_)
    await clock.advance(101)
    control.fleet.end_idle()
    assert worker.over.result() == "idle"
    await worker.ended.wait()


async def test_what_a_foreign_page_fetches_does_not_keep_a_worker(start, clock):
    control = await start("proxy.idle_worker_timeout = '100s'")
    await control.app()
    worker = control.worker_of(await control.visit())
    await clock.advance(60)
    stray = await control.ask("/app/plain/logo.png", sec_fetch_dest=b"image")
    assert stray.end().forwarded
    await clock.advance(41)
    control.fleet.end_idle()
    assert worker.over.result() == "idle"
    await worker.ended.wait()


# --- a host that has its own troubles --------------------------------------------------------------------------------


def out_of_descriptors(*_args, **_kwargs):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def test_a_host_without_a_descriptor_for_a_workers_limits_serves_all_the_same(control, monkeypatch):
    monkeypatch.setattr("blockyard_api.host.accounting.select.epoll", out_of_descriptors)
    control.spawner.rewrite["spawn"] = lambda message: message | {"ok": message["ok"] | {"cgroup": "/b/nonexistent"}}
    await control.app()
    worker = control.worker_of(await control.visit())
    assert worker.cgroup_dir.name == "nonexistent"
    assert control.alive


async def test_a_host_without_a_descriptor_for_the_spawner_ends_nothing_but_the_request(control, monkeypatch):
    await control.app()
    await control.visit()
    control.services.spawner._connection.fail("truncated")  # what a descriptor that does not fit comes to
    with monkeypatch.context() as context:
        context.setattr("blockyard_api.backends.spawner.socket.socket", out_of_descriptors)
        control.fleet.all()[0].end("idle")
        await asyncio.sleep(0.2)
        assert control.alive
    await until(lambda: not control.spawner.running(), "the worker's end")


async def test_housekeeping_on_a_disk_that_fails_is_put_off(start, monkeypatch):
    met = asyncio.Event()

    def read_only(*_args):
        met.set()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("blockyard_api.workers.log._prune", read_only)
    control = await start('proxy.health_interval = "50ms"')
    await asyncio.sleep(0.3)
    assert met.is_set()
    assert control.alive


async def test_the_logs_of_an_apps_ended_workers_are_bounded_all_together(control, monkeypatch):
    monkeypatch.setattr("blockyard_api.workers.fleet._LOGS_KEPT", 100_000)
    await control.app()
    made = []
    for _ in range(4):
        worker = control.worker_of(await control.visit())
        made.append(control.state / "logs" / f"{worker.id}.log")
        made[-1].write_bytes(b"x" * 45_000)
        worker.end("idle")
        await worker.ended.wait()
        await asyncio.sleep(0.01)  # their ends have an order
    assert [path.exists() for path in made] == [False, False, True, True]


async def test_what_is_known_to_others_is_asked_once_the_spawner_has_answered(control):
    await control.app()
    await control.visit()
    (spawned,) = control.spawner.running()
    known = control.fleet._workers.pop(spawned.id)
    begun = set()
    control.spawner.rewrite["list"] = lambda message: begun.add(spawned.id) or message
    await control.fleet.sweep(lambda: begun)
    assert control.spawner.running() == [spawned]
    control.fleet._workers[spawned.id] = known
