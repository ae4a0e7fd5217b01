"""A model of visitors, pages, redeploys and crashes: whatever happens in whatever order, no place is given twice."""

import asyncio
import random

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from running_control import Control, until

from blockyard_api.workers.life import State

CAPACITY = {"single": 1, "shared": 3}
MOST = {"single": 3, "shared": 2}
MOST_WORKERS = 4
LINES = f"""
proxy.max_workers = {MOST_WORKERS}
proxy.idle_worker_timeout = '200s'
proxy.session_idle_ttl = '300s'
"""
STEPS = 60


class Places:
    """Drives the gate as the relay does, and checks after each step what must always hold."""

    def __init__(self, control, clock, seed):
        self.control = control
        self.clock = clock
        self.chance = random.Random(seed)
        self.visitors = []  # (app, cookie)
        self.pages = []  # (app, cookie, worker, answer, ends)
        # how often each is to happen, beside the others
        self.actions = {
            self.visit: 6, self.come_back: 5, self.open_page: 5, self.close_page: 4, self.redeploy: 2,
            self.want_warm_places: 1, self.switch_off_and_on: 1, self.crash: 1, self.wait: 3,
        }  # fmt: skip

    async def run(self):
        await self.control.start()
        for name, capacity in CAPACITY.items():
            await self.control.app(name, max_sessions_per_worker=capacity, max_workers_per_app=MOST[name])
        for _ in range(STEPS):
            (action,) = self.chance.choices(list(self.actions), list(self.actions.values()))
            note(action.__name__)
            await action()
            await self.settle()
            self.everything_holds()
        await self.end()

    def some_app(self):
        return self.chance.choice(list(CAPACITY))

    async def settle(self):
        """Let what is under way come to its end, and housekeeping see to room that another app has left."""
        await self.control.quiet()
        for app in self.control.catalog.all():
            self.control.fleet.reconcile(app.id)
        await self.control.quiet()
        draining = [worker for worker in self.control.fleet.all() if worker.state is State.DRAINING]
        assert all(worker.slots for worker in draining)

    async def visit(self):
        name = self.some_app()
        answer = (await self.control.ask(f"/app/{name}/", html=self.chance.random() < 0.3)).end()
        if answer.cookie is not None:
            self.visitors.append((name, answer.cookie))

    async def come_back(self):
        if self.visitors:
            name, cookie = self.chance.choice(self.visitors[-6:])
            (await self.control.ask(f"/app/{name}/", cookie, html=self.chance.random() < 0.5)).end()

    async def open_page(self):
        if self.visitors:
            name, cookie = self.chance.choice(self.visitors[-6:])
            answer = await self.control.ask(f"/app/{name}/websocket/", cookie, websocket=True)
            if answer.forwarded:
                if answer.cookie is not None:  # his session was over
                    self.visitors.append((name, cookie := answer.cookie))
                self.pages.append((name, cookie, self.control.worker_of(answer), answer, answer.open()))

    async def close_page(self):
        if self.pages:
            *_, answer, ends = self.pages.pop(self.chance.randrange(len(self.pages)))
            if not ends:
                answer.end()

    async def redeploy(self):
        await self.control.deploy(self.some_app())

    async def want_warm_places(self):
        await self.control.change(self.some_app(), pre_warmed_sessions=self.chance.randrange(4))

    async def switch_off_and_on(self):
        name = self.some_app()
        app = await self.control.change(name, enabled=False)
        self.control.sessions.drop_where(lambda session: session.app_id == app.id)
        await until(lambda: not self.control.fleet.of(app.id))
        await self.control.change(name, enabled=True)

    async def crash(self):
        if workers := self.control.spawner.running():
            worker = self.control.fleet.find(self.chance.choice(workers).id)
            self.control.spawner.exit(worker.id, number=9)
            await worker.ended.wait()
            self.hang_up()

    async def wait(self):
        await self.clock.advance(self.chance.choice([16, 16, 61, 250]))
        self.control.fleet.end_idle()
        await until(lambda: all(not worker.over.done() for worker in self.control.fleet.all()))
        self.hang_up()

    def hang_up(self):
        """Tell of the pages whose worker is gone, as the relay does."""
        for page in [page for page in self.pages if page[2].state is State.ENDED]:
            self.pages.remove(page)
            if not page[4]:
                page[3].end()

    def everything_holds(self):
        assert self.control.alive
        self.no_worker_holds_more_visitors_than_it_may()
        self.whoever_has_a_page_open_has_his_place()
        self.visitors_with_open_pages_never_exceed_the_places()
        self.every_place_belongs_to_a_session()
        self.there_are_never_more_workers_than_may_be()
        self.warm_places_are_there_where_there_is_room()
        self.the_fleet_knows_exactly_the_workers_that_run()

    def no_worker_holds_more_visitors_than_it_may(self):
        for worker in self.control.fleet.all():
            name = self.control.catalog.with_id(worker.app_id).name
            assert len(worker.slots) <= CAPACITY[name]

    def whoever_has_a_page_open_has_his_place(self):
        for _, _, worker, answer, ends in self.pages:
            if not ends and worker.state is not State.ENDED:
                assert answer.tracker._session.key in worker.slots

    def visitors_with_open_pages_never_exceed_the_places(self):
        for worker in self.control.fleet.all():
            visitors = {cookie for _, cookie, served_by, _, ends in self.pages if served_by is worker and not ends}
            assert len(visitors) <= worker.capacity

    def every_place_belongs_to_a_session(self):
        for worker in self.control.fleet.all():
            assert len(self.control.sessions.of(worker)) == len(worker.slots)

    def there_are_never_more_workers_than_may_be(self):
        assert self.control.spawner.most_running <= MOST_WORKERS
        for name, most in MOST.items():
            app = self.control.catalog.named(name)
            serving = [worker for worker in self.control.fleet.of(app.id) if worker.bundle_id == app.active_bundle]
            assert len(serving) <= most

    def warm_places_are_there_where_there_is_room(self):
        for name, most in MOST.items():
            app = self.control.catalog.named(name)
            current = [worker for worker in self.control.fleet.of(app.id) if worker.bundle_id == app.active_bundle]
            free = sum(worker.capacity - len(worker.slots) for worker in current)
            full = len(current) >= most or self.control.fleet.count >= MOST_WORKERS
            assert full or free >= app.pre_warmed_sessions or self.control.fleet.setback(app)

    def the_fleet_knows_exactly_the_workers_that_run(self):
        running = {worker.id for worker in self.control.spawner.running()}
        assert running == {worker.id for worker in self.control.fleet.all()}

    async def end(self):
        for *_, answer, ends in self.pages:
            if not ends:
                answer.end()
        for name in CAPACITY:
            await self.control.change(name, pre_warmed_sessions=0)
        await self.clock.advance(100)
        assert not [worker for worker in self.control.fleet.all() if worker.slots], "a place was never freed"
        await self.clock.advance(300)
        self.control.fleet.end_idle()
        await until(lambda: not self.control.fleet.all(), "the end of the last worker")
        assert not self.control.spawner.running()


@pytest.mark.timeout(300)
def test_whatever_happens_in_whatever_order_places_are_given_once_and_freed_once(template, clock):
    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def story(seed):
        async def whole():
            control = Control(template, LINES)
            try:
                await Places(control, clock, seed).run()
            finally:
                await control.close()

        asyncio.run(whole())

    story()
